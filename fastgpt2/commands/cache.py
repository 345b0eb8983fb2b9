"""`fastgpt2 cache`: lists the cache folder, or removes what is of no more use there."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from fastgpt2.commands.cached_files import Entry, entries, prune
from fastgpt2.engine.cache import cache_folder
from fastgpt2.errors import BadRequest, FastGPT2Error


def run(values: dict[str, Any]) -> int:
    """
    Raises:
        BadRequest: an option that only `prune` takes.
        FastGPT2Error: the folder cannot be read or written.
    """
    pruning = values["action"] == "prune"
    if not pruning and (values["all"] or values["dry_run"]):
        raise BadRequest("--all and --dry-run are for `fastgpt2 cache prune`")
    try:
        folder = cache_folder()
    except OSError as reason:
        raise FastGPT2Error(f"the cache has no place ({reason}); set FASTGPT2_CACHE to a folder") from None
    if pruning:
        _prune(folder, values["all"], values["dry_run"], values["json"])
    else:
        _list(folder, values["json"])
    return 0


def _list(folder: Path, as_json: bool) -> None:
    found = entries(folder)
    total = sum(entry.size for entry in found)
    if as_json:
        listed = [entry.as_json() for entry in found]
        print(json.dumps({"folder": str(folder), "bytes": total, "files": listed}, indent=2))
        return
    if not found:
        print(f"nothing in {folder}")
        return
    rows = [("MODEL", "LAYOUT", "SIZE", "CHANGED", "USED", "STATE", "FILE")]
    for entry in found:
        texts = (entry.model or "-", entry.layout or "-", _size(entry.size), _day(entry.changed), _day(entry.used))
        rows.append((*texts, str(entry.state), str(entry.path)))
    widths = [max(len(_shown(row[column])) for row in rows) for column in range(6)]
    for row in rows:
        cells = [_shown(cell).ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, _shown(row[6])]))
    print(f"{len(found)} file{'s' if len(found) > 1 else ''}, {_size(total)}")


def _prune(folder: Path, everything: bool, dry_run: bool, as_json: bool) -> None:
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry, gone in prune(folder, everything, dry_run):
        (removed if gone else kept).append(entry)
        if as_json:
            continue
        if gone:
            verb = "would remove" if dry_run else "removed"
            print(f"{verb} {_shown(str(entry.path))} ({entry.state}, {_size(entry.size)})")
        else:
            print(f"kept {_shown(str(entry.path))}: it is being packed", file=sys.stderr)
    freed = sum(entry.size for entry in removed)
    if as_json:
        lists = {"removed": [entry.as_json() for entry in removed], "kept": [entry.as_json() for entry in kept]}
        print(json.dumps({"folder": str(folder), "dry_run": dry_run, "freed_bytes": freed, **lists}, indent=2))
    elif removed:
        print(f"{'would free' if dry_run else 'freed'} {_size(freed)}")
    else:
        print(f"nothing to remove in {folder}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")


def _shown(text: str) -> str:
    """Nothing that a terminal would obey: a model's name comes from a file."""
    return "".join(c if c.isprintable() else "?" for c in text)
