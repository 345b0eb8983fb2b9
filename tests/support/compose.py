"""docker-compose.yml as a person uses it, under a project name of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMAND_SECONDS = 600.0
PINNED_PYTHON = "3.11.14-slim-bookworm"


@cache
def why_not() -> str:
    """Why no containers can be run here; empty where they can."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"`{' '.join(command)}` says: {done.stderr.strip()[:200]}"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Compose:
    """One project of docker-compose.yml.

    Args:
        project: its name, which all its containers, volumes and networks begin with.
        command: `docker compose`, or the older `docker-compose`.
        files: beside the main one.
        variables: as in an .env file.
    """

    def __init__(
        self, project: str, *files: str, command: tuple[str, ...] = ("docker", "compose"), **variables: str
    ) -> None:
        self.project = project
        self.port = free_port()
        named = [word for file in ("docker-compose.yml", *files) for word in ("-f", file)]
        # An .env of whoever runs the tests is none of theirs; the example changes nothing.
        self._command = [*command, "-p", project, "--env-file", ".env.example", *named]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FASTGPT2_", "HF_"))},
            "FASTGPT2_PORT": str(self.port),
            "FASTGPT2_IMAGE": "fastgpt2:test",
            "PYTHON_TAG": python_tag(),
            **variables,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run a command of compose. Returns what it printed; its errors are the assertion's."""
        done = subprocess.run(
            [*self._command, *words],
            cwd=ROOT,
            env={**self._environment, **variables},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stderr[-3000:]}"
        return done.stdout + ("" if check else done.stderr)

    def follow(self, commands: str, folder: Path) -> None:
        """Run shell commands of the documentation in a folder; `docker compose` means this project in them."""
        project = f"-p {self.project} --project-directory {ROOT} --env-file {ROOT}/.env.example"
        script = commands.replace("docker compose", f"docker compose {project} -f {ROOT}/docker-compose.yml")
        command = ["sh", "-euc", script]
        done = subprocess.run(
            command, cwd=folder, env=self._environment, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def containers(self, service: str, *options: str) -> list[str]:
        """Ids of those of a service that run; with "--all", of those that have ended too."""
        label = f"label=com.docker.compose.project={self.project}"
        name = f"label=com.docker.compose.service={service}"
        return docker("ps", "--quiet", "--filter", label, "--filter", name, *options).split()

    def inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(docker("inspect", container))
        return dict(found)

    def down(self) -> None:
        self("down", "--volumes", "--timeout", "1", "--remove-orphans", check=False)


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, f"docker {words}: {done.stderr[-3000:]}"
    return done.stdout


@cache
def python_tag() -> str:
    """The base image's tag that is pinned; where that cannot be had, one that is here already."""
    for tag in (PINNED_PYTHON, "3.11-slim-bookworm", "3.11-slim"):
        if subprocess.run(["docker", "image", "inspect", f"python:{tag}"], capture_output=True).returncode == 0:
            return tag
    return PINNED_PYTHON


def until(condition: Any, what: str, seconds: float = 60.0) -> None:
    """Wait for what containers do, which takes longer than what processes do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {seconds:.0f} s, waiting for {what}"
        time.sleep(0.1)
