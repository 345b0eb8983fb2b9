"""A job's text as it comes, put together from its stream: every character, and every log probability, once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

from fastgpt2.api.client.flow import Pause, Talk, entries_by_key, read_streams
from fastgpt2.api.client.outcome import Awaited, Entries, unwrapped
from fastgpt2.api.client.session import LOOK_SECONDS, WAIT_SLICE_SECONDS, Session, deadline_in
from fastgpt2.engine.decoding.records import GenerationResult, TokenLogprob
from fastgpt2.protocol.keys import stream_key
from fastgpt2.protocol.messages import Piece, entry_to_piece

# A token's id, and where in the text it begins.
Token: TypeAlias = tuple[int, int]


class Assembly:
    """The text so far, and the tokens whose log probabilities have been given.

    Attributes:
        text: what a reader holds who has taken every piece, and cut the text where one said so.
        attempt: the latest of which something was read, from 1.
    """

    def __init__(self) -> None:
        self.text = ""
        self.attempt = 1
        self._tokens: list[Token] = []

    def add(self, piece: Piece) -> Piece | None:
        """What is new in a piece; None if it is held already, or cannot be placed, as what comes before it was lost."""
        if piece.attempt < self.attempt or piece.at > len(self.text):
            return None
        self.attempt = piece.attempt
        same = _held(self.text, piece.at, piece.text)
        # Nothing new is to be put behind all that is held, which cuts nothing off.
        text, at = (piece.text[same:], piece.at + same) if same < len(piece.text) else ("", len(self.text))
        known = _held(self._tokens, piece.token_at, _tokens(piece.logprobs))
        logprobs, token_at = piece.logprobs[known:], piece.token_at + known
        if not logprobs or token_at > len(self._tokens):
            logprobs, token_at = (), len(self._tokens)
        return self._put(text, at, logprobs, token_at) if text or logprobs else None

    def complete(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Piece | None:
        """What the text and the tokens that begin in it still lack of the whole; empty text if there is too much."""
        told = tuple(one for one in logprobs if one.text_offset < len(text))
        tokens = _tokens(told)
        if text == self.text and tokens == self._tokens:
            return None
        same, known = _held(self.text, 0, text), _held(self._tokens, 0, tokens)
        return self._put(text[same:], same, told[known:], known)

    def _put(self, text: str, at: int, logprobs: tuple[TokenLogprob, ...], token_at: int) -> Piece:
        self.text = self.text[:at] + text
        self._tokens[token_at:] = _tokens(logprobs)
        return Piece(text, at, self.attempt, logprobs, token_at)


def _tokens(logprobs: Sequence[TokenLogprob]) -> list[Token]:
    """What tells tokens apart: their log probabilities are another machine's in the last digits."""
    return [(one.token_id, one.text_offset) for one in logprobs]


def _held(held: Sequence[object], at: int, new: Sequence[object]) -> int:
    """How many of the first of `new` are what is held from `at` on."""
    same = 0
    while same < min(len(new), len(held) - at) and held[at + same] == new[same]:
        same += 1
    return same


class Following:
    """The reading of one job's stream until its end.

    Attributes:
        result: once there.
        ended: nothing more will come.
    """

    def __init__(self, session: Session, job_id: str, timeout: float | None) -> None:
        self.job_id = job_id
        self.result: GenerationResult | None = None
        self.ended = False
        self._session = session
        self._timeout, self._deadline = timeout, deadline_in(timeout)
        self._job = Awaited(job_id)
        self._stream = stream_key(job_id)
        self._after: bytes | str = "0-0"
        self._assembly = Assembly()
        self._look_at = 0.0
        self._pieces: deque[Piece] = deque()

    def next(self) -> Talk[Piece | None]:
        """The next piece, or None at the end. Raises what `Session.result` raises."""
        while not self._pieces and not self.ended:
            try:
                yield from self._read()
            except BaseException:
                self.ended = True
                raise
        return self._pieces.popleft() if self._pieces else None

    def _read(self) -> Talk[None]:
        contact, job = self._session.contact, self._job
        now = time.monotonic()
        if now >= self._look_at:
            answers = yield from contact.patiently(job.look(), self._deadline)
            outcome = job.seen(answers, time.monotonic())
            if outcome is not None:
                self._end(unwrapped(outcome))
                return
            self._look_at = time.monotonic() + WAIT_SLICE_SECONDS
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise (yield from self._session.timed_out(self.job_id, self._timeout))
        if job.letting_go:
            self._look_at = 0.0
            yield Pause(min(LOOK_SECONDS, left))
            return
        read = read_streams({self._stream: self._after, job.key: job.after}, min(WAIT_SLICE_SECONDS, left))
        reply = entries_by_key((yield from contact.patiently(read, self._deadline)))
        if not reply:
            self._look_at = 0.0
        self._take(reply.get(self._stream, []))
        news = reply.get(job.key, [])
        outcome = job.heard(news)
        if outcome is not None:
            self._end(unwrapped(outcome))
        elif news:
            self._look_at = 0.0

    def _take(self, entries: Entries) -> None:
        for entry_id, fields in entries:
            self._after = entry_id
            try:
                piece = entry_to_piece(fields)
            except (KeyError, TypeError, ValueError):
                continue  # not of ours; what it may have stood for comes with the result
            if piece is None:
                self._look_at = 0.0
            else:
                self._add(self._assembly.add(piece))

    def _end(self, result: GenerationResult) -> None:
        self.result = result
        self._add(self._assembly.complete(result.text, result.logprobs or ()))
        self.ended = True

    def _add(self, piece: Piece | None) -> None:
        if piece is not None:
            self._pieces.append(piece)
