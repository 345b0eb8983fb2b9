"""deploy/kubernetes/ha makes three Redises and three sentinels of one Redis, in all files that know of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from support.manifests import VERSIONS, Object, check, mappings

from fastgpt2 import settings

BASE = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
PODS = [f"fastgpt2-redis-{n}.fastgpt2-redis" for n in range(3)]

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """What kustomize makes of it, with KEDA, when the comments are followed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    folder = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    text = (folder / "kustomization.yaml").read_text()
    for before, after in (
        ("  - redis.yaml", "  # - redis.yaml"),
        ("# components:\n#   - ha", "components:\n  - ha"),
        ("# - scaling-keda.yaml", "- scaling-keda.yaml"),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "kustomization.yaml").write_text(text)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=30, check=True)
    return list(yaml.safe_load_all(done.stdout))


def named(built: list[Object], kind: str, name: str) -> Object:
    (found,) = (each for each in built if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def test_every_document_is_of_its_schema(built: list[Object]) -> None:
    for document in built:
        check(document, VERSIONS[0])
        assert document["metadata"]["namespace"] == "fastgpt2"


def test_three_pods_of_a_redis_and_a_sentinel(built: list[Object]) -> None:
    workload = named(built, "StatefulSet", "fastgpt2-redis")["spec"]
    assert workload["replicas"] == 3
    assert workload["podManagementPolicy"] == "Parallel"
    pod = workload["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    ports = {port["name"]: port["containerPort"] for each in pod["containers"] for port in each["ports"]}
    assert ports == {"redis": 6379, "sentinel": 26379}
    service = named(built, "Service", "fastgpt2-redis")["spec"]
    assert service["clusterIP"] == "None"
    assert {port["name"]: port["port"] for port in service["ports"]} == ports
    volumes = {each["name"] for each in pod["volumes"]} | {"data"}
    assert {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]} == volumes


def test_everybody_asks_the_sentinels(built: list[Object]) -> None:
    data = named(built, "ConfigMap", "fastgpt2-settings")["data"]
    url = urlsplit(data["FASTGPT2_REDIS_URL"])
    assert url.scheme == "redis+sentinel"
    assert url.netloc.split(",") == [f"{pod}:26379" for pod in PODS]
    assert url.path == "/pool/0"
    assert parse_qs(url.query) == {
        "password_file": ["/run/secrets/fastgpt2/password"],
        "sentinel_password_file": ["/run/secrets/fastgpt2/password"],
    }
    assert settings.DURABILITY.parse(data["FASTGPT2_DURABILITY"]) == "replica"
    triggers = named(built, "ScaledObject", "fastgpt2-worker")["spec"]["triggers"]
    assert len(triggers) == 12
    for trigger in triggers:
        assert trigger["type"] == "redis-sentinel"
        assert trigger["metadata"].keys() == {"addresses", "sentinelMaster", "listName", "listLength"}
        assert trigger["metadata"]["addresses"].split(",") == [f"{pod}.fastgpt2.svc:26379" for pod in PODS]
    secret = named(built, "TriggerAuthentication", "fastgpt2-redis")["spec"]["secretTargetRef"]
    assert [each["parameter"] for each in secret] == ["password", "sentinelPassword"]


def test_redises_and_sentinels_reach_each_other(built: list[Object]) -> None:
    """The network policies of the set and of KEDA open both ports, and the set's own pods are let in."""
    for name in ("fastgpt2-redis", "fastgpt2-redis-from-keda"):
        (rule,) = named(built, "NetworkPolicy", name)["spec"]["ingress"]
        assert {port["port"] for port in rule["ports"]} == {"redis", "sentinel"}
    peers = named(built, "NetworkPolicy", "fastgpt2-redis")["spec"]["ingress"][0]["from"]
    labels = named(built, "StatefulSet", "fastgpt2-redis")["spec"]["template"]["metadata"]["labels"]
    assert labels in [peer["podSelector"]["matchLabels"] for peer in peers]


@pytest.mark.parametrize(
    ("host", "has_data", "said", "follows"),
    [
        (0, False, ["", "", ""], None),
        (1, False, ["", "", ""], 0),
        (0, True, [2, "", 2], 2),
        (2, True, [2, 2, 0], None),
        (0, False, [1, 1, 1], 1),
    ],
)
def test_a_redis_follows_whom_two_sentinels_name(
    built: list[Object], tmp_path: Path, host: int, has_data: bool, said: list[Any], follows: int | None
) -> None:
    """The container's own script runs, with other folders and with programs that stand in for Redis."""
    settings_of_redis = _start(built, tmp_path, host, has_data, said).splitlines()
    master = [line for line in settings_of_redis if line.startswith("replicaof")]
    assert master == ([] if follows is None else [f"replicaof {PODS[follows]}.fastgpt2.svc 6379"])
    for line in ("requirepass 0123-secret", "masterauth 0123-secret", "min-replicas-to-write 1", "appendonly yes"):
        assert line in settings_of_redis
    assert f"replica-announce-ip {PODS[host]}.fastgpt2.svc" in settings_of_redis


def test_a_redis_that_has_data_waits_for_a_second_sentinel(built: list[Object], tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        _start(built, tmp_path, 0, True, [1, "", 2], seconds=1.5)


def _start(built: list[Object], tmp_path: Path, host: int, has_data: bool, said: list[Any], seconds: float = 20) -> str:
    script: str = named(built, "ConfigMap", "fastgpt2-redis")["data"]["start-redis.sh"]
    for path in ("/etc/redis", "/run/secrets/redis", "/run/redis", "/data"):
        folder = tmp_path / path.replace("/", "-")
        folder.mkdir()
        script = script.replace(path, str(folder))
    redis_conf = named(built, "ConfigMap", "fastgpt2-redis")["data"]["redis.conf"]
    (tmp_path / "-etc-redis" / "redis.conf").write_text(redis_conf)
    (tmp_path / "-run-secrets-redis" / "password").write_text("0123-secret\n")
    if has_data:
        (tmp_path / "-data" / "appendonlydir").mkdir()
    answers = {PODS[n]: f"{PODS[name]}.fastgpt2.svc" for n, name in enumerate(said) if name != ""}
    cases = "".join(f"  *-h\\ {pod}.*) echo {answer}; echo 6379;;\n" for pod, answer in answers.items())
    _program(tmp_path / "redis-cli", f'case "$*" in\n{cases}  *) echo refused >&2; exit 1;;\nesac\n')
    _program(tmp_path / "redis-server", 'cat "$1"\n')
    done = subprocess.run(
        ["sh", "-euc", script],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOSTNAME": f"fastgpt2-redis-{host}",
            "NAMESPACE": "fastgpt2",
        },
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def test_the_first_master_is_the_first_pod_and_sentinels_use_names(built: list[Object]) -> None:
    data = named(built, "ConfigMap", "fastgpt2-redis")["data"]
    assert "sentinel monitor pool fastgpt2-redis-0.NODES 6379 2" in data["sentinel.conf"]
    assert re.search(r"s/NODES/fastgpt2-redis\.\$NAMESPACE\.svc/", data["start-sentinel.sh"])
    assert {found["fieldRef"]["fieldPath"] for found in mappings(built) if "fieldRef" in found} == {
        "metadata.namespace"
    }
