"""Whatever stands in a file's place is told in one sentence: pipes, devices, endless files, numbers without end."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.engine.engine import Engine
from fastgpt2.engine.model.files import SpecialFile, open_file, parse_json, read_file
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import BadRequest, ConfigError, ModelError

SPECIAL = "a folder, pipe or device; put the model's file in its place"
DIGITS = "1" + "0" * 4999


def _socket(path: Path) -> None:
    at = Path.cwd()
    os.chdir(path.parent)  # an address has at most a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(at)


def _linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": _socket,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to a pipe": _linked_pipe,
}
# Each file of a model, with the files that must not be there for it to be read.
FILES = {
    "config.json": (),
    "generation_config.json": (),
    "tokenizer.json": (),
    "tokenizer_config.json": (),
    "special_tokens_map.json": (),
    "added_tokens.json": (),
    "vocab.json": ("tokenizer.json",),
    "tokenizer.model": ("tokenizer.json",),
    "model.safetensors": (),
    "model.safetensors.index.json": ("model.safetensors",),
    "pytorch_model.bin": ("model.safetensors",),
    "pytorch_model.bin.index.json": ("model.safetensors",),
}


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """End a test that waits for a pipe, or reads a device, by an error."""

    def fail(*_: object) -> None:
        raise TimeoutError("waits for a minute")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Engine.load(str(folder), max_batch=1)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "pipe") for name in FILES),
        *((name, kind) for name in ("config.json", "model.safetensors") for kind in KINDS),
    ],
)
def test_what_is_no_file_is_named(folder: Path, name: str, kind: str) -> None:
    for other in (name, *FILES[name]):
        (folder / other).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    if name == "generation_config.json":  # as any other that cannot be read
        notes = Engine.load(str(folder), max_batch=1).notes
        assert notes == (f"{folder / name}: {SPECIAL}; config.json counts in its place",)
    else:
        said = refusal(folder)
        assert said.startswith(f"{folder / name}: ")
        assert SPECIAL in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_hundred_gigabytes_are_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(100 << 30)
    said = refusal(folder)
    assert "107374182400 bytes; a file of this kind has at most" in said or "its header is no JSON" in said


def test_a_pipe_that_takes_the_name_of_a_file_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a file and its opening another may have the name."""
    os.mkfifo(folder / "pipe")
    regular = (folder / "config.json").stat()
    monkeypatch.setattr(Path, "stat", lambda _path: regular)
    with pytest.raises(SpecialFile):
        open_file(folder / "pipe")


def test_no_more_is_read_than_a_file_had(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_file(path, 10, ConfigError) == b"x" * 10
    with pytest.raises(ConfigError, match="10 bytes; a file of this kind has at most 9"):
        read_file(path, 9, ConfigError)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "gpt2", "n_embd": %s}'),
        ("config.json", '{"model_type": "gpt2", "unknown": [%s]}'),
        ("tokenizer_config.json", '{"model_max_length": %s}'),
        ("special_tokens_map.json", '{"bos_token": %s}'),
        ("added_tokens.json", '{"<x>": %s}'),
        ("model.safetensors.index.json", '{"metadata": {"total_size": %s}, "weight_map": {}}'),
        ("tokenizer.json", '{"added_tokens": [{"id": %s}]}'),
    ],
)
def test_numbers_of_thousands_of_digits(folder: Path, name: str, content: str) -> None:
    for other in (name, *FILES[name]):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_text(content % DIGITS)
    said = refusal(folder)
    assert said.startswith(f"{folder / name}: ")
    assert "a number in it has thousands of digits" in said
    # Nor does one that Python still reads, or that is none, get further.
    for number in (DIGITS[:4000], "-" + DIGITS[:4000], "1e999", "NaN"):
        (folder / name).write_text(content % number)
        with suppress(ModelError):
            Engine.load(str(folder), max_batch=1)


def test_numbers_of_thousands_of_digits_in_a_header(folder: Path) -> None:
    header = b'{"x": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % DIGITS.encode()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "its header is no JSON (a number in it has thousands of digits)" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DIGITS, "a number in it has thousands of digits"),
        ("[" * 100_000, "^its lists and objects are nested too deeply$"),
        ("\ufeff{}", "BOM"),
        (b"\xff\xfe{\x00}\x00", "utf-8"),
    ],
)
def test_json_that_python_does_not_read(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 10**5000},
        {"max_new_tokens": -(10**5000)},
        {"seed": 10**5000},
        {"temperature": 10**5000},
        {"top_p": [10**5000]},
        {"stop_token_ids": [10**5000]},
        {"suppress_tokens": [-(10**5000)]},
        {"logit_bias": {10**5000: 1.0}},
        {"logit_bias": {1: 10**5000}},
        {"bad_words": [[10**5000]]},
        {"json_schema": {"maximum": 10**5000}},
        {"json_schema": '{"maximum": ' + DIGITS + "}"},
        {"json_schema": "[" * 100_000},
    ],
)
def test_a_request_with_what_python_does_not_read(options: dict[str, Any]) -> None:
    from fastgpt2.engine.decoding.records import GenerationRequest

    with pytest.raises(BadRequest) as caught:
        GenerationRequest("x", **options)
    assert next(iter(options)) in str(caught.value)
    assert "sys." not in str(caught.value)
    assert "recursion" not in str(caught.value)
    with pytest.raises(BadRequest, match="prompt holds a number of thousands of digits, which is no token id"):
        GenerationRequest((10**5000,))


def test_a_settings_file_keeps_its_number_of_digits(folder: Path) -> None:
    """What does not matter may be any number that Python reads."""
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config)[:-1] + f', "seed": {DIGITS[:4000]}}}')
    Engine.load(str(folder), max_batch=1)
