"""tools/zoo.py compares a model with what transformers answers. A script that answers from a file stands in for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

ROOT = Path(__file__).parents[2]
MODEL = GOLDEN / "zoo" / "openai-gpt2"
PROMPT = "Hello, my name is"

pytestmark = pytest.mark.processes

Check = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def answer() -> dict[str, Any]:
    """Return what transformers answers to one prompt."""
    stored = json.loads((GOLDEN / "zoo" / "answers.json").read_text("utf-8"))["openai-gpt2"]["prompts"]["ascii"]
    more = {"prompt": PROMPT, "full_minus_prompt": stored["text"], "near": [0.5] * len(stored["new"])}
    return {"generation_config": {}, "prompts": {"1": {**stored, **more}}}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Return a function that runs `tools/zoo.py check` with these answers."""

    def run(answers: dict[str, Any], *models: Path) -> subprocess.CompletedProcess[str]:
        (tmp_path / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        (tmp_path / "prompts.txt").write_text(PROMPT + "\n", encoding="utf-8")
        stand_in = tmp_path / "python"
        stand_in.write_text(f"#!/bin/sh\ncat > {tmp_path}/question.json\ncat {tmp_path}/answers.json\n")
        stand_in.chmod(0o755)
        command = [sys.executable, str(ROOT / "tools" / "zoo.py"), "check", *map(str, models or (MODEL,))]
        command += ["--python", str(stand_in), "--prompts", str(tmp_path / "prompts.txt")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


def test_equal(check: Check, answer: dict[str, Any], tmp_path: Path) -> None:
    run = check(answer, MODEL, MODEL)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [f"{MODEL}: equal"] * 2 + [""] + [f"{MODEL}  equal"] * 2
    question = json.loads((tmp_path / "question.json").read_text("utf-8"))
    assert question == {"model": str(MODEL), "prompts": {"1": PROMPT}, "tokens": 20}


def test_the_first_token_that_differs_is_named_with_how_near_the_two_best_were(
    check: Check, answer: dict[str, Any]
) -> None:
    said = answer["prompts"]["1"]
    said["new"] = [*said["new"][:3], 7, *said["new"][4:]]
    run = check(answer)
    assert run.returncode == 1
    assert f"{MODEL}: differs" in run.stdout
    assert "token 4 is" in run.stdout
    assert "for fastgpt2, 7 '(' for transformers, whose two best logits differ by 0.5\n" in run.stdout
    assert f"the prompt's ids: {said['ids']}" in run.stdout


def test_a_near_tie_is_no_difference(check: Check, answer: dict[str, Any]) -> None:
    said = answer["prompts"]["1"]
    said["new"] = [*said["new"][:3], 7, *said["new"][4:]]
    said["near"][3] = 0.0004
    run = check(answer)
    assert run.returncode == 0
    assert "differ by 0.0004: a near tie" in run.stdout


def test_ids_and_texts_that_differ_are_shown_on_both_sides(check: Check, answer: dict[str, Any]) -> None:
    answer["prompts"]["1"]["full_minus_prompt"] = "another"
    run = check(answer)
    assert run.returncode == 1
    assert "and 'another' for transformers" in run.stdout
    answer["prompts"]["1"]["ids"] = [1, 2]
    assert "and [1, 2] for transformers" in check(answer).stdout


def test_settings_that_only_transformers_applies_are_left_out_and_named(check: Check, answer: dict[str, Any]) -> None:
    said = answer["prompts"]["1"]
    said |= {"plain": said["new"], "plain_text": said["full_minus_prompt"], "plain_near": said["near"], "new": [1] * 20}
    answer["generation_config"] = {"num_beams": 4, "repetition_penalty": 1.2, "eos_token_id": 309, "top_k": 30}
    run = check(answer)
    assert run.returncode == 0
    assert "generation_config.json asks transformers for num_beams 4; where" in run.stdout


def test_settings_that_both_apply_are_no_matter(check: Check, answer: dict[str, Any]) -> None:
    said = answer["prompts"]["1"]
    said |= {"plain": said["new"], "plain_text": said["full_minus_prompt"], "plain_near": said["near"]}
    answer["generation_config"] = {"repetition_penalty": 1.2}
    run = check(answer)
    assert run.returncode == 0
    assert "generation_config.json" not in run.stdout


def test_both_sides_say_why_a_model_is_refused(check: Check) -> None:
    run = check({"model_error": "OSError: no file"}, GOLDEN / "zoo" / "flax-only")
    assert run.returncode == 1
    assert "refused\n    fastgpt2: " in run.stdout
    assert "transformers: OSError: no file\n" in run.stdout


def test_an_environment_that_cannot_be_run_is_another_matter() -> None:
    command = [sys.executable, str(ROOT / "tools" / "zoo.py"), "check", str(MODEL), "--python", "/nowhere/python"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    assert "not asked\n    /nowhere/python cannot be run" in run.stdout
