"""The reading of HTTP/1.1 on one connection: h11's, with bounds on heads, and nothing that two readers may read apart.

A proxy before the endpoint and the endpoint must agree where a request ends. Otherwise the rest of one request is taken
for another one (request smuggling). So what has no single meaning is refused, and the connection closed behind it.
Source: RFC 9112, 2.3, 5.2, 6.1 and 6.3.
"""

from __future__ import annotations

import re

import h11

# The limit for the fields of a head, and of the trailer of a body in chunks.
MAX_FIELDS = 100

_VERSIONS = (b"1.0", b"1.1")
_FOLDED_LINE = re.compile(rb"\n[ \t]")


class Parser(h11.Connection):
    """h11's reader of requests, which refuses more.

    Args:
        max_head_bytes: the limit for a request's line and fields together, and for a trailer.

    Attributes:
        refusal: why nothing more is read from this connection; None while it is in order.
        target: what the latest request asked for.
    """

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._max_head_bytes = max_head_bytes
        self.refusal: h11.RemoteProtocolError | None = None
        self.target = b""

    @property
    def has_begun(self) -> bool:
        """Tell whether bytes have come that are not read yet, as those of a head that is not whole."""
        return bool(self.trailing_data[0])

    @property
    def is_in_midst(self) -> bool:
        """Tell whether something has begun to come whose rest is missing: a head, or a body that was answered early."""
        return self.has_begun or self.their_state is h11.SEND_BODY

    def next_event(self) -> type[h11.NEED_DATA | h11.PAUSED] | h11.Event:
        """Return what comes next, as h11 does.

        Raises:
            RemoteProtocolError: it is refused; `refusal` is the same error.
        """
        if self.refusal is not None:
            raise self.refusal
        waiting = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.target = event.target
                self._check_head(waiting[: len(waiting) - len(self.trailing_data[0])], event)
            elif isinstance(event, h11.EndOfMessage):
                self._check_size(sum(len(name) + len(value) for name, value in event.headers), len(event.headers))
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check_head(self, head: bytes, request: h11.Request) -> None:
        self._check_size(len(head), len(request.headers))
        if request.http_version not in _VERSIONS:
            version = request.http_version.decode("ascii")
            raise h11.RemoteProtocolError(f"HTTP/{version} is not spoken here, HTTP/1.1 is", error_status_hint=505)
        if _FOLDED_LINE.search(head):
            raise h11.RemoteProtocolError("a field is folded over two lines")
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names:
            if b"content-length" in names:
                raise h11.RemoteProtocolError("there are both Transfer-Encoding and Content-Length; leave one out")
            if request.http_version == b"1.0":
                raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")

    def _check_size(self, size: int, fields: int) -> None:
        if size > self._max_head_bytes or fields > MAX_FIELDS:
            raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)

    @property
    def objection(self) -> tuple[int, str]:
        """Return the status and the sentence that answer what was refused."""
        assert self.refusal is not None
        status = self.refusal.error_status_hint
        if status == 431:
            return status, (
                f"the head of a request may have {self._max_head_bytes} bytes and {MAX_FIELDS} fields, and so may a "
                "trailer: send less"
            )
        return status, f"this is no request that can be read as HTTP/1.1: {str(self.refusal)[:200]}"
