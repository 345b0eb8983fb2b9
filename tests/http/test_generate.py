"""The routes of the original and of text-generation-inference serve huggingface_hub's client and plain requests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from support.running import GOLDEN

from fastgpt2 import Engine, TokenLogprob
from fastgpt2.api.http.generate import _details
from fastgpt2.engine.decoding.records import GenerationResult, Timings, Usage
from fastgpt2.system.up import System

if TYPE_CHECKING:  # late: every process of a run collects this file, and most never need the half second that it takes
    from huggingface_hub import InferenceClient

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]


@pytest.fixture
def hf(system: System, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    from huggingface_hub import InferenceClient

    return InferenceClient(model=system.http_url, timeout=60)


def post(system: System, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{system.http_url}{path}", json=body, trust_env=False, timeout=60)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


def expected(engine: Engine, n: int, **fields: Any) -> str:
    text: str = engine.generate(ENTRY["prompt"], max_new_tokens=n, **fields).text
    return text


def test_the_hubs_client(hf: InferenceClient, engine: Engine) -> None:
    assert hf.text_generation(ENTRY["prompt"], max_new_tokens=12) == expected(engine, 12)
    assert "".join(hf.text_generation(ENTRY["prompt"], max_new_tokens=12, stream=True)) == expected(engine, 12)
    got = hf.text_generation(ENTRY["prompt"], max_new_tokens=12, details=True, decoder_input_details=True)
    assert got.generated_text == expected(engine, 12)
    assert got.details is not None
    assert (got.details.finish_reason, got.details.generated_tokens) == ("length", 12)
    assert [token.id for token in got.details.tokens] == ENTRY["ids"][:12]
    assert "".join(token.text for token in got.details.tokens) == expected(engine, 12)
    assert [token.id for token in got.details.prefill] == ENTRY["prompt_ids"]
    last = list(hf.text_generation(ENTRY["prompt"], max_new_tokens=12, stream=True, details=True))[-1]
    assert last.generated_text == expected(engine, 12)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 12)


def test_generate_gives_an_object_and_the_original_a_list(system: System, engine: Engine) -> None:
    body = {"inputs": ENTRY["prompt"], "parameters": {"max_new_tokens": 6}}
    text = expected(engine, 6)
    assert post(system, "/generate", body).json() == {"generated_text": text}
    assert post(system, "/", body).json() == [{"generated_text": ENTRY["prompt"] + text}]
    body["parameters"]["return_full_text"] = True
    assert post(system, "/generate", body).json() == {"generated_text": ENTRY["prompt"] + text}


def test_an_event_a_token(system: System, engine: Engine) -> None:
    body = {"inputs": ENTRY["prompt"], "parameters": {"max_new_tokens": 15, "details": True, "top_n_tokens": 2}}
    for path, extra in (("/generate_stream", {}), ("/", {"stream": True})):
        got = events(post(system, path, {**body, **extra}))
        assert [one["index"] for one in got] == list(range(1, 16))
        assert [one["token"]["id"] for one in got] == ENTRY["ids"][:15]
        assert "".join(one["token"]["text"] for one in got) == expected(engine, 15)
        assert all(len(one["top_tokens"]) == 2 for one in got)
        assert all(one["top_tokens"][0]["id"] == one["token"]["id"] for one in got)
        assert [one["generated_text"] for one in got[:-1]] == [None] * 14
        full = ENTRY["prompt"] if path == "/" else ""
        assert got[-1]["generated_text"] == full + expected(engine, 15)
        assert got[-1]["details"]["generated_tokens"] == 15


def test_a_stream_of_nothing(system: System) -> None:
    got = post(system, "/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 0}})
    assert (got.status_code, events(got)) == (200, [])


def test_a_character_of_several_tokens_comes_whole(system: System, engine: Engine) -> None:
    """What follows such a prompt need not be valid text, and the pieces add up all the same."""
    ids = engine.tokenizer.encode("— é 日本 🎉 ")
    body = {"inputs": ids, "parameters": {"max_new_tokens": 20, "ignore_eos": True}}
    got = events(post(system, "/generate_stream", body))
    text = engine.generate(ids, max_new_tokens=20, ignore_eos=True).text
    assert "".join(one["token"]["text"] for one in got) == got[-1]["generated_text"] == text


def test_why_it_ended(system: System, engine: Engine) -> None:
    text = expected(engine, 20)
    stop = text[8:11]
    details = {"details": True, "max_new_tokens": 20}
    got = post(system, "/generate", {"inputs": ENTRY["prompt"], "parameters": {**details, "stop": [stop]}}).json()
    assert got["generated_text"] == text[: text.index(stop)]
    assert got["details"]["finish_reason"] == "stop_sequence"
    # A prompt that the demo model brings to an end.
    prompt = "The last word"
    assert engine.generate(prompt, max_new_tokens=480).finish_reason == "stop"
    parameters = {"details": True, "max_new_tokens": 480}
    got = post(system, "/generate", {"inputs": prompt, "parameters": parameters}).json()
    assert got["details"]["finish_reason"] == "eos_token"
    assert got["details"]["tokens"][-1]["special"] is True


def test_a_stop_string_that_is_a_special_token(system: System, engine: Engine) -> None:
    prompt = "The last word"
    ended = engine.generate(prompt, max_new_tokens=480)
    assert engine.tokenizer.token_text(ended.token_ids[-1]) == "<|endoftext|>"
    parameters = {"details": True, "max_new_tokens": 480, "ignore_eos": True, "stop": ["<|endoftext|>"]}
    got = post(system, "/generate", {"inputs": prompt, "parameters": parameters}).json()
    assert (got["generated_text"], got["details"]["finish_reason"]) == (ended.text, "stop_sequence")
    assert got["details"]["tokens"][-1]["special"] is True
    streamed = events(post(system, "/generate_stream", {"inputs": prompt, "parameters": parameters}))
    assert streamed[-1]["generated_text"] == ended.text
    assert "".join(one["token"]["text"] for one in streamed if not one["token"]["special"]) == ended.text


def a_result(last: TokenLogprob, stop_reason: int | str | None = None) -> GenerationResult:
    told = (TokenLogprob(5, "a", -1.0), last)
    usage, timings = Usage(1, 2), Timings(0.0, 0.0, 0.0)
    return GenerationResult("a", (5, last.token_id), "stop", usage, timings, "m", told, stop_reason=stop_reason)


def test_an_end_of_text_of_any_name() -> None:
    end = TokenLogprob(2, "[SEP]", -1.0, text_offset=1, special=True)
    details = _details(a_result(end))
    assert details["finish_reason"] == "eos_token"
    assert [token["special"] for token in details["tokens"]] == [False, True]
    assert details["tokens"][1]["text"] == "[SEP]"
    # Named by the request, the same token is a stop.
    for reason in (2, "[SEP]"):
        assert _details(a_result(end, reason))["finish_reason"] == "stop_sequence"
    # Of a worker of an earlier release, which tells no more than the names.
    old = TokenLogprob(0, "<|endoftext|>", -1.0, text_offset=1)
    assert _details(a_result(old))["finish_reason"] == "eos_token"
    assert _details(a_result(old))["tokens"][1]["special"] is True
    assert _details(a_result(TokenLogprob(6, "b", -1.0)))["finish_reason"] == "stop_sequence"
    # A text of a given form ends without such a token.
    assert _details(a_result(TokenLogprob(6, "b", -1.0)), guided=True)["finish_reason"] == "eos_token"


def test_what_clients_send_for_not_at_all_is_taken(system: System, engine: Engine) -> None:
    neutral = {
        "best_of": 1, "do_sample": False, "frequency_penalty": 0, "repetition_penalty": 1.0, "seed": 3, "stop": [],
        "adapter_id": None, "grammar": None,
        "temperature": None, "top_k": None, "top_p": None, "typical_p": None, "truncate": None, "watermark": False,
        "top_n_tokens": None, "details": False, "decoder_input_details": False, "return_full_text": None,
    }  # fmt: skip
    got = post(system, "/generate", {"inputs": ENTRY["prompt"], "parameters": {**neutral, "max_new_tokens": 3}})
    assert got.json() == {"generated_text": expected(engine, 3)}


@pytest.mark.parametrize(
    ("path", "parameters", "message"),
    [
        ("/generate", {}, "best_of is 2, and all texts would be equal: set do_sample, or leave best_of out"),
        (
            "/generate_stream",
            {"do_sample": True},
            "best_of is 2, and only the end tells which text is the best: stream w",
        ),
    ],
)
def test_the_best_of_what_has_no_best(system: System, path: str, parameters: Any, message: str) -> None:
    got = post(system, path, {"inputs": "a", "parameters": {"best_of": 2, **parameters}})
    assert got.status_code == 400
    assert got.json()["error"].startswith(message)


REGEX = {"type": "regex", "value": "(a"}
JSON_OF_NO_TYPE = {"type": "json", "value": {"type": "x"}}


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs is missing"),
        ({"inputs": "a", "parameters": {"do_sample": 1}}, "do_sample must be true or false"),
        ({"inputs": "a", "parameters": {"temperature": -0.7}}, "temperature must be between 0 and 100"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 0}}, "repetition_penalty must be between 0.01 and 100"),
        ({"inputs": "a", "parameters": {"n": 2}}, "unknown field 'n' in parameters; the best of several texts is giv"),
        ({"inputs": "a", "parameters": {"watermark": True}}, "watermark must be false or left out: texts get no wate"),
        ({"inputs": "a", "parameters": {"truncate": 0}}, "truncate must be -1, for as many as fit, or between 1 and"),
        ({"inputs": "a", "parameters": {"adapter_id": "x"}}, "adapter_id must be left out: there are no adapters"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "regex"}}}, "grammar must have a type and a value"),
        ({"inputs": "a", "parameters": {"grammar": REGEX, "choices": ["a"]}}, "grammar and choices are both given; a"),
        ({"inputs": "a", "parameters": {"grammar": REGEX}}, "grammar cannot be used: unclosed group"),
        ({"inputs": "a", "parameters": {"grammar": JSON_OF_NO_TYPE}}, "grammar cannot be used: Invalid type: x"),
        ({"inputs": "a", "parameters": {"details": 1}}, "details must be true or false"),
        ({"inputs": "a", "parameters": {"top_n_tokens": 99}}, "top_n_tokens must be between 0 and 20, not 99"),
        ({"inputs": "a", "more": 1}, "unknown field 'more'"),
        ({"inputs": "a", "max_new_tokens": 3}, "unknown field 'max_new_tokens' beside inputs; it goes into parameters"),
        ({"inputs": "a", "parameters": {"stream": True}}, "unknown field 'stream' in parameters; /generate_stream"),
        ({"inputs": "a", "details": True}, "unknown field 'details' beside inputs; it goes into parameters"),
    ],
)
def test_what_cannot_be_done_is_refused(system: System, path: str, body: Any, message: str) -> None:
    got = post(system, path, body)
    assert got.status_code == 400
    assert message in got.json()["error"]
    assert got.json()["error_type"] == "validation"


def test_a_stream_is_asked_of_the_routes_that_give_one(system: System) -> None:
    got = post(system, "/generate", {"inputs": "a", "stream": True})
    assert (got.status_code, got.json()["error_type"]) == (400, "validation")
    assert "ask /generate_stream" in got.json()["error"]
    parameters = {"max_new_tokens": 2}
    for stream in (None, False, True):
        asked = {"inputs": "a", "parameters": parameters, "stream": stream}
        assert len(events(post(system, "/generate_stream", asked))) == 2
    for stream in (None, False):
        asked = {"inputs": "a", "parameters": parameters, "stream": stream}
        assert post(system, "/generate", asked).json().keys() == {"generated_text"}


def test_a_worker_refuses_before_the_stream_begins(system: System) -> None:
    body = {"inputs": "the " * 300, "parameters": {"max_new_tokens": 400}}
    got = post(system, "/generate_stream", body)
    assert (got.status_code, got.json()["error_type"]) == (400, "validation")


LONG = "my words " * 600


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_errors_name_the_parameters_of_this_api(system: System, path: str) -> None:
    cases: list[tuple[Any, str]] = [
        ({"inputs": None}, "inputs must be a string or a list of token ids, not null"),
        ({"inputs": "x" * ((1 << 20) + 1)}, "inputs has 1048577 bytes; the limit is 1048576: shorten it"),
        ({"inputs": [1, "prompt"]}, 'inputs, a list, must hold token ids, not the string "prompt"'),
        ({"inputs": [9999]}, "inputs holds token id 9999, and the model's vocabulary has 2048"),
        # The worker's words.
        ({"inputs": LONG}, "over the model's 512 positions, one of which a new token needs: shorten inputs by"),
        ({"inputs": [5] * 600}, "inputs has 600 tokens, over the model's 512 positions"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 600}}, "512 positions inputs needs 1 or more"),
        ({"inputs": "a", "parameters": {"max_new_tokens": "5"}}, 'must be a whole number, not the string "5"'),
        ({"inputs": "a", "parameters": {"truncate": 4.5}}, "truncate must be a whole number, not 4.5"),
        ({"inputs": "a", "parameters": {"truncate": 4, "truncate_prompt_tokens": 5}}, "truncate and truncate"),
        ({"inputs": LONG, "parameters": {"truncate": 513}}, "inputs tokens 513, over the model's 512 positions"),
        ({"inputs": "a", "parameters": {"temprature": 1}}, "temperature may be meant; known are do_sample, tem"),
        ({"inputs": "a", "parameters": {"stop": ["prompt"] * 17}}, "stop holds 17 strings; the limit is 16"),
        ({"inputs": "a", "parameters": {"typical": "prompt"}}, "typical_p may be meant"),
    ]  # fmt: skip
    for body, said in cases:
        got = post(system, path, body)
        assert got.status_code == 400, body
        assert said in got.json()["error"]
        assert not re.search(r"(?<!\")\bprompt\b", got.json()["error"])


def test_inputs_that_are_truncated(system: System, engine: Engine) -> None:
    ids = engine.tokenizer.encode(LONG)
    expected = engine.generate(ids[-9:], max_new_tokens=4)
    parameters = {"max_new_tokens": 4, "truncate": 9.0, "details": True, "decoder_input_details": True}
    got = post(system, "/generate", {"inputs": LONG, "parameters": parameters}).json()
    assert got["generated_text"] == expected.text
    assert [token["id"] for token in got["details"]["prefill"]] == ids[-9:]
    assert (
        events(post(system, "/generate_stream", {"inputs": LONG, "parameters": parameters}))[-1]["details"][
            "input_length"
        ]
        == 9
    )
    (whole,) = post(system, "/", {"inputs": LONG, "parameters": {"max_new_tokens": 4, "truncate": 9}}).json()
    assert whole["generated_text"] == LONG + expected.text


def test_the_hubs_client_truncates(hf: InferenceClient, engine: Engine) -> None:
    expected = engine.generate(engine.tokenizer.encode(LONG)[-9:], max_new_tokens=4).text
    assert hf.text_generation(LONG, max_new_tokens=4, truncate=9, return_full_text=False) == expected
