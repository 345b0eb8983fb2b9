"""docker-compose.yml on a real Docker daemon: started as docs/containers.md says, looked at, and broken in all ways.

Skipped where no daemon answers. Images are built from the tree, so a first run takes a minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from support.compose import ROOT, Compose, docker, free_port, until, why_not
from support.fake_hub import FakeHub
from support.running import GOLDEN

from fastgpt2.engine.model.hub import DEMO_FOLDER

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(bool(why_not()), reason=f"no containers here: {why_not()}"),
]

ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
SERVICES = ("password", "model", "redis", "worker", "api")


@pytest.fixture(scope="module")
def pool() -> Iterator[Compose]:
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="demo", WORKER_MEMORY_LIMIT="600m")
    try:
        compose("up", "--build", "--detach", "--wait", "--scale", "worker=2")
        yield compose
    finally:
        compose.down()


def complete(pool: Compose, tokens: int = 20) -> str:
    body = {"prompt": ENTRY["prompt"], "max_tokens": tokens}
    answer = httpx.post(f"{pool.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def status(pool: Compose) -> dict[str, Any]:
    return dict(httpx.get(f"{pool.url}/status", timeout=10, trust_env=False).json())


def tokens(pool: Compose) -> list[int]:
    """Ask for a hundred greedy tokens after the prompt of `ENTRY`."""
    body = {"prompt": ENTRY["prompt"], "max_new_tokens": 100, "ignore_eos": True}
    job = httpx.post(f"{pool.url}/v1/jobs", json=body, trust_env=False).json()["id"]
    answer = httpx.get(f"{pool.url}/v1/jobs/{job}", params={"wait": 30}, timeout=40, trust_env=False)
    return list(answer.json()["result"]["token_ids"])


def test_it_generates_what_transformers_does(pool: Compose) -> None:
    assert tokens(pool) == ENTRY["ids"]
    assert len(status(pool)["workers"]) == 2


def test_every_container_may_do_as_little_as_it_can(pool: Compose) -> None:
    for service in SERVICES:
        containers = pool.containers(service, "--all")
        assert len(containers) == (2 if service == "worker" else 1)
        for container in containers:
            found = pool.inspect(container)
            host = found["HostConfig"]
            assert host["ReadonlyRootfs"]
            assert host["CapDrop"] == ["ALL"]
            assert not host["CapAdd"]
            assert "no-new-privileges:true" in host["SecurityOpt"]
            assert host["Init"]
            assert host["Memory"] > 0
            assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
            once = service in ("password", "model")
            assert host["RestartPolicy"]["Name"] == ("no" if once else "unless-stopped")
            assert found["Config"]["User"] == ("redis" if service == "redis" else "10001:10001")
            assert bool(host["PortBindings"]) == (service == "api")
            if not once:
                assert found["State"]["Health"]["Status"] == "healthy"
    for name in ("pool.example", "localhost.example"):
        rebound = httpx.get(f"{pool.url}/status", headers={"Host": name}, trust_env=False)
        assert rebound.status_code == 403
    (api,) = pool.containers("api")
    ((binding,),) = pool.inspect(api)["HostConfig"]["PortBindings"].values()
    assert binding["HostIp"] == "127.0.0.1"
    for container in pool.containers("worker"):
        found = pool.inspect(container)
        assert {mount["Destination"]: mount["RW"] for mount in found["Mounts"]} == {"/cache": False, "/access": False}
        (network,) = found["NetworkSettings"]["Networks"]
        assert json.loads(docker("network", "inspect", network))[0]["Internal"]
        processes = docker("top", container, "-eo", "pid,uid").splitlines()[1:]
        assert {line.split()[1] for line in processes} == {"10001"}


def test_redis_wants_a_password_that_stands_in_no_environment(pool: Compose) -> None:
    (redis,) = pool.containers("redis")
    assert "NOAUTH" in docker("exec", redis, "redis-cli", "ping")
    password = docker("exec", redis, "cat", "/access/redis-password")
    assert re.fullmatch(r"[0-9a-f]{64}", password)
    for service in SERVICES:
        for container in pool.containers(service, "--all"):
            assert password not in json.dumps(pool.inspect(container))
            assert password not in docker("logs", container)


def test_threads_and_memory_follow_the_limits(pool: Compose) -> None:
    """WORKER_CPUS is 1 by default, and the machine may have more. A quarter of 600 MB holds keys and values."""
    for worker in status(pool)["workers"]:
        assert worker["threads"] == 1
        assert worker["kv_bytes_limit"] == 600 * 1024 * 1024 // 4


def test_all_workers_map_the_pages_of_one_file(pool: Compose) -> None:
    seen = set()
    for container in pool.containers("worker"):
        for line in docker("top", container, "-eo", "pid").splitlines()[1:]:
            for mapping in Path(f"/proc/{line.strip()}/maps").read_text().splitlines():
                if ".safetensors" in mapping:
                    _, flags, _, device, inode, path = mapping.split(maxsplit=5)
                    assert flags == "r--s"
                    assert path.startswith("/cache/fastgpt2/demo-")
                    seen.add((device, inode))
    assert len(seen) == 1


def test_once_more_is_no_work(pool: Compose) -> None:
    before, workers = _packed(pool), set(pool.containers("worker"))
    pool("up", "--detach", "--wait", "--scale", "worker=2")
    assert _packed(pool) == before
    assert set(pool.containers("worker")) == workers
    (model,) = pool.containers("model", "--all")
    assert pool.inspect(model)["State"]["ExitCode"] == 0
    assert len(docker("logs", model).splitlines()) == 2, "it ran twice, and said the path each time"


def _packed(pool: Compose) -> str:
    worker = pool.containers("worker")[0]
    return docker("exec", worker, "sh", "-c", "stat -c '%i %Y %n' /cache/fastgpt2/*.safetensors")


def test_the_command_line_is_there_too(pool: Compose) -> None:
    assert pool("exec", "-T", "api", "fastgpt2", "status").count("\nworker ") == 2
    text = pool("exec", "-T", "api", "fastgpt2", "enqueue", "--wait", "--max-new-tokens", "20", ENTRY["prompt"])
    assert text.strip() in complete(pool) or complete(pool).strip() in text


def test_a_worker_that_crashes_is_back_and_so_is_redis(pool: Compose) -> None:
    """The process is killed from outside, as the kernel does it. `docker kill` counts as a stop by hand, and stays."""
    for service in ("worker", "redis", "api"):
        container = pool.containers(service)[0]
        state = pool.inspect(container)["State"]
        os.kill(state["Pid"], signal.SIGKILL)
        until(lambda c=container, s=state: pool.inspect(c)["State"]["StartedAt"] != s["StartedAt"], f"{service} again")
        until(lambda: _answers(pool), "a text")
    assert complete(pool, 100).strip()


def _answers(pool: Compose) -> bool:
    try:
        return bool(complete(pool))
    except (AssertionError, httpx.HTTPError):
        return False


def test_an_update_of_the_workers_loses_no_request(pool: Compose) -> None:
    """Workers are replaced one by one while requests are under way."""
    old = set(pool.containers("worker"))
    over = time.monotonic() + 600
    counts = []

    def ask() -> None:
        done = 0
        while time.monotonic() < over:
            assert complete(pool, 60).strip()
            done += 1
        counts.append(done)

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(ask) for _ in range(4)]
        try:
            for container in sorted(old):
                docker("stop", "--time", "60", container)
                docker("rm", container)
                pool("up", "--detach", "--no-deps", "--no-recreate", "--scale", "worker=2", "worker")
                until(lambda: len(status(pool)["workers"]) == 2, "the new worker")
        finally:
            over = time.monotonic()
        for each in asking:
            each.result(120)
    assert not old & set(pool.containers("worker"))
    assert sum(counts) > 4


def test_a_model_is_downloaded_and_packed_once() -> None:
    """The model comes from a hub that this machine plays. Containers reach it at their network's gateway."""
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="some/model")
    try:
        compose("up", "--build", "--detach", "password")
        (network,) = json.loads(docker("network", "inspect", f"{compose.project}_outside"))
        (config,) = network["IPAM"]["Config"]
        with FakeHub(config["Gateway"]) as hub:
            hub.commit("some/model", {file.name: file.read_bytes() for file in DEMO_FOLDER.iterdir() if file.is_file()})
            compose("up", "--detach", "--wait", HF_ENDPOINT=hub.url)
            assert tokens(compose) == ENTRY["ids"]
            asked = len(hub.requests)
            assert any(request.file == "model.safetensors" for request in hub.requests)
            compose("up", "--detach", "--wait", "--force-recreate", HF_ENDPOINT=hub.url)
            assert len(hub.requests) == asked, "what is in the volume is not asked for again"
            assert tokens(compose) == ENTRY["ids"]
    finally:
        compose.down()


def test_with_the_profile_second_model_each_request_is_answered_by_the_model_that_it_names() -> None:
    compose = Compose(
        f"fastgpt2-test-{uuid.uuid4().hex[:6]}",
        MODEL="demo",
        FASTGPT2_SERVED_MODEL_NAME="first",
        SECOND_MODEL="demo",
        SECOND_SERVED_MODEL_NAME="second",
        WORKER_MEMORY_LIMIT="600m",
    )
    try:
        compose("--profile", "second-model", "up", "--build", "--detach", "--wait", "--scale", "worker=1")
        models = httpx.get(f"{compose.url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in models] == ["first", "second"]
        body = {"prompt": ENTRY["prompt"], "max_tokens": 5}
        for name in ("first", "second", None):
            named = {} if name is None else {"model": name}
            answer = httpx.post(f"{compose.url}/v1/completions", json={**body, **named}, timeout=60, trust_env=False)
            assert answer.json()["model"] == (name or "first"), answer.text
        (worker,) = compose.containers("worker")
        docker("stop", worker)
        for name, status_code in (("second", 200), ("neither", 404)):
            answer = httpx.post(
                f"{compose.url}/v1/completions", json={**body, "model": name}, timeout=60, trust_env=False
            )
            assert answer.status_code == status_code, answer.text
    finally:
        compose.down()


def test_with_the_profile_ha_the_pool_follows_another_master() -> None:
    """The variables are those that .env.example proposes."""
    example = (ROOT / ".env.example").read_text()
    proposed = dict(re.findall(r"^#(COMPOSE_PROFILES|REDIS_URL)=(ha|redis\+sentinel:\S+)$", example, re.MULTILINE))
    assert proposed.keys() == {"COMPOSE_PROFILES", "REDIS_URL"}
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="demo", FASTGPT2_DURABILITY="replica", **proposed)

    def master() -> str:
        asked = "REDISCLI_AUTH=$(cat /access/redis-password) redis-cli -p 26379 sentinel get-master-addr-by-name pool"
        return compose("exec", "-T", "sentinel-1", "sh", "-c", asked).split()[0]

    try:
        compose("up", "--build", "--detach", "--wait")
        assert complete(compose)
        assert master() == "redis"
        (lost,) = compose.containers("redis")
        docker("kill", lost)
        until(lambda: master() != "redis", "a promotion")
        until(lambda: _answers(compose), "a text by the new master")
        docker("start", lost)
        role = "REDISCLI_AUTH=$(cat /access/redis-password) redis-cli role || true"  # while it begins, nothing answers
        until(lambda: "slave" in docker("exec", lost, "sh", "-c", role), "the old master to follow")
        promoted = master()
        # After a stop of everything, they go on as they were: no Redis takes itself for the master by its name.
        compose("stop", "--timeout", "5")
        compose("up", "--detach", "--wait")
        assert master() == promoted
        assert complete(compose)
    finally:
        compose.down()


def test_the_profile_ha_alone_is_refused() -> None:
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="demo", COMPOSE_PROFILES="ha")
    try:
        compose("up", "--detach", "redis-1", check=False)
        until(
            lambda: "needs REDIS_URL, as .env.example has it" in compose("logs", "redis-1", check=False), "a sentence"
        )
    finally:
        compose.down()


def test_with_the_profile_monitoring_prometheus_reads_the_endpoint_with_its_token() -> None:
    """Grafana starts only where its image is: what Grafana reads is held to its models by `test_monitoring.py`."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    images = {name: services[name]["image"].partition(":-")[2].rstrip("}") for name in ("prometheus", "grafana")}
    if not has_image(images["prometheus"]):
        pytest.skip(f"there is no {images['prometheus']} here")
    port, other = str(free_port()), str(free_port())
    compose = Compose(
        f"fastgpt2-test-{uuid.uuid4().hex[:6]}",
        MODEL="demo",
        FASTGPT2_TOKEN="t" * 32,
        PROMETHEUS_PORT=port,
        GRAFANA_PORT=other,
    )
    started = ["api", *(name for name, image in images.items() if has_image(image))]
    try:
        compose("up", "--build", "--detach", "--wait", *started)
        for name in started[1:]:
            (container,) = compose.containers(name)
            host = compose.inspect(container)["HostConfig"]
            assert host["ReadonlyRootfs"]
            assert host["CapDrop"] == ["ALL"]
            ((binding,),) = host["PortBindings"].values()
            assert binding["HostIp"] == "127.0.0.1"
        url = f"http://127.0.0.1:{port}/api/v1"

        def workers() -> list[Any]:
            found = httpx.get(f"{url}/query", params={"query": "fastgpt2_workers"}, trust_env=False).json()
            return list(found["data"]["result"])

        until(workers, "Prometheus to read the endpoint")
        rules = httpx.get(f"{url}/rules", trust_env=False).json()["data"]["groups"][0]["rules"]
        assert "Fastgpt2NoReadyWorker" in [rule["name"] for rule in rules]
        compose("restart", "--timeout", "10", "prometheus")
        compose("up", "--detach", "--wait", "--no-recreate", *started)
    finally:
        compose.down()


def has_image(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0


def test_a_backup_is_made_and_restored_as_the_documentation_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8").partition("## Backup and restore")[2]
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", page, re.MULTILINE)
    (save,) = [block.partition("# Docker Compose:\n")[2] for block in blocks if "# Docker Compose:" in block]
    (restore,) = [block for block in blocks if "docker compose stop" in block]
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="demo")

    def enqueue() -> str:
        return str(httpx.post(f"{compose.url}/v1/jobs", json={"prompt": "My name is"}, trust_env=False).json()["id"])

    def ended(job: str) -> httpx.Response:
        return httpx.get(f"{compose.url}/v1/jobs/{job}", params={"wait": 30}, timeout=40, trust_env=False)

    try:
        compose("up", "--build", "--detach", "--wait")
        compose("stop", "worker")
        saved = enqueue()
        compose.follow(save, tmp_path)
        later = enqueue()
        compose.follow(restore, tmp_path)
        until(lambda: _answers(compose), "a text")
        assert ended(saved).json()["status"] == "finished"
        assert ended(later).status_code == 404
    finally:
        compose.down()


class TestRefusals:
    def test_a_password_that_redis_would_misread(self) -> None:
        compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="demo", REDIS_PASSWORD="a b")
        try:
            compose("up", "--detach", "password", check=False)
            until(lambda: compose.containers("password", "--all", "--filter", "status=exited"), "it to end")
            assert "letters, digits and . _ ~ - only" in compose("logs", "password", check=False)
        finally:
            compose.down()

    def test_a_model_that_is_none_starts_no_worker(self) -> None:
        compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", MODEL="no/such", HF_HUB_OFFLINE="1")
        try:
            said = compose("up", "--detach", "--build", check=False)
            assert "exit 3" in said
            assert "no/such: revision main is not in the cache" in compose("logs", "model")
            assert compose.containers("worker") == []
        finally:
            compose.down()


def test_the_older_compose_takes_the_file_too() -> None:
    if shutil.which("docker-compose", path="/usr/bin:/usr/local/bin") is None:
        pytest.skip("there is no docker-compose 1.29")
    command = ("/usr/bin/docker-compose",)
    compose = Compose(f"fastgpt2-test-{uuid.uuid4().hex[:6]}", command=command, MODEL="demo")
    assert "1.29" in compose("version")
    try:
        compose("up", "--build", "--detach", "--scale", "worker=2")
        until(lambda: _answers(compose), "a text")
        assert len(status(compose)["workers"]) == 2
    finally:
        compose.down()
