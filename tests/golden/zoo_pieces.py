# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The pieces of which the zoo is built: a folder under construction, weights, files of tokenizers. See make_zoo.py."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
GPT2_TOKENIZER = json.loads(gzip.decompress((HERE / "gpt2-tokenizer.json.gz").read_bytes()))
END_OF_TEXT = "<|endoftext|>"
TEXTS = json.loads((HERE / "zoo_texts.json").read_text("utf-8"))

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]

# Names of special tokens, as tokenizer_config.json and special_tokens_map.json have them.
EOT_MAP = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
BERT_MAP = {
    "cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]",
}  # fmt: skip
S_MAP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# Stands for "without this field" where fields are changed.
DROP = object()

# config.json as most fine-tunes of the hub have it.
CONFIG: Json = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_inner": None,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "torch_dtype": "float32",
    "transformers_version": "4.35.2",
    "use_cache": True,
}
NOT_FOR_MODELS = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "quantization_config")


@dataclass(frozen=True)
class Size:
    """How large the models of a zoo are, and how many of GPT-2's own tokens theirs have.

    The usual rules of normalization take 240 KB in each model of sentencepiece. So the small zoo has a few of its own.
    """

    n_embd: int
    n_head: int
    n_layer: int
    n_positions: int
    eot: int
    trained_tokens: int
    stored: torch.dtype
    spread: float
    rules: dict[str, str]


SMALL = Size(8, 2, 2, 64, 309, 300, torch.float16, 1.0, {"normalization_rule_tsv": "zoo_rules.tsv"})
FULL = Size(32, 4, 3, 1024, 50256, 700, torch.float32, 0.4, {"normalization_rule_name": "nmt_nfkc"})


@dataclass
class Box:
    """The folder of one kind, under construction.

    Attributes:
        seed: of the weights; another one is tried if two tokens come out nearly alike.
        swaps: pairs of ids whose rows of the token table change places, so that a certain token is generated.
        reference: what transformers is to be asked about instead of this folder, which it cannot read as it is meant.
    """

    folder: Path
    size: Size
    seed: int
    swaps: Sequence[tuple[int, int]] = ()
    reference: Box | None = None
    config: Json = field(default_factory=dict)

    def twin(self) -> Box:
        """Return a folder beside this one that says the same in a way that transformers reads."""
        folder = self.folder.with_name(self.folder.name + ".twin")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        self.reference = Box(folder, self.size, self.seed, self.swaps, config=self.config)
        return self.reference

    # ------------------------------------------------------------------------------------------ config and weights

    def write_config(self, **changes: Any) -> Json:
        """Write config.json: the common fields, changed. Return it."""
        size = self.size
        fields = {
            **CONFIG, "bos_token_id": size.eot, "eos_token_id": size.eot, "n_ctx": size.n_positions,
            "n_embd": size.n_embd, "n_head": size.n_head, "n_layer": size.n_layer, "n_positions": size.n_positions,
            "vocab_size": size.eot + 1, **changes,
        }  # fmt: skip
        self.config = {name: copy.deepcopy(value) for name, value in sorted(fields.items()) if value is not DROP}
        self.put("config.json", self.config)
        return self.config

    def weights(self, **for_the_model: Any) -> Tensors:
        """Return weights under GPT2LMHeadModel's names, with lm_head.weight only where config.json says untied.

        They come from `seed` alone, and stand apart enough for logits to differ and for positions to matter.
        """
        fields = {name: value for name, value in self.config.items() if name not in NOT_FOR_MODELS} | for_the_model
        model = GPT2LMHeadModel(GPT2Config(**fields))
        generator = torch.Generator().manual_seed(self.seed)
        tensors: Tensors = {}
        for name, parameter in sorted(model.state_dict().items()):
            mean, spread = 0.0, 0.45
            if ".ln_" in name:
                mean, spread = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.1)
            elif name.endswith("bias"):
                spread = 0.1
            elif name.endswith(("wte.weight", "lm_head.weight")):
                spread = self.size.spread
            elif name.endswith("wpe.weight"):
                spread = 1.25 * self.size.spread
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            # Rounded to half precision once, so that each way of storing them holds the same numbers.
            tensors[name] = (mean + spread * noise).half().float()
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        for name in ("transformer.wte.weight", "lm_head.weight"):
            for a, b in self.swaps:
                if name in tensors:
                    tensors[name][[a, b]] = tensors[name][[b, a]]
        return tensors

    def masks(self, dtype: torch.dtype) -> Tensors:
        """Return the masks that older versions stored with each layer."""
        n = self.config.get("n_positions", self.size.n_positions)
        triangle = torch.tril(torch.ones(n, n, dtype=torch.bool)).view(1, 1, n, n)
        masks: Tensors = {}
        for layer in range(self.config["n_layer"]):
            masks[f"transformer.h.{layer}.attn.bias"] = triangle.to(dtype)
            if dtype not in (torch.float32, torch.float16):
                masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return masks

    # ------------------------------------------------------------------------------------------ files

    def put(self, name: str, value: str | bytes | Json | list[Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(value, str | bytes):
            value = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
        path.write_bytes(value.encode() if isinstance(value, str) else value)

    def safetensors(
        self, tensors: Tensors | None = None, name: str = "model.safetensors", metadata: Any = "pt", keep: bool = False
    ) -> None:
        """Write a safetensors file; the weights if no tensors are given.

        Args:
            keep: each tensor's type stays as it is; otherwise float32 becomes the type that this size stores.
        """
        tensors = self.weights() if tensors is None else tensors
        stored = {n: t.to(self.size.stored) if t.dtype == torch.float32 and not keep else t for n, t in tensors.items()}
        metadata = {"format": metadata} if isinstance(metadata, str) else metadata
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().clone() for n, t in stored.items()}, self.folder / name, metadata=metadata)

    def bin(self, tensors: Any = None, name: str = "pytorch_model.bin", legacy: bool = False) -> None:
        """Write a torch file, in torch's older format with `legacy`."""
        tensors = self.weights() if tensors is None else tensors
        if isinstance(tensors, dict) and not isinstance(tensors, OrderedDict):
            tensors = OrderedDict(tensors)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, self.folder / name, _use_new_zipfile_serialization=not legacy)

    # ------------------------------------------------------------------------------------------ GPT-2's tokenizer

    @property
    def gpt2_vocab(self) -> dict[str, int]:
        """GPT-2's first tokens, as many as this size has, and the end of a text."""
        vocab = GPT2_TOKENIZER["model"]["vocab"]
        return {**{token: i for token, i in vocab.items() if i < self.size.eot}, END_OF_TEXT: self.size.eot}

    @property
    def gpt2_merges(self) -> list[str]:
        merges = GPT2_TOKENIZER["model"]["merges"][: self.size.eot - 256]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]

    def gpt2_json(self, *added: Json, **changes: Any) -> None:
        """Write tokenizer.json as GPT-2's, with more added tokens, and with other parts of it changed."""
        whole = copy.deepcopy(GPT2_TOKENIZER)
        whole["model"] |= {"vocab": self.gpt2_vocab, "merges": self.gpt2_merges}
        whole["added_tokens"] = [token_entry(self.size.eot, END_OF_TEXT, normalized=True), *added]
        self.put("tokenizer.json", whole | changes)

    def gpt2_vocab_merges(self, header: str = "#version: 0.2") -> None:
        self.put("vocab.json", self.gpt2_vocab)
        self.put("merges.txt", "\n".join([header, *self.gpt2_merges]) + "\n")

    # ------------------------------------------------------------------------------------------ other tokenizers

    def vocab_merges_of(self, tokenizer: Tokenizer) -> None:
        """Write vocab.json and merges.txt of a trained tokenizer."""
        model = json.loads(tokenizer.to_str())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        self.put("vocab.json", dict(sorted(model["vocab"].items(), key=lambda item: item[1])))
        self.put("merges.txt", "\n".join(["#version: 0.2 - Trained by `huggingface/tokenizers`", *merges]) + "\n")

    def json_of(self, tokenizer: Tokenizer, **changes: Any) -> None:
        self.put("tokenizer.json", json.loads(tokenizer.to_str()) | changes)

    def byte_level(self, lang: str, specials: Sequence[str], add_prefix_space: bool = False) -> Tokenizer:
        """Return a byte-level BPE, trained on a language, with special tokens at its first ids."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.size.trained_tokens, special_tokens=list(specials), initial_alphabet=alphabet,
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(corpus(lang), trainer)
        return tokenizer


def corpus(lang: str) -> list[str]:
    return [*TEXTS[lang]["sentences"], *TEXTS["en"]["sentences"]] * 3


def token_entry(
    token_id: int, content: str, special: bool = True, normalized: bool = False, lstrip: bool = False,
    rstrip: bool = False, single_word: bool = False,
) -> Json:  # fmt: skip
    """Return an added token as tokenizer.json has it."""
    flags = {"single_word": single_word, "lstrip": lstrip, "rstrip": rstrip, "normalized": normalized}
    return {"id": token_id, "content": content, **flags, "special": special}


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def in_type(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def model_of(box: Box, vocab_size: int, **changes: Any) -> None:
    """Write config.json and weights for a vocabulary of the kind's own."""
    box.write_config(vocab_size=vocab_size, **changes)
    box.safetensors()


# ---------------------------------------------------------------------------------------------- the register of kinds


@dataclass(frozen=True)
class Kind:
    """One kind of repository.

    Attributes:
        repos: public repositories that look so.
        prompts: what to continue, by name.
        occur: ids that shall be generated; "eot" and "eot+N" are GPT-2's end of a text and the N-th id behind it.
        refused: parts of the sentence with which fastgpt2 refuses it; none if it is served.
        notes: parts of the notes that fastgpt2 makes when it loads it.
        small: this kind stands in the repository, in small.
    """

    name: str
    build: Callable[[Box], None]
    repos: str
    prompts: dict[str, str]
    occur: tuple[int | str, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    small: bool


KINDS: dict[str, Kind] = {}


def kind(
    lang: str = "en",
    special: str = "<|endoftext|>Once upon<|endoftext|>",
    *,
    occur: Sequence[int | str] = (),
    refused: Sequence[str] = (),
    notes: Sequence[str] = (),
    small: bool = True,
    more: dict[str, str] | None = None,
) -> Callable[[Callable[[Box], None]], Callable[[Box], None]]:
    """Register a function that builds a kind. Its name is the kind's, its docstring names repositories."""
    prompts = {
        "ascii": "Hello, my name is", "language": TEXTS[lang]["prompt"], "emoji": "I am happy 😀🎉👍🏽 today",
        "empty": "", "special": special, "odd": " Two  spaces,\n\ta tab ﬁ ① don't é ", **(more or {}),
    }  # fmt: skip

    def register(build: Callable[[Box], None]) -> Callable[[Box], None]:
        name = build.__name__.replace("_", "-")
        repos = " ".join((build.__doc__ or "").split())
        KINDS[name] = Kind(name, build, repos, prompts, tuple(occur), tuple(refused), tuple(notes), small)
        return build

    return register
