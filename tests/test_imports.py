"""Cold start is a feature, and imports point one way: cli -> api, worker -> engine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
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
)


def imported(code: str) -> set[str]:
    """The top-level names of all modules that running this imports, as `python -X importtime` sees them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_importing_the_package_imports_nothing_else() -> None:
    assert not imported("import fastgpt2") & set(HEAVY)


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import fastgpt2.cli; fastgpt2.cli.build_parser()", set()),
        ("from fastgpt2 import Client", {"redis", "rq", "asyncio"}),
        ("import fastgpt2.api.http.app", {"redis", "rq", "asyncio", "starlette"}),
        ("from fastgpt2 import Engine", set()),
        ("import fastgpt2.system", set()),
    ],
)
def test_only_what_is_needed_is_imported(code: str, allowed: set[str]) -> None:
    assert imported(code) & set(HEAVY) <= allowed


def test_a_cached_model_is_loaded_without_the_hubs_library() -> None:
    names = imported("from fastgpt2 import Engine; Engine.load('demo')")
    assert {"numpy", "tokenizers", "safetensors"} <= names
    assert not names & {"huggingface_hub", "redis", "rq", "starlette", "uvicorn", "llvmlite"}
    # BLAS is told its threads by variables, before numpy reads them; asking it later takes longer than mapping gpt2.
    assert "threadpoolctl" not in names


@pytest.mark.parametrize("first", ["import numpy", "pass"])
def test_blas_is_held_to_one_thread_whoever_imported_numpy(first: str) -> None:
    code = (
        f"{first}; from fastgpt2 import Engine; Engine.load('demo'); import threadpoolctl as t; "
        "print({lib['num_threads'] for lib in t.threadpool_info() if lib['user_api'] == 'blas'})"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{1}", done.stderr


# Who may import whom, beside the modules that have no imports of their own.
ALLOWED = {
    "engine": {"engine"},
    "worker": {"worker", "engine"},
    "api": {"api", "worker", "engine"},
}
COMMON = {"errors", "settings", "logs", "__version__"}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "fastgpt2" and len(parts) > 1:
                assert parts[1] in ALLOWED[room] | COMMON, f"{path.name} imports {name}"
            if room == "engine":
                assert parts[0] not in ("redis", "rq", "starlette", "uvicorn", "http"), f"{path.name} imports {name}"
            if room != "engine":
                assert parts[0] not in ("numpy", "tokenizers", "safetensors"), f"{path.name} imports {name}"


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_the_package_lists_what_it_gives() -> None:
    for name in fastgpt2.__all__:
        assert getattr(fastgpt2, name) is not None
    assert "Engine" in dir(fastgpt2)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = fastgpt2.Nonsense
    assert (PACKAGE / "py.typed").exists()
