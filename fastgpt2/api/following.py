"""A job's text as it comes, put together from its stream: every character once, whatever was sent twice or lost."""

from __future__ import annotations

import time
from collections import deque

from fastgpt2.api.exchange import Pause, Talk, entries_by_key, read_streams
from fastgpt2.api.outcome import Awaited, Entries, unwrapped
from fastgpt2.api.session import LOOK_SECONDS, WAIT_SLICE_SECONDS, Session, deadline_in
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.worker.names import stream_key
from fastgpt2.worker.stream import Piece, entry_to_piece


class Assembly:
    """The text so far.

    Attributes:
        text: what a reader holds who has taken every piece, and cut the text where one said so.
        attempt: the latest of which something was read, from 1.
    """

    def __init__(self) -> None:
        self.text = ""
        self.attempt = 1

    def add(self, piece: Piece) -> Piece | None:
        """What is new in a piece; None if it is held already, or cannot be placed, as what comes before it was lost."""
        if piece.attempt < self.attempt or piece.at > len(self.text):
            return None
        self.attempt = piece.attempt
        same = 0
        while same < len(piece.text) and self.text[piece.at + same : piece.at + same + 1] == piece.text[same]:
            same += 1
        return self._put(piece.text[same:], piece.at + same) if same < len(piece.text) else None

    def complete(self, text: str) -> Piece | None:
        """What the text still lacks of the whole one; empty text if it has too much."""
        if text == self.text:
            return None
        same = 0
        while same < min(len(text), len(self.text)) and text[same] == self.text[same]:
            same += 1
        return self._put(text[same:], same)

    def _put(self, text: str, at: int) -> Piece:
        self.text = self.text[:at] + text
        return Piece(text, at, self.attempt)


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
            except (KeyError, ValueError):
                continue  # not of ours; what it may have stood for comes with the result
            if piece is None:
                self._look_at = 0.0
            else:
                self._add(self._assembly.add(piece))

    def _end(self, result: GenerationResult) -> None:
        self.result = result
        self._add(self._assembly.complete(result.text))
        self.ended = True

    def _add(self, piece: Piece | None) -> None:
        if piece is not None:
            self._pieces.append(piece)
