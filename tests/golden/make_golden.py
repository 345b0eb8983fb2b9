# ruff: noqa: RUF001
# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call,untyped-decorator"
"""Make the oracle data in this directory from independent implementations.

The package under test needs none of these libraries; they live in an environment of their own:

    python -m venv oracle && oracle/bin/pip install torch transformers tokenizers safetensors regex
    oracle/bin/python tests/golden/make_golden.py checkpoints
    oracle/bin/python tests/golden/make_golden.py tokenization --tokenizer path/to/gpt2/tokenizer.json
    oracle/bin/python tests/golden/make_golden.py continuations --model path/to/model
    oracle/bin/python tests/golden/make_golden.py scores --model path/to/model
    oracle/bin/python tests/golden/make_golden.py prompt-scores --model path/to/model

``checkpoints``    tiny random GPT-2 checkpoints in every stored form the loader has to read, each with the
                   logits that transformers computes in float32 from the stored files.
``tokenization``   token ids of many texts by OpenAI's original GPT-2 algorithm, cross-checked with the
                   tokenizers and transformers libraries. Without ``--tokenizer`` the copy in this directory
                   (gpt2-tokenizer.json.gz) is read.
``continuations``  greedy continuations of 64 prompts by a model directory, computed by transformers in float32.
``scores``         for a few prompts: the log probabilities of a greedy continuation and of the likeliest tokens, and a
                   continuation with a least number of tokens before an end-of-text token, by transformers in float32.
``prompt-scores``  for a few prompts: the log probabilities of their own tokens and of the likeliest in their places.

All five are deterministic: the library versions in VERSIONS.txt, on the same kind of processor, write the same
files again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import platform
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import regex
import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
TOKENIZER_COPY = HERE / "gpt2-tokenizer.json.gz"
END_OF_TEXT = "<|endoftext|>"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "regex")

Tensors = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Case:
    """One checkpoint: what its config.json adds to the common part, and how its tensors are written.

    `missing` and `unexpected` are the beginnings of names that transformers may miss in the file or leave out of it.
    """

    name: str
    write: Callable[[GPT2LMHeadModel, Path], None]
    config: dict[str, Any] = field(default_factory=dict)
    length: int = 24
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def write_bare(model: GPT2LMHeadModel, folder: Path) -> None:
    """Names as in the public ``gpt2`` file: no ``transformer.`` and no lm_head."""
    save_file(bare(model), folder)


def write_prefixed(model: GPT2LMHeadModel, folder: Path) -> None:
    """One file exactly as save_pretrained writes it."""
    save_pretrained(model, folder, "10MB")


def write_sharded(model: GPT2LMHeadModel, folder: Path) -> None:
    """Several files and model.safetensors.index.json exactly as save_pretrained writes them."""
    save_pretrained(model, folder, "16KB")
    if len(list(folder.glob("model-*.safetensors"))) < 3:
        raise RuntimeError("expected at least 3 shards")


def write_tied_with_head(model: GPT2LMHeadModel, folder: Path) -> None:
    """Tied, yet the file repeats wte as lm_head.weight."""
    tensors = prefixed(model)
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder)


def write_own_head(model: GPT2LMHeadModel, folder: Path) -> None:
    """A second table for the output, whatever the configuration says of tying."""
    tensors = prefixed(model)
    save_file({**tensors, "lm_head.weight": 0.3 * torch.randn(tensors["transformer.wte.weight"].shape)}, folder)


def write_head_only(model: GPT2LMHeadModel, folder: Path) -> None:
    """Tied, and the one table is stored as lm_head.weight, as safetensors.torch.save_model does it."""
    tensors = prefixed(model)
    table = tensors.pop("transformer.wte.weight")
    save_file({**tensors, "lm_head.weight": table}, folder)


def write_left_out(model: GPT2LMHeadModel, folder: Path) -> None:
    """Bare and prefixed names side by side, heads of other tasks, and whatever else transformers leaves out."""
    tensors = prefixed(model)
    n_embd, n_layer = model.config.n_embd, model.config.n_layer
    for name in [name for name in tensors if ".h.0." in name]:
        tensors[name.replace(".h.0.", f".h.{n_layer}.")] = torch.randn(tensors[name].shape)
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["transformer.lm_head.weight"] = 0.3 * torch.randn(model.config.vocab_size, n_embd)
    for name, shape in {
        "lm_head.bias": (model.config.vocab_size,),
        "v_head.summary.weight": (1, n_embd),
        "v_head.summary.bias": (1,),
        "multiple_choice_head.summary.weight": (1, n_embd),
        "score.weight": (2, n_embd),
        "transformer.h.0.crossattention.c_attn.weight": (n_embd, 2 * n_embd),
        "transformer.h.1.attn.rotary_emb.inv_freq": (2,),
    }.items():
        tensors[name] = torch.randn(shape)
    for layer in range(n_layer):
        tensors[f"h.{layer}.attn.bias"] = causal_mask(model).to(torch.float16)
    save_file(tensors, folder)


def write_without_biases(model: GPT2LMHeadModel, folder: Path) -> None:
    """No biases at all; transformers makes them zeros."""
    save_file({name: tensor for name, tensor in bare(model).items() if not name.endswith(".bias")}, folder)


def write_pickle(model: GPT2LMHeadModel, folder: Path) -> None:
    """As torch.save writes it, in float16, with masks."""
    tensors = {name: tensor.half() for name, tensor in prefixed(model).items()}
    for layer in range(model.config.n_layer):
        tensors[f"transformer.h.{layer}.attn.bias"] = causal_mask(model).to(torch.uint8)
    torch.save(tensors, folder / "pytorch_model.bin")


def write_pickle_shards(model: GPT2LMHeadModel, folder: Path) -> None:
    """Two files of torch's old format, and the index that lists what is in each."""
    tensors = bare(model)
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file, _use_new_zipfile_serialization=False)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (folder / "pytorch_model.bin.index.json").write_text(text + "\n", encoding="utf-8")


def write_nanogpt(model: GPT2LMHeadModel, folder: Path) -> None:
    """As nanoGPT's train.py saves a compiled model without biases; the script takes the logits of `model` itself."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    tensors = {}
    for name, tensor in prefixed(model).items():
        if not name.endswith(".bias"):
            linear = ".h." in name and tensor.ndim == 2
            tensors[f"_orig_mod.{name}"] = tensor.t().contiguous() if linear else tensor
    tensors["_orig_mod.lm_head.weight"] = tensors["_orig_mod.transformer.wte.weight"]
    config = model.config
    arguments = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    arguments |= {"block_size": config.n_positions, "bias": False, "dropout": 0.0}
    value = {"model": tensors, "optimizer": {}, "model_args": arguments, "iter_num": 7, "best_val_loss": 1.5}
    torch.save(value, folder / "ckpt.pt")
    (folder / "config.json").unlink()


def write_as(dtype: torch.dtype) -> Callable[[GPT2LMHeadModel, Path], None]:
    """Prefixed names, every tensor rounded to a narrower dtype."""
    return lambda model, folder: save_file({name: t.to(dtype) for name, t in prefixed(model).items()}, folder)


def write_masks_misaligned(model: GPT2LMHeadModel, folder: Path) -> None:
    """Like the public ``gpt2`` file: float32 masks, and tensor data that starts 3 bytes past a 4-byte boundary."""
    tensors = bare(model)
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = causal_mask(model).to(torch.float32)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder)
    misalign(folder / "model.safetensors")


def write_masks_uint8(model: GPT2LMHeadModel, folder: Path) -> None:
    """Like later exports: masks of dtype U8 and BOOL beside prefixed names."""
    tensors = prefixed(model)
    for layer in range(model.config.n_layer):
        dtype = torch.bool if layer % 2 else torch.uint8
        tensors[f"transformer.h.{layer}.attn.bias"] = causal_mask(model).to(dtype)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder)


ACTIVATIONS = ("relu", "silu", "swish", "gelu", "tanh", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu")

CASES = (
    Case("odd_heads", write_bare, {"n_embd": 35, "n_head": 5, "n_inner": 20, "vocab_size": 61}, length=20),
    Case("prefixed", write_prefixed, {"n_head": 4, "n_inner": None}),
    Case("untied", write_prefixed, {"tie_word_embeddings": False, "vocab_size": 61}),
    Case("tied_with_head", write_tied_with_head, {"tie_word_embeddings": True, "vocab_size": 67}),
    Case("float16", write_as(torch.float16), {"n_embd": 28, "n_head": 4, "vocab_size": 97, "torch_dtype": "float16"}),
    Case("bfloat16", write_as(torch.bfloat16), {"n_embd": 28, "n_head": 2, "vocab_size": 97, "dtype": "bfloat16"}),
    Case("sharded", write_sharded, {"vocab_size": 71}),
    Case("masks_misaligned", write_masks_misaligned, {"n_head": 5, "vocab_size": 61}),
    Case("masks_uint8", write_masks_uint8, {"vocab_size": 73}),
    Case("inner", write_prefixed, {"n_embd": 24, "n_head": 3, "n_inner": 52}),
    Case("inverse_layer_scale", write_prefixed, {"n_layer": 3, "n_inner": 48, "scale_attn_by_inverse_layer_idx": True}),
    Case("unscaled", write_prefixed, {"n_head": 2, "scale_attn_weights": False}),
    Case("upcast", write_prefixed, {"n_layer": 3, "n_inner": 48, "reorder_and_upcast_attn": True}),
    *(Case(f"act_{name}", write_bare, {"vocab_size": 61, "activation_function": name}) for name in ACTIVATIONS),
    Case("own_head", write_own_head, {"n_embd": 8, "n_head": 2, "vocab_size": 53}),
    Case("head_only", write_head_only, {"n_embd": 8, "n_head": 2, "vocab_size": 51}),
    Case("equal_head", write_tied_with_head, {"n_embd": 8, "n_head": 2, "tie_word_embeddings": False}),
    Case("float64", write_as(torch.float64), {"n_embd": 12, "n_head": 2, "vocab_size": 47}),
    Case("cross_attention", write_prefixed, {"n_embd": 8, "n_head": 2, "add_cross_attention": True}),
    Case("without_biases", write_without_biases, {"n_embd": 12, "n_head": 3}, missing=("transformer.",)),
    Case(
        "left_out",
        write_left_out,
        {"n_embd": 8, "n_head": 2, "vocab_size": 59, "pruned_heads": {"0": [1]}},
        unexpected=("lm_head.bias", "v_head.", "multiple_choice_head.", "score.", "transformer.h."),
    ),
    Case("pickle", write_pickle, {"n_embd": 8, "n_head": 2, "vocab_size": 57}),
    Case("pickle_shards", write_pickle_shards, {"n_embd": 8, "n_head": 2, "vocab_size": 57}),
    Case("nanogpt", write_nanogpt, {"n_embd": 8, "n_head": 2, "vocab_size": 57, "activation_function": "gelu"}),
    Case("epsilon", write_bare, {"vocab_size": 67, "layer_norm_epsilon": 1e-2}),
)


def case_config(case: Case) -> dict[str, Any]:
    """The config.json of a case, with the keys that hub repositories hold."""
    config: dict[str, Any] = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 32,
        "n_embd": 20,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 32,
        "resid_pdrop": 0.1,
        "vocab_size": 83,
        **case.config,
    }
    last = config["vocab_size"] - 1
    return dict(sorted({**config, "bos_token_id": last, "eos_token_id": last}.items()))


def random_model(config: dict[str, Any], seed: int) -> GPT2LMHeadModel:
    """A model whose random weights are large enough for every part to move the logits."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith(("bias", "wpe.weight")):
                parameter.copy_(0.1 * noise)
            elif "ln_" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def prefixed(model: GPT2LMHeadModel) -> Tensors:
    """The model's tensors under their ``transformer.`` names, without the head."""
    return {f"transformer.{name}": tensor for name, tensor in bare(model).items()}


def bare(model: GPT2LMHeadModel) -> Tensors:
    """The model's tensors without prefix and without the head."""
    return {name: tensor.detach().clone() for name, tensor in model.transformer.named_parameters()}


def causal_mask(model: GPT2LMHeadModel) -> torch.Tensor:
    """The lower triangle that old checkpoints store, [1, 1, n_positions, n_positions]."""
    size = model.config.n_positions
    return torch.ones(size, size).tril().view(1, 1, size, size)


def save_file(tensors: Tensors, folder: Path) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_pretrained(model: GPT2LMHeadModel, folder: Path, shard_size: str) -> None:
    """Keep only the weight files of save_pretrained; config.json is written by the caller."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size=shard_size)
        for path in sorted(Path(scratch).glob("model*.safetensors*")):
            shutil.copyfile(path, folder / path.name)


def misalign(path: Path) -> None:
    """Pad the JSON header with spaces until tensor data starts at an offset of 3 modulo 4."""
    data = path.read_bytes()
    (header_length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + header_length].rstrip(b" "), data[8 + header_length :]
    header += b" " * ((3 - (8 + len(header))) % 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def stored_model(folder: Path, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = ()) -> GPT2LMHeadModel:
    """The model that a directory holds, upcast to float32, after checking that every weight was found in it.

    Names that begin with `missing`, of biases, and with `unexpected` are not checked.
    """
    loaded: Any = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model: GPT2LMHeadModel = loaded[0].eval()
    info: dict[str, Any] = loaded[1]
    surplus = [name for name in info["unexpected_keys"] if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    surplus = [name for name in surplus if not name.startswith(unexpected)]
    lost = [name for name in info["missing_keys"] if not (name.startswith(missing) and name.endswith(".bias"))]
    if lost or info["mismatched_keys"] or surplus:
        raise RuntimeError(f"{folder.name}: transformers did not read every tensor: {info}")
    return model


@torch.no_grad()
def make_case(case: Case, root: Path) -> None:
    folder = root / case.name
    folder.mkdir(parents=True)
    config = case_config(case)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    fields = {name: value for name, value in config.items() if name != "pruned_heads"}
    model = random_model(fields, zlib.crc32(case.name.encode()))
    case.write(model, folder)

    input_ids = torch.randint(config["vocab_size"], (case.length,))
    # transformers does not read nanoGPT's files.
    stored = model if case.write is write_nanogpt else stored_model(folder, case.missing, case.unexpected)
    logits = stored(input_ids[None]).logits[0]
    if logits.dtype != torch.float32 or not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"{case.name}: bad logits")
    np.savez(folder / "golden.npz", input_ids=input_ids.numpy(), logits=logits.numpy())

    size = sum(path.stat().st_size for path in folder.iterdir())
    kinds = len(set(logits.argmax(-1).tolist()))
    print(f"{case.name:24} {size:7,} bytes, logits std {logits.std():.2f}, {kinds} distinct argmax of {case.length}")


def make_checkpoints(out: Path, names: list[str]) -> None:
    """Make all cases anew, or those of these names and leave the others."""
    root = out / "checkpoints"
    for case in CASES:
        if names and case.name not in names:
            continue
        if (root / case.name).exists():
            shutil.rmtree(root / case.name)
        make_case(case, root)
    if names:
        return
    lines = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    (out / "VERSIONS.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------- tokenization


TEXTS: tuple[str, ...] = (
    # nothing, and ordinary spaces
    "",
    " ",
    "  ",
    "   ",
    " " * 17,
    "Hello",
    " Hello",
    "  Hello",
    "Hello ",
    "Hello  ",
    "   Hello   world   ",
    "Hello, world!",
    "Hello , world !",
    "a b  c   d    e     f",
    # other white space
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\n\n\n",
    " \n",
    "\n ",
    " \n \n ",
    "\t\tindented by tabs",
    "tab\tbetween\twords",
    "trailing tab\t",
    "first line\nsecond line\n",
    "first line\r\nsecond line\r\n\r\n",
    "old\rmac\rlines",
    "mixed \t \n white \r\n\t space \x0b and \x0c feeds",
    "a\n\n\n  b\n\t\n c",
    "non\u00a0breaking\u00a0spaces",
    "\u00a0leading and trailing\u00a0",
    "two\u00a0\u00a0of them, and \u00a0mixed \u00a0 kinds",
    "narrow\u202fno-break, thin\u2009space, hair\u200aspace",
    "em\u2003space, en\u2002space, figure\u2007space, ideographic\u3000space\u3000",
    "\u2028line separator\u2029paragraph separator",
    "next line\u0085character and ogham\u1680space mark",
    "zero\u200bwidth\u200cspaces\u200dand\u2060joiner",
    "\ufeffbyte order mark in front",
    "mongolian\u180evowel separator",
    "soft\u00adhyphen",
    # contractions
    "I'm sure he's right, they've said we'll go; you're late and I'd wait, but it can't be.",
    "I'M SURE HE'S RIGHT, THEY'VE SAID WE'LL GO; YOU'RE LATE AND I'D WAIT, BUT CAN'T.",
    "'s 't 're 've 'm 'll 'd",
    "'s't're've'm'll'd",
    "it 's spaced, and ' s apart",
    "''s and '''ll",
    "'twas the dog's bone, 'tis o'er; rock 'n' roll",
    "it\u2019s a typographer\u2019s apostrophe; they\u2019re different",
    "'stop 'them 'really 'very 'money 'lle 'do",
    # numbers
    "0",
    "1234567890",
    "3.14159265358979",
    "1,000,000.00",
    "In 1887 and 1895, page 221b, at 10:45 p.m.",
    "0x1F600 1e-5 -273.15 +44 20 7946 0958",
    "½ ¼ ² ³ ¹⁰ ₂ Ⅳ ⅷ ①②③ ㊿",
    "٠١٢٣٤٥ ०१२३४ ๐๑๒๓ 〇一二三",
    "abc123def456 7th 8va9",
    # punctuation
    "!",
    "!!!",
    "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "............",
    "... ... ...",
    "----------------------------------------",
    "=====\n=====\n",
    "********** ########## ~~~~~~~~~~",
    "?!?!?! ;;:: ,,, ((( ))) [[ ]] {{ }} << >>",
    "\"Quoted,\" 'single', “curly”, ‘bent’, «guillemets», „low“, 「corner」",
    "A dash—without spaces – and with — them… and an ellipsis…",
    "_underscores_ and __dunder__ and snake_case_name",
    "$100 €200 £300 ¥400 ₹500 100% 5‰ §7 ©2024 ™ ® ° µ ¶",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑∫√∞ ≠ ≤ ≥ ± × ÷ → ⇒",
    "┌──┐\n│▓▒│\n└──┘",
    # code and the web
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nprint(f(3))\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "if x:\n        if y:\n                z()\n",
    '{"key": [1, 2.5, null, true], "nested": {"a\\"b": "\\u00e9"}}',
    '<html><body class="x">&nbsp;&amp;</body></html>',
    "SELECT * FROM users WHERE name LIKE '%O''Brien%' LIMIT 10;",
    "https://www.example.com/path/to/page?query=1&other=two#fragment",
    "mail someone@example.org or see http://127.0.0.1:8080/~user/index.html",
    "C:\\Users\\name\\file.txt and /usr/local/bin/tool --flag=value -x",
    "camelCaseIdentifier PascalCase SCREAMING_SNAKE kebab-case",
    "^[a-z]+(?:\\d{2,3}|\\s*)$",
    "# Title\n\n- one\n- two\n  1. nested\n\n```sh\nls -la | wc -l\n```\n",
    # control characters
    "\x00",
    "NUL\x00inside\x00\x00twice",
    "\x01\x02\x03\x04\x05\x06\x07\x08\x0e\x0f",
    "\x1b[31mred\x1b[0m",
    "separators \x1c\x1d\x1e\x1f here\x1c",
    "delete\x7f and C1 \x80\x81\x9f controls",
    "bell\x07 back\x08space",
    # Latin, Greek, Cyrillic
    "Café crème à la carte, naïve façade, Ærøskøbing, Straße, GROẞ",
    "Cafe\u0301 cre\u0300me with combining marks, n\u0303 and a\u0328\u0301",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324a\u0346\u0348lgo",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Árvíztűrő tükörfúrógép.",
    "Türkçe: İstanbul'da ılık bir gün, ğüşöç",
    "Tiếng Việt: Đường phố Hà Nội rất đẹp",
    "Ένα καλό πρωινό· τι κάνεις; ᾳ ῷ ϊ ΐ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Српски: Љубазни фењерџија; українська: ґанок, її",
    "Ⓐⓑ ﬁ ﬂ ǅ ʰ ª º",
    # other scripts
    "السلام عليكم ورحمة الله، كيف حالك؟",
    "بِسْمِ اللَّهِ مع التشكيل",
    "שלום עולם! שָׁלוֹם",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान। कैसे हैं आप?",
    "আমার সোনার বাংলা, தமிழ் மொழி, తెలుగు, ಕನ್ನಡ, മലയാളം",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ བོད་སྐད།",
    "ქართული ენა, Հայերեն լեզու, አማርኛ ቋንቋ",
    "ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ᚠᚢᚦᚨᚱᚲ ᠮᠣᠩᠭᠣᠯ",
    "你好，世界！今天天气很好。",
    "繁體中文：臺灣的圖書館",
    "吾輩は猫である。名前はまだ無い。カタカナ・ﾊﾝｶｸ・ー",
    "안녕하세요 세계, 한국어 띄어쓰기",
    "\u1112\u1161\u11ab\u1100\u1173\u11af decomposed Hangul",
    "mixed English и русский 和中文 و العربية together",
    "right\u200fto\u200eleft \u202bembedding\u202c \u2067isolate\u2069",
    # emoji and astral characters
    "😀",
    " 😀😀 😀",
    "👍🏽 thumbs 👍🏿👍🏻",
    "👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🧑🏾\u200d🚀",
    "🇫🇷🇯🇵🇧🇷 flags, keycap 1\ufe0f\u20e3 #\ufe0f\u20e3",
    "❤\ufe0f ☺ ☺\ufe0e ✨🔥🎉",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 \U0001d7d9\U0001d7da\U0001d7db mathematical",
    "\U00020000\U0002a6d6 𠮷野家 rare ideographs",
    "𐌰𐍄𐍄𐌰 𓀀𓁐 𒀭 𝄞 𐎠",
    "private \ue000\uf8ff \U000f0000 use, unassigned \u0378, noncharacters \ufffe\uffff\U0010ffff",
    "replacement \ufffd character",
    # long words and repetition
    "a" * 300,
    "ab" * 150,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "xq" * 40 + "zjvk" * 20,
    "é" * 60,
    "中" * 60,
    "9" * 120,
    "na " * 50,
    "THEQUICKBROWNFOXJUMPSOVERTHELAZYDOG" * 3,
    "the The THE tHe  the",
    # prose
    "The detective set down his violin and peered through the fog at the hansom below.",
    "“You have walked from Paddington,” said he, “and the clay on your boot is still wet.”",
    "It was upon a bitter evening in the March of 1889 that I found my friend deep in his chemicals.",
    "“Surely,” I cried, “you can't have known that from a glove!”--but he only smiled.",
    "KING:\nWhat news, good cousin, from the northern field?\n\nMESSENGER:\nIll news, my liege; the day is lost.\n",
    "O, that this weary night would yield to morn,\nAnd I, that watch'd, be quit of watching's toil!",
    "First Guard:\nWho goes? Stand, ho!\n\nSecond Guard:\n'Tis but the wind, thou coward.\n\n",
    "[Enter a Fool, with a lantern. Exeunt.]",
    # the special token, and what resembles it
    END_OF_TEXT,
    f"{END_OF_TEXT}{END_OF_TEXT}",
    f"One story.{END_OF_TEXT}Another story.",
    f"spaces {END_OF_TEXT} around",
    f"newlines\n\n{END_OF_TEXT}\n\naround",
    f"{END_OF_TEXT}first",
    f"last  {END_OF_TEXT}",
    f"{END_OF_TEXT} \n {END_OF_TEXT}",
    f"é{END_OF_TEXT}'s 中",
    "<|endoftext",
    "<|endoftext |> <|ENDOFTEXT|> |endoftext|",
    "<<|endoftext|>>",
)


class OriginalEncoder:
    """The algorithm of OpenAI's encoder.py for GPT-2, with the vocabulary and merges of a tokenizer.json."""

    pattern = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )

    def __init__(self, tokenizer_json: dict[str, Any]) -> None:
        model = tokenizer_json["model"]
        self.encoder: dict[str, int] = model["vocab"]
        self.decoder = {index: token for token, index in self.encoder.items()}
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.end_of_text = self.encoder[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split(END_OF_TEXT)):
            if index:
                ids.append(self.end_of_text)
            for word in self.pattern.findall(part):
                chars = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
                ids.extend(self.encoder[token] for token in self.bpe(chars))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids' bytes, without special tokens."""
        chars = "".join(self.decoder[index] for index in ids if index != self.end_of_text)
        return bytes(self.byte_decoder[char] for char in chars).decode("utf-8", errors="replace")

    def bpe(self, chars: str) -> tuple[str, ...]:
        word = tuple(chars)
        pairs = get_pairs(word)
        while pairs:
            bigram = min(pairs, key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
            if bigram not in self.bpe_ranks:
                break
            word = merge_pair(word, bigram)
            pairs = get_pairs(word)
        return word


def bytes_to_unicode() -> dict[int, str]:
    """Every byte as a printable character, as GPT-2's vocabulary file spells them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def get_pairs(word: tuple[str, ...]) -> set[tuple[str, str]]:
    return set(itertools.pairwise(word))


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair joined, from the left."""
    merged: list[str] = []
    index = 0
    while index < len(word):
        if word[index : index + 2] == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return tuple(merged)


def partial_sequences(encoder: OriginalEncoder) -> list[list[int]]:
    """Seeded id sequences: any ids, single bytes, and windows that cut multi-byte characters in the middle."""
    rng = random.Random(20)
    multibyte = encoder.encode("日本語のテキスト 😀👩🏽\u200d💻 नमस्ते สวัสดี Ελληνικά 𝄞𐍈 é “ — ” 한국어 ٠١٢ 𠮷")
    single = [encoder.encoder[char] for char in encoder.byte_encoder.values()]
    sequences = [[rng.randrange(len(encoder.encoder)) for _ in range(rng.randint(1, 12))] for _ in range(20)]
    sequences += [[rng.choice(single) for _ in range(rng.randint(1, 10))] for _ in range(16)]
    for _ in range(20):
        start = rng.randrange(len(multibyte) - 1)
        sequences.append(multibyte[start : start + rng.randint(1, 8)])
    sequences.append([*multibyte[:3], encoder.end_of_text, *multibyte[3:5]])
    for cut in ("e282", "f09f98", "c3", "80bf", "c0af", "eda080", "f4908080", "f09f9880f09f", "e4b8ade4b8", "61ff62fe"):
        sequences.append([encoder.encoder[encoder.byte_encoder[byte]] for byte in bytes.fromhex(cut)])
    return sequences


def disagreements(text_json: str, texts: list[dict[str, Any]], partial: list[dict[str, Any]]) -> list[str]:
    """Where the tokenizers and transformers libraries encode or decode otherwise than the original algorithm."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        path.write_text(text_json, encoding="utf-8")
        fast = Tokenizer.from_file(str(path))
        slow = PreTrainedTokenizerFast(
            tokenizer_file=str(path), clean_up_tokenization_spaces=False, eos_token=END_OF_TEXT
        )
    found = []
    for entry in texts:
        for name, ids in (("tokenizers", fast.encode(entry["text"]).ids), ("transformers", slow.encode(entry["text"]))):
            if ids != entry["ids"]:
                found.append(f"{name} encodes {entry['text']!r} as {ids}, not {entry['ids']}")
    for entry in texts + partial:
        for name, decode in (("tokenizers", fast.decode), ("transformers", slow.decode)):
            text = decode(entry["ids"], skip_special_tokens=True)
            if text != entry["decoded"]:
                found.append(f"{name} decodes {entry['ids']} as {text!r}, not {entry['decoded']!r}")
    return found


def make_tokenization(tokenizer: Path, out: Path) -> None:
    raw = tokenizer.read_bytes()
    if tokenizer.suffix == ".gz":
        raw = gzip.decompress(raw)
    encoder = OriginalEncoder(json.loads(raw))
    if len(set(TEXTS)) != len(TEXTS):
        raise RuntimeError("a text is listed twice")
    encoded = [(text, encoder.encode(text)) for text in TEXTS]
    texts = [{"text": text, "ids": ids, "decoded": encoder.decode(ids)} for text, ids in encoded]
    partial = [{"ids": ids, "decoded": encoder.decode(ids)} for ids in partial_sequences(encoder)]
    (out / TOKENIZER_COPY.name).write_bytes(gzip.compress(raw, compresslevel=9, mtime=0))
    with (out / "tokenization.json").open("w", encoding="ascii", newline="\n") as file:
        file.write('{"texts": [\n' + ",\n".join(json.dumps(entry) for entry in texts))
        file.write('\n],\n"partial": [\n' + ",\n".join(json.dumps(entry) for entry in partial) + "\n]}\n")
    print(f"{len(texts)} texts, {len(partial)} partial sequences")
    found = disagreements(raw.decode("utf-8"), texts, partial)
    print("\n".join(found) if found else "tokenizers and transformers agree on all of them")
    assert not found, f"{len(found)} disagreements with the original algorithm"


# -------------------------------------------------------------------------------------------- continuations


PROMPTS: tuple[str, ...] = (
    "",
    "My name is",
    "Sherlock Holmes",
    "“Holmes”",
    "It was a cold morning",
    "It was in the spring of the year",
    "The door opened and",
    "I had called upon my friend",
    "“My dear Watson,” said he,",
    "“You see,” said Holmes,",
    "He rose from his chair",
    "The letter was written",
    "“I have heard of you, Mr. Holmes,”",
    "On glancing over my notes",
    "She was a tall woman",
    "The little man",
    "There was no doubt that",
    "We drove through the streets of London",
    "“What do you make of that?”",
    "“Pray take a seat,”",
    "The case is",
    "I could not help",
    "A long silence followed",
    "The room was dark",
    "“Good-night,”",
    "At ten o'clock",
    "Baker Street",
    '"Come in," said',
    "It is a capital mistake",
    "The bell rang",
    "His eyes were",
    "When I returned",
    "ROMEO:\n",
    "JULIET:\nO",
    "KING RICHARD III:\n",
    "First Citizen:\n",
    "MENENIUS:\nSir,",
    "HAMLET:\nTo be",
    "DUKE VINCENTIO:\n",
    "QUEEN MARGARET:\n",
    "GLOUCESTER:\nNow is",
    "Nurse:\nMadam",
    "What light",
    "O my lord,",
    "Good morrow,",
    "I pray thee,",
    "My gracious sovereign",
    "Thou art",
    "Alas, poor",
    "Come, come,",
    "Away with him!",
    "The king is dead",
    "Enter",
    "CORIOLANUS:\nWhat must I say?\n\nSICINIUS:\n",
    "Once upon a time",
    "The",
    "I",
    " and",
    "\n",
    "\n\n",
    "Café —",
    "1895",
    "naïve 中文 😀",
    "To the wife, to the husband, and to the world at large; that is, to every one of them:",
    "The letter",
    "A knock at the door",
    "Upon the table",
    "HAMLET:\n",
    "Second Citizen:\n",
    "The Count",
    "He smiled",
    "Good morning, madam,",
    "My lord,",
    "There was no reply",
    "The train",
    "All:\nSpeak",
    "In the street below",
    "She had",
    "What is it",
    "The old man",
    "Farewell",
    "London",
    "Nothing could be clearer",
    "Let us go",
)
NEW_TOKENS = 100
CONTINUATIONS = 64
# Two logits closer than this may change places where sums are taken in another order, as another CPU's BLAS does; a
# test on such a continuation would be a test of the CPU.
NEAR_TIE = 1e-3


def first_ids(prompt: str, tokenizer: Tokenizer, config: dict[str, Any]) -> list[int]:
    """The prompt's ids; the empty prompt starts from the end-of-text id."""
    if prompt:
        return list(tokenizer.encode(prompt).ids)
    start = config.get("bos_token_id", config.get("eos_token_id"))
    if not isinstance(start, int):
        raise TypeError("config.json names no bos_token_id or eos_token_id")
    return [start]


@torch.no_grad()
def greedy(model: GPT2LMHeadModel, prompt_ids: list[int], count: int) -> tuple[list[int], float]:
    """The next ``count`` ids by argmax, never stopping, and the smallest top1-top2 logit difference on the way."""
    ids: list[int] = []
    gap = float("inf")
    inputs, cache = torch.tensor([prompt_ids]), None
    for _ in range(count):
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best, second = output.logits[0, -1].topk(2).values.tolist()
        gap = min(gap, best - second)
        ids.append(int(output.logits[0, -1].argmax()))
        inputs = torch.tensor([[ids[-1]]])
    return ids, gap


def make_continuations(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = stored_model(folder)
    continuations: list[dict[str, Any]] = []
    smallest_gap, left_out = float("inf"), []
    for prompt in dict.fromkeys(PROMPTS):
        if len(continuations) == CONTINUATIONS:
            break
        prompt_ids = first_ids(prompt, tokenizer, config)
        if len(prompt_ids) + NEW_TOKENS > model.config.n_positions:
            raise ValueError(f"prompt {prompt!r} leaves no room for {NEW_TOKENS} tokens")
        ids, gap = greedy(model, prompt_ids, NEW_TOKENS)
        if gap < NEAR_TIE:
            left_out.append(prompt)
            continue
        smallest_gap = min(smallest_gap, gap)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        continuations.append({"prompt": prompt, "prompt_ids": prompt_ids, "ids": ids, "text": text})
    if len(continuations) < CONTINUATIONS:
        raise RuntimeError(f"only {len(continuations)} of {CONTINUATIONS} prompts without a near tie")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with out.open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"model_sha256": "{digest}",\n"smallest_gap": {json.dumps(smallest_gap)},\n"continuations": [\n')
        file.write(",\n".join(json.dumps(entry) for entry in continuations) + "\n]}\n")
    print(
        f"{len(continuations)} continuations of {NEW_TOKENS} tokens, smallest gap {smallest_gap:.3g}; "
        f"near ties: {left_out}"
    )


# --------------------------------------------------------------------------------------------------- scores


SCORED_PROMPTS, SCORED_TOKENS, LIKELIEST = 6, 20, 5
LEAST_TOKENS, MOST_TOKENS = 10, 60


def make_scores(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = stored_model(folder)
    entries: list[dict[str, Any]] = []
    for prompt in dict.fromkeys(PROMPTS):
        if len(entries) == SCORED_PROMPTS:
            break
        prompt_ids = first_ids(prompt, tokenizer, config)
        ids, logits = generated(model, prompt_ids, SCORED_TOKENS, eos=None, least=0)
        # The plain continuation meets them early.
        eos = sorted({ids[3], ids[7], ids[12]})
        least = LEAST_TOKENS + len(entries)
        held_ids, held_logits = generated(model, prompt_ids, MOST_TOKENS, eos, least)
        ended = held_ids[-1] in eos and len(held_ids) > least
        taken = [row.index_fill(0, torch.tensor(eos), -torch.inf) for row in held_logits[:least]] + held_logits[least:]
        gaps = [gap_of(row, LIKELIEST + 1) for row in logits] + [gap_of(row, 2) for row in taken]
        if not ended or min(gaps) < NEAR_TIE:
            continue
        entries.append(
            {
                "prompt": prompt,
                "prompt_ids": prompt_ids,
                "ids": ids,
                "logprobs": [float(row.log_softmax(0)[i]) for row, i in zip(logits, ids, strict=True)],
                "top": [
                    list(zip(*(part.tolist() for part in row.log_softmax(0).topk(LIKELIEST)[::-1]), strict=True))
                    for row in logits
                ],
                "least": {
                    "eos_token_id": eos,
                    "min_new_tokens": least,
                    "max_new_tokens": MOST_TOKENS,
                    "ids": held_ids,
                    "logprobs": [float(row.log_softmax(0)[i]) for row, i in zip(held_logits, held_ids, strict=True)],
                },
            }
        )
    if len(entries) < SCORED_PROMPTS:
        raise RuntimeError(f"only {len(entries)} of {SCORED_PROMPTS} prompts without a near tie")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with out.open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"model_sha256": "{digest}",\n"scores": [\n')
        file.write(",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")
    print(f"{len(entries)} prompts: {[entry['prompt'] for entry in entries]}")


def generated(
    model: GPT2LMHeadModel, prompt_ids: list[int], most: int, eos: list[int] | None, least: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Return what ``generate`` takes greedily, and the logits that it saw before any processor, in float64."""
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=most,
        min_new_tokens=least or None,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, len(prompt_ids) :].tolist(), [row[0].double() for row in output.logits]


def gap_of(logits: torch.Tensor, count: int) -> float:
    """The smallest difference between neighbours among the largest."""
    top = logits.topk(count).values
    return float((top[:-1] - top[1:]).min())


# -------------------------------------------------------------------------------------------- prompt scores


SCORED_TEXTS: tuple[str, ...] = (
    "",
    "Sherlock Holmes",
    "“You see,” said Holmes, “naïve 中文 😀, café.”",
    "KING RICHARD III:\nMy gracious lord, I pray thee,\n",
    "One night, it was on the twentieth of March, 1888, I was returning from a journey to a patient, for I had now "
    "returned to civil practice, when my way led me through Baker Street. As I passed the well-remembered door, which "
    "must always be associated in my mind with my wooing, and with the dark incidents of the Study in Scarlet, I was "
    "seized with a keen desire to see Holmes again.",
)
LIKELIEST_IN_PLACE, DIGITS = 3, 6


@torch.no_grad()
def make_prompt_scores(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = stored_model(folder)
    entries: list[dict[str, Any]] = []
    for prompt in SCORED_TEXTS:
        ids = first_ids(prompt, tokenizer, config)
        rows = model(torch.tensor([ids])).logits[0, :-1].double()
        gap = min((gap_of(row, LIKELIEST_IN_PLACE + 1) for row in rows), default=float("inf"))
        if gap < NEAR_TIE:
            raise RuntimeError(f"a near tie ({gap:.2g}) among the likeliest in {prompt!r}: choose another text")
        logprobs, top = [], []
        for row, token_id in zip(rows.log_softmax(1), ids[1:], strict=True):
            likeliest = row.topk(LIKELIEST_IN_PLACE)
            logprobs.append(round(float(row[token_id]), DIGITS))
            values = [round(value, DIGITS) for value in likeliest.values.tolist()]
            top.append(list(zip(likeliest.indices.tolist(), values, strict=True)))
        entries.append({"prompt": prompt, "prompt_ids": ids, "logprobs": logprobs, "top": top})
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with out.open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"model_sha256": "{digest}",\n"scores": [\n')
        file.write(",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")
    print(f"{[len(entry['prompt_ids']) for entry in entries]} tokens")


# -------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoints = commands.add_parser("checkpoints", help="tiny checkpoints with logits")
    checkpoints.add_argument("--out", type=Path, default=HERE, help="directory to write into")
    checkpoints.add_argument("--case", action="append", default=[], metavar="NAME", help="make this one only")
    tokenization = commands.add_parser("tokenization", help="token ids of many texts")
    tokenization.add_argument("--tokenizer", type=Path, default=TOKENIZER_COPY, help="GPT-2's tokenizer.json, or .gz")
    tokenization.add_argument("--out", type=Path, default=HERE, help="directory to write into")
    continuations = commands.add_parser("continuations", help="greedy continuations of a model")
    continuations.add_argument("--model", type=Path, required=True, help="directory with model and tokenizer")
    continuations.add_argument("--out", type=Path, default=HERE / "demo_continuations.json", help="file to write")
    scores = commands.add_parser("scores", help="log probabilities of a model, and continuations of a least length")
    scores.add_argument("--model", type=Path, required=True, help="directory with model and tokenizer")
    scores.add_argument("--out", type=Path, default=HERE / "demo_scores.json", help="file to write")
    prompt_scores = commands.add_parser("prompt-scores", help="log probabilities of prompts' own tokens")
    prompt_scores.add_argument("--model", type=Path, required=True, help="directory with model and tokenizer")
    prompt_scores.add_argument("--out", type=Path, default=HERE / "demo_prompt_scores.json", help="file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.command == "checkpoints":
        make_checkpoints(arguments.out, arguments.case)
    elif arguments.command == "tokenization":
        make_tokenization(arguments.tokenizer, arguments.out)
    elif arguments.command == "continuations":
        make_continuations(arguments.model, arguments.out)
    elif arguments.command == "scores":
        make_scores(arguments.model, arguments.out)
    else:
        make_prompt_scores(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
