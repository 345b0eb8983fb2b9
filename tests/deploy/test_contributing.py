"""The pages for newcomers and contributors are true: links, file names, settings, rooms, hooks and the workflow."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_imports import ROOMS

from fastgpt2 import settings
from fastgpt2.api.client.enqueue import JobFields
from fastgpt2.setting import Setting

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def found(*patterns: str) -> list[Path]:
    """Return the project's files of these patterns, without those of hidden folders other than .github."""
    paths = [path for pattern in patterns for path in ROOT.rglob(pattern)]
    folders = {path: path.relative_to(ROOT).parts[:-1] for path in paths}
    return sorted(p for p in paths if not any(f.startswith(".") and f != ".github" for f in folders[p]))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PAGES = found("*.md")
READERS_NAMED = [*DOCS.glob("*.md"), *(ROOT / name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINKS = re.compile(r"\]\(([^()\s]+)\)|\bsrc(?:set)?=\"([^\"\s]+)\"")
PATHS = re.compile(
    r"(?<![\w/.-])(?:fastgpt2|tests|benchmarks|docs|deploy|tools|examples)/[\w./-]+\.(?:py|md|lua|js|html|css|ya?ml|acl|sh)\b"
)


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    slugs: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text("utf-8")))
    for link in (first or second for first, second in LINKS.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads to no file"
        assert target.is_relative_to(ROOT), f"{link} leads out of the project"
        assert not anchor or anchor in anchors(target), f"{link}: {name_of(target)} has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    missing = [name for name in PATHS.findall(page.read_text("utf-8")) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", READERS_NAMED, ids=name_of)
def test_a_page_says_at_its_head_for_whom_it_is(page: Path) -> None:
    title, blank, head, *_ = page.read_text("utf-8").splitlines()
    assert title.startswith("# ")
    assert blank == ""
    assert head.startswith("For ")


def test_the_index_lists_every_page_once() -> None:
    linked = re.findall(r"^\| \[[^\]]+\]\(([^)#]+)\) \|", (DOCS / "README.md").read_text("utf-8"), re.MULTILINE)
    pages = [page.name for page in DOCS.glob("*.md") if page.name != "README.md"]
    assert sorted(name for name in linked if "/" not in name) == sorted(pages)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 180


def test_every_setting_stands_in_the_table_of_settings() -> None:
    listed = re.findall(r"^\| `(FASTGPT2_\w+)` \|", (DOCS / "settings.md").read_text("utf-8"), re.MULTILINE)
    defined = {value.variable for value in vars(settings).values() if isinstance(value, Setting)}
    assert sorted(listed) == sorted({*defined, "FASTGPT2_CACHE"})


def test_every_field_of_a_job_stands_in_the_tables_of_usage() -> None:
    text = (DOCS / "usage.md").read_text("utf-8").partition("\n## What a job may ask\n")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted({"prompt", *JobFields.__annotations__})


def test_the_table_of_rooms_is_what_the_imports_are_held_to() -> None:
    table = (
        (DOCS / "architecture.md").read_text("utf-8").partition("\n## The rooms\n")[2].partition("\n```mermaid\n")[0]
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines() if row.startswith("| `")]
    assert {name.strip("`"): set(re.findall(r"`([\w.]+)`", uses)) for name, _, uses in rows} == ROOMS


def test_the_list_of_files_has_every_module() -> None:
    listed = re.findall(r"^\| `(fastgpt2/[\w/]+\.py)` \|", (DOCS / "architecture.md").read_text("utf-8"), re.MULTILINE)
    modules = {name_of(path) for path in (ROOT / "fastgpt2").rglob("*.py") if not path.name.startswith("__")}
    assert sorted(listed) == sorted({*modules, "fastgpt2/api/page/__init__.py"})


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", found("*.yml", "*.yaml"), ids=name_of)
def test_every_yaml_file_can_be_read(path: Path) -> None:
    assert all(document is not None for document in yaml.safe_load_all(path.read_text("utf-8")))


def test_hooks_are_local_and_run_what_the_makefile_installs() -> None:
    (repository,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_the_workflow_runs_ci_on_every_python_that_is_supported() -> None:
    (job,) = parsed(ROOT / ".github/workflows/ci.yml")["jobs"].values()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    supported = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == supported
    (step,) = [step for step in job["steps"] if ".ci/run" in step.get("run", "") and "PYTHON" in step.get("env", {})]
    assert step["run"] == ".ci/run"
    assert re.search(r"^PYTHON \?=", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), "taken from the environment"
    assert (ROOT / ".ci/run").read_text("utf-8").rstrip().endswith("exec make test")


@pytest.mark.parametrize("template", found(".github/ISSUE_TEMPLATE/*.md"), ids=name_of)
def test_a_template_of_issues_has_a_name_and_says_what_it_is_for(template: Path) -> None:
    _, front, body = template.read_text("utf-8").split("---\n", 2)
    assert {"name", "about"} <= yaml.safe_load(front).keys()
    assert body.strip()
