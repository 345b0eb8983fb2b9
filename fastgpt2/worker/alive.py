"""A file that tells probes how a worker is: there while it serves its queue, touched while its loop turns."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from fastgpt2.errors import BadRequest

log = logging.getLogger("fastgpt2.worker")

TOUCH_SECONDS = 1.0


class AliveFile:
    """For `docker` and Kubernetes: to look at a file costs a probe next to nothing, beside a process that asks Redis.

    Whether Redis is there does not matter to it: a worker that waits for Redis must not be restarted for that, as it
    holds jobs.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._touched_at = -TOUCH_SECONDS
        self._complained = False
        # One that was left by a process which was killed, in a folder that outlived it, tells nothing of this one.
        self.remove()

    def make(self) -> None:
        """The worker is ready.

        Raises:
            BadRequest: the file cannot be made.
        """
        try:
            self._path.touch()
        except OSError as reason:
            raise BadRequest(f"--alive-file {self._path}: cannot be made ({reason.strerror})") from None

    def turned(self) -> None:
        """The worker's loop goes round."""
        now = time.monotonic()
        if now - self._touched_at < TOUCH_SECONDS:
            return
        self._touched_at = now
        try:
            self._path.touch()
        except OSError as reason:
            if not self._complained:
                log.warning("--alive-file %s: cannot be touched (%s)", self._path, reason)
            self._complained = True

    def remove(self) -> None:
        """The worker has ended."""
        with contextlib.suppress(OSError):
            self._path.unlink()
