"""`fastgpt2 pack` makes a model's packed file in the cache, before the first worker needs it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.model.packing import PackedFile


def run(values: dict[str, Any]) -> int:
    """Run the command.

    Raises:
        ModelError: the model cannot be found or used, or the cache cannot be written.
    """
    # This comes before numpy is imported.
    from fastgpt2.engine.figure import measuring_again
    from fastgpt2.engine.machine import hold_to_one_thread

    hold_to_one_thread()
    _check_text(values)
    if values["measure"]:
        # The layout of the packed file is measured too.
        with measuring_again() as began:
            files = _make_files(values)
            _tell_figures(_load(values), began)
    else:
        files = _make_files(values)
        if values["measure_missing"]:
            _load(values)
    for packed in files:
        print(packed.path, os.fstat(packed.fd).st_size, sep="\t")
    return 0


def _make_files(values: dict[str, Any]) -> list[PackedFile]:
    from fastgpt2.engine.loading import note

    kinds = [values["weights"], *(["int8"] if values["drafts"] == "int8" else [])]
    files = [_pack_and_verify(values, weights) for weights in kinds]
    note(values["model"], *files[0].notes)
    return files


def _check_text(values: dict[str, Any]) -> None:
    """Open all that makes texts of tokens, and prompts of chats, as a worker does: what is packed can be served."""
    from fastgpt2.engine.loading import note, notes_on_text
    from fastgpt2.engine.model.config import read_config
    from fastgpt2.engine.model.generation_config import read_generation_config
    from fastgpt2.engine.model.hub import find_folders
    from fastgpt2.engine.text.chat_template import load_chat_template
    from fastgpt2.engine.text.tokenizer import Tokenizer

    folder, tokenizer_folder = find_folders(values["model"], values["revision"], values["tokenizer"])
    config = read_config(folder)
    generation = read_generation_config(folder, config, values["generation_config"])
    template = load_chat_template(tokenizer_folder, values["chat_template"])
    template.close()
    notes = notes_on_text(config, Tokenizer.from_folder(tokenizer_folder), generation)
    note(values["model"], *notes, *template.notes)


def _pack_and_verify(values: dict[str, Any], weights: str) -> PackedFile:
    packed = _pack(values, weights)
    if values["verify"] and not _is_intact(packed):
        _discard(packed)
        packed = _pack(values, weights)
        if not _is_intact(packed):
            raise ModelError(
                f"{packed.path} reads otherwise than it was written a moment ago: check the disk, or set "
                "FASTGPT2_CACHE to a folder on another"
            )
    return packed


def _pack(values: dict[str, Any], weights: str) -> PackedFile:
    from fastgpt2.engine.loading import pack_model
    from fastgpt2.engine.model.config import read_config
    from fastgpt2.engine.model.hub import find_folders

    folder, _ = find_folders(values["model"], values["revision"], values["tokenizer"])
    config = read_config(folder)
    return pack_model(folder, config, values["model"], values["blas"], weights, must_keep=True)[0]


def _load(values: dict[str, Any]) -> Engine:
    """Load the model as a worker does, which keeps what it measures beside the packed file."""
    from fastgpt2.engine.engine import Engine

    names = ("revision", "threads", "blas", "weights", "drafts", "tokenizer", "generation_config", "chat_template")
    return Engine.load(values["model"], **{name: values[name] for name in names})


def _tell_figures(engine: Engine, began: float) -> None:
    """Say what was measured since `began`, and whether the machine was too busy for it."""
    from fastgpt2.engine.figure import TRUSTED_SPREAD
    from fastgpt2.engine.kernels.choice import open_measurements
    from fastgpt2.engine.machine import is_large

    if not is_large(engine.config):
        print(f"{engine.model}: a small model, of which nothing is measured", file=sys.stderr)
        return
    measurements = open_measurements(engine.config)
    figures = measurements.find_since(began)
    if not figures:
        print(_why_none(measurements.path), file=sys.stderr)
        return
    print(f"measured on {measurements.machine}:", file=sys.stderr)
    for name, figure in figures.items():
        print(f"  {name}: {figure.describe()}", file=sys.stderr)
    kept = sum(figure.date < began for figure in figures.values())
    if doubtful := sum(figure.is_doubtful or figure.date < began for figure in figures.values()):
        earlier = f", {kept} of which are those that a calm machine told before" if kept else ""
        print(
            f"the machine was too busy for {doubtful} of {len(figures)} figures to be trusted (spread over "
            f"{TRUSTED_SPREAD:.0%}): workers begin with what is here{earlier}, and learn from their jobs; run this "
            "command again when nothing else runs",
            file=sys.stderr,
        )


def _why_none(path: Path | None) -> str:
    """Return why nothing was kept of what was measured."""
    from fastgpt2.engine.machine import MEASUREMENTS_LOCK, is_locked

    if path is not None and is_locked(path.with_name(MEASUREMENTS_LOCK)):
        return "nothing was measured: another process measures this machine; run this command again when it is done"
    where = "there is no cache folder that is trusted" if path is None else f"{path.parent} cannot be written"
    return f"what was measured is not kept: {where}; set FASTGPT2_CACHE to a folder of your own"


def _is_intact(packed: PackedFile) -> bool:
    from fastgpt2.engine.model.checkpoint import read_metadata
    from fastgpt2.engine.model.packing import checksum

    assert packed.path is not None
    return f"{checksum(packed.fd):08x}" == read_metadata(packed.fd, packed.path).get("crc32")


def _discard(packed: PackedFile) -> None:
    from fastgpt2.engine.machine import locked

    assert packed.path is not None
    print(
        f"{packed.path} is damaged; packing anew. Workers that use the file go on with it until they are restarted",
        file=sys.stderr,
    )
    with locked(packed.path.with_suffix(".lock")):
        packed.path.unlink(missing_ok=True)
