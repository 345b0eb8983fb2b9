"""The tokenizer: text to token ids and back, also a token at a time without ever splitting a character."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt2.engine.model.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from fastgpt2.engine.model.tokenizer_files import LoadedTokenizer


class Tokenizer:
    """A byte-level BPE tokenizer (Radford et al. 2019), as the tokenizers library runs it."""

    def __init__(self, loaded: LoadedTokenizer) -> None:
        from tokenizers import processors

        backend = loaded.backend
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.post_processor, processors.ByteLevel):
            # All that this processor could do is to leave spaces out of the tokens' offsets.
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self._backend = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model's folder.

        Raises:
            TokenizerError: there is none, or what is there cannot be read.
        """
        return cls(load_tokenizer(folder))

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def longest_token_bytes(self) -> int:
        """The longest token's length in bytes: a text of n bytes has at least n / longest_token_bytes tokens."""
        added = {content: len(content.encode()) for content in self._added.values()}
        longest = found = 0
        # One at a time: a dictionary of all would leave behind 10 MB in the process that nothing else can use.
        for token_id in range(self.vocab_size):
            token = self._backend.id_to_token(token_id)
            if token is not None:
                found += 1
                longest = max(longest, added.get(token, len(token)))
        if found < self.vocab_size:  # there are gaps in the ids, so that some lie beyond
            longest = max(added.get(token, len(token)) for token in self._backend.get_vocab())
        return max(longest, 1)

    def ids_from(self, first: int) -> list[int]:
        """Return the ids of the tokens from this id on, in their order."""
        candidates = {*range(first, self.vocab_size), *(i for i in self._added if i >= first)}
        return sorted(i for i in candidates if self._backend.id_to_token(i) is not None)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text).ids)

    def offsets(self, text: str) -> list[int]:
        """Return where in the text each token of `encode` begins: the index of the character of its first byte."""
        return [begin for begin, _ in self._backend.encode(text).offsets]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for: b"" for a special token or an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """Return a token for people to read, as in `TokenLogprob.token`."""
        if token_id in self._special:
            return self._added[token_id]
        value = self.token_bytes(token_id)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in value)

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[c] for c in token)
        except KeyError:
            return token.encode()

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


class IncrementalDetokenizer:
    """Turns token ids into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token, and return the text that it completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def unfinished(self) -> bytes:
        """Return the bytes of an unfinished character, which are held back; b"" if there is none."""
        return self._decoder.getstate()[0]

    def breaks_off(self, token_id: int) -> bool:
        """Tell whether this token's first byte cannot continue the unfinished character, which becomes U+FFFD then."""
        if not self.unfinished:
            return False
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.unfinished + self._tokenizer.token_bytes(token_id)[:1])
        except UnicodeDecodeError:
            return True
        return False

    def flush(self) -> str:
        """Return what is left when no token follows: U+FFFD for an unfinished character, else ""."""
        return self._decoder.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable stand-ins for bytes. Source: `bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
