"""Which format a file has, by its name or by an option; how it is opened, and what is said of a file that has none.

Nothing is guessed that could be wrong: a file whose name tells no format, and whose format is not given, is refused.
"""

from __future__ import annotations

import codecs
import gzip
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastgpt2.errors import BadRequest, FastGPT2Error

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
DELIMITERS = {"csv": ",", "tsv": "\t"}
HEAD_BYTES = 4096

# What files of other kinds begin with: what such a file is, and what to do.
_BEGINNINGS = (
    (b"\x1f\x8b", "is compressed by gzip", "let its name end with .gz, or decompress it: gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "let its name end with .zst, or decompress it: unzstd"),
    (b"PAR1", "is a Parquet file", "read it as a file with --format parquet"),
    (b"PK\x03\x04", "is a zip archive or a spreadsheet", "unpack it, or save the sheet as csv"),
    (b"BZh", "is compressed by bzip2", "decompress it: bunzip2"),
    (b"\xfd7zXZ\x00", "is compressed by xz", "decompress it: unxz"),
    (b"ARROW1\x00", "is an Arrow file", "save it as Parquet"),
    (b"SQLite format 3\x00", "is a database of SQLite", "export its table as csv"),
    (b"\xff\xfe", "is UTF-16", "make it UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16", "make it UTF-8: iconv -f UTF-16 -t UTF-8"),
)
# Some of these could begin a text too: such a file is refused only if it holds bytes that no text has.
_COULD_BE_TEXT = (b"PAR1", b"BZh")


@dataclass(frozen=True, slots=True)
class Format:
    """A file's format.

    Attributes:
        name: txt, jsonl, openai, csv, tsv or parquet.
        compression: gzip, zstd, or empty.
    """

    name: str
    compression: str = ""

    @property
    def is_table(self) -> bool:
        """Tell whether the file has columns, and each value one place."""
        return self.name in ("csv", "tsv", "parquet")

    @property
    def is_plain_jsonl(self) -> bool:
        return self.name in ("jsonl", "openai") and not self.compression


def input_format(path: Path | None, given: str) -> Format:
    """Return the format of the input: as `given`, else by its name; standard input and pipes are txt.

    Raises:
        BadRequest: the name tells none.
    """
    if path is None:
        return Format("txt" if given == "auto" else _plain_name(given))
    found = _by_name(path, given)
    if found is not None:
        return found
    if not path.is_file():  # a pipe
        return Format("txt")
    ending = path.suffix.lower()
    if ending in _SPREADSHEETS:
        raise BadRequest(f"{path} is a spreadsheet; save it as csv")
    told = f"{ending!r}, the ending of its name, tells no format" if ending else "its name has no ending"
    raise BadRequest(
        f"{path}: {told}; give the format with --format: txt (a prompt a line), jsonl, csv, tsv, parquet or openai"
    )


def output_format(path: Path | None, given: str, source: Format) -> Format:
    """Return the format of the output: as `given`, else by its name; jsonl on standard output.

    Raises:
        BadRequest: the name tells none, or the results of this input have no such form.
    """
    found = Format("jsonl" if given == "auto" else _plain_name(given)) if path is None else _by_name(path, given)
    if found is None:
        assert path is not None
        if path.suffix and (path.is_file() or not path.exists()):
            raise BadRequest(
                f"{path}: {path.suffix!r}, the ending of its name, tells no format; give the format with "
                "--output-format: jsonl, csv, tsv or parquet"
            )
        found = Format("jsonl")
    elif found.name == "txt":  # such a file has always held lines of JSON
        found = Format("jsonl", found.compression)
    if found.name == "parquet":
        if found.compression:
            raise BadRequest(f"{path}: Parquet compresses its columns itself; let the name end with .parquet")
        if path is None or (path.exists() and not path.is_file()):
            raise BadRequest("Parquet can be written into a file only; name one with -o")
    if source.name == "openai":
        if found.is_table:
            raise BadRequest(
                f"OpenAI's lines are answered by OpenAI's lines, not as {found.name}; let the name of the output end "
                "with .jsonl"
            )
        return Format("openai", found.compression)
    return found


def _plain_name(given: str) -> str:
    return "jsonl" if given == "ndjson" else given


def _by_name(path: Path, given: str) -> Format | None:
    """Return the format that is given, or that the name tells, and the compression that the name tells."""
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if compression else path
    name = _FORMATS.get(inner.suffix.lower()) if given == "auto" else _plain_name(given)
    return None if name is None else Format(name, compression)


def open_input(path: Path | None, form: Format) -> BinaryIO:
    """Open the input for reading, decompressed.

    Raises:
        FastGPT2Error: it cannot be read.
        BadRequest: it is a file of another kind.
    """
    if path is None:
        if form.name == "parquet":
            raise BadRequest("Parquet is read from a file, not from standard input; name the file")
        return sys.stdin.buffer
    try:
        file = cast(BinaryIO, path.open("rb"))
        if path.is_file():
            _refuse_other_kinds(str(path), file.read(HEAD_BYTES), form)
            file.seek(0)
    except OSError as reason:
        hint = "; name a file in it" if path.is_dir() else ""
        raise FastGPT2Error(f"{path}: cannot be read ({reason.strerror}){hint}") from None
    if form.name == "parquet" or not form.compression:
        return file
    opened = _decompressed(file, form.compression)
    if path.is_file():
        try:
            _refuse_other_kinds(str(path), opened.peek(HEAD_BYTES)[:HEAD_BYTES], Format(form.name))
        except (EOFError, OSError) as reason:
            raise FastGPT2Error(f"{path}: cannot be decompressed ({reason})") from None
    return cast(BinaryIO, opened)


def _decompressed(file: BinaryIO, compression: str) -> io.BufferedReader:
    raw: Any
    if compression == "gzip":
        raw = gzip.GzipFile(fileobj=file)
    else:
        from fastgpt2.commands.batch.parquet import arrow

        raw = arrow(".zst").CompressedInputStream(file, "zstd")
    return io.BufferedReader(raw, 1 << 16)


def check_head_of_pipe(file: BinaryIO, form: Format) -> None:
    """Refuse what comes through a pipe and is of another kind; wait for its first bytes.

    Raises:
        BadRequest
    """
    if isinstance(file, io.BufferedReader):
        _refuse_other_kinds("the input", file.peek(1)[:HEAD_BYTES], form)


def _refuse_other_kinds(name: str, head: bytes, form: Format) -> None:
    if form.name == "parquet":
        if not head.startswith((b"PAR1", b"PARE")):
            raise BadRequest(f"{name} is no Parquet file; give its format with --format")
        return
    own = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}.get(form.compression)
    if own is not None:
        if head and not head.startswith(own):
            raise BadRequest(f"{name} is not compressed by {form.compression}; let its name end otherwise")
        return
    for beginning, what, remedy in _BEGINNINGS:
        if head.startswith(beginning) and (beginning not in _COULD_BE_TEXT or _is_no_text(head)):
            raise BadRequest(f"{name} {what}; {remedy}")
    if b"\0" in head:
        half = len(head) // 2
        if head[1::2].count(b"\0") > half // 2 or head[::2].count(b"\0") > half // 2:
            raise BadRequest(f"{name} is UTF-16; make it UTF-8: iconv -f UTF-16LE -t UTF-8")
        raise BadRequest(f"{name} holds zero bytes, so that it is no {form.name}; give its format with --format")
    if b"\r" in head.rstrip(b"\r") and b"\n" not in head:
        raise BadRequest(f"{name} has lines that end with CR alone; let them end with LF: tr '\\r' '\\n' < FILE")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if form.name in ("jsonl", "openai") and start.startswith(b"["):
        raise BadRequest(f"{name} begins with a JSON array; write an object a line: jq -c '.[]' FILE > FILE.jsonl")
    if form.name in ("jsonl", "openai") and name.endswith(".json") and start.splitlines()[:1] == [b"{"]:
        raise BadRequest(f"{name} holds an object of several lines; write an object a line: jq -c . FILE > FILE.jsonl")


def _is_no_text(head: bytes) -> bool:
    """Tell whether the beginning of a file is no text in UTF-8; a character may be cut at its end."""
    try:
        return "\0" in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
