"""What is no model says in one sentence what it is and what to do. The commands in the sentences were run by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import custom_code, read_config
from fastgpt2.engine.model.diagnosis import explain_adapter, explain_folder, explain_names
from fastgpt2.engine.model.hub import find_model
from fastgpt2.errors import CheckpointError, ConfigError

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
INDEX = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
TOKENIZER = {"tokenizer.json": "{}"}


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Write files of bytes, of text, or of JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def explain(tmp_path: Path) -> Callable[..., str]:
    """Return a function that gives the sentence for a folder of these files, less the folder's name."""

    def explained(files: dict[str, Any]) -> str:
        sentence = explain_folder(write(tmp_path, files))
        assert sentence.startswith(f"{tmp_path}: ")
        assert "\n" not in sentence
        return sentence.replace(str(tmp_path), "F").removeprefix("F: ")

    return explained


class TestAdapters:
    def adapter(self, **fields: Any) -> dict[str, Any]:
        config = {"base_model_name_or_path": "gpt2", "peft_type": "LORA", "task_type": "CAUSAL_LM", **fields}
        return {"adapter_config.json": config, "adapter_model.safetensors": b"x"}

    def test_the_command_that_merges(self, explain: Callable[..., str]) -> None:
        assert explain(self.adapter()) == (
            "is a PEFT adapter of gpt2, and no model itself. Merge the two (pip install torch transformers peft) by "
            '`python -c \'from peft import AutoPeftModelForCausalLM as M; M.from_pretrained("F").merge_and_unload()'
            '.save_pretrained("merged")\'`, and name the folder merged with --tokenizer gpt2'
        )

    def test_its_own_tokenizer_goes_first(self, explain: Callable[..., str]) -> None:
        assert explain({**self.adapter(), **TOKENIZER}).endswith("name the folder merged with --tokenizer F")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"base_model_name_or_path": None}, "of a model that it does not name, and no model itself. Merge"),
            ({"base_model_name_or_path": ["x"], "peft_type": {}, "task_type": 7}, "of a model that it does not name"),
            ({"peft_type": "PROMPT_TUNING"}, r"no weights \(PROMPT_TUNING\), so that it cannot be merged"),
            ({"task_type": "SEQ_CLS"}, "for the task SEQ_CLS, which writes no text"),
        ],
    )
    def test_other_adapters(self, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
        write(tmp_path, self.adapter(**fields))
        assert re.search(message, explain_adapter(tmp_path))

    def test_names_that_a_terminal_would_obey(self, explain: Callable[..., str]) -> None:
        sentence = explain(self.adapter(base_model_name_or_path="gpt2\n\x1b[2J"))
        assert sentence.isprintable()
        assert explain({"model\x1b[2J.gguf": b"x"}).isprintable()

    def test_beside_a_model(self, tmp_path: Path) -> None:
        """transformers would load the base model and the adapter, so that the text would be another."""
        write(tmp_path, {**self.adapter(), "config.json": GPT2, "model.safetensors": b"x"})
        with pytest.raises(ConfigError, match=r"If adapter_config\.json is left over from before a merge, remove it$"):
            find_model(str(tmp_path))


class TestConfigurations:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": None}, r'there is no model_type. If the model is a GPT-2, add "model_type": "gpt2" to'),
            (
                {"model_type": "gpt_bigcode"},
                r"model_type is \S+gpt_bigcode\S+, a GPT-2 with multi-query attention; fast",
            ),
            ({"model_type": "llama"}, r"model_type is \S+llama\S+; fastgpt2 runs GPT-2 models"),
            ({"model_type": ["gpt2"]}, "model_type is "),
            ({"architectures": ["GPT2ForTokenClassification"]}, "writes none; name a causal GPT-2. To have"),
            ({"architectures": ["GPT2ForQuestionAnswering"]}, "the model judges text and writes none"),
            ({"architectures": ["GPT2RewardModel"]}, r'set architectures to \["GPT2LMHeadModel"\] in this file'),
            ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\). Name the model that it was made"),
            ({"quantization_config": {"load_in_8bit": True}}, r"quantised \(quantization_config\). Name the model"),
            ({"is_encoder_decoder": True}, "is_encoder_decoder is true: the model needs an input of its own"),
            ({"attention_head_type": "multiquery"}, "attention_head_type is 'multiquery', which a GPT-2 does not have"),
        ],
    )
    def test_what_is_no_causal_gpt2(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        write(tmp_path, {"config.json": {**GPT2, **changes}})
        with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
            read_config(tmp_path)
        assert "config.json: " in explain_folder(tmp_path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"architectures": None},
            {"architectures": ["GPT2Model"]},
            {"architectures": ["GPT2DoubleHeadsModel"]},
            {"architectures": ["GPT2HeadWithValueModel"]},
            {"architectures": [7, {}]},
            {"add_cross_attention": True, "is_decoder": True},
            {"pruned_heads": {"0": [1]}},
            {"quantization_config": None},
            {"attention_head_type": "multihead"},
        ],
    )
    def test_what_transformers_writes_text_with(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        write(tmp_path, {"config.json": {**GPT2, **changes}})
        assert read_config(tmp_path).n_layer == 12

    def test_code_of_its_own(self, tmp_path: Path) -> None:
        assert custom_code(tmp_path) is None
        without: tuple[Any, ...] = (None, [], {"AutoConfig": "c.C"})
        for auto_map in without:
            assert custom_code(write(tmp_path, {"config.json": {**GPT2, "auto_map": auto_map}})) is None
        write(tmp_path, {"config.json": {**GPT2, "auto_map": {"AutoModelForCausalLM": "modeling.M"}}})
        assert 'for the model, "modeling.M". It is not run' in (custom_code(tmp_path) or "")


class TestDownloads:
    def test_a_pointer_of_git_lfs(self, tmp_path: Path) -> None:
        write(tmp_path, {"config.json": GPT2, "model.safetensors": POINTER})
        message = rf"model\.safetensors: is a Git LFS pointer.*run `git lfs pull` in {tmp_path}, or download"
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path)
        write(tmp_path, {"config.json": POINTER})
        with pytest.raises(ConfigError, match=r"config\.json: is a Git LFS pointer"):
            read_config(tmp_path)
        assert explain_folder(tmp_path).startswith(f"{tmp_path / 'config.json'}: is a Git LFS pointer")

    def test_a_pointer_among_other_files(self, tmp_path: Path) -> None:
        write(tmp_path, {"config.json": GPT2, "tf_model.h5": POINTER})
        assert explain_folder(tmp_path).startswith(f"{tmp_path / 'tf_model.h5'}: is a Git LFS pointer")

    def test_a_shard_is_missing(self, explain: Callable[..., str]) -> None:
        files = {"config.json": GPT2, "model.safetensors.index.json": INDEX, **TOKENIZER}
        shard = {"model-00001-of-00002.safetensors": b"x"}
        sentence = "the download is not complete: model-00002-of-00002.safetensors of model.safetensors.index.json"
        assert explain({**files, **shard}).startswith(sentence)

    @pytest.mark.parametrize("index", [[], {}, {"weight_map": 7}, {"weight_map": {"a": 7}}, "no JSON"])
    def test_a_spoiled_index(self, explain: Callable[..., str], index: Any) -> None:
        assert explain({"config.json": GPT2, "pytorch_model.bin.index.json": index})

    def test_shards_without_an_index(self, explain: Callable[..., str]) -> None:
        assert explain({"config.json": GPT2, "pytorch_model-00001-of-00003.bin": b"x"}).startswith(
            "holds 1 of 3 shards, and no pytorch_model.bin.index.json, which says what is in them; fetch it again"
        )

    @pytest.mark.parametrize(
        "name", [".cache/huggingface/download/abc.incomplete", "model.safetensors.part", "model.safetensors.aria2"]
    )
    def test_it_was_cut_off(self, explain: Callable[..., str], name: str) -> None:
        sentence = explain({"config.json": GPT2, name: b"x"})
        assert sentence == f"the download is not complete: there is {name}; run it again"

    def test_nothing_at_all(self, explain: Callable[..., str]) -> None:
        assert explain({}) == "is empty; name a folder or a repository that holds a model"


class TestOtherForms:
    @pytest.mark.parametrize(
        ("name", "what", "packages"),
        [
            ("flax_model.msgpack", "the weights for Flax", 'torch "transformers<5" flax'),
            ("tf_model.h5", "the weights for TensorFlow", 'torch "transformers<5" tensorflow tf-keras'),
            ("gpt2.Q4_K_M.gguf", "the weights for llama.cpp", "torch transformers gguf"),
        ],
    )
    def test_what_can_be_converted(self, explain: Callable[..., str], name: str, what: str, packages: str) -> None:
        sentence = explain({"config.json": GPT2, name: b"x", "training_args.bin": b"x", **TOKENIZER})
        assert sentence.startswith(
            f"holds {name}, {what}, and no model.safetensors. Convert it (pip install {packages}) by"
        )
        assert sentence.endswith('.save_pretrained("converted")\'`, and name the folder converted with --tokenizer F')

    @pytest.mark.parametrize("name", ["onnx/decoder_model.onnx", "rust_model.ot", "64.tflite", "model.ckpt-1000.index"])
    def test_what_cannot(self, explain: Callable[..., str], name: str) -> None:
        sentence = explain({"config.json": GPT2, name: b"x"})
        assert sentence.startswith(f"holds {name}, ")
        assert sentence.endswith("Name the model that it was made from, as safetensors or pytorch_model.bin")

    def test_a_repository_is_converted_from_the_hub(self) -> None:
        sentence = explain_names("owner/name", ["config.json", "flax_model.msgpack"], lambda _name: GPT2)
        assert 'hf_hub_download("owner/name", "flax_model.msgpack")' in sentence

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("model.fp16.safetensors", "model.safetensors"),
            ("pytorch_model.fp16.bin", "pytorch_model.bin"),
            ("gpt2.pth", "pytorch_model.bin"),
        ],
    )
    def test_weights_of_another_name(self, explain: Callable[..., str], name: str, wanted: str) -> None:
        files = {"config.json": GPT2, "a_training_args.txt": b"", "optimizer.pt": b"x", "rng_state_0.pth": b"x"}
        assert explain({**files, name: b"x"}) == (
            f"holds {name} but no {wanted}; if these are the model's weights, rename the file to {wanted}"
        )

    def test_what_training_leaves_is_not_taken_for_weights(self, explain: Callable[..., str]) -> None:
        files = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "optimizer.bin")
        assert explain({"config.json": GPT2, **dict.fromkeys(files, b"x"), **TOKENIZER}) == (
            "holds no weights (model.safetensors or pytorch_model.bin), but config.json, tokenizer.json; name the "
            "folder or the repository of a whole model"
        )


class TestFolders:
    def test_a_model_in_a_folder_below(self, explain: Callable[..., str], tmp_path: Path) -> None:
        shutil.copytree(GOLDEN / "checkpoints" / "prefixed", tmp_path / "checkpoint-500")
        sentence = explain({"README.md": b"x", "trainer_state.json": b"{}"})
        assert sentence == "is no model itself, but holds one in the folder checkpoint-500; name F/checkpoint-500"
        # Of what training leaves, the tokenizer is often beside the checkpoints.
        assert explain(TOKENIZER) == f"{sentence} with --tokenizer F"

    def test_no_configuration(self, explain: Callable[..., str]) -> None:
        assert explain({"pytorch_model.bin": b"x", **TOKENIZER}).startswith(
            "holds pytorch_model.bin but no config.json; "
        )

    def test_no_tokenizer(self, explain: Callable[..., str]) -> None:
        sentence = explain({"model.safetensors": b"x", "config.json": GPT2, "vocab.json": b"{}"})
        assert sentence == (
            "holds model.safetensors but no tokenizer that can be read; name another model's by --tokenizer"
        )

    def test_something_else(self, explain: Callable[..., str]) -> None:
        assert explain({f"{i}.csv": b"x" for i in range(9)}) == (
            "holds no config.json and no weights (model.safetensors or pytorch_model.bin) and no tokenizer, but 0.csv, "
            "1.csv, 2.csv, 3.csv and 5 more; name the folder or the repository of a whole model"
        )

    def test_pipes_are_not_waited_for(self, explain: Callable[..., str], tmp_path: Path) -> None:
        for name in ("config.json", "adapter_config.json", "pytorch_model.bin"):
            os.mkfifo(tmp_path / name)
        assert explain({}).startswith("is a PEFT adapter of a model that it does not name")

    def test_a_file_and_nothing(self, tmp_path: Path) -> None:
        write(tmp_path, {"x.safetensors": b"x"})
        assert "is a file; name the folder that holds it" in explain_folder(tmp_path / "x.safetensors")
        assert explain_folder(tmp_path / "y").endswith("y: no such folder")
