"""Texts that are drawn, several texts, and texts of a given form over HTTP, asked for by stock clients.

Each is compared with what the engine gives for the same request, which `tests/engine/` compares with transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest

from fastgpt2 import Engine
from fastgpt2.api.http.generate import ChoiceParameters
from fastgpt2.engine.decoding.records import GenerationResult, mean_logprob
from fastgpt2.system.up import System

if TYPE_CHECKING:  # late: every process of a run collects this file, and most never need the second that it takes
    from huggingface_hub import InferenceClient
    from openai import OpenAI

PROMPT = "It was a dark night"
# The client asks `POST /`, whose texts begin with the prompt otherwise.
NEW: dict[str, Any] = {"return_full_text": False}
DRAWN: dict[str, Any] = {"temperature": 0.7, "seed": 8}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def ai(system: System) -> Iterator[OpenAI]:
    from openai import OpenAI

    http = httpx.Client(trust_env=False)
    with OpenAI(base_url=f"{system.http_url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        yield client


@pytest.fixture
def hf(system: System, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    from huggingface_hub import InferenceClient

    return InferenceClient(model=system.http_url, timeout=60)


def post(system: System, path: str, body: Any) -> Any:
    answer = httpx.post(f"{system.http_url}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(result: GenerationResult) -> list[str]:
    return [text.text for text in (result, *result.alternatives)]


class TestOpenAI:
    def test_with_its_defaults_and_two_texts(self, ai: OpenAI, engine: Engine) -> None:
        got = ai.completions.create(model="demo", prompt=PROMPT, temperature=0.7, n=2)
        assert [choice.index for choice in got.choices] == [0, 1]
        seeds = {choice.to_dict()["seed"] for choice in got.choices}
        assert len(seeds) == 1
        (seed,) = seeds
        assert isinstance(seed, int)
        assert 0 <= seed < 1 << 53
        expected = engine.generate(PROMPT, temperature=0.7, seed=seed, n=2, max_new_tokens=16)
        assert [choice.text for choice in got.choices] == texts(expected)
        assert got.usage is not None
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (expected.usage.prompt_tokens, 32)
        assert got.usage.total_tokens == got.usage.prompt_tokens + 32

    def test_a_text_is_had_again_by_its_seed_and_index(self, ai: OpenAI) -> None:
        asked: Any = {"model": "demo", "prompt": PROMPT, "temperature": 1.2}
        first = ai.completions.create(n=3, **asked)
        for choice in first.choices:
            told = choice.to_dict()
            index = told.get("choice_index", 0)
            assert index == choice.index
            again = ai.completions.create(seed=told["seed"], extra_body={"choice_index": index}, **asked)
            assert again.choices[0].text == choice.text
        other = ai.completions.create(n=3, **asked)
        assert [choice.text for choice in other.choices] != [choice.text for choice in first.choices]

    def test_the_same_request_again_is_drawn_once(self, system: System) -> None:
        body = {"prompt": PROMPT, "temperature": 1.5, "n": 2}
        found = []
        for key in ("one", "one", "another"):
            headers = {"idempotency-key": f"drawn {key}"}
            answer = httpx.post(f"{system.http_url}/v1/completions", json=body, headers=headers, trust_env=False)
            found.append(answer.json()["choices"])
        assert found[0] == found[1]
        assert found[2][0]["seed"] != found[0][0]["seed"]

    def test_a_greedy_text_has_no_seed(self, ai: OpenAI, engine: Engine) -> None:
        got = ai.completions.create(model="demo", prompt=PROMPT, seed=5, top_p=0.5, n=2)
        assert [choice.text for choice in got.choices] == [engine.generate(PROMPT, max_new_tokens=16).text] * 2
        assert not any("seed" in choice.to_dict() for choice in got.choices)

    def test_several_prompts_and_texts_in_order(self, ai: OpenAI, engine: Engine) -> None:
        prompts = [PROMPT, "My name is"]
        got = ai.completions.create(model="demo", prompt=prompts, n=2, max_tokens=6, **DRAWN)
        results = [engine.generate(prompt, n=2, max_new_tokens=6, **DRAWN) for prompt in prompts]
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in got.choices] == [text for result in results for text in texts(result)]
        assert got.usage is not None
        assert got.usage.prompt_tokens == sum(result.usage.prompt_tokens for result in results)
        assert got.usage.completion_tokens == 24

    def test_a_stream_of_two_texts(self, ai: OpenAI, engine: Engine) -> None:
        expected = engine.generate(PROMPT, n=2, max_new_tokens=12, **DRAWN)
        chunks = list(
            ai.completions.create(
                model="demo", prompt=PROMPT, n=2, max_tokens=12, stream=True,
                stream_options={"include_usage": True}, **DRAWN,
            )
        )  # fmt: skip
        found, ends = ["", ""], {}
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            found[choice.index] += choice.text
            if choice.finish_reason:
                told = choice.to_dict()
                ends[choice.index] = choice.finish_reason, told["seed"], told.get("choice_index")
            else:
                assert "seed" not in choice.to_dict()
        assert found == texts(expected)
        assert ends == {0: ("length", 8, None), 1: ("length", 8, 1)}
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 24

    def test_the_best_of_several(self, ai: OpenAI, engine: Engine) -> None:
        got = ai.completions.create(model="demo", prompt=PROMPT, n=2, best_of=5, max_tokens=8, **DRAWN)
        expected = engine.generate(PROMPT, n=2, best_of=5, max_new_tokens=8, **DRAWN)
        assert [choice.text for choice in got.choices] == texts(expected)
        indices = [choice.to_dict().get("choice_index", 0) for choice in got.choices]
        assert indices == [text.choice_index for text in (expected, *expected.alternatives)]

    @pytest.mark.parametrize("stream", [False, True])
    def test_echo_and_log_probabilities_of_two_texts(self, ai: OpenAI, engine: Engine, stream: bool) -> None:
        asked: Any = {"n": 2, "echo": True, "logprobs": 1, **DRAWN}
        lists: list[dict[str, list[Any]]] = [{}, {}]
        found = ["", ""]
        answer: Any = ai.completions.create(model="demo", prompt=PROMPT, max_tokens=5, stream=stream, **asked)
        for part in answer if stream else [answer]:
            for choice in part.choices:
                found[choice.index] += choice.text
                if choice.logprobs is not None:
                    lists[choice.index] = choice.logprobs.to_dict()
        expected = engine.generate(PROMPT, max_new_tokens=5, prompt_logprobs=1, **asked)
        assert expected.prompt_logprobs is not None
        for text, told, result in zip(found, lists, (expected, *expected.alternatives), strict=True):
            assert text == result.text
            assert text.startswith(PROMPT)
            # The model's own, whatever the temperature.
            entries = [*expected.prompt_logprobs, *(result.logprobs or ())]
            assert told["tokens"] == [entry.token for entry in entries]
            assert told["token_logprobs"][0] is None
            assert told["token_logprobs"][1:] == pytest.approx([entry.logprob for entry in entries[1:]], abs=1e-5)
            assert [
                text[at : at + len(token)] for at, token in zip(told["text_offset"], told["tokens"], strict=True)
            ] == (told["tokens"])

    def test_penalties_and_forbidden_tokens(self, ai: OpenAI, engine: Engine) -> None:
        greedy = engine.generate(PROMPT, max_new_tokens=20)
        banned = greedy.token_ids[0]
        ours: dict[str, Any] = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {banned: -100.0}}
        theirs: dict[str, Any] = {
            "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words": [" the"], "suppress_tokens": [5],
        }  # fmt: skip
        got = ai.completions.create(
            model="demo",
            prompt=PROMPT,
            max_tokens=20,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            logit_bias={str(banned): -100},
            extra_body=theirs,
        )
        expected = engine.generate(PROMPT, max_new_tokens=20, **ours, **theirs)
        assert got.choices[0].text == expected.text
        assert banned not in expected.token_ids


class TestForms:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("llguidance")

    def test_openais_response_format(self, ai: OpenAI) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        for asked in ({}, DRAWN):
            got = ai.completions.create(
                model="demo", prompt=PROMPT, max_tokens=100, extra_body={"response_format": form}, **asked
            )
            person = json.loads(got.choices[0].text)
            assert person.keys() == {"name", "age"}
            assert isinstance(person["age"], int)
            assert got.choices[0].finish_reason == "stop"

    def test_vllms_names(self, ai: OpenAI) -> None:
        for body in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
            (choice,) = ai.completions.create(model="demo", prompt=PROMPT, extra_body=body).choices
            assert choice.text in ("yes", "no")
            assert choice.to_dict()["cumulative_logprob"] < 0  # type: ignore[operator]
        got = ai.completions.create(model="demo", prompt=PROMPT, extra_body={"guided_regex": "[0-9]{4}"}, stream=True)
        assert re.fullmatch("[0-9]{4}", "".join(chunk.choices[0].text for chunk in got))

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("body", [{"guided_regex": "(a"}, {"structured_outputs": {"json": {"type": "person"}}}])
    def test_one_that_cannot_be_is_refused_by_its_name(self, system: System, body: Any, stream: bool) -> None:
        asked = {"prompt": PROMPT, "stream": stream, **body}
        answer = httpx.post(f"{system.http_url}/v1/completions", json=asked, trust_env=False, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", next(iter(body)))

    def test_the_hubs_grammar(self, hf: InferenceClient) -> None:
        grammars: list[Any] = [
            {"type": "json", "value": PERSON},
            {"type": "json", "value": json.dumps(PERSON)},
            {"type": "json_schema", "value": {"name": "person", "schema": PERSON}},
        ]
        for grammar in grammars:
            got = hf.text_generation(PROMPT, **NEW, grammar=grammar, max_new_tokens=100)
            assert json.loads(got).keys() == {"name", "age"}
        regex: Any = {"type": "regex", "value": "[a-z]{3}-[0-9]{2}"}
        got = hf.text_generation(PROMPT, **NEW, grammar=regex, do_sample=True, seed=3)
        assert re.fullmatch("[a-z]{3}-[0-9]{2}", got)


class TestHub:
    def test_a_draw_with_details_tells_its_seed(self, hf: InferenceClient, engine: Engine) -> None:
        got = hf.text_generation(PROMPT, **NEW, do_sample=True, details=True, max_new_tokens=9)
        assert got.details is not None
        assert got.details.seed is not None
        expected = engine.generate(PROMPT, do_sample=True, seed=got.details.seed, max_new_tokens=9)
        assert got.generated_text == expected.text
        again = hf.text_generation(PROMPT, **NEW, do_sample=True, seed=got.details.seed, max_new_tokens=9)
        assert again == expected.text

    def test_its_options(self, hf: InferenceClient, engine: Engine) -> None:
        options: dict[str, Any] = {
            "temperature": 0.8, "top_k": 30, "top_p": 0.9, "typical_p": 0.95, "repetition_penalty": 1.2,
            "frequency_penalty": 0.5, "seed": 12, "max_new_tokens": 12,
        }  # fmt: skip
        expected = engine.generate(PROMPT, **options).text
        assert hf.text_generation(PROMPT, **NEW, **options) == expected
        assert "".join(hf.text_generation(PROMPT, **NEW, stream=True, **options)) == expected
        last = list(hf.text_generation(PROMPT, **NEW, stream=True, details=True, **options))[-1]
        assert last.details is not None
        assert (last.generated_text, last.details.seed) == (expected, 12)

    def test_the_best_of_several_and_the_others(self, hf: InferenceClient, engine: Engine) -> None:
        options: dict[str, Any] = {"temperature": 0.9, "seed": 4, "max_new_tokens": 7}
        expected = engine.generate(PROMPT, n=4, logprobs=0, **options)
        best, *others = sorted((expected, *expected.alternatives), key=mean_logprob, reverse=True)
        assert hf.text_generation(PROMPT, **NEW, best_of=4, **options) == best.text
        got = hf.text_generation(PROMPT, **NEW, best_of=4, details=True, decoder_input_details=True, **options)
        assert got.generated_text == best.text
        assert got.details is not None
        sequences = got.details.best_of_sequences or []
        assert [one.generated_text for one in sequences] == [text.text for text in others]
        for one, text in zip((got.details, *sequences), (best, *others), strict=True):
            assert (one.seed, one.generated_tokens) == (4, 7)
            assert [token.id for token in one.tokens] == list(text.token_ids)
            assert len(one.prefill) == text.usage.prompt_tokens

    def test_the_originals_route(self, system: System, engine: Engine) -> None:
        parameters = {"temperature": 0.7, "seed": 6, "max_new_tokens": 6, "best_of": 2}
        text = engine.generate(PROMPT, temperature=0.7, seed=6, max_new_tokens=6, best_of=2).text
        assert post(system, "/", {"inputs": PROMPT, "parameters": parameters}) == [{"generated_text": PROMPT + text}]


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"do_sample": False}, False),
        ({"temperature": 1.0}, False),
        ({"temperature": 1.0, "do_sample": False}, False),
        ({"temperature": 1, "do_sample": False, "top_k": 0, "top_p": 1, "typical_p": 1.0}, False),
        ({"temperature": 1.0, "do_sample": False, "top_k": -1}, False),
        ({"temperature": 0.0, "do_sample": False, "top_p": 0}, False),
        ({"temperature": 0, "top_k": 1, "top_p": 0.0, "typical_p": 0.5}, False),
        ({"temperature": 1.0, "do_sample": False, "top_p": 0.9}, True),
        ({"temperature": 1.0, "do_sample": True, "top_k": -1}, True),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0, "top_p": 0.5}, False),
        ({"top_k": 0, "top_p": 1.0, "typical_p": 1}, False),
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 1}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9, "do_sample": False}, True),
    ],
)
def test_when_the_hubs_server_draws(parameters: dict[str, Any], samples: bool) -> None:
    """As text-generation-inference's `NextTokenChooser` decides it; a temperature of 0, which it refuses, is greedy."""
    choice = ChoiceParameters(**parameters)
    assert choice.samples is samples
    fields = choice.fields(details=False, stream=False)
    assert fields.get("do_sample", False) is samples
    assert fields.get("temperature") == (parameters.get("temperature") if samples else None)
