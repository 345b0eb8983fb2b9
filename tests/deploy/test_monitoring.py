"""The files of deploy/monitoring, held to promtool, to Grafana's own models, and to a Prometheus that reads a pool."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from support.compose import ROOT, free_port
from support.manifests import mappings
from support.programs import find_program
from support.running import wait_until

from fastgpt2 import settings
from fastgpt2.system.up import System

sys.path.insert(0, str(ROOT / "tools"))
from kubernetes_alerts import ALERTS, RULES, alerts

FOLDER = ROOT / "deploy" / "monitoring"
CONFIGURATION: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
(GROUP,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
CASES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules_test.yml").read_text("utf-8"))["tests"]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana" / "dashboards" / "fastgpt2.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]

# A selector that wants labels, and a name of ours: counters, histograms and gauges.
SELECTOR = re.compile(r"\b(fastgpt2_\w+)\{([^{}]*)\}")
NAME = re.compile(r"\bfastgpt2_\w+")


# --- The files by themselves ---


@pytest.mark.processes
@pytest.mark.parametrize("words", ["check config --syntax-only prometheus.yml", "test rules rules_test.yml"])
def test_promtool_finds_nothing_wrong(words: str) -> None:
    """Testing rules checks them, too."""
    command = [find_program("promtool"), *words.split()]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_of_each_alert_it_is_tested_when_it_fires_and_when_not() -> None:
    names = [rule["alert"] for rule in GROUP["rules"]]
    assert len(set(names)) == len(names)
    told = {(check["alertname"], bool(check["exp_alerts"])) for case in CASES for check in case["alert_rule_test"]}
    assert told == {(name, fires) for name in names for fires in (True, False)}


def test_of_each_alert_it_is_told_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    told = re.findall(r"^\| `(Fastgpt2\w+)` \|", page, re.MULTILINE)
    assert told == [rule["alert"] for rule in GROUP["rules"]]
    for rule in GROUP["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_operators_manifest_is_made_of_the_same_rules() -> None:
    text = ALERTS.read_text("utf-8")
    assert text == alerts(RULES.read_text("utf-8")), "run tools/kubernetes_alerts.py"
    assert yaml.safe_load(text)["spec"] == yaml.safe_load(RULES.read_text("utf-8"))


def test_grafanas_own_models_understand_the_dashboard() -> None:
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    # The models have no words for these three, which Prometheus's annotations have.
    assert set(_lost(DASHBOARD, understood)) == {
        f"/annotations/list/0/{field}" for field in ("step", "titleFormat", "textFormat")
    }


def _lost(given: Any, understood: Any, path: str = "") -> Iterator[str]:
    """Yield the places of what is not understood, or as something else. Defaults may be added."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for name, value in given.items():
            yield from _lost(value, understood.get(name), f"{path}/{name}")
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for at, pair in enumerate(zip(given, understood, strict=True)):
            yield from _lost(*pair, f"{path}/{at}")
    elif given != understood:
        yield path


def test_what_each_endpoint_counts_is_summed_and_of_what_all_report_alike_one_is_taken() -> None:
    """A sum over endpoints of what stands in Redis would count it once for each of them."""
    expressions = [rule["expr"] for rule in GROUP["rules"]] + [target["expr"] for _, target in TARGETS]
    seen = set()
    for expression in expressions:
        for found in NAME.finditer(expression):
            (*_, innermost) = re.findall(r"\b(sum|max|min)\b", expression[: found.start()])
            is_own = found[0].startswith(("fastgpt2_http_", "fastgpt2_token_requests"))
            assert (innermost == "sum") == is_own, expression
            seen.add(found[0])
    assert {"fastgpt2_http_requests_total", "fastgpt2_token_requests_total", "fastgpt2_token_tokens_total"} <= seen


def test_panels_have_places_names_and_explanations_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(panel["description"] for panel in PANELS)
    sources = {json.dumps(found["datasource"]) for found in mappings(DASHBOARD) if "datasource" in found}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


def test_what_compose_mounts_is_what_the_files_name() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    prometheus, grafana = services["prometheus"], services["grafana"]
    mounts = dict(volume.split(":")[:2] for service in (prometheus, grafana) for volume in service["volumes"])
    for path in (path for path in mounts if path.startswith(".")):
        assert (ROOT / path).is_dir()
    script = prometheus["entrypoint"][-1]
    (file,) = re.findall(r"--config.file=(\S+)", script)
    assert file == f"{mounts['./deploy/monitoring']}/prometheus.yml"
    (job,) = [job for job in CONFIGURATION["scrape_configs"] if job["job_name"] == "fastgpt2"]
    token = job["authorization"]["credentials_file"]
    assert f"> {token}" in script
    # Docker keeps this one writable for all, also when it starts the container again.
    assert str(Path(token).parent) == "/dev/shm"
    assert job["static_configs"] == [{"targets": ["api:8000"]}], "the endpoint serves this name alone, without a token"
    provided = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/fastgpt2.yml").read_text("utf-8"))
    dashboards = mounts["./deploy/monitoring/grafana/dashboards"]
    assert provided["providers"][0]["options"]["path"] == dashboards
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{dashboards}/fastgpt2.json"
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == CONFIGURATION["global"]["scrape_interval"]


# --- On a real Prometheus, which reads a real pool ---


class Prometheus:
    """A Prometheus with the configuration of deploy/monitoring that looks at an endpoint of the test's own, often."""

    def __init__(self, folder: Path, endpoint: str, token: str) -> None:
        configuration = json.loads(json.dumps(CONFIGURATION))
        configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
        configuration["rule_files"] = [str(RULES)]
        (job,) = [job for job in configuration["scrape_configs"] if job["job_name"] == "fastgpt2"]
        job["static_configs"] = [{"targets": [endpoint]}]
        job["authorization"]["credentials_file"] = str(folder / "token")
        configuration["scrape_configs"] = [job]
        (folder / "token").write_text(token)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self.log = folder / "prometheus.log"
        address = f"127.0.0.1:{free_port()}"
        options = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
        with self.log.open("w") as out:
            command = [find_program("prometheus"), *options, f"--web.listen-address={address}"]
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        self._client = httpx.Client(base_url=f"http://{address}/api/v1", timeout=30, trust_env=False)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            # While it starts, it answers that it is not ready.
            if self._client.get("/query", params={"query": "1"}).status_code != 200:
                return False
        except httpx.HTTPError:
            return False
        # A rate needs two samples, of every series.
        return bool(self.query('count_over_time(up{job="fastgpt2"}[1m]) >= 4'))

    def query(self, expression: str) -> list[dict[str, str]]:
        """Return the labels of what an expression of the dashboard finds."""
        for variable, value in (("$namespace", ".*"), ("$job", "fastgpt2"), ("$__rate_interval", "1m")):
            expression = expression.replace(variable, value)
        return [found["metric"] for found in self.get("query", query=expression)["result"]]

    def alerts(self) -> set[str]:
        """Return the names of the alerts that fire, or will if it goes on."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"]}

    def stop(self) -> None:
        self._client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A pool whose endpoint has named tokens, and has served requests."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"prometheus:{'p' * 32}\nweb:{'w' * 32}\n")
    values = settings.of_system(
        model="demo", workers="1", port="0", redis_port="0", log_level="warning", token_file=str(tokens)
    )
    with System(values) as running:
        complete(running)
        yield running


def complete(pool: System) -> None:
    """Ask for texts, with the token of one of the pool's users; one of them names the model."""
    for body in ({"prompt": "My name is"}, {"prompt": "It was", "model": "demo", "max_tokens": 40}):
        headers = {"authorization": f"Bearer {'w' * 32}"}
        answer = httpx.post(f"{pool.http_url}/v1/completions", json=body, headers=headers, trust_env=False)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def prometheus(pool: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path_factory.mktemp("prometheus"), pool.http_url.removeprefix("http://"), "p" * 32)
    try:
        wait_until(running.is_ready, "Prometheus to read the endpoint a few times")
        complete(pool)
        wait_until(lambda: running.query("rate(fastgpt2_step_batch_size_count[1m]) > 0"), "Prometheus to see jobs run")
        yield running
    finally:
        running.stop()


# What this pool has nothing of: a Redis with a limit, and perhaps guesses.
MAY_BE_EMPTY = {("Redis memory", ""), ("Memory", "{{job}} maxmemory"), ("Work that was saved", "{{job}} accepted")}


@pytest.mark.processes
def test_every_expression_of_the_dashboard_finds_something(prometheus: Prometheus) -> None:
    nothing = []
    for title, target in TARGETS:
        found = prometheus.query(target["expr"])
        if not found and (title, target["legendFormat"]) not in MAY_BE_EMPTY:
            nothing.append((title, target["expr"]))
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert all(label in labels for labels in found), (title, label)
    assert not nothing
    (annotation,) = DASHBOARD["annotations"]["list"]
    prometheus.query(annotation["expr"])
    _, *variables = DASHBOARD["templating"]["list"]
    for variable in variables:
        (selector, label) = re.findall(r"^label_values\((.*), (\w+)\)$", variable["query"]["query"])[0]
        assert prometheus.query(selector), variable["name"]
        assert label == variable["name"]


@pytest.mark.processes
def test_every_rule_is_about_metrics_that_there_are(prometheus: Prometheus) -> None:
    there = set(prometheus.get("label/__name__/values"))
    (group,) = prometheus.get("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in GROUP["rules"]]
    wait_until(lambda: prometheus.get("rules")["groups"][0]["rules"][-1]["health"] == "ok", "all rules to be evaluated")
    for rule in prometheus.get("rules")["groups"][0]["rules"]:
        assert rule["health"] == "ok", rule
        assert set(NAME.findall(rule["query"])) - {"fastgpt2"} <= there, rule["name"]
        for metric, matchers in SELECTOR.findall(rule["query"]):
            for label in re.findall(r"(\w+)\s*[=!]", matchers):
                assert prometheus.query(f'{metric}{{{label}!=""}}'), (rule["name"], metric, label)


@pytest.mark.processes
def test_a_pool_that_is_well_raises_no_alert_and_one_that_goes_raises_some(
    pool: System, prometheus: Prometheus
) -> None:
    wait_until(lambda: not prometheus.alerts(), "no alert")
    pool.stop()
    wait_until(lambda: "Fastgpt2Down" in prometheus.alerts(), "an alert that the endpoint is gone")
