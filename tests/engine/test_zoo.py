"""The zoo: small models of the kinds that public repositories have. Each gives what transformers gives, or is refused.

tests/golden/make_zoo.py built them and asked transformers. Prompts at which transformers fails are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import ModelError

ZOO = GOLDEN / "zoo"
kinds: dict[str, Any] = json.loads((ZOO / "meta.json").read_text("utf-8"))
answers: dict[str, Any] = json.loads((ZOO / "answers.json").read_text("utf-8"))

SERVED = [name for name, kind in kinds.items() if not kind["refused"]]
REFUSED = [name for name, kind in kinds.items() if kind["refused"]]
NEW_TOKENS = 20

# Kinds whose weights a pickle holds.
PICKLES = [name for name in SERVED if list((ZOO / name).glob("pytorch_model*.bin"))]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that come from a pickle are packed into the cache."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))


def load(folder: Path) -> Engine:
    return Engine.load(folder, threads=1, max_batch=4, prefix_memory=0, blas="openblas", drafts="off")


def answered(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the prompts that transformers answered, with its answers."""
    for prompt, answer in answers[name]["prompts"].items():
        if "error" not in answer:
            yield kinds[name]["prompts"][prompt], answer


def stream(engine: Engine, prompt: str) -> list[str]:
    """Return the pieces of a continuation's text as a stream has them: each as soon as it stays whatever follows."""
    decoder = engine.decoder
    sequence = decoder.admit(decoder.prepare(GenerationRequest(prompt, max_new_tokens=NEW_TOKENS)))
    pieces, sent = [], 0
    while not sequence.finished:
        decoder.step()
        settled = sequence.settled
        pieces.append(sequence.text[sent:settled])
        sent = settled
    return pieces


def test_every_kind_has_its_folder_and_its_answers() -> None:
    folders = {path.name for path in ZOO.iterdir() if path.is_dir()}
    assert folders == kinds.keys() == answers.keys()
    assert all("prompts" in answers[name] and any(answered(name)) for name in SERVED)


# What renders chats is a process of its own, which a model with a chat template has.
WITH_TEMPLATE = "dialogpt-half-with-head"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.processes) if name == WITH_TEMPLATE else name for name in SERVED],
)
def test_a_kind_gives_what_transformers_gives(name: str) -> None:
    engine = load(ZOO / name)
    for prompt, answer in answered(name):
        assert engine.tokenizer.encode(prompt) == answer["ids"], prompt
    prompts = [prompt for prompt, _ in answered(name)]
    for result, (prompt, answer) in zip(
        engine.generate(prompts, max_new_tokens=NEW_TOKENS), answered(name), strict=True
    ):
        assert list(result.token_ids) == answer["new"], prompt
        assert result.text == answer["text"], prompt
        assert "".join(stream(engine, prompt)) == answer["text"], prompt


@pytest.mark.parametrize("name", [name for name in SERVED if kinds[name]["notes"]])
def test_what_is_not_applied_is_noted(name: str) -> None:
    notes = load(ZOO / name).notes
    for word in kinds[name]["notes"]:
        assert any(word in note for note in notes), (word, notes)


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_read_once_and_its_weights_are_found_in_the_cache_then(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(ZOO / name, tmp_path / "model")
    prompt, answer = next(answered(name))
    first = load(folder)
    monkeypatch.setattr("fastgpt2.engine.model.torch_file.TorchFile.open", _refuse)
    second = load(folder)
    for engine in (first, second):
        assert engine.generate(prompt, max_new_tokens=NEW_TOKENS).text == answer["text"]


def _refuse(*_: object) -> None:
    pytest.fail("the pickle is read")


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_is_not_served_is_refused_in_one_sentence_that_says_what_it_is(name: str) -> None:
    with pytest.raises(ModelError) as refused:
        load(ZOO / name)
    sentence = str(refused.value)
    assert "\n" not in sentence
    for word in kinds[name]["refused"]:
        assert word.lower() in sentence.lower()
