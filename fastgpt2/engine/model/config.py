"""The configuration of a GPT-2, from the small JSON files of a model's folder.

`config.json` holds the architecture's numbers. Every field that bears on the arithmetic is checked, so that a model is
either computed as its makers meant or refused by the name of a field. The index of a checkpoint in several files is
read here too. JSON files are read within bounds, and nothing heavy is imported. A checkpoint of nanoGPT holds these
numbers itself, so it needs no `config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.files import parse_json, read_file
from fastgpt2.engine.model.lfs_pointer import explain_pointer, is_pointer
from fastgpt2.errors import CheckpointError, ConfigError, FastGPT2Error

# The files of a model's folder.
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
NANOGPT_FILE = "ckpt.pt"

# The files of the weights, in the order in which they are looked for: their format, one file, and an index of several.
WEIGHT_FILES = (
    ("safetensors", SINGLE_FILE, INDEX_FILE),
    ("torch", TORCH_FILE, TORCH_INDEX_FILE),
    ("nanogpt", NANOGPT_FILE, None),
)

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
WORDPIECE_FILE = "vocab.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
ADAPTER_FILE = "adapter_config.json"
# A chat template alone, others beside it by their names, and what processors of several media had before.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
# The names that classes of transformers give to a model of sentencepiece; the first is taken by all of them.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")

# The files of a tokenizer: all of one of these sets are enough, and the first set that is whole is taken.
TOKENIZER_SETS: tuple[tuple[str, ...], ...] = (
    (TOKENIZER_FILE,),
    (VOCAB_FILE, MERGES_FILE),
    *((name,) for name in SENTENCEPIECE_FILES),
    (WORDPIECE_FILE,),
)
# What may stand beside them, and says more of the tokenizer.
TOKENIZER_EXTRAS: tuple[str, ...] = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)

# What no real model comes near: beyond these a file is damaged, or made to do harm.
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024
MAX_DIMENSION = 1 << 24
_MAX_QUOTED = 80

# The names that GPT-2 configurations use and what transformers' ACT2FN understands by them; `transformer.py` has the
# functions.
ACTIVATION_FUNCTIONS = frozenset(
    {"gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh"}
)

# Model types that are taken for GPT-2s, and what they are.
_OTHER_TYPES = {
    "gpt_bigcode": "a GPT-2 with multi-query attention",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX",
    "gptj": "GPT-J",
    "openai-gpt": "the first GPT",
    "imagegpt": "a model of pixels",
    "decision_transformer": "a model of actions",
    "vision-encoder-decoder": "a model of captions, which may have a GPT-2 in it that needs an image",
    "encoder-decoder": "a translating model, which may have a GPT-2 in it that needs an input of its own",
    "speech-encoder-decoder": "a model of speech, which may have a GPT-2 in it that needs sound",
}

# Heads that give no text, as classes of transformers and of others name them.
_NO_TEXT = re.compile(r"Classif|QuestionAnswering|MultipleChoice|Regress|Reward|Embedding|Retriev", re.IGNORECASE)

# The remedy for quantised weights, of which there is always an original.
UNQUANTISED = "Name the model that it was made from, in float32, float16 or bfloat16"

# Other names of some fields. Source: `GPT2Config.attribute_map` in transformers.
_OTHER_NAMES = (
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
    ("max_position_embeddings", "n_positions"),
)


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """The architecture's numbers, under the names that `transformers.GPT2Config` gives them.

    Source: Radford et al. 2019 and `transformers/models/gpt2/configuration_gpt2.py`, whose defaults are these.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 4 * 768
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_parameters(self) -> int:
        n, inner = self.n_embd, self.n_inner
        block = 4 * n + 3 * n * (n + 1) + n * (n + 1) + inner * (n + 1) + n * (inner + 1)
        tables = (self.vocab_size + self.n_positions) * n + (0 if self.tie_word_embeddings else self.vocab_size * n)
        return tables + self.n_layer * block + 2 * n

    def attention_scale(self, layer: int) -> float:
        """Return the factor of a layer's scores. Source: `eager_attention_forward` of transformers' modeling_gpt2."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def read_config(folder: Path) -> GPT2Config:
    """Read and check the `config.json` of a model's folder. Without one, the numbers of nanoGPT's `ckpt.pt` are taken.

    Raises:
        ConfigError: the file is missing, is no JSON object or no GPT-2, or holds a value that cannot be; the message
            names the file and the field.
        CheckpointError: there is only a `ckpt.pt`, which is damaged or no checkpoint of nanoGPT.
    """
    path = folder / CONFIG_FILE
    if not path.exists() and (folder / NANOGPT_FILE).exists():
        return _read_nanogpt(folder / NANOGPT_FILE)
    fields = read_json_object(path, MAX_CONFIG_BYTES, ConfigError)
    problem = config_problem(fields)
    if problem:
        raise ConfigError(f"{path}: {problem}")

    reader = _Reader(path, _by_first_names(path, fields))
    n_embd, n_head = reader.width_and_heads()
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATION_FUNCTIONS:
        known = ", ".join(sorted(ACTIVATION_FUNCTIONS))
        raise ConfigError(f"{path}: activation_function is {quote(activation)}; known are {known}")
    return GPT2Config(
        vocab_size=reader.size("vocab_size", 50257),
        n_positions=reader.size("n_positions", 1024),
        n_embd=n_embd,
        n_layer=reader.size("n_layer", 12),
        n_head=n_head,
        n_inner=4 * n_embd if fields.get("n_inner") is None else reader.size("n_inner", 0),
        activation_function=activation,
        layer_norm_epsilon=reader.epsilon("layer_norm_epsilon", 1e-5),
        scale_attn_weights=reader.flag("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=reader.flag("scale_attn_by_inverse_layer_idx", False),
        # `reorder_and_upcast_attn` needs no code: it computes scores in float32, as this engine always does.
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
    )


def _read_nanogpt(path: Path) -> GPT2Config:
    """Return the numbers in a checkpoint of nanoGPT, and those that its code has in common for all models.

    Source: `GPTConfig` and `MLP` in nanoGPT's model.py. Since June 2023 they compute the exact GELU.
    """
    from fastgpt2.engine.model.torch_file import TorchFile

    reader = _Reader(path, TorchFile.open(path).nanogpt()[1])
    n_embd, n_head = reader.width_and_heads()
    return GPT2Config(
        vocab_size=reader.size("vocab_size", 50304),
        n_positions=reader.size("block_size", 1024),
        n_embd=n_embd,
        n_layer=reader.size("n_layer", 12),
        n_head=n_head,
        n_inner=4 * n_embd,
        activation_function="gelu",
    )


def config_problem(fields: Mapping[str, Any]) -> str | None:
    """Return why the fields of a `config.json` are no causal GPT-2's, and what to do; None if they may be.

    Two fields of models that are served look as if they mattered: heads in `pruned_heads` are computed, as transformers
    computes them since its version 5, and cross attention (`add_cross_attention`) has nothing to attend to.
    """
    model_type = fields.get("model_type")
    if model_type is None:
        return 'there is no model_type. If the model is a GPT-2, add "model_type": "gpt2" to this file'
    if model_type != "gpt2":
        known = _OTHER_TYPES.get(model_type) if isinstance(model_type, str) else None
        what = f", {known}" if known else ""
        return f"model_type is {quote(model_type)}{what}; fastgpt2 runs GPT-2 models (model_type 'gpt2')"
    if fields.get("is_encoder_decoder"):
        return "is_encoder_decoder is true: the model needs an input of its own beside the text; name a causal GPT-2"
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        how = f" ({method if isinstance(method, str) else 'quantization_config'})"[:_MAX_QUOTED]
        return f"quantization_config says that the weights are quantised{how}. {UNQUANTISED}"
    if fields.get("attention_head_type") == "multiquery":
        return "attention_head_type is 'multiquery', which a GPT-2 does not have; fastgpt2 runs GPT-2 models"
    architectures = fields.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        if isinstance(name, str) and _NO_TEXT.search(name):
            return (
                f"architectures is {quote(name)}: the model judges text and writes none; name a causal GPT-2. To have "
                'its transformer write text all the same, set architectures to ["GPT2LMHeadModel"] in this file'
            )
    return None


def _by_first_names(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, each under its first name; raise ConfigError if two names of one have different values."""
    named = dict(fields)
    for other, name in _OTHER_NAMES:
        if fields.get(other) is None:
            continue
        if named.setdefault(name, fields[other]) != fields[other]:
            raise ConfigError(f"{path}: {name} is {quote(named[name])}, but {other} is {quote(fields[other])}")
    if fields.get("n_ctx") is not None:
        named.setdefault("n_positions", fields["n_ctx"])  # as older files have it
    return named


class _Reader:
    """Reads the fields of one configuration file, and raises ConfigError for a value of the wrong kind."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path, self.fields = path, fields

    def size(self, name: str, default: int) -> int:
        rule = f"a whole number from 1 to {MAX_DIMENSION}"
        return int(self._checked(name, default, rule, lambda value: type(value) is int and 1 <= value <= MAX_DIMENSION))

    def width_and_heads(self) -> tuple[int, int]:
        """Return `n_embd` and `n_head`, which divides it."""
        n_embd, n_head = self.size("n_embd", 768), self.size("n_head", 12)
        if n_embd % n_head:
            raise ConfigError(f"{self.path}: n_embd {n_embd} is not divisible by n_head {n_head}")
        return n_embd, n_head

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._checked(name, default, "true or false", lambda value: type(value) is bool))

    def epsilon(self, name: str, default: float) -> float:
        rule = "a number from 0 up to 1"
        return float(self._checked(name, default, rule, lambda value: type(value) in (int, float) and 0 <= value < 1))

    def _checked(self, name: str, default: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
        value = self.fields.get(name, default)
        if not fits(value):
            raise ConfigError(f"{self.path}: {name} is {quote(value)}; it must be {rule}")
        return value


def read_index(path: Path) -> dict[str, str]:
    """Read the `weight_map` of an index file: tensor name -> shard file name, each a plain name in the same folder.

    The shards of `model.safetensors.index.json` end in `.safetensors`, those of `pytorch_model.bin.index.json` end in
    `.bin`.

    Raises:
        CheckpointError: the file is malformed, or a shard's name leads out of the folder.
    """
    weight_map = read_json_object(path, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(rf"[^/\\\x00-\x1f\x7f\ud800-\udfff]{{1,255}}\.{suffix}", file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to lie in {repr(file)[:_MAX_QUOTED]}, which is no plain file name"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: lists more than {MAX_SHARDS} files")
    return weight_map


def read_json_object(path: Path, max_bytes: int, error: type[FastGPT2Error]) -> dict[str, Any]:
    """Read a JSON object from a file of at most `max_bytes`; raise `error`, naming the file, if it is anything else."""
    data = read_file(path, max_bytes, error)
    try:
        value = parse_json(data)
    except ValueError as reason:
        if is_pointer(path):
            raise error(explain_pointer(path)) from None
        raise error(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object but {quote(value)}")
    return value


def read_small_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a small file; {} if there is none."""
    try:
        value = parse_json(read_file(path, MAX_INDEX_BYTES, ConfigError))
    except (ConfigError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def custom_code(folder: Path) -> str | None:
    """Return a sentence for people if `config.json` names code of its own for the model; None if it does not."""
    auto_map = read_small_json(folder / CONFIG_FILE).get("auto_map")
    if not isinstance(auto_map, dict) or "AutoModelForCausalLM" not in auto_map:
        return None
    code = quote(auto_map["AutoModelForCausalLM"])
    return (
        f"{folder / CONFIG_FILE}: auto_map names code of its own for the model, {code}. It is not run: the model is "
        "computed as a plain GPT-2, as transformers does without trust_remote_code"
    )


def printable(text: str) -> str:
    """Return a text with "?" for what a terminal would obey: names in a file may be made to do harm."""
    return "".join(c if c.isprintable() else "?" for c in text)


def quote(value: object) -> str:
    """Return a value as a message shows it: JSON, of bounded length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
