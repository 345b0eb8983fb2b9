"""The files that containers are made of, as far as no daemon is needed to look at them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from support.compose import ROOT
from support.running import StartWorker

from fastgpt2 import Client, settings
from fastgpt2.setting import Setting


def test_every_variable_is_documented_and_passed_on() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    more = (ROOT / "deploy" / "compose.redis-port.yml").read_text("utf-8")
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text + more))
    services = yaml.safe_load(text)["services"]
    for service in services.values():
        used |= {name for name, value in (service.get("environment") or {}).items() if value is None}
    used.add("COMPOSE_PROFILES")  # compose's own
    documented = dict(re.findall(r"^#?(\w+)=(.*)$", (ROOT / ".env.example").read_text("utf-8"), re.M))
    assert documented.keys() == used
    for name, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", text + more):
        assert documented[name] == default, name
    for name, default in re.findall(r"^ARG (\w+)=(.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M):
        assert documented[name] == default, name
    known = {setting.variable: setting for setting in vars(settings).values() if isinstance(setting, Setting)}
    for name in used:
        if name.startswith("FASTGPT2_") and name != "FASTGPT2_IMAGE":
            assert name in known
            if documented[name]:
                known[name].resolve(documented[name])


def test_images_are_built_of_pinned_versions_that_the_package_allows() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert not any("/" in line or "--" in line for line in lines), "names and versions, and no place to get them from"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = list(project["project"]["dependencies"])
    wanted += [line for name in ("chat", "guided", "mkl", "compact", "otel") for line in extras[name]]
    for text in (*wanted, *project["build-system"]["requires"]):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pins[name]), text


def requirements(blas: str, compact: str, otel: str = "no") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/image/requirements.py", blas, compact, otel]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.processes
def test_an_image_brings_what_is_asked_for_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    on_x86 = platform.machine() == "x86_64"
    for blas, mkl in (("openblas", []), *([("mkl", extras["mkl"])] if on_x86 else [])):
        for compact, llvm in (("no", []), ("yes", extras["compact"])):
            done = requirements(blas, compact)
            always = [*project["dependencies"], *extras["chat"], *extras["guided"]]
            assert done.stdout.splitlines() == [*always, *mkl, *llvm]
    done = requirements("openblas", "no", "yes")
    assert done.stdout.splitlines() == [*always, *extras["otel"]]
    for blas, compact, otel, message in (
        ("atlas", "no", "no", "BLAS=atlas: is neither openblas nor mkl"),
        ("openblas", "maybe", "no", "COMPACT=maybe: is neither yes nor no"),
        ("openblas", "no", "jaeger", "OTEL=jaeger: is neither yes nor no"),
    ):
        done = requirements(blas, compact, otel)
        assert (done.returncode, done.stdout, message in done.stderr) == (1, "", True)


@pytest.mark.processes
def test_an_image_for_arm_is_not_built_without_the_mkl_that_was_asked_for() -> None:
    code = "import platform, runpy, sys; platform.machine = lambda: 'aarch64'; runpy.run_path(sys.argv.pop(1))"
    command = [sys.executable, "-c", code, "deploy/image/requirements.py", "mkl", "no", "no"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    message = "--build-arg BLAS=mkl: there is no MKL for aarch64; leave it out\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def service_of(name: str, **given: str) -> tuple[list[str], dict[str, str]]:
    """Return a service's command in docker-compose.yml, and those of the given variables that the service takes."""
    service: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"][name]
    return service["command"], {key: value for key, value in given.items() if key in service["environment"]}


@pytest.mark.parametrize(
    ("weights", "drafts", "kinds"),
    [("", "", [""]), ("", "auto", [""]), ("", "int8", ["", "int8"]), ("int8", "auto", ["int8"])],
)
def test_what_workers_map_has_been_packed(
    client: Client, start_worker: StartWorker, tmp_path: Path, weights: str, drafts: str, kinds: list[str]
) -> None:
    """Workers cannot write to the volume. So the service that packs must take the settings that they take."""
    given = {"FASTGPT2_WEIGHTS": weights, "FASTGPT2_DRAFTS": drafts, "FASTGPT2_THREADS": "1"}
    own = {"FASTGPT2_CACHE": str(tmp_path / "cache"), "FASTGPT2_MODEL": "demo"}
    (program, *words), variables = service_of("model", **given)
    assert program == "fastgpt2"
    subprocess.run(
        [sys.executable, "-m", program, *words],
        env={**os.environ, **variables, **own},
        capture_output=True,
        timeout=120,
        check=True,
    )

    def there() -> dict[str, tuple[int, int]]:
        files = [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
        return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}

    before = there()
    packed = [name for name in before if name.endswith(".safetensors")]
    assert sorted("int8" if "-int8-lines." in name else "" for name in packed) == kinds
    worker = start_worker(**service_of("worker", **given)[1], **own)
    client.enqueue("My name is", max_new_tokens=5).result(60)
    assert there() == before
    maps = Path(f"/proc/{worker.pid}/maps")
    if maps.exists():
        assert all(name in maps.read_text() for name in packed)
