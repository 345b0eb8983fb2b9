"""The tokenizer: text to token ids and back, also a token at a time without ever splitting a character."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.text import decoders
from fastgpt2.engine.text.auto_tokenizer import load_tokenizer
from fastgpt2.engine.text.bounds import (
    MAX_TOKEN_CHARACTERS,
    Normalization,
    Step,
    check_decoder,
    check_frame,
    regexes_of,
    split_growth,
    steps_of,
)
from fastgpt2.engine.text.detokenizer import ByteDetokenizer, Detokenizer, StagedDetokenizer, copies, rest, run
from fastgpt2.engine.text.tokenizer_base import END_OF_TEXT
from fastgpt2.errors import BadRequest, TokenizerError

if TYPE_CHECKING:
    from fastgpt2.engine.text.auto_tokenizer import LoadedTokenizer
    from fastgpt2.engine.text.regex_trial import RegexTrial

# What stands for "no bound": a token may stand for a text of any length.
ANY_LENGTH = 1 << 30

# A token before another one, to see what that gives within a text. No vocabulary has it.
_BEFORE = "\uf8ff"

# The field of a sequence of pre-tokenizers.
_SPLITS = "pretokenizers"

_BYTES_AS_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


class Tokenizer:
    """A tokenizer, as the tokenizers library runs it.

    Most are byte-level BPE (Radford et al. 2019), whose tokens are bytes. The text of all others is what the
    tokenizer's own decoder makes of them.

    Attributes:
        bos_token_id: the token with which the tokenizer begins a text, or GPT-2's between two texts; None if there is
            neither.
        eos_token_id: the token with which the tokenizer ends a text, as its files say; None if they name none.
        special_texts: the texts of its special tokens by the names of their parts, as chat templates have them.
        special_tokens: the names of the special tokens by their ids. They are no part of a text.
        notes: sentences for people on what was passed over in the tokenizer's files.
    """

    def __init__(self, loaded: LoadedTokenizer) -> None:
        backend = loaded.backend
        backend.no_truncation()
        backend.no_padding()
        _keep_spaces_in_offsets(backend)
        self._backend, self.notes = backend, loaded.notes
        normalizer, splits = steps_of(backend.normalizer, "normalizers"), steps_of(backend.pre_tokenizer, _SPLITS)
        self._split_growth = split_growth(splits)
        self._trial = _trial_for(backend, [*normalizer, *splits])
        bos = loaded.bos_token_id
        self.bos_token_id: int | None = bos if bos is not None else backend.token_to_id(END_OF_TEXT)
        self.eos_token_id, self.special_texts = loaded.eos_token_id, loaded.special_texts
        added = backend.get_added_tokens_decoder()
        raw_tokens = [token.content for token in added.values() if not token.normalized]
        self._normalization = Normalization(normalizer, raw_tokens)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
        # The vocabulary may have a token of such a name under another id too, which the library takes for special.
        self._special_names = frozenset(self.special_tokens.values())
        # A token that takes spaces beside it along stands for a text of any length.
        self._takes_spaces = any(token.lstrip or token.rstrip for token in added.values())
        self._cleans_up, self._bytes_alone = loaded.clean_up, loaded.bytes_alone
        self._is_byte_level = decoders.is_byte_level(backend.decoder)
        # Where tokens are bytes and nothing else is to be done, a table of bytes is enough.
        self._needs_stages = not self._is_byte_level or loaded.clean_up
        self._stages = decoders.stages_of(backend.decoder, loaded.bytes_alone) if self._needs_stages else []
        if loaded.clean_up:
            self._stages += decoders.clean_up_stages()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model's folder.

        Raises:
            TokenizerError: there is none, or what is there cannot be read.
        """
        loaded = load_tokenizer(folder)
        remedy = "correct its files, or give a tokenizer by --tokenizer ID|PATH"
        try:
            tokenizer = cls(loaded)
            tokenizer.try_out()
        except TokenizerError as reason:
            raise TokenizerError(f"{folder}: {reason}; {remedy}") from None
        except BaseException as reason:
            if not decoders.is_library_failure(reason):
                raise
            raise TokenizerError(
                f"{folder}: not a tokenizer that can be used ({decoders.said(reason)}); {remedy}"
            ) from None
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token_bytes(self) -> int:
        """Return the most bytes that a token stands for: a text of n bytes has at least n / longest_token_bytes tokens.

        `ANY_LENGTH` where there is no bound: a tokenizer may drop characters, or take a whole word for one unknown
        token.
        """
        if not self._keeps_every_byte():
            return ANY_LENGTH
        added = set(self._added.values())

        def size(token: str) -> int:
            # A byte-level token has a character for each byte. Any other has at least the bytes that it stands for.
            return len(token) if self._is_byte_level and token not in added else len(token.encode())

        longest = found = 0
        # One at a time: a dictionary of all would leave behind 10 MB in the process that nothing else can use.
        for token_id in range(self.vocab_size):
            token = self._backend.id_to_token(token_id)
            if token is not None:
                found += 1
                longest = max(longest, size(token))
        if found < self.vocab_size:  # there are gaps in the ids, so that some lie beyond
            longest = max(map(size, self._backend.get_vocab()))
        return max(longest, 1)

    @property
    def has_fixed_bytes(self) -> bool:
        """Tell whether the text that tokens give behind others is their `token_bytes`, one after the other."""
        return not self._needs_stages or all(stage.is_fixed for stage in self._stages)

    def continues(self, prompt_ids: Sequence[int]) -> bool:
        """Tell whether tokens behind a prompt give their `token_bytes`: some decoders treat a text's first otherwise.

        So do some where the prompt ends with a part of a character. This is for tokenizers with fixed bytes.
        """
        if not self._needs_stages:
            return True
        return all(self._follows(prompt_ids, token_id) for token_id in self._probes)

    @cached_property
    def _probes(self) -> list[int]:
        """Return tokens that show whether a text has begun: one with a space in front, and one that is a byte."""
        ids = range(self.vocab_size)
        spaced = next((i for i in ids if re.fullmatch(rb" [a-z]+", self.token_bytes(i))), None)
        byte = next((i for i in ids if decoders.byte_of(self.token(i) or "") == b"\n"), None)
        return [token_id for token_id in (spaced, byte) if token_id is not None]

    def _follows(self, prompt_ids: Sequence[int], token_id: int) -> bool:
        detokenizer = self.detokenizer(prompt_ids)
        return (detokenizer.push(token_id) + detokenizer.flush()).encode() == self.token_bytes(token_id)

    def ids_from(self, first: int) -> list[int]:
        """Return the ids of the tokens from this id on, in their order."""
        candidates = {*range(first, self.vocab_size), *(i for i in self._added if i >= first)}
        return sorted(i for i in candidates if self._backend.id_to_token(i) is not None)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            BadRequest: the tokenizer has no token for some of the text, nor one for what is unknown.
        """
        return list(self._encode(text).ids)

    def encode_last(self, text: str, most: int | None) -> tuple[list[int], bool]:
        """Return the last token ids of a text, at most `most` if that is a number, and whether there were more.

        Those that the tokenizer puts around every text stay, and count: transformers' tokenizers truncate at the left
        side in this way.

        Raises:
            BadRequest: as `encode` does.
        """
        encoding = self._encode(text)
        ids: list[int] = list(encoding.ids)
        if most is None or len(ids) <= most:
            return ids, False
        dropped = len(ids) - most
        mask = encoding.special_tokens_mask  # 1 for the tokens around a text, 0 for its own
        if mask.count(0) < dropped:
            return ids[-most:], True
        begin = mask.index(0)
        return ids[:begin] + ids[begin + dropped :], True

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens below which no text of that length stays."""
        return -(-len(text.encode()) // self.longest_token_bytes)

    def encode_part(self, text: str) -> list[int]:
        """Return the token ids of a part of a text, without the tokens that the tokenizer puts around a whole one.

        Raises:
            BadRequest: as `encode` does.
        """
        return list(self._encode(text, whole=False).ids)

    def offsets(self, text: str) -> list[int]:
        """Return where in the text each token of `encode` begins: the index of the character of its first byte.

        A token that stands for none of the text, as one that the tokenizer puts before or behind it, begins where the
        token before it ends.
        """
        offsets, behind = [], 0
        for begin, end in self._encode(text).offsets:
            offsets.append(begin if begin < end else behind)
            behind = max(behind, end)
        return offsets

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary has it; None for one without a text: a special, a huge or no token."""
        token = self._name(token_id)
        if token is None or token in self._special_names or len(token) > MAX_TOKEN_CHARACTERS:
            return None
        return token

    def is_special(self, token_id: int) -> bool:
        """Tell whether a token is a special one, which is no part of a text."""
        return self._name(token_id) in self._special_names

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within a text: b"" for a special token or an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """Return a token for people to read, as in `TokenLogprob.token`."""
        name = self._name(token_id)
        if name is not None and name in self._special_names:
            return name
        value = self.token_bytes(token_id)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in value)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        if not self._needs_stages:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        tokens = [token for token in map(self.token, ids) if token is not None]
        decoder = self._backend.decoder
        if self._bytes_alone:
            stages = copies(self._stages)
            return run(stages, tokens) + rest(stages)
        text = " ".join(tokens) if decoder is None else decoders.run_decoder(decoder, tokens)
        return decoders.clean_up(text) if self._cleans_up else text

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Return what turns token ids into text as they come, of the tokens that follow `prompt_ids`."""
        if not self._needs_stages:
            return ByteDetokenizer(self.token_bytes, prompt_ids)
        return StagedDetokenizer(self.token, copies(self._stages), prompt_ids)

    def _name(self, token_id: int) -> str | None:
        name: str | None = self._added.get(token_id) or self._backend.id_to_token(token_id)
        return name

    def try_out(self) -> None:
        """Encode and decode short texts, so that what fails for every text is known when the tokenizer is loaded.

        Raises:
            TokenizerError: one of its steps may take a text beyond every bound.
            BaseException: a panic of the library's.
        """
        check_frame(steps_of(self._backend.post_processor, "processors"))
        decoder = steps_of(self._backend.decoder, "decoders")
        check_decoder(decoder)
        # In each step tokens are decoded, and no process could try all of them.
        regex = _find_harmful(regexes_of(decoder))
        if regex is not None:
            raise TokenizerError(f"its decoder has a regular expression that may take any time, {regex[:40]!r}")
        for text in ("", " A b"):
            if objection := self._normalization.objection(text, "the shortest text", self._split_growth):
                raise TokenizerError(objection)
            try:
                self._backend.encode(text)
            except Exception:  # it may have no token for these characters
                continue

    def _encode(self, text: str, whole: bool = True) -> Any:
        what = f"this {'prompt' if whole else 'text'}"
        try:
            if objection := self._normalization.objection(text, what, self._split_growth):
                raise BadRequest(f"{objection}: shorten it, or give token ids")
            if self._trial is not None:
                self._trial.run(text, what)
            return self._backend.encode(text, add_special_tokens=whole)
        except BadRequest:
            raise
        except BaseException as reason:
            if not decoders.is_library_failure(reason):
                raise
            raise BadRequest(
                f"the tokenizer cannot encode {what} ({decoders.said(reason)}): leave out characters that it does "
                "not know, or give token ids"
            ) from None

    def _look_up(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return decoders.bytes_of(token)
        byte = decoders.byte_of(token)
        if byte is not None and any(
            isinstance(stage, decoders.BytesOfTokens | decoders.BytesAlone) for stage in self._stages
        ):
            return byte
        stages = copies(self._stages)
        before = run(stages, (_BEFORE,))
        alone = before + rest(stages)
        return (before + run(stages, (token,)) + rest(stages)).removeprefix(alone).encode()

    def _keeps_every_byte(self) -> bool:
        """Tell whether each byte of a text surely becomes a part of a token.

        That is so for BPE with a token for each byte, if nothing before it takes text away. A normalizer may, but for
        the one of sentencepiece's kind that puts something before the text, or for spaces.
        """
        if self._takes_spaces or type(self._backend.model).__name__ != "BPE":
            return False
        if not all(map(_only_adds, steps_of(self._backend.normalizer, "normalizers"))):
            return False
        splits = steps_of(self._backend.pre_tokenizer, _SPLITS)
        if not all(map(_only_splits, splits)):
            return False
        if any(part["type"] == "ByteLevel" for part in splits):
            tokens: Sequence[str] = decoders.CHARACTERS_OF_BYTES
        elif self._backend.model.byte_fallback:
            tokens = _BYTES_AS_TOKENS
        else:
            return False
        return all(self._backend.token_to_id(token) is not None for token in tokens)


def _trial_for(backend: Any, steps: list[Step]) -> RegexTrial | None:
    """Return the trial that a tokenizer's prompts need, which has no process yet; None if they need none."""
    if _find_harmful(regexes_of(steps)) is None:
        return None
    from fastgpt2.engine.text.regex_trial import RegexTrial

    return RegexTrial(backend)


def _find_harmful(regexes: list[str]) -> str | None:
    """Return the first regular expression that may take any time; None if there is none."""
    if not regexes:  # as in most tokenizers, which do not wait for the module
        return None
    from fastgpt2.engine.text.regex_trial import is_harmless

    return next((regex for regex in regexes if not is_harmless(regex)), None)


def _only_adds(part: Step) -> bool:
    """Tell whether a step of a normalizer makes no text shorter, in bytes."""
    match part:
        case {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(content.encode()) >= len(pattern.encode())
    return False


def _only_splits(part: Step) -> bool:
    """Tell whether a step of a pre-tokenizer takes nothing of the text away."""
    match part:
        case {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
    return False


def _keep_spaces_in_offsets(backend: Any) -> None:
    """Have no post-processor leave spaces out of the tokens' offsets."""
    processor = backend.post_processor
    if processor is None:
        return
    state = processor.__getstate__()
    kept = state.replace(b'"trim_offsets":true', b'"trim_offsets":false')
    if kept != state:
        processor.__setstate__(kept)
        backend.post_processor = processor
