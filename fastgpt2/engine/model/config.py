"""The configuration of a GPT-2, from the small JSON files of a model's folder.

`config.json` holds the architecture's numbers. Every field that bears on the arithmetic is checked, so that a model is
either computed as its makers meant or refused by the name of a field. The index of a checkpoint in several files is
read here too. JSON files are read within bounds, and nothing heavy is imported.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.errors import CheckpointError, ConfigError, FastGPT2Error

log = logging.getLogger("fastgpt2.engine")

# The files of a model's folder.
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
WORDPIECE_FILE = "vocab.txt"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
# The names that classes of transformers give to a model of sentencepiece; the first is taken by all of them.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")

# The files of a tokenizer: all of one of these sets are enough, and the first set that is whole is taken.
TOKENIZER_SETS: tuple[tuple[str, ...], ...] = (
    (TOKENIZER_FILE,),
    (VOCAB_FILE, MERGES_FILE),
    *((name,) for name in SENTENCEPIECE_FILES),
    (WORDPIECE_FILE,),
)
# What may stand beside them, and says more of the tokenizer.
TOKENIZER_EXTRAS: tuple[str, ...] = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)

# A tokenizer is the first of these, or both of the second.
TOKENIZER_FILES = ((TOKENIZER_FILE,), (VOCAB_FILE, MERGES_FILE))

# Never opened, but named in messages.
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

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

# Settings that change what the model computes and that this engine does not have: refused unless off.
_REFUSED_UNLESS_FALSY = ("add_cross_attention", "is_encoder_decoder", "pruned_heads", "quantization_config")

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
    bos_token_id: int | None = 50256
    eos_token_ids: tuple[int, ...] = (50256,)

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


def read_config(path: Path) -> GPT2Config:
    """Read and check a `config.json`.

    Raises:
        ConfigError: the file is missing, is no JSON object or no GPT-2, or holds a value that cannot be; the message
            names the file and the field.
    """
    fields = read_json_object(path, MAX_CONFIG_BYTES, ConfigError)
    model_type = fields.get("model_type")
    if model_type != "gpt2":
        raise ConfigError(f"{path}: model_type is {_quote(model_type)}; fastgpt2 runs GPT-2 models (model_type 'gpt2')")
    for name in _REFUSED_UNLESS_FALSY:
        if fields.get(name):
            raise ConfigError(f"{path}: {name} is {_quote(fields[name])}; fastgpt2 does not support it")

    reader = _Reader(path, _by_first_names(path, fields))
    n_embd = reader.size("n_embd", 768)
    n_head = reader.size("n_head", 12)
    if n_embd % n_head:
        raise ConfigError(f"{path}: n_embd {n_embd} is not divisible by n_head {n_head}")
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATION_FUNCTIONS:
        known = ", ".join(sorted(ACTIVATION_FUNCTIONS))
        raise ConfigError(f"{path}: activation_function is {_quote(activation)}; known are {known}")
    vocab_size = reader.size("vocab_size", 50257)
    bos = reader.token_ids("bos_token_id", vocab_size)
    return GPT2Config(
        vocab_size=vocab_size,
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
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
    )


def _by_first_names(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, each under its first name; raise ConfigError if two names of one have different values."""
    named = dict(fields)
    for other, name in _OTHER_NAMES:
        if fields.get(other) is None:
            continue
        if named.setdefault(name, fields[other]) != fields[other]:
            raise ConfigError(f"{path}: {name} is {_quote(named[name])}, but {other} is {_quote(fields[other])}")
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

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._checked(name, default, "true or false", lambda value: type(value) is bool))

    def epsilon(self, name: str, default: float) -> float:
        rule = "a number from 0 up to 1"
        return float(self._checked(name, default, rule, lambda value: type(value) in (int, float) and 0 <= value < 1))

    def _checked(self, name: str, default: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
        value = self.fields.get(name, default)
        if not fits(value):
            raise ConfigError(f"{self.path}: {name} is {_quote(value)}; it must be {rule}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Read one id, a list of ids or null. Ids outside the vocabulary cannot occur: dropped, with a warning."""
        value = self.fields.get(name, 50256 if vocab_size > 50256 else None)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool):
                raise ConfigError(f"{self.path}: {name} is {_quote(value)}; it must be an id, a list of ids or null")
        inside = tuple(one for one in ids if 0 <= one < vocab_size)
        if len(inside) < len(ids):
            log.warning("%s: %s is %s, outside the vocabulary of %d: ignored", self.path, name, value, vocab_size)
        return inside


def read_index(path: Path) -> dict[str, str]:
    """Read the `weight_map` of an index file: tensor name -> shard file name, each a plain name in the same folder.

    Raises:
        CheckpointError: the file is malformed, or a shard's name leads out of the folder.
    """
    weight_map = read_json_object(path, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,255}\.safetensors", file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to lie in {repr(file)[:_MAX_QUOTED]}, which is no plain file name"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: lists more than {MAX_SHARDS} files")
    return weight_map


def read_json_object(path: Path, max_bytes: int, error: type[FastGPT2Error]) -> dict[str, Any]:
    """Read a JSON object from a file of at most `max_bytes`; raise `error`, naming the file, if it is anything else."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path}: {size} bytes; a file of this kind has at most {max_bytes}")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object but {_quote(value)}")
    return value


def _quote(value: object) -> str:
    """Return a value as a message shows it: JSON, of bounded length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
