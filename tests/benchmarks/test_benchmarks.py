"""Every benchmark script runs to its end in its smallest form, and writes the tables that the pages are made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.compose import why_not

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"
# They mostly wait: for processes to start and for workers to write their figures. Nothing here looks at times.
AT_ONCE = 5

# The tables of a model's entry in the result, by script. The slowest come first, as they are started in this order.
TABLES = {
    "pool/pool.py": ("cells", "ratios", "overhead", "redis", "alone"),
    "pool/mixed.py": ("rates", "mixed"),
    "endpoint/endpoint.py": ("start", "overhead", "streams"),
    "peers/peers.py": ("peers", "bandwidth_gb_per_s"),
    "peers/servers.py": ("servers",),
    "engine/step.py": ("bandwidth_gb_per_s", "engines", "plain"),
    "engine/memory.py": ("engines",),
    "engine/weights.py": ("weights",),
    "engine/cold_start.py": ("fastgpt2", "python"),
    "engine/drafts.py": ("batches",),
    "engine/sampling.py": ("ms", "ratios"),
    "engine/guided.py": ("libraries", "hostile", "ms", "ratios"),
    "engine/step_parts.py": ("time", "memory"),
    "engine/prefixes.py": ("ms", "copies_ms", "same_ids"),
}
# The slowest script, in two runs at once.
CAPACITY = "capacity/capacity.py"
PARTS = ("idle,memory", "redis,workers")
MORE_OPTIONS = {
    "engine/step.py": ("--plain",),
    "peers/peers.py": ("--only", "fastgpt2"),
    "peers/servers.py": ("--weights", "float32"),
}
# Whatever is a program of its own, but is started by these, or makes something for them.
OTHERS = {
    "containers.py",
    "report.py",
    "capacity/busy_client.py",
    "engine/checkpoints.py",
    "engine/engine_process.py",
    "engine/plain_numpy.py",
    "peers/convert.py",
    "peers/environment.py",
    "peers/run.py",
    "peers/transformers_generate.py",
}

Done = subprocess.CompletedProcess[str]


def run(script: str, *options: str) -> Done:
    """Run a script from the clone's root, as its head says."""
    command = [sys.executable, f"benchmarks/{script}", *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("FASTGPT2_", "HF_"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[dict[str, Future[Done]]]:
    """All scripts, started some at a time."""

    def begin(script: str, name: str, *more: str) -> Done:
        small = ("--model", "demo", "--rounds", "1", "--quick", "--output", str(folder / name))
        return run(script, *small, *more)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        started = {parts: threads.submit(begin, CAPACITY, f"{parts}.parts", "--parts", parts) for parts in PARTS}
        for script in TABLES:
            name = f"{Path(script).stem}.json"
            started[script] = threads.submit(begin, script, name, *MORE_OPTIONS.get(script, ()))
        yield started


@pytest.mark.parametrize("script", list(reversed(TABLES)))
def test_a_script_writes_its_tables(script: str, runs: dict[str, Future[Done]], folder: Path) -> None:
    done = runs[script].result()
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / f"{Path(script).stem}.json").read_text("utf-8"))
    assert {"benchmark", "machine", "options"} <= result.keys()
    (entry,) = result["models"]
    assert entry["model"] == "demo"
    assert all(entry[table] for table in TABLES[script])


@pytest.fixture(scope="module")
def capacity(runs: dict[str, Future[Done]], folder: Path) -> dict[str, Any]:
    """Join what both runs have measured, as one run would have written it."""
    found: dict[str, Any] = {}
    for parts in PARTS:
        done = runs[parts].result()
        assert done.returncode == 0, done.stderr
        found |= json.loads((folder / f"{parts}.parts").read_text("utf-8"))
    (folder / "capacity.json").write_text(json.dumps(found), "utf-8")
    return found


def test_capacity_has_its_parts(capacity: dict[str, Any]) -> None:
    assert all(capacity[part] for part in ("redis", "load", "idle", "memory"))
    (entry,) = capacity["models"]
    assert entry["pools"]
    assert entry["memory"]


@pytest.mark.usefixtures("capacity")
def test_pages_are_made_of_these_results(runs: dict[str, Future[Done]], folder: Path, tmp_path: Path) -> None:
    assert all(run.result().returncode == 0 for run in runs.values())
    done = run("report.py", "--no-plots", "--results", str(folder), "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results.md").read_text("utf-8")
    assert all(f"`benchmarks/{script}`" in page for script in TABLES)
    page = (tmp_path / "capacity.md").read_text("utf-8")
    assert "## A job, measured" in page
    assert "## demo: 1,000 workers with a core each, derived" in page


def test_pages_in_docs_are_those_of_the_results_in_the_clone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "img", tmp_path / "docs" / "img")
    with_a_table = ("README.md", "docs/performance.md")
    for name in with_a_table:
        before, begin, rest = (ROOT / name).read_text("utf-8").partition("do not edit -->\n")
        (tmp_path / name).write_text(before + begin + rest[rest.index("<!-- end -->") :], "utf-8")
    done = run("report.py", "--no-plots", "--docs", str(tmp_path / "docs"))
    assert done.returncode == 0, done.stderr
    for name in ("docs/results.md", "docs/capacity.md", *with_a_table):
        assert (tmp_path / name).read_text("utf-8") == (ROOT / name).read_text("utf-8")


def test_a_checkpoint_of_gpt2s_width_has_the_demo_models_texts(tmp_path: Path) -> None:
    from fastgpt2 import Engine

    done = run("engine/checkpoints.py", "english", str(tmp_path), "--layers", "5", "--vocabulary", "2100")
    assert done.returncode == 0, done.stderr
    prompt: dict[str, Any] = {"prompts": "My name is", "max_new_tokens": 8}
    large, demo = (Engine.load(model, prefix_memory=0, drafts="off") for model in (str(tmp_path), "demo"))
    assert large.config.n_embd == 768
    assert large.generate(**prompt).token_ids == demo.generate(**prompt).token_ids


def test_a_jobs_path_is_counted() -> None:
    command = [sys.executable, "tools/job_path.py", "--jobs", "4", "--tokens", "4", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["path"]["both"]["files"] > 10
    assert all(sent[side] > 0 for sent in result["bytes"].values() for side in ("client", "worker"))


def test_containers(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    output = tmp_path / "containers.json"
    done = run("containers.py", "--model", "demo", "--rounds", "1", "--quick", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(output.read_text("utf-8"))["models"]
    assert all(entry[table] for table in ("start", "memory", "cut"))


def test_no_script_is_left_out() -> None:
    programs = {
        str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert programs == {*TABLES, CAPACITY, *OTHERS}
