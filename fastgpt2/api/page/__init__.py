"""The pages for a browser: each is one document that holds its style and its script, and may load nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_STYLE = '<link rel="stylesheet" href="page.css">'
_SCRIPT = '<script type="module" src="page.js"></script>'
_STYLE_PARTS = ("base.css", "page.css", "jobs.css")
# The parts of one module. They share one scope: each uses what the parts before it declare.
_SCRIPT_PARTS = (
    "words.js", "requests.js", "charts.js", "tables.js", "models.js", "prompt.js", "job.js", "job_list.js", "views.js",
    "page.js",
)  # fmt: skip
_DOCS_STYLE_PARTS = ("base.css", "docs.css")
_DOCS_SCRIPT_PARTS = ("words.js", "requests.js", "docs.js")


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page that shows the pool, and its headers; it is put together once in a process."""
    # A client that does not ask for HTML gets another answer at the same address.
    document, headers = _put_together(_read("index.html"), _STYLE_PARTS, _SCRIPT_PARTS)
    return document, {**headers, "vary": "Accept"}


def docs(content: str) -> tuple[bytes, dict[str, str]]:
    """Return the page of the routes, and its headers.

    Args:
        content: what stands on it, as HTML.
    """
    frame = _read("docs.html").replace("<!-- content -->", content)
    return _put_together(frame, _DOCS_STYLE_PARTS, _DOCS_SCRIPT_PARTS)


def _put_together(frame: str, styles: Sequence[str], scripts: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """Return a document, and headers whose Content-Security-Policy allows its own style and script by their hashes."""
    style, script = ("\n".join(map(_read, names)) for names in (styles, scripts))
    document = frame.replace(_STYLE, f"<style>{style}</style>").replace(
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
    return document.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        # A stored page of an older version would ask this endpoint for what it no longer has.
        "cache-control": "no-store",
    }


def _read(name: str) -> str:
    """Return a file's text, with line ends as a browser counts them, however the files were checked out."""
    return (_FOLDER / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
