"""The page for a browser: one document that holds its style and its script, with headers that allow nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_STYLE = '<link rel="stylesheet" href="page.css">'
_SCRIPT = '<script type="module" src="page.js"></script>'
# The parts of one module. They share one scope: each uses what the parts before it declare.
_SCRIPT_PARTS = (
    "words.js", "requests.js", "charts.js", "tables.js", "prompt.js", "job.js", "job_list.js", "views.js", "page.js",
)  # fmt: skip
_STYLE_PARTS = ("page.css", "jobs.css")


def page() -> tuple[bytes, dict[str, str]]:
    """Return the document and its headers; it is put together once in a process."""
    document, policy = _document()
    return document, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        # A stored page of an older version would ask this endpoint for what it no longer has.
        "cache-control": "no-store",
        # A client that does not ask for HTML gets another answer at the same address.
        "vary": "Accept",
    }


@cache
def _document() -> tuple[bytes, str]:
    """Return the document and its Content-Security-Policy, which allows its own style and script by their hashes."""
    style = "\n".join(_read(name) for name in _STYLE_PARTS)
    script = "\n".join(_read(name) for name in _SCRIPT_PARTS)
    document = _read("index.html")
    document = document.replace(_STYLE, f"<style>{style}</style>").replace(
        _SCRIPT, f'<script type="module">{script}</script>'
    )
    policy = (
        "default-src 'none'",
        f"style-src {_hash(style)}",
        f"script-src {_hash(script)}",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Whatever a later change of the script does, no text can become markup or code.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return document.encode(), "; ".join(policy)


def _read(name: str) -> str:
    """Return a file's text, with line ends as a browser counts them, however the files were checked out."""
    return (_FOLDER / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
