#!/usr/bin/env python3
# The peers' packages are in environments of their own, not in the one that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Write a checkpoint in the form of one peer. `peers.py` starts it by the peer's Python, and keeps what it writes.

    python convert.py ctranslate2 FOLDER OUT TYPE    # TYPE float32 or int8
    python convert.py openvino FOLDER OUT TYPE       # TYPE fp32 or int8; by the Python that has optimum-intel
    python convert.py llama.cpp FOLDER OUT TYPE      # TYPE f32, f16, bf16 or q8_0; OUT is a file

Nothing is written to FOLDER, and nothing is asked of a hub. CTranslate2 and OpenVINO bring a converter. That of
llama.cpp knows tokenizers by the hash of a text and refuses others, as the demo model's is; so a GGUF file is written
here by llama.cpp's own package `gguf`, which knows the names of the tensors and the formats of their numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

END = "<|endoftext|>"


def ctranslate2(folder: Path, out: Path, kind: str) -> None:
    """Write CTranslate2's folder by its own converter."""
    import ctranslate2.converters

    with tempfile.TemporaryDirectory() as temporary:
        with_tokenizer(folder, Path(temporary))
        ctranslate2.converters.TransformersConverter(temporary).convert(str(out), quantization=kind, force=True)


def openvino(folder: Path, out: Path, kind: str) -> None:
    """Write OpenVINO's folder as its users do: keys and values are kept inside the model, int8 has a scale a row."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
    with tempfile.TemporaryDirectory() as temporary:
        with_tokenizer(folder, Path(temporary))
        options = ["--model", temporary, "--task", "text-generation-with-past", "--weight-format", kind]
        subprocess.run([*command, *options, str(out)], check=True)


def llama_cpp(folder: Path, out: Path, kind: str) -> None:
    """Write a GGUF file: matrices in the numbers of `kind`; positions and vectors in float32, as llama.cpp does."""
    import gguf
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype="float32")
    config = model.config
    writer = gguf.GGUFWriter(str(out), "gpt2")
    writer.add_name(folder.name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, folder, config)

    numbers = gguf.GGMLQuantizationType[kind.upper()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    tied = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    for name, tensor in model.state_dict().items():
        if name.endswith((".attn.bias", ".attn.masked_bias")) or (name == "lm_head.weight" and tied):
            continue
        x = tensor.float().numpy()
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            x = x.T  # Conv1D keeps inputs x outputs, a GGUF file outputs x inputs
        plain = x.ndim == 1 or name.endswith("wpe.weight")
        to = gguf.GGMLQuantizationType.F32 if plain else numbers
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quants.quantize(x, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """Add the tokens, the merges and the special tokens; the model's table may have more rows than there are tokens."""
    import gguf

    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
    special = {token["id"] for token in whole["added_tokens"] if token["special"]}
    tokens = {i: token for token, i in vocabulary.items()}
    kinds = gguf.TokenType
    every = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in every])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in tokens else kinds.UNUSED for i in every]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)


def with_tokenizer(folder: Path, copy: Path) -> None:
    """Make a folder of links to a checkpoint's files, with the files that AutoTokenizer reads."""
    from transformers import PreTrainedTokenizerFast

    for path in folder.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    if (copy / "tokenizer_config.json").exists():
        return
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=END, eos_token=END, unk_token=END
    )
    # A converter needs a word for each row of the model's table.
    wanted = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    tokenizer.add_tokens([f"<|unused {i}|>" for i in range(len(tokenizer), wanted)])
    (copy / "tokenizer.json").unlink()
    tokenizer.save_pretrained(copy)


CONVERTERS: dict[str, Callable[[Path, Path, str], None]] = {
    "ctranslate2": ctranslate2,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    peer, folder, name, kind = sys.argv[1:]
    out = Path(name)
    part = out.with_name(f"{out.name}.part")  # what is there under its name is whole
    CONVERTERS[peer](Path(folder).resolve(), part, kind)
    part.rename(out)
    print("{}")


if __name__ == "__main__":
    main()
