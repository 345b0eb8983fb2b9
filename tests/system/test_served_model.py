"""Which models a pool serves under which names, as its settings say, and what is said of settings that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from fastgpt2.cli import COMMANDS, read_arguments, resolve_values
from fastgpt2.errors import BadRequest
from fastgpt2.protocol.keys import MAX_MODEL_CHARACTERS
from fastgpt2.setting_values import MAX_NAME_CHARACTERS
from fastgpt2.system.served_model import ServedModel, read_served_models
from fastgpt2.system.welcome import describe_models


def values_of(name: str, *words: str) -> dict[str, Any]:
    return resolve_values(COMMANDS[name], read_arguments(name, words))


def served(name: str, *words: str) -> list[ServedModel]:
    return read_served_models(values_of(name, *words))


@pytest.mark.parametrize("name", ["up", "pool", "worker"])
def test_a_model_is_called_as_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(name) == [ServedModel("gpt2")]
    (one,) = served(name, "--model", "/a folder/of,mine=x")
    assert (one.names, one.variables()["FASTGPT2_SERVED_MODEL_NAME"]) == (("/a folder/of,mine=x",), "")
    monkeypatch.setenv("FASTGPT2_MODEL", "demo")
    monkeypatch.setenv("FASTGPT2_SERVED_MODEL_NAME", "tiny, small")
    monkeypatch.setenv("FASTGPT2_NAMED_ONLY", "yes")
    assert served(name) == [ServedModel("demo", ("tiny", "small"), named_only=True)]


def test_names_of_one_model_need_not_say_of_which() -> None:
    words = ["--served-model-name", "a", "--served-model-name", "demo=b,c", "--served-model-name=a"]
    (one,) = served("up", "--model", "demo", *words)
    assert one.names == ("a", "b", "c"), "each once, in the order in which they are given"
    assert served("worker", "--model", "/x=y", "--served-model-name", "/x=y=z")[0].names == ("z",)


@pytest.mark.parametrize("name", ["up", "pool"])
def test_the_first_of_several_models_has_the_jobs_that_name_none(name: str) -> None:
    both = ["--model", "gpt2", "--model", "demo"]
    assert served(name, *both) == [ServedModel("gpt2"), ServedModel("demo", named_only=True)]
    first, second = served(name, *both, "--served-model-name", "demo=d,gpt2=g,h", "--served-model-name", "demo=e")
    assert (first.names, second.names) == (("g", "h"), ("d", "e"))
    assert all(one.named_only for one in served(name, *both, "--named-only"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model demo --model demo", "--model demo is given 2 times; --workers N starts more workers of it"),
        (
            "--model a --model b --served-model-name c",
            "--served-model-name c does not say for which of the models: write MODEL=NAME, as in --served-model-name "
            "a=c",
        ),
        (
            "--model a --served-model-name b=c",
            "--served-model-name b=c is a name for the model b, which is not served here; served are a",
        ),
        (
            "--model a --model b --served-model-name a=c,b=c",
            "c is the name of two models, a and b; give one of them another by --served-model-name MODEL=NAME",
        ),
        ("--model a --model b --served-model-name a=b", "b is the name of two models, a and b; give one of them"),
        ("--model a --model b --revision r", "--revision does not say which of the models it is for: start one of"),
        ("--model a --model b --tokenizer t", "--tokenizer does not say which of the models it is for: start one"),
        ("--served-model-name a,,b", "--served-model-name: 'a,,b' is not a list of names with commas between"),
        ("--served-model-name a=", "--served-model-name: 'a=' is not a list of names with commas between"),
        ("--served-model-name a\u00a0b", r"--served-model-name: 'a\xa0b' is not a list of names"),
        (f"--served-model-name {'n' * 501}", "holds a name of 501 characters; the limit is 500"),
        (f"--served-model-name {','.join(map(str, range(17)))}", "the model gpt2 has 17 names; the limit is 16"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(words: str, sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        served("up", *words.split(" "))
    assert sentence in str(caught.value)
    assert MAX_NAME_CHARACTERS == MAX_MODEL_CHARACTERS


def test_a_pool_says_what_it_serves() -> None:
    one, other = ServedModel("demo"), ServedModel("/m/x", ("tiny", "small"))
    assert describe_models([one], 1) == "model demo, 1 worker"
    assert describe_models([other], 3) == "model tiny (/m/x, also small), 3 workers"
    assert describe_models([one, other], 2) == "models demo and tiny (/m/x, also small), 2 workers each"
