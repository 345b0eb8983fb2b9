"""The manifests of deploy/kubernetes agree with Kubernetes' schemas, with each other, and with the code here."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from rq import Queue
from rq.registry import StartedJobRegistry
from support.manifests import VERSIONS, Object, Refused, check, mappings
from support.running import wait_until

from fastgpt2 import settings
from fastgpt2.api.http.access import OPEN_ROUTES
from fastgpt2.api.http.serve import SHUTDOWN_SECONDS
from fastgpt2.api.pool.prometheus import render_metrics
from fastgpt2.cli import COMMANDS
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import PRIORITIES, queue_of
from fastgpt2.setting import Setting
from fastgpt2.setting_values import size
from fastgpt2.system.redis_server import RedisServer, find_server
from fastgpt2.system.served_model import ServedModel, read_served_models

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
TEXTS = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
KUSTOMIZATION = yaml.safe_load(TEXTS["kustomization.yaml"])
COMMENTED = re.findall(r"^ *# - (\S+\.yaml)$", TEXTS["kustomization.yaml"], re.MULTILINE)
DOCUMENTS: list[Object] = [
    document for name, text in TEXTS.items() if name != "kustomization.yaml" for document in yaml.safe_load_all(text)
]
BY_THE_USER = {("fastgpt2-redis", "password"), ("fastgpt2-api", "token"), ("fastgpt2-hub", "token")}


def of_kind(*kinds: str) -> list[Object]:
    return [document for document in DOCUMENTS if document["kind"] in kinds]


def named(kind: str, name: str) -> Object:
    (found,) = (document for document in of_kind(kind) if document["metadata"]["name"] == name)
    return found


WORKLOADS = of_kind("Deployment", "StatefulSet")
PODS = {workload["metadata"]["name"]: workload["spec"]["template"] for workload in WORKLOADS}


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selected(selector: Object) -> set[str]:
    wanted = selector.get("matchLabels", selector).items()
    return {name for name, pod in PODS.items() if wanted <= pod["metadata"]["labels"].items()}


def environment(container: Object) -> dict[str, str]:
    """Return the variables that a container sets by name and value."""
    shared = [named("ConfigMap", source["configMapRef"]["name"])["data"] for source in container.get("envFrom", [])]
    own = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    return {name: value for data in (*shared, own) for name, value in data.items()}


def bytes_of(text: str) -> int:
    return size(re.sub("([KMG])i$", r"\1iB", text))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_of_its_schema(version: str) -> None:
    assert len(DOCUMENTS) >= 15
    for document in DOCUMENTS:
        check(document, version)


def test_a_misspelt_field_is_refused() -> None:
    """The checker does check, at every depth: beside the name of whatever has one, and in what a document is for."""
    for document in DOCUMENTS:
        places = [found for found in mappings(document) if "name" in found]
        for place in (document, document.get("spec", document), places[0], places[-1]):
            place["misspelt"] = "x"
            with pytest.raises(Refused):
                check(document, VERSIONS[-1])
            del place["misspelt"]


def test_all_files_are_in_the_base_or_to_be_chosen() -> None:
    optional = {"second-model.yaml", "scaling-keda.yaml", "scaling-hpa.yaml", "monitoring.yaml", "alerts.yaml"}
    assert set(COMMENTED) == optional
    assert {*KUSTOMIZATION["resources"], *COMMENTED, "kustomization.yaml"} == set(TEXTS)


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
@pytest.mark.parametrize(
    "chosen", [[], ["scaling-keda.yaml", "second-model.yaml"], ["scaling-hpa.yaml", "monitoring.yaml", "alerts.yaml"]]
)
def test_kustomize_builds_it(chosen: list[str], tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    text = TEXTS["kustomization.yaml"].replace("newTag: latest", "newTag: 1.2.3")
    for file in chosen:
        text = text.replace(f"# - {file}", f"- {file}")
    (tmp_path / "kustomization.yaml").write_text(text)
    built = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, timeout=30, check=True)
    documents = list(yaml.safe_load_all(built.stdout))
    left_out = sum(len(list(yaml.safe_load_all(TEXTS[file]))) for file in COMMENTED if file not in chosen)
    assert len(documents) == len(DOCUMENTS) - left_out
    assert {document["metadata"]["namespace"] for document in documents} == {"fastgpt2"}
    assert built.stdout.count("image: fastgpt2:1.2.3") == (5 if "second-model.yaml" in chosen else 3)
    for document in documents:
        check(document, VERSIONS[-1])


REFERENCES = {
    "configMapRef": "ConfigMap", "configMap": "ConfigMap", "scaleTargetRef": "Deployment",
    "authenticationRef": "TriggerAuthentication",
    "claimName": "PersistentVolumeClaim", "serviceName": "Service",
}  # fmt: skip


def test_what_is_referred_to_is_there_or_made_by_the_user() -> None:
    secrets, kinds = set(), set()
    for found in mappings(DOCUMENTS):
        for field in REFERENCES.keys() & found.keys():
            named(REFERENCES[field], found[field]["name"] if isinstance(found[field], dict) else found[field])
            kinds.add(field)
        match found:
            case {"secretName": name}:
                secrets |= {(name, item["key"]) for item in found.get("items", [{"key": "password"}])}
            case {"name": str(name), "key": key}:
                secrets.add((name, key))
    assert kinds == set(REFERENCES), "or this test looks for nothing"
    assert secrets == BY_THE_USER
    guide = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    for name, key in BY_THE_USER:
        assert f"create secret generic {name} --from-file={key}=/dev/stdin" in guide
    for workload in WORKLOADS:
        pod = workload["spec"]["template"]["spec"]
        claims = [claim["metadata"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
        there = {volume["name"] for volume in (*pod["volumes"], *claims)}
        assert {mount["name"] for found in mappings(pod) for mount in found.get("volumeMounts", [])} == there


def test_selectors_and_ports_mean_the_pods_that_are_there() -> None:
    selectors = [
        *((d, d["spec"]["selector"]) for d in of_kind("Service", "PodDisruptionBudget", "PodMonitor")),
        *((d, d["spec"]["podSelector"]) for d in of_kind("NetworkPolicy")),
        *((d, constraint["labelSelector"]) for d in WORKLOADS
          for constraint in d["spec"]["template"]["spec"].get("topologySpreadConstraints", [])),
        *((d, d["spec"]["selector"]) for d in WORKLOADS),
    ]  # fmt: skip
    for document, selector in selectors:
        component = document["metadata"]["labels"].get("app.kubernetes.io/component")
        assert selected(selector) == ({f"fastgpt2-{component}"} if component else set(PODS)), document["metadata"]
        ports = {
            port["name"] for name in selected(selector) for c in containers(PODS[name]) for port in c.get("ports", [])
        }
        if document["kind"] in ("Service", "NetworkPolicy", "PodMonitor"):
            asked = {found.get("targetPort", found.get("port")) for found in mappings(document["spec"])}
            assert {port for port in asked if port} <= ports, document["metadata"]
    for pod in PODS.values():
        ports = {port["name"] for container in containers(pod) for port in container.get("ports", [])}
        assert {found["httpGet"]["port"] for found in mappings(pod) if "httpGet" in found} <= ports
    clients = named("NetworkPolicy", "fastgpt2-redis")["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert selected(clients) == {"fastgpt2-worker", "fastgpt2-second-worker", "fastgpt2-api"}


def test_variables_are_settings_of_the_command_and_can_be_read() -> None:
    known: Object = {setting.variable: setting for setting in vars(settings).values() if isinstance(setting, Setting)}
    commands = set()
    for pod in (PODS["fastgpt2-worker"], PODS["fastgpt2-second-worker"], PODS["fastgpt2-api"]):
        assert pod["spec"]["enableServiceLinks"] is False, "FASTGPT2_REDIS_PORT would be tcp://..."
        for container in containers(pod):
            (command,) = re.findall(r"fastgpt2 (\w+)", " ".join(container["command"]))
            commands.add(command)
            taken = {setting.variable for setting in COMMANDS[command].settings}
            shared = (
                named("ConfigMap", "fastgpt2-settings")["data"] | named("ConfigMap", "fastgpt2-second-model")["data"]
            )
            for name, value in environment(container).items():
                if not name.startswith("FASTGPT2_"):
                    assert name.startswith("HF_")
                    continue
                assert name in taken or name in shared, (command, name)
                assert known[name].parse(value) not in (None, ""), name
    assert commands == {"pack", "worker", "api"}


def test_what_is_proposed_can_be_set_and_means_the_same_to_who_packs_and_who_maps() -> None:
    proposed = dict(re.findall(r"^  # (FASTGPT2_\w+): (\S+)$", TEXTS["settings.yaml"], re.MULTILINE))
    # How the model is called, and what is logged, matters to nobody who packs it.
    assert (
        proposed.pop("FASTGPT2_SERVED_MODEL_NAME") == named("ConfigMap", "fastgpt2-settings")["data"]["FASTGPT2_MODEL"]
    )
    told = {"FASTGPT2_LOG_FORMAT", "FASTGPT2_OTLP_TRACES_ENDPOINT"}
    assert proposed.keys() == {"FASTGPT2_DRAFTS", "FASTGPT2_TOKENIZER", "FASTGPT2_WEIGHTS", *told}
    pack, worker = containers(PODS["fastgpt2-worker"])
    for command in ("pack", "worker"):
        taken = {setting.variable: setting for setting in COMMANDS[command].settings}
        for name, value in proposed.items():
            # Who packs sends no spans.
            assert (name, command) == ("FASTGPT2_OTLP_TRACES_ENDPOINT", "pack") or taken[name].parse(value) == value
    for container in (pack, worker):
        assert {"configMapRef": {"name": "fastgpt2-settings"}} in container["envFrom"]
        assert not proposed.keys() & {entry["name"] for entry in container["env"]}


def test_the_workers_of_the_second_model_are_as_those_of_the_first() -> None:
    """They differ in their names, and in the settings that they have beside those of all."""
    first, second = (json.dumps(named("Deployment", f"fastgpt2-{name}")) for name in ("worker", "second-worker"))
    own = ', {"configMapRef": {"name": "fastgpt2-second-model"}}'
    assert second.count(own) == 2
    assert second.replace(own, "").replace("second-worker", "worker") == first
    told = named("ConfigMap", "fastgpt2-second-model")["data"]
    proposed = re.findall(r"^  # (FASTGPT2_\w+): (\S+)$", TEXTS["second-model.yaml"], re.MULTILINE)
    values = {
        setting.name: setting.resolve({**told, **dict(proposed)}.get(setting.variable))
        for setting in COMMANDS["worker"].settings
    }
    assert read_served_models(values) == [ServedModel("demo", ("small",), named_only=True)]


def test_files_that_are_named_are_mounted() -> None:
    for name, container in ((name, container) for name, pod in PODS.items() for container in pod["spec"]["containers"]):
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in PODS[name]["spec"]["volumes"]}
        values = [*environment(container).values(), *re.findall(r"/run/\S+/password", str(container.get("command")))]
        for file in {Path(found) for value in values for found in re.findall(r"/run/[\w/-]+", value)}:
            secret = volumes[mounts[str(file.parent)]["name"]]["secret"]
            assert (secret["secretName"], file.name) in BY_THE_USER
            assert file.name in [item["path"] for item in secret.get("items", [{"path": "password"}])]
    worker = {container["name"]: container for container in containers(PODS["fastgpt2-worker"])}
    read_only = {name: [m.get("readOnly", False) for m in c["volumeMounts"] if m["mountPath"] == "/cache"]
                 for name, c in worker.items()}  # fmt: skip
    assert read_only == {"pack": [False], "worker": [True]}


def test_nobody_is_root_or_writes_to_the_image_or_is_without_bounds() -> None:
    for pod in PODS.values():
        spec, own = pod["spec"], pod["spec"]["securityContext"]
        assert own["runAsNonRoot"]
        assert own["runAsUser"] > 0
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
            }  # fmt: skip
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    assert PODS["fastgpt2-worker"]["spec"]["securityContext"]["runAsUser"] == 10001
    assert "USER 10001:10001" in (ROOT / "Dockerfile").read_text("utf-8")


def test_no_secret_is_in_any_file() -> None:
    assert not of_kind("Secret")
    for name, text in TEXTS.items():
        assert not re.search(r"[0-9a-f]{16}|[A-Za-z0-9+/]{40}|stringData", text), name
    for entry in (found for found in mappings(DOCUMENTS) if re.search("TOKEN$|PASSWORD|AUTH", str(found.get("name")))):
        assert "value" not in entry


def test_a_pod_that_is_told_to_stop_has_time_to() -> None:
    worker, api = PODS["fastgpt2-worker"]["spec"], PODS["fastgpt2-api"]["spec"]
    drain = settings.DRAIN_TIMEOUT.parse(environment(worker["containers"][0])["FASTGPT2_DRAIN_TIMEOUT"])
    assert worker["terminationGracePeriodSeconds"] >= drain + 15
    _, before = api["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert api["terminationGracePeriodSeconds"] >= int(before) + SHUTDOWN_SECONDS + 5


@pytest.mark.processes
def test_probes_ask_what_answers_them(tmp_path: Path) -> None:
    (api,) = PODS["fastgpt2-api"]["spec"]["containers"]
    paths = {name: api[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")}
    assert paths == {"readinessProbe": "/ready", "livenessProbe": "/health"}
    assert all(("GET", path) in OPEN_ROUTES for path in paths.values())
    (worker,) = PODS["fastgpt2-worker"]["spec"]["containers"]
    alive = environment(worker)["FASTGPT2_ALIVE_FILE"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        file = tmp_path / probe
        *shell, script = worker[probe]["exec"]["command"]

        def answer(shell: list[str] = shell, script: str = script, file: Path = file) -> int:
            return subprocess.run([*shell, script.replace(alive, str(file))], stderr=subprocess.DEVNULL).returncode

        assert answer() == 1
        file.touch()
        assert answer() == 0
        os.utime(file, (time.time() - 90,) * 2)
        assert answer() == 1


@pytest.mark.processes
def test_redis_starts_with_the_secrets_password_and_stays_below_its_memory(tmp_path: Path) -> None:
    """The test runs the container's own command, with other folders and another program."""
    configuration = named("ConfigMap", "fastgpt2-redis")["data"]["redis.conf"]
    (container,) = PODS["fastgpt2-redis"]["spec"]["containers"]
    (bound,) = re.findall(r"^maxmemory (\d+mb)$", configuration, re.MULTILINE)
    assert size(bound.replace("mb", "MiB")) <= bytes_of(container["resources"]["limits"]["memory"]) / 2
    folders = {
        path: tmp_path / path.replace("/", "-") for path in ("/etc/redis", "/run/secrets/redis", "/run/redis", "/data")
    }
    for folder in folders.values():
        folder.mkdir()
    *shell, script = container["command"]
    for path, folder in folders.items():
        script, configuration = script.replace(path, str(folder)), configuration.replace(path, str(folder))
    socket, password = tmp_path / "socket", "0123-not-a-secret"
    (folders["/etc/redis"] / "redis.conf").write_text(f"{configuration}port 0\nunixsocket {socket}\n")
    (folders["/run/secrets/redis"] / "password").write_text(f"{password}\n")
    process = subprocess.Popen([*shell, script.replace("redis-server", str(find_server()))], stdout=subprocess.DEVNULL)
    try:
        wait_until(socket.exists, "Redis to listen")
        assert password.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        with pytest.raises(RedisError, match=r"NOAUTH|[Aa]uthenticat"):
            connect(f"unix://{socket}").ping()
        connection = connect(f"unix://:{password}@{socket}")
        assert connection.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
        assert connection.config_get("appendonly") == {"appendonly": "yes"}
    finally:
        process.terminate()
        assert process.wait(20) == 0, "the signal reaches Redis itself"


def test_keda_counts_the_jobs_that_wait_and_those_that_run(redis: Redis) -> None:
    spec = named("ScaledObject", "fastgpt2-worker")["spec"]
    model = named("ConfigMap", "fastgpt2-settings")["data"]["FASTGPT2_MODEL"]
    lists = []
    for name in (None, model):
        queues = [Queue(queue_of(settings.QUEUE.default, each, name), connection=redis) for each in PRIORITIES]
        lists += [queue.key for queue in queues]
        lists += [StartedJobRegistry(queue=queue).key for queue in queues]
    assert [trigger["metadata"]["listName"] for trigger in spec["triggers"]] == lists
    modifiers = spec["advanced"]["scalingModifiers"]
    assert modifiers["formula"].split(" + ") == [trigger["name"] for trigger in spec["triggers"]]
    url = named("ConfigMap", "fastgpt2-settings")["data"]["FASTGPT2_REDIS_URL"]
    (host,) = re.findall(r"^redis://([\w-]+):6379/0\?", url)
    assert named("Service", host)["spec"]["ports"][0]["port"] == 6379
    for trigger in spec["triggers"]:
        assert trigger["metadata"]["address"] == f"{host}.{KUSTOMIZATION['namespace']}.svc:6379"
        assert trigger["metadata"]["listLength"] == modifiers["target"]


def test_the_autoscalers_metric_is_made_of_what_the_endpoint_exposes(redis_server: RedisServer) -> None:
    comment = re.findall(r"^# (rules:\n(?:#.+\n)+)", TEXTS["scaling-hpa.yaml"], re.MULTILINE)[0]
    (rule,) = yaml.safe_load(re.sub("^# ?", "", comment, flags=re.MULTILINE))["rules"]["external"]
    (metric,) = named("HorizontalPodAutoscaler", "fastgpt2-worker")["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == rule["name"]["as"]

    async def ask() -> bytes:
        async with AsyncRedis.from_url(redis_server.url) as connection:
            return (await render_metrics(connection, settings.QUEUE.default))[1]

    samples = [s for family in text_string_to_metric_families(asyncio.run(ask()).decode()) for s in family.samples]
    assert {s.labels["priority"] for s in samples if s.name == "fastgpt2_queue_jobs"} == {"high", "normal", "low"}
    assert [s.value for s in samples if s.name == "fastgpt2_jobs" and s.labels["state"] == "started"] == [0]
    series = re.findall(r"fastgpt2_\w+(?=\{)", rule["seriesQuery"] + rule["metricsQuery"])
    assert series == ["fastgpt2_queue_jobs", "fastgpt2_queue_jobs", "fastgpt2_jobs"]
    assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}}
