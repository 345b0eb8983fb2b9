"""Detokenizers: the text of token ids as they come, each piece as soon as no later token can change it.

The pieces together are the text that the tokenizer's decoder gives for all ids, as transformers' `decode` does without
special tokens. Behind a prompt, they are what that text has beyond the prompt's own: where a token that follows changes
the end of the prompt's text, the new text begins where the two differ.
"""

from __future__ import annotations

import codecs
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from fastgpt2.engine.text.decoders import UNKNOWN, Stage, count_same

# In UTF-8, no character has more bytes.
MAX_CHARACTER_BYTES = 4


class Detokenizer(ABC):
    """Turns token ids into text as they come. `Tokenizer.detokenizer` makes one that fits the tokenizer."""

    def __init__(self) -> None:
        # The end of the prompt's text that its last tokens have been read as, and that may come out otherwise.
        self._shown = ""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Take the next token, and return the text that it completes."""

    @abstractmethod
    def begin(self, token_id: int) -> int:
        """Return how many characters behind the text so far a token's text begins that comes next.

        A token that goes on with a character begins where the character does.
        """

    @property
    @abstractmethod
    def pending(self) -> str:
        """Return the whole characters that are held back as later tokens may change them."""

    @abstractmethod
    def flush(self) -> str:
        """Return what is left when no token follows; an unfinished character has become U+FFFD."""

    def _beyond_prompt(self, piece: str) -> str:
        """Return what of a piece was not in the prompt's text already."""
        same = count_same(self._shown, piece)
        self._shown = self._shown[same:] if same == len(piece) else ""
        return piece[same:]


class ByteDetokenizer(Detokenizer):
    """The detokenizer of byte-level tokens, which holds back the bytes of an unfinished character.

    Args:
        token_bytes: the function that gives a token's bytes.
        prompt_ids: the tokens before the first, whose text is not given.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], prompt_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = b""
        for token_id in reversed(prompt_ids):
            last = token_bytes(token_id) + last
            if len(last) >= MAX_CHARACTER_BYTES:
                break
        self._decoder.decode(last[-MAX_CHARACTER_BYTES:])
        if self.unfinished:
            self._shown = UNKNOWN

    def push(self, token_id: int) -> str:
        piece = self._decoder.decode(self._token_bytes(token_id))
        return self._beyond_prompt(piece) if self._shown and piece else piece

    def begin(self, token_id: int) -> int:
        # A character that is broken off becomes U+FFFD. If the prompt began that character, its text has the U+FFFD.
        return 1 if self.breaks_off(token_id) and not self._shown else 0

    @property
    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        return self._beyond_prompt(self._decoder.decode(b"", final=True))

    @property
    def unfinished(self) -> bytes:
        """Return the bytes of an unfinished character, which are held back; b"" if there is none."""
        return self._decoder.getstate()[0]

    def breaks_off(self, token_id: int) -> bool:
        """Tell whether this token's first byte cannot continue the unfinished character, which becomes U+FFFD then."""
        if not self.unfinished:
            return False
        try:
            codecs.getincrementaldecoder("utf-8")().decode(self.unfinished + self._token_bytes(token_id)[:1])
        except UnicodeDecodeError:
            return True
        return False


class StagedDetokenizer(Detokenizer):
    """The detokenizer of all other tokens, which runs the steps of the tokenizer's decoder.

    Args:
        token_of: the function that gives a token as the decoder takes it, or None for an id that has no text.
        stages: fresh ones; they become the detokenizer's own.
        prompt_ids: the tokens before the first, whose text is not given.
    """

    def __init__(
        self, token_of: Callable[[int], str | None], stages: Sequence[Stage], prompt_ids: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._token_of, self._stages = token_of, stages
        for token_id in prompt_ids:
            self._take(token_id)
        if prompt_ids:
            self._shown = rest(stages)

    def push(self, token_id: int) -> str:
        piece = self._take(token_id)
        return self._beyond_prompt(piece) if self._shown and piece else piece

    def begin(self, token_id: int) -> int:
        ahead = copies(self._stages)
        token = self._token_of(token_id)
        piece = run(ahead, (token,)) if token is not None else ""
        # If nothing comes out, the token may go on with an unfinished character, and begins where that does.
        before = rest(self._stages, only_whole=not piece)
        after = piece + rest(ahead, only_whole=not piece)
        return max(0, count_same(before, after) - count_same(self._shown, after))

    @property
    def pending(self) -> str:
        text = rest(self._stages, only_whole=True)
        return text[count_same(self._shown, text) :]

    def flush(self) -> str:
        return self._beyond_prompt(rest(self._stages))

    def _take(self, token_id: int) -> str:
        token = self._token_of(token_id)
        return run(self._stages, (token,)) if token is not None else ""


def copies(stages: Iterable[Stage]) -> list[Stage]:
    """Return stages with the same state, that go on without changing these."""
    return [copy.copy(stage) for stage in stages]


def run(stages: Iterable[Stage], tokens: Iterable[str]) -> str:
    """Have stages take these tokens, and return the text that is sure now."""
    for stage in stages:
        tokens = [piece for token in tokens for piece in stage.push(token)]
    return "".join(tokens)


def rest(stages: Iterable[Stage], only_whole: bool = False) -> str:
    """Return the text that follows if no token does.

    Args:
        only_whole: leave out what stands for unfinished characters.
    """
    pieces: list[str] = []
    for stage in copies(stages):
        pieces = [piece for token in pieces for piece in stage.push(token)]
        pieces += stage.whole_rest() if only_whole else stage.rest()
    return "".join(pieces)
