"""The options by which a request says how its tokens are chosen: their checks, bounds and schemas. Nothing heavy here.

The names are those of transformers' `GenerationConfig` where there is one, else OpenAI's or vLLM's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeAlias

from fastgpt2.errors import BadRequest
from fastgpt2.fields import Field, described, is_listed, items_of, plain, real, refusal, shown, whole, why_no_json

# Far beyond any vocabulary. The decoder refuses an id that its own model does not have.
MAX_TOKEN_ID = (1 << 31) - 1

# The limit of n and best_of: as many as OpenAI's API takes.
MAX_TEXTS = 128
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0
MAX_NGRAM = 1 << 20

# OpenAI's own bounds.
MAX_PENALTY = 2.0
MAX_BIAS = 100.0

# OpenAI's limit is 300 entries.
MAX_BIASED_TOKENS = 1024
MAX_SUPPRESSED_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 256

MAX_GUIDED_CHOICES = 256
MAX_CHOICE_CHARACTERS = 1024
MAX_REGEX_CHARACTERS = 8192
MAX_SCHEMA_CHARACTERS = 1 << 16

BadWord: TypeAlias = str | tuple[int, ...]


def check_token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Return the items of a list, all of which must be token ids. The list's length is bounded by the caller."""
    checked = tuple(items_of(ids))
    if not set(map(type, checked)) <= {int}:
        checked = tuple([_token_id(name, token_id) for token_id in checked])
    if checked and not (min(checked) >= 0 and max(checked) <= MAX_TOKEN_ID):
        wrong = next(token_id for token_id in checked if not 0 <= token_id <= MAX_TOKEN_ID)
        raise BadRequest(f"{name} holds {shown(wrong)}, which is no token id")
    return checked


def _token_id(name: str, value: Any) -> int:
    found = plain(value)
    if type(found) is float and found.is_integer():
        return int(found)
    if type(found) is not int:
        raise BadRequest(f"{name}, a list, must hold token ids, not {described(value)}")
    return found


def token_ids_field(most: int) -> Field:
    """Describe a list of at most `most` token ids."""
    schema = {"type": "array", "items": whole(0, MAX_TOKEN_ID).schema, "maxItems": most}
    return Field(schema, partial(_check_list_of_ids, most))


def _check_list_of_ids(most: int, name: str, ids: Any) -> tuple[int, ...]:
    if not is_listed(ids):
        raise refusal(name, "a list of token ids", ids, of_type=True)
    if len(ids) > most:
        raise BadRequest(f"{name} holds {len(ids)} token ids; the limit is {most}")
    return check_token_ids(name, ids)


def _check_logit_bias(name: str, bias: Any) -> dict[int, float]:
    # The keys of JSON's objects are strings.
    if not isinstance(bias, Mapping):
        raise refusal(name, "an object of token ids, each with its bias", bias, of_type=True)
    if len(bias) > MAX_BIASED_TOKENS:
        raise BadRequest(f"{name} holds {len(bias)} token ids; the limit is {MAX_BIASED_TOKENS}")
    checked = {}
    for key, value in bias.items():
        token_id = _id_of_key(plain(key))
        if token_id is None or not 0 <= token_id <= MAX_TOKEN_ID:
            raise BadRequest(f"{name} holds {shown(key)}, which is no token id")
        checked[token_id] = float(_BIAS.check(f"{name} of token {token_id}", value))
    return checked


def _id_of_key(key: Any) -> int | None:
    """Return the whole number that a key is, as a number or a string; None if it is none."""
    if isinstance(key, str):
        return int(float(key)) if re.fullmatch(_ID_OF_KEY, key) else None
    if type(key) is float and key.is_integer():
        return int(key)
    return key if type(key) is int else None


def _check_bad_words(name: str, words: Any) -> tuple[BadWord, ...]:
    if not is_listed(words):
        raise refusal(name, "a list of strings or of lists of token ids", words, of_type=True)
    if len(words) > MAX_BAD_WORDS:
        raise BadRequest(f"{name} holds {len(words)} words; the limit is {MAX_BAD_WORDS}")
    checked: list[BadWord] = []
    for given in items_of(words):
        word = plain(given)
        if not isinstance(word, str) and not is_listed(word):
            raise BadRequest(f"{name} must hold strings or lists of token ids, not {described(word)}")
        kind = "characters" if isinstance(word, str) else "tokens"
        if not 1 <= len(word) <= MAX_BAD_WORD_LENGTH:
            raise BadRequest(f"{name} must hold words of 1 to {MAX_BAD_WORD_LENGTH} {kind}, not of {len(word)}")
        checked.append(_in_unicode(name, word) if isinstance(word, str) else check_token_ids(name, word))
    return tuple(checked)


def _check_choices(name: str, choices: Any) -> tuple[str, ...]:
    if not is_listed(choices):
        raise refusal(name, "a list of strings", choices, of_type=True)
    if len(choices) > MAX_GUIDED_CHOICES:
        raise BadRequest(f"{name} holds {len(choices)} strings; the limit is {MAX_GUIDED_CHOICES}")
    if not len(choices):
        raise BadRequest(f"{name} is an empty list: give a string, or leave {name} out")
    checked = tuple(map(plain, items_of(choices)))
    for choice in checked:
        if not isinstance(choice, str):
            raise BadRequest(f"{name} must hold strings, not {described(choice)}")
        if not 1 <= len(choice) <= MAX_CHOICE_CHARACTERS:
            raise BadRequest(
                f"{name} must hold strings of 1 to {MAX_CHOICE_CHARACTERS} characters, not of {len(choice)}"
            )
        _in_unicode(name, choice)
    return checked


def _check_regex(name: str, value: Any) -> str:
    regex = plain(value)
    if not isinstance(regex, str):
        raise refusal(name, "a string", regex, of_type=True)
    if not 1 <= len(regex) <= MAX_REGEX_CHARACTERS:
        raise BadRequest(f"{name} must have 1 to {MAX_REGEX_CHARACTERS} characters, not {len(regex)}")
    return _in_unicode(name, regex)


def _check_json_schema(name: str, schema: Any) -> str:
    """Return a JSON schema, an object, true or false, or the JSON text of one, as JSON text."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else plain(schema)
        written = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as reason:
        raise BadRequest(
            f"{name} is no JSON schema ({why_no_json(reason)[:100]}): give an object, or the JSON text of one"
        ) from None
    if not isinstance(value, dict | bool):
        raise refusal(name, "a JSON schema: an object", value, of_type=True)
    if len(written) > MAX_SCHEMA_CHARACTERS:
        raise BadRequest(f"{name} has {len(written)} characters of JSON; the limit is {MAX_SCHEMA_CHARACTERS}")
    return _in_unicode(name, written)


def _in_unicode(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X}") from None
    return text


# As strings, the keys of JSON's objects too may read 7.0 where 7 is meant.
_ID_OF_KEY = r"[0-9]{1,10}(\.0{1,10})?"
_BIAS = real(-MAX_BIAS, MAX_BIAS)
_LOGIT_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": f"^{_ID_OF_KEY}$"},
    "additionalProperties": _BIAS.schema,
    "maxProperties": MAX_BIASED_TOKENS,
}
_WORD_SCHEMAS = [
    {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_LENGTH},
    {**token_ids_field(MAX_BAD_WORD_LENGTH).schema, "minItems": 1},
]
_BAD_WORDS_SCHEMA = {"type": "array", "items": {"anyOf": _WORD_SCHEMAS}, "maxItems": MAX_BAD_WORDS}
_CHOICE_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_CHOICE_CHARACTERS}
_CHOICES_SCHEMA = {"type": "array", "items": _CHOICE_SCHEMA, "minItems": 1, "maxItems": MAX_GUIDED_CHOICES}
_REGEX_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_REGEX_CHARACTERS}
_ANY_OBJECT = {"type": "object", "additionalProperties": True}
_JSON_SCHEMA_SCHEMA = {"anyOf": [_ANY_OBJECT, {"type": "boolean"}, {"type": "string"}]}

Temperature = Annotated[float, real(0.0, MAX_TEMPERATURE)]
TopK = Annotated[int, whole(-1, MAX_TOKEN_ID)]
Share = Annotated[float, real(0.0, 1.0)]
Seed = Annotated[int, whole(-(1 << 63), (1 << 64) - 1)]
Texts = Annotated[int, whole(1, MAX_TEXTS)]
ChoiceIndex = Annotated[int, whole(0, MAX_TOKEN_ID)]
RepetitionPenalty = Annotated[float, real(0.01, MAX_REPETITION_PENALTY)]
NgramSize = Annotated[int, whole(0, MAX_NGRAM)]
Penalty = Annotated[float, real(-MAX_PENALTY, MAX_PENALTY)]
LogitBias = Annotated[Mapping[int, float], Field(_LOGIT_BIAS_SCHEMA, _check_logit_bias)]
BadWords = Annotated[tuple[BadWord, ...], Field(_BAD_WORDS_SCHEMA, _check_bad_words)]
SuppressTokens = Annotated[tuple[int, ...], token_ids_field(MAX_SUPPRESSED_TOKENS)]
GuidedChoices = Annotated[tuple[str, ...], Field(_CHOICES_SCHEMA, _check_choices)]
Regex = Annotated[str, Field(_REGEX_SCHEMA, _check_regex)]
JSONSchema = Annotated[Mapping[str, Any] | bool | str, Field(_JSON_SCHEMA_SCHEMA, _check_json_schema)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """The options of a text: how its tokens are chosen, how many texts there are, and which form they have.

    Args:
        do_sample: draw each token at random, by its probability. None draws if `temperature` is above 0; True without a
            temperature takes the model's own, or 1; False takes the likeliest token whatever the temperature.
        temperature: divides the scores before a token is drawn: below 1, likely tokens become likelier. 0 or None takes
            the likeliest token. The next five shape the draw, and do nothing where nothing is drawn.
        top_k: draw one of the k likeliest tokens; 0 or -1 for all.
        top_p: draw one of the likeliest tokens that together have this probability (nucleus sampling, Holtzman et al.
            2020).
        min_p: draw one of the tokens that have at least this share of the likeliest token's probability (Nguyen et al.
            2024).
        typical_p: draw one of the tokens whose surprise is nearest the expected one, which together have this
            probability (locally typical sampling, Meister et al. 2023).
        seed: the random number of a token is a function of the seed, the text's index and the token's place in the
            text, and of nothing else. None takes a new seed, which the result tells.
        n: give this many texts, each with its own index. The prompt is read once.
        best_of: generate this many texts, and give the `n` whose mean log probability a token is highest, the best
            first.
        choice_index: the index of the first text; the others follow. One text with index i is the text i of several.
        repetition_penalty: divides the scores of tokens that the prompt or the text has, or multiplies them where they
            are negative (CTRL, Keskar et al. 2019). 1 does nothing.
        no_repeat_ngram_size: never repeat this many tokens in a row, of the prompt or the text. 0 does nothing.
        presence_penalty: is subtracted from the scores of the tokens that the text has, the prompt apart.
        frequency_penalty: is subtracted from a token's score once for each time that the text has the token.
        logit_bias: is added to the scores of these tokens, by their ids.
        bad_words: never generate these: strings, alone or behind a space, or lists of token ids.
        suppress_tokens: never generate these tokens.
        choices: the text is one of these strings: the one to which the likeliest allowed tokens lead.
        regex: the text matches this regular expression as a whole.
        json_schema: the text is JSON that this JSON schema describes.

    None, for an option, is what the model's `generation_config.json` says, if it says something, and else nothing.
    """

    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    seed: Seed | None = None
    n: Texts = 1
    best_of: Annotated[Texts | None, "As many as n by default."] = None
    choice_index: ChoiceIndex = 0
    repetition_penalty: RepetitionPenalty | None = None
    no_repeat_ngram_size: NgramSize | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    bad_words: BadWords | None = None
    suppress_tokens: SuppressTokens | None = None
    choices: GuidedChoices = ()
    regex: Regex | None = None
    json_schema: JSONSchema | None = None

    @property
    def samples(self) -> bool:
        """Tell whether tokens are drawn at random."""
        return bool(self.temperature) if self.do_sample is None else self.do_sample and self.temperature != 0

    @property
    def guided(self) -> bool:
        """Tell whether the text has to have a form."""
        return bool(self.choices) or self.regex is not None or self.json_schema is not None

    @property
    def texts(self) -> int:
        """Return how many texts are generated, of which `n` are given."""
        return self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """Tell whether the best of more texts are given."""
        return self.texts > self.n
