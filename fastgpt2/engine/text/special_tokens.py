"""The special and added tokens of a tokenizer, as the small files beside its vocabulary declare them.

These are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, as all versions of transformers
since 2.0 have written them. Source for the order in which they are believed: `PreTrainedTokenizerBase._from_pretrained`
and `TokenizersBackend.__init__` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fastgpt2.engine.text.bounds import check_added
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    Token: TypeAlias = str | tokenizers.AddedToken

# The order is that in which tokens are added, and so that of the ids of new ones.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_TOKEN_ID = (1 << 31) - 1
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Options:
    """The fields and the tokens that the small files have.

    Attributes:
        values: the fields of `tokenizer_config.json`, with those of `special_tokens_map.json` over them.
        declared: the tokens that the files give an id to.
        by_content: the same by their texts.
        own: special tokens under names that only this model has.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.declared: dict[int, tokenizers.AddedToken] = {}
        self.by_content: dict[str, tokenizers.AddedToken] = {}
        self.own: dict[str, Any] = {}

    def flag(self, name: str, default: bool) -> bool:
        """Return a field that is true or false; null is the default."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise TokenizerError(f"tokenizer_config.json: {name} must be true or false")
        return value

    def number(self, name: str, default: int, limit: int) -> int:
        """Return a field that is a whole number from 0 to `limit`."""
        value = self.values.get(name, default)
        if type(value) is not int or not 0 <= value <= limit:
            raise TokenizerError(f"tokenizer_config.json: {name} must be a whole number from 0 to {limit}")
        return value

    def declare(self, index: object, token: tokenizers.AddedToken) -> None:
        """Note that a token has an id."""
        number = int(index) if isinstance(index, (int, str)) and str(index).isdecimal() else -1
        if not 0 <= number <= MAX_TOKEN_ID:
            given = str(index)[:40].encode("ascii", "backslashreplace").decode()
            raise TokenizerError(f"the added token {token.content[:40]!r} has the id {given}")
        self.declared[number] = token
        self.by_content[token.content] = token


class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        named: token by the name of its part, in the order in which they are added; None where there is none.
        extra: special tokens without such a part.
    """

    def __init__(self, named: dict[str, Token | None], extra: list[Token]) -> None:
        self.named, self.extra = named, extra

    def text(self, name: str) -> str | None:
        """Return the text of the token that plays a part."""
        token = self.named.get(name)
        return None if token is None else str(token)

    def find(self, backend: tokenizers.Tokenizer, name: str) -> int | None:
        """Return the id of the token that plays a part: that of the unknown token if its text has none."""
        text = self.text(name)
        if text is None:
            return None
        index = backend.token_to_id(text)
        unknown = self.text("unk_token")
        return backend.token_to_id(unknown) if index is None and unknown is not None else index

    def pair(self, backend: tokenizers.Tokenizer, name: str, otherwise: int | None = None) -> tuple[str, int]:
        """Return text and id of the token that plays a part, for a post-processor.

        Raises:
            TokenizerError: the token has no id, and there is none to be taken otherwise.
        """
        index = self.find(backend, name)
        index = otherwise if index is None else index
        if index is None:
            text = self.text(name)
            why = "is null" if text is None else f"is {text[:40]!r}, none of its tokens"
            raise TokenizerError(f"the tokenizer's class puts its {name} beside every text, but that {why}")
        return str(self.text(name)), index


def read_options(
    config: dict[str, Any],
    special_map: Mapping[str, Any],
    added: Mapping[str, Any],
    in_tokenizer: Iterable[dict[str, Any]],
) -> Options:
    """Put together what the small files say.

    Args:
        config: `tokenizer_config.json`.
        special_map: `special_tokens_map.json`, {} if there is none.
        added: `added_tokens.json`, {} if there is none.
        in_tokenizer: the list `added_tokens` of `tokenizer.json`.

    Raises:
        TokenizerError: a token is malformed.
    """
    options = Options(dict(config))
    values = options.values
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    options.own = _take_own(values)
    if "added_tokens_decoder" in values:
        for index, token in _mapping(values.pop("added_tokens_decoder"), "added_tokens_decoder").items():
            options.declare(index, added_token(token))
        return options
    _merge_special_map(options, special_map)
    special = {str(values[name]) for name in SPECIAL_NAMES if values.get(name)}
    special.update(map(str, _sequence(values.get("extra_special_tokens"), "extra_special_tokens")))
    for text, index in added.items():
        options.declare(index, added_token(text, special=text in special, normalized=text not in special))
    for token in in_tokenizer:
        options.declare(token.get("id"), added_token(token))
    return options


def _take_own(values: dict[str, Any]) -> dict[str, Any]:
    """Take out of the values the special tokens under names that only this model has."""
    names = [name for name in values if name.endswith("_token") and name not in SPECIAL_NAMES]
    own = {name: values.pop(name) for name in names if isinstance(values[name], str)}
    if isinstance(values.get("extra_special_tokens"), dict):
        own |= values.pop("extra_special_tokens")
    known = values.pop("model_specific_special_tokens", None)
    return own or _mapping(known or {}, "model_specific_special_tokens")


def _merge_special_map(options: Options, special_map: Mapping[str, Any]) -> None:
    for name, value in special_map.items():
        if isinstance(value, dict) and name != "extra_special_tokens":
            value = added_token(value, special=True)
        elif name == "extra_special_tokens" and isinstance(value, list):
            known = list(options.values.get("extra_special_tokens") or [])
            for token in value:
                read = added_token(token, special=True) if isinstance(token, dict) else token
                if read not in known:
                    known.append(read)
            value = known
        options.values[name] = value
    if isinstance(options.values.get("extra_special_tokens"), dict):
        options.own |= options.values.pop("extra_special_tokens")


def collect_special_tokens(
    options: Options, defaults: Mapping[str, str | None], additional: list[Any] | None, mask_strips: bool
) -> SpecialTokens:
    """Return the special tokens that the files name, or that the tokenizer's class has unless they do.

    Args:
        options: what the files say.
        defaults: the class's own tokens.
        additional: the class's further tokens, which count unless the files list such tokens.
        mask_strips: whether the mask token takes the space before it.
    """
    values = options.values
    given = {name: _token(values[name], options.by_content) for name in SPECIAL_NAMES if name in values}
    named: dict[str, Token | None] = {**defaults, **given}
    own_parts = [name for name in defaults if name not in SPECIAL_NAMES]
    named = {name: named.get(name) for name in (*SPECIAL_NAMES, *own_parts)}
    mask = named["mask_token"]
    if mask_strips and isinstance(mask, str):
        named["mask_token"] = added_token(mask, lstrip=True)
    for name, value in values.items():
        if name.endswith("_token") and name not in SPECIAL_NAMES and isinstance(value, dict) and "__type" in value:
            named[name] = _token(value, {})
    named |= {name: _token(value, {}) for name, value in options.own.items()}
    extra = values.get("extra_special_tokens") if "extra_special_tokens" in values else additional
    listed = [_token(token, {}) for token in _sequence(extra, "extra_special_tokens")]
    return SpecialTokens(named, [token for token in listed if token is not None])


def add_tokens(backend: tokenizers.Tokenizer, options: Options, special: SpecialTokens, raw: bool = False) -> None:
    """Add the declared and the special tokens to a tokenizer: known texts keep their ids, new ones come at the end.

    Args:
        backend: the tokenizer.
        options: which has the declared tokens.
        special: the special tokens.
        raw: whether all of them are looked for in the text as it comes, and the special ones by their texts alone.
    """
    tokens: list[Token] = [token for _, token in sorted(options.declared.items())]
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | set(map(str, tokens))
    for token in [*special.named.values(), *special.extra]:
        if token is not None and str(token) not in known and token not in tokens:
            tokens.append(str(token) if raw else token)
    names = {str(token) for token in special.named.values() if token}
    added = []
    for token in tokens:
        if isinstance(token, str):
            token = added_token(token, special=True)
        elif not token.special and str(token) in names:
            token.special = True
        added.append(as_raw(token) if raw else token)
    if added:
        check_added(backend.normalizer, [token.content for token in added if token.normalized])
        backend.add_tokens(added)


def as_raw(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """Return a token that is looked for in the text as it comes, before the text is normalized."""
    from tokenizers import AddedToken

    flags = {name: getattr(token, name) for name in _FLAGS}
    return AddedToken(token.content, **{**flags, "normalized": False})


def added_token(value: object, **flags: bool) -> tokenizers.AddedToken:
    """Return a token as the files write it: its text, or an object with the text and flags."""
    from tokenizers import AddedToken

    fields = value if isinstance(value, dict) else {"content": value}
    content = fields.get("content")
    if not isinstance(content, str):
        raise TokenizerError(f"an added token is {str(value)[:80]!r}; it must be a text, or an object with content")
    stated = {name: fields[name] for name in _FLAGS if isinstance(fields.get(name), bool)}
    return AddedToken(content, **{**stated, **flags})


def _token(value: object, by_content: Mapping[str, tokenizers.AddedToken]) -> Token | None:
    """Return a token, which is the declared one of that text if there is one."""
    from tokenizers import AddedToken

    if value is None:
        return None
    if isinstance(value, (str, AddedToken)):
        token: Token = value
    elif isinstance(value, dict) and "__type" in value:
        token = added_token(value)
    else:
        token = added_token(value, special=True)
    return by_content.get(str(token), token)


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"tokenizer_config.json: {name} must be an object")
    return value


def _sequence(value: object, name: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TokenizerError(f"tokenizer_config.json: {name} must be a list of tokens")
    return value
