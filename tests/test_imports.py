"""Cold start is a feature, and imports run down: from the rooms that use to those that are used."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastgpt2

PACKAGE = Path(fastgpt2.__file__).parent
HEAVY = (
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "redis",
    "rq",
    "starlette",
    "uvicorn",
    "asyncio",
    "prometheus_client",
    "llvmlite",
    "llguidance",
    "jinja2",
    "opentelemetry",
    "requests",  # OpenTelemetry's exporter uses it
)


def imported(code: str) -> set[str]:
    """The top-level names of all modules that running this imports, as `python -X importtime` sees them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.processes
def test_importing_the_package_imports_nothing_else() -> None:
    assert not imported("import fastgpt2") & set(HEAVY)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import fastgpt2.cli; fastgpt2.cli.build_parser()", set()),
        # redis imports OpenTelemetry, for metrics of its own, where that is installed.
        ("from fastgpt2 import Client", {"redis", "rq", "asyncio", "opentelemetry"}),
        ("import fastgpt2.api.http.app", {"redis", "rq", "asyncio", "opentelemetry", "starlette"}),
        ("from fastgpt2 import Engine", set()),
        ("import fastgpt2.system.up", set()),
    ],
)
def test_only_what_is_needed_is_imported(code: str, allowed: set[str]) -> None:
    assert imported(code) & set(HEAVY) <= allowed


@pytest.mark.processes
def test_a_cached_model_is_loaded_without_the_hubs_library() -> None:
    load = "from fastgpt2 import Engine; Engine.load('demo')"
    imported(load)  # which compiles, if nothing has before
    names = imported(load)
    assert {"numpy", "tokenizers", "safetensors"} <= names
    assert not names & {"huggingface_hub", "redis", "rq", "starlette", "uvicorn", "llvmlite", "llguidance"}
    # BLAS is told its threads by variables, before numpy reads them; asking it later takes longer than mapping gpt2.
    assert "threadpoolctl" not in names


@pytest.mark.processes
@pytest.mark.parametrize("first", ["import numpy", "pass"])
def test_blas_is_held_to_one_thread_whoever_imported_numpy(first: str) -> None:
    code = (
        f"{first}; from fastgpt2 import Engine; Engine.load('demo'); import threadpoolctl as t; "
        "print({lib['num_threads'] for lib in t.threadpool_info() if lib['user_api'] == 'blas'})"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{1}", done.stderr


# Which rooms each room imports, late imports included, imports for annotations left out. Imports run down: a room
# stands above those that it uses. What `COMMON` has is there for all, and uses no room.
COMMON = {
    "errors",
    "fields",
    "foreign_fields",
    "plurals",
    "prompt_lists",
    "setting",
    "settings",
    "setting_values",
    "process",
    "events",
    "tracing",
    "span_export",
    "__version__",
}
RECORDS = "engine.decoding.records"
OPTIONS = "engine.decoding.options"
CHAT_OPTIONS = "engine.decoding.chat_options"
ROOMS: dict[str, set[str]] = {
    "engine.trust": set(),
    "engine.figure": set(),
    "engine.machine": {"engine.figure", "engine.trust"},
    "engine.kernels": {"engine.figure", "engine.machine", "engine.trust"},
    "engine.model": {"engine.kernels", "engine.machine", "engine.trust"},
    "engine.network": {"engine.model", "engine.kernels", "engine.figure", "engine.machine"},
    "engine.text": {"engine.model"},
    "engine.decoding": {"engine.network", "engine.text", "engine.model"},
    "engine.loading": {
        "engine.decoding",
        "engine.network",
        "engine.text",
        "engine.model",
        "engine.kernels",
        "engine.machine",
    },
    "engine.engine": {"engine.loading", "engine.decoding"},
    "protocol": {RECORDS},
    "worker": {"protocol", "engine"},
    "api.client": {"protocol", RECORDS, CHAT_OPTIONS},
    "api.pool": {"protocol"},
    "api.page": set(),
    "api.http": {"api.client", "api.pool", "api.page", "protocol", RECORDS, OPTIONS, CHAT_OPTIONS},
    "system": {"api.http", "worker", "protocol", "engine.model", "engine.machine"},
    "bench": {"engine"},
    "commands": {"api", "system", "worker", "protocol", "engine"},
    "cli": {"commands", "system", "bench"},
}
# What only some rooms may have to do with.
FOREIGN = {
    "numpy": {"engine", "bench"},
    "tokenizers": {"engine"},
    "safetensors": {"engine"},
    "llguidance": {"engine"},
    "jinja2": {"engine"},
    "redis": {"protocol", "worker", "api", "system"},
    "rq": {"worker", "api"},
    "starlette": {"api.http"},
    "uvicorn": {"api.http"},
    "prometheus_client": {"api.pool", "api.http"},
    "opentelemetry": {"api.http", "worker", "span_export"},
}


def test_every_file_is_in_a_room() -> None:
    alone = {"__init__", "__main__", "engine.__init__", "api.__init__", *COMMON}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert name in alone or any(is_in(name, room) for room in ROOMS), f"{name} is in no room of ROOMS"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_down(room: str) -> None:
    used = set()
    for path in files_of(room):
        for name in imports_of(path):
            first, _, inner = name.partition(".")
            if first in FOREIGN:
                assert any(is_in(room, home) for home in FOREIGN[first]), f"{path.name} imports {name}"
            if first != "fastgpt2" or inner.split(".")[0] in COMMON or is_in(inner, room):
                continue
            found = [other for other in ROOMS[room] if is_in(inner, other)]
            assert found, f"{path.name} imports {name}, and {room} is not above it"
            used.update(found)
    assert used == ROOMS[room], f"{room} may import what it does not"


def test_rooms_form_no_cycle() -> None:
    above: dict[str, set[str]] = {
        room: {other for other in ROOMS for use in uses if is_in(other, use) or is_in(use, other)}
        for room, uses in ROOMS.items()
    }
    assert list(TopologicalSorter(above).static_order())


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")}), ids=lambda path: path.name)
def test_each_folder_says_what_it_is_for(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))


def is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def files_of(room: str) -> list[Path]:
    path = PACKAGE.joinpath(*room.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports_of(path: Path) -> list[str]:
    """The dotted names that a file imports, those for annotations alone left out."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"fastgpt2(\.\w+)+:\w+", str(node.value)):
            names.append(str(node.value).replace(":", "."))  # what a subcommand runs
    return names


def test_the_package_lists_what_it_gives() -> None:
    for name in fastgpt2.__all__:
        assert getattr(fastgpt2, name) is not None
    assert "Engine" in dir(fastgpt2)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = fastgpt2.Nonsense
    assert (PACKAGE / "py.typed").exists()
