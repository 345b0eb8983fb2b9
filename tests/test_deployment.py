"""What stands in the files that containers are made of, where no daemon is needed to see it."""

from __future__ import annotations

import re
import tomllib

import yaml
from compose import ROOT
from packaging.requirements import Requirement

from fastgpt2 import settings


def test_every_variable_is_documented_and_passed_on() -> None:
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    more = (ROOT / "deploy" / "compose.redis-port.yml").read_text("utf-8")
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text + more))
    services = yaml.safe_load(text)["services"]
    for service in services.values():
        used |= {name for name, value in (service.get("environment") or {}).items() if value is None}
    documented = dict(re.findall(r"^#?(\w+)=(.*)$", (ROOT / ".env.example").read_text("utf-8"), re.M))
    assert documented.keys() == used
    for name, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", text + more):
        assert documented[name] == default, name
    for name, default in re.findall(r"^ARG (\w+)=(.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.M):
        assert documented[name] == default, name
    known = {setting.variable: setting for setting in vars(settings).values() if isinstance(setting, settings.Setting)}
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
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["mkl"]
    for text in (*wanted, *project["build-system"]["requires"]):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pins[name]), text
