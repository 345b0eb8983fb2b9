"""The generation settings that come with a model, as transformers reads them.

`generation_config.json` counts alone where it is there. Where it is not, or is no JSON, the fields of generation in
`config.json` count, and those that are missing there have no default. Source: `adjust_generation_fn` in transformers'
generation/utils.py.

The ids that begin and end a text are applied, and so are least lengths and what requests can ask for too: these are
the options of a request that does not name them. Every other field that changes what transformers generates becomes a
note for people. Nothing here has tokens drawn at random unasked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastgpt2.engine.model.config import CONFIG_FILE, MAX_CONFIG_BYTES, GPT2Config, quote, read_json_object
from fastgpt2.errors import ConfigError

GENERATION_CONFIG_FILE = "generation_config.json"

# The name of the end-of-text token in GPT-2's own vocabulary, where nothing else says what begins a text.
GPT2_END_OF_TEXT_ID = 50256

# What no real file comes near. A check of each token against a longer list would take its time.
MAX_END_IDS = 1024

# The numbers of tokens that a request asks for by default, here and in transformers; not worth a note.
_USUAL_LENGTHS = (None, 20)

# Fields that change greedy text, each with the values that leave it as it is and with what transformers does by it.
# A missing field is None.
_UNAPPLIED: dict[str, tuple[tuple[Any, ...], str]] = {
    "encoder_repetition_penalty": ((1.0,), "make the tokens of the prompt more likely, or less"),
    "encoder_no_repeat_ngram_size": ((0,), "never repeat that many tokens of the prompt in a row"),
    "begin_suppress_tokens": (([],), "not begin with these tokens"),
    "forced_bos_token_id": ((), "take that token first where the prompt is one token"),
    "forced_eos_token_id": ((), "take that token last where the text reaches its greatest length"),
    "exponential_decay_length_penalty": ((), "make the end more likely with each token"),
    "guidance_scale": ((1.0,), "weigh each token against a text without the prompt"),
    "watermarking_config": ((), "mark the text by the choice of its tokens"),
    "token_healing": ((False,), "replace the last token of the prompt"),
    "stop_strings": ((), "end the text with these strings"),
    "max_time": ((), "end the text after that many seconds"),
    "num_beams": ((0, 1), "search with that many beams"),
    "constraints": ((), "search for a text that meets them"),
    "force_words_ids": ((), "search for a text that has these words"),
    "dola_layers": ((), "weigh the logits of the last layer against those of others"),
    "num_return_sequences": ((0, 1), "give that many texts for a prompt"),
}

# What shapes the draw of a request that asks for one, and what does in transformers alone.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_OTHER_SAMPLING = ("top_h", "epsilon_cutoff", "eta_cutoff")

# The numbers among the options that a request has too: their kinds, least and greatest values.
_NUMBERS: dict[str, tuple[Any, float, float]] = {
    "repetition_penalty": (int | float, 0.01, 100.0),
    "no_repeat_ngram_size": (int, 0, 1 << 20),
    "temperature": (int | float, 0.0, 100.0),
    "top_k": (int, 0, (1 << 31) - 1),
    "top_p": (int | float, 0.0, 1.0),
    "min_p": (int | float, 0.0, 1.0),
    "typical_p": (int | float, 0.0, 1.0),
}

# What no real list comes near.
_MAX_LISTED_IDS = 1 << 16


class GenerationConfig(NamedTuple):
    """The settings of generating with a model, as its files have them.

    Attributes:
        bos_token_id: the token from which an empty prompt starts; None if nothing names one.
        eos_token_ids: each of these tokens ends a text. The first stands in for a missing `bos_token_id`.
        min_new_tokens: the tokens that come before an end, for requests that do not say.
        min_length: the same, counted with the prompt's tokens; it counts where `min_new_tokens` is None.
        options: what else a request may ask for, by the names of `GenerationRequest`; for requests that do not.
        notes: sentences for people, each about a setting that is not applied.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int | None = None
    min_length: int = 0
    options: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[str, ...] = ()

    @property
    def start_token_id(self) -> int:
        """Return the token from which an empty prompt starts. In GPT-2 the end of a text begins the next."""
        return self.bos_token_id if self.bos_token_id is not None else [*self.eos_token_ids, 0][0]

    def least_new_tokens(self, prompt_tokens: int) -> int:
        """Return how many tokens come before the one that may end the text of a prompt of `prompt_tokens`."""
        return self.min_length - prompt_tokens if self.min_new_tokens is None else self.min_new_tokens


def read_generation_config(folder: Path, config: GPT2Config, source: str = "auto") -> GenerationConfig:
    """Read the generation settings of a model's folder.

    Args:
        config: the model's configuration, for the size of its vocabulary.
        source: "auto" for what transformers would read; "none" for the ids in `config.json` alone.

    Raises:
        ConfigError: `config.json` cannot be read, or an id or a length is none; the message names file and field.
    """
    notes: list[str] = []
    path, fields = _find_fields(folder, config.vocab_size, source, notes)
    reader = _Reader(path, fields, config.vocab_size, notes)
    begins, ends = reader.token_ids("bos_token_id"), reader.token_ids("eos_token_id")
    if not fields.keys() & {"bos_token_id", "eos_token_id"} and config.vocab_size > GPT2_END_OF_TEXT_ID:
        # transformers generates nothing from an empty prompt then.
        begins = (GPT2_END_OF_TEXT_ID,)
    bos = begins[0] if begins else None
    if source == "none":
        return GenerationConfig(bos, ends, notes=tuple(notes))
    least, length = reader.length("min_new_tokens"), reader.length("min_length") or 0
    options = reader.options(ends)
    reader.note_unapplied()
    return GenerationConfig(bos, ends, least, length, options, tuple(notes))


def _find_fields(folder: Path, vocab_size: int, source: str, notes: list[str]) -> tuple[Path, dict[str, Any]]:
    """Return the file that counts, and its fields."""
    path, instead = folder / GENERATION_CONFIG_FILE, folder / CONFIG_FILE
    if source == "auto" and path.exists():
        try:
            return path, read_json_object(path, MAX_CONFIG_BYTES, ConfigError)
        except ConfigError as reason:  # where it is no JSON, transformers goes on like that too, and without a word
            notes.append(f"{reason}; {CONFIG_FILE} counts in its place")
    if not instead.exists():  # a checkpoint that holds its own configuration
        end = GPT2_END_OF_TEXT_ID if vocab_size > GPT2_END_OF_TEXT_ID else None
        return instead, {"bos_token_id": end, "eos_token_id": end}
    fields = read_json_object(instead, MAX_CONFIG_BYTES, ConfigError)
    if fields.get("force_bos_token_to_be_generated"):  # the old name
        fields["forced_bos_token_id"] = fields.get("bos_token_id")
    return instead, fields


class _Reader:
    """Reads the fields of one file of generation settings, and adds to the notes what is not applied."""

    def __init__(self, path: Path, fields: dict[str, Any], vocab_size: int, notes: list[str]) -> None:
        self._path, self._fields, self._vocab_size, self._notes = path, fields, vocab_size, notes

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Read one id, a list of ids or null. Ids outside the vocabulary cannot occur: left out, with a note."""
        value = self._fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > MAX_END_IDS:
            raise ConfigError(f"{self._path}: {name} lists {len(ids)} ids; {MAX_END_IDS} are the most")
        if not all(isinstance(one, int | float) and not isinstance(one, bool) and one == one // 1 for one in ids):
            raise self._refusal(name, "an id, a list of ids or null")
        inside = tuple(int(one) for one in ids if 0 <= one < self._vocab_size)
        if len(inside) < len(ids):
            outside = f"outside the vocabulary of {self._vocab_size}: ignored"
            self._notes.append(f"{self._path.name}: {name} is {quote(value)}, {outside}")
        return inside

    def length(self, name: str) -> int | None:
        """Read a number of tokens, or null."""
        value = self._fields.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise self._refusal(name, "a whole number or null")
        return value

    def options(self, ends: tuple[int, ...]) -> dict[str, Any]:
        """Read the options that a request has too. One that cannot be is left out, with a note.

        Args:
            ends: the tokens that end a text, which transformers takes out of the words that are banned.
        """
        options = {name: self._fields[name] for name, bounds in _NUMBERS.items() if self._is_number(name, *bounds)}
        words = self._lists_of_ids("bad_words_ids", self._fields.get("bad_words_ids"))
        options["bad_words"] = tuple(
            tuple(word) for word in words if word and word not in [[end] for end in ends] and self._are_inside(word)
        )
        suppressed = self._lists_of_ids("suppress_tokens", [self._fields.get("suppress_tokens") or []])
        options["suppress_tokens"] = tuple(one for ids in suppressed for one in ids if self._are_inside([one]))
        options["logit_bias"] = self._biases()
        return {name: value for name, value in options.items() if value not in ((), {})}

    def _is_number(self, name: str, kind: Any, low: float, high: float) -> bool:
        """Tell whether a field has a number that a request may have too; add a note if it has something else."""
        value = self._fields.get(name)
        if value is None:
            return False
        if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:
            return True
        self._note(name, f"it must be a {'whole ' if kind is int else ''}number from {low:g} to {high:g}")
        return False

    def _lists_of_ids(self, name: str, lists: Any) -> list[list[int]]:
        """Return a value if it is a list of lists of ids, or else an empty one; add a note then."""
        lists = [] if lists is None else lists
        if isinstance(lists, list) and all(isinstance(ids, list) for ids in lists):
            flat = [one for ids in lists for one in ids]
            if len(flat) <= _MAX_LISTED_IDS and all(type(one) is int for one in flat):
                return lists
        self._note(name, f"it must list ids, at most {_MAX_LISTED_IDS}")
        return []

    def _are_inside(self, ids: list[int]) -> bool:
        """Tell whether the vocabulary has all of these ids. A word with another one never occurs."""
        return all(0 <= one < self._vocab_size for one in ids)

    def _biases(self) -> dict[int, float]:
        """Read the biases of single tokens; add a note if there are others."""
        biases = self._fields.get("sequence_bias") or []
        try:
            found = {ids[0]: bias for ids, bias in biases if len(ids) == 1 and ids[0] in range(self._vocab_size)}
            usable = len(found) == len(biases) <= _MAX_LISTED_IDS and all(map(math.isfinite, found.values()))
        except (TypeError, ValueError, KeyError):
            usable = False
        if not usable:
            self._note("sequence_bias", "only single tokens can have a bias here, a finite one")
        return found if usable else {}

    def _refusal(self, name: str, rule: str) -> ConfigError:
        message = f"{self._path}: {name} is {quote(self._fields[name])}; it must be {rule}: correct it"
        aside = ", or leave the file aside by --generation-config none"
        return ConfigError(message + (aside if self._path.name == GENERATION_CONFIG_FILE else ""))

    def note_unapplied(self) -> None:
        """Add a note for each setting that is not applied."""
        get = self._fields.get
        for name, (idle, effect) in _UNAPPLIED.items():
            if get(name) is not None and get(name) not in idle:
                self._note(name, f"transformers would {effect}")
        if get("penalty_alpha") and get("top_k", 50) != 1:
            self._note("penalty_alpha", "transformers would search contrastively")
        if get("do_sample"):
            shape = ", ".join(f"{name} {quote(get(name))}" for name in _SAMPLING if get(name) is not None)
            by = f", by {shape}" if shape else ""
            self._note(
                "do_sample",
                "transformers would draw tokens at random, and fastgpt2 takes the likeliest token, unless a request "
                f"asks for do_sample{by}, or for a temperature of its own",
            )
            for name in _OTHER_SAMPLING:
                if get(name):
                    self._note(name, "transformers would leave unlikely tokens out by it")
        for name in ("max_new_tokens", "max_length"):
            if get(name) not in _USUAL_LENGTHS:
                self._note(name, "a request that names no max_new_tokens gets 20 tokens at most")

    def _note(self, name: str, instead: str) -> None:
        value = quote(self._fields[name])
        aside = f"--generation-config none takes the ids in {CONFIG_FILE} and nothing else"
        self._notes.append(f"{self._path.name}: {name} {value} is not applied: {instead}; {aside}")
