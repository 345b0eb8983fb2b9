"""OpenAI's chats, asked for by OpenAI's own Python client, with real workers behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from redis import Redis
from rq.utils import now, utcformat
from support.running import GOLDEN, StartEndpoint
from support.turns import Turns

from fastgpt2 import Client, Engine
from fastgpt2.api.http.chat import bytes_of
from fastgpt2.api.http.chat_request import parse_chat
from fastgpt2.engine.text.chat_template import ChatTemplate
from fastgpt2.errors import BadRequest, NoChatTemplate
from fastgpt2.protocol.keys import CHAT_FIELD, MODEL_FIELD, MODELS_FIELD, workers_key
from fastgpt2.system.up import System

if TYPE_CHECKING:  # late: every process of a run collects this file, and most never need the second that it takes
    from openai import OpenAI

ORACLE: dict[str, Any] = json.loads((GOLDEN / "chats.json").read_text("utf-8"))
CASES = {case["chat"]: case for case in ORACLE["continuations"] if case["template"] == "human-and-assistant"}
HELLO, TALK = (ORACLE["chats"][name]["messages"] for name in ("hello", "talk"))
CONTINUED = ORACLE["chats"]["to be continued"]["messages"]
WRONG = "invalid_request_error"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def ai(system: System) -> Iterator[OpenAI]:
    from openai import OpenAI

    http = httpx.Client(trust_env=False)
    with OpenAI(base_url=f"{system.http_url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        yield client


def answer(engine: Engine, name: str, tokens: int) -> str:
    return engine.tokenizer.decode(CASES[name]["new"][:tokens])


@pytest.mark.parametrize("name", ["hello", "talk"])
def test_an_answer(ai: OpenAI, engine: Engine, name: str) -> None:
    messages = ORACLE["chats"][name]["messages"]
    got = ai.chat.completions.create(model="demo", messages=messages, max_completion_tokens=7)
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", answer(engine, name, 7))
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (got.object, got.model, got.id[:9]) == ("chat.completion", "demo", "chatcmpl-")
    assert got.system_fingerprint
    assert got.usage is not None
    prompt_tokens = len(CASES[name]["ids"])
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt_tokens, 7)
    assert got.usage.total_tokens == prompt_tokens + 7


def test_an_answer_in_pieces(ai: OpenAI, engine: Engine) -> None:
    with ai.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True},
        logprobs=True, top_logprobs=2,
    ) as stream:  # fmt: skip
        first, *pieces, last, end = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer(engine, "hello", 8)
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert {piece.choices[0].finish_reason for piece in pieces} == {None}
    told = [token for piece in pieces for token in piece.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert "".join(token.token for token in told) == answer(engine, "hello", 8)
    assert [bytes(token.bytes or ()) for token in told] == [token.token.encode() for token in told]
    for token in told:
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
        assert len(token.top_logprobs) == 2
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)
    assert end.choices == []
    assert end.usage is not None
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(CASES["hello"]["ids"]), 8)
    assert len({piece.id for piece in (first, *pieces, last, end)}) == 1


def test_several_answers_each_with_its_pieces(ai: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "messages": HELLO, "max_completion_tokens": 6, "n": 3, "temperature": 1.0, "seed": 5,
    }  # fmt: skip
    whole = ai.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for piece in ai.chat.completions.create(**asked, stream=True):
        (choice,) = piece.choices
        assert not ends[choice.index]
        roles[choice.index] += choice.delta.role is not None
        assert roles[choice.index] == 1
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason == "length"
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [1, 1, 1]
    again = ai.chat.completions.create(**{**asked, "n": 1}, extra_body={"choice_index": 2})
    assert again.choices[0].message.content == texts[2]


def test_stop_strings_forms_and_log_probabilities(ai: OpenAI, engine: Engine) -> None:
    text = answer(engine, "hello", 24)
    stop = text[5:8]
    ended = ai.chat.completions.create(model="demo", messages=HELLO, stop=stop, logprobs=True)
    (choice,) = ended.choices
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert choice.model_dump()["stop_reason"] == stop
    assert choice.logprobs is not None
    assert text.startswith("".join(token.token for token in choice.logprobs.content or ()))
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    formed = ai.chat.completions.create(model="demo", messages=HELLO, response_format=form, max_tokens=40)
    assert json.loads(formed.choices[0].message.content or "").keys() == {"a"}
    chosen = ai.chat.completions.create(model="demo", messages=HELLO, extra_body={"guided_choice": ["yes", "no"]})
    assert chosen.choices[0].message.content in ("yes", "no")


def test_the_last_message_is_continued(ai: OpenAI, engine: Engine) -> None:
    text = answer(engine, "to be continued", 6)
    asked: dict[str, Any] = {"model": "demo", "messages": CONTINUED, "max_tokens": 6}
    got = ai.chat.completions.create(**asked, extra_body={"continue_final_message": True})
    assert got.choices[0].message.content == text
    both = {"continue_final_message": True, "echo": True, "add_generation_prompt": False}
    echoed = ai.chat.completions.create(**asked, extra_body=both)
    assert echoed.choices[0].message.content == "I am fine, and " + text
    pieces = ai.chat.completions.create(**asked, extra_body=both, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "I am fine, and " + text


def test_what_stock_programs_add_asks_for_nothing(ai: OpenAI, engine: Engine) -> None:
    neutral: dict[str, Any] = {
        "tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False, "frequency_penalty": 0,
        "presence_penalty": 0, "store": False, "user": "somebody", "metadata": {"a": "b"}, "modalities": ["text"],
        "service_tier": "auto", "verbosity": "medium", "reasoning_effort": "none", "response_format": {"type": "text"},
        "add_special_tokens": False, "chat_template_kwargs": {"enable_thinking": False}, "documents": [],
        "skip_special_tokens": True, "functions": [], "function_call": "auto", "top_k": -1, "logprobs": None,
        "include_reasoning": True, "mm_processor_kwargs": None, "tool_prompt": None,
    }  # fmt: skip
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    got = ai.chat.completions.create(model="demo", messages=parts, max_completion_tokens=5, extra_body=neutral)
    assert got.choices[0].message.content == answer(engine, "hello", 5)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": None}, None, "messages is missing: send {"),
        ({"messages": []}, "messages", "messages is an empty list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "GPT-2 reads text alone"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
        ({"tools": [TOOL]}, "tools", "tools must be left out, or stand beside tool_choice: none"),
        ({"tools": [TOOL], "tool_choice": TOOL}, "tools", "is not read as a call of a tool"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice must be none, auto or left out"),
        ({"tool_choice": 5}, "tool_choice", "one of none, auto, required"),
        ({"functions": [{"name": "f"}]}, "functions", "functions must be empty, or left out"),
        ({"chat_template": "x"}, "chat_template", "a chat template comes with the model"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "which is a field of its own"),
        ({"add_special_tokens": True}, "add_special_tokens", "the chat template says which special tokens"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs goes with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"logprobs": 2}, "logprobs", "logprobs must be true or false"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "they are the same: leave one out"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be between 0"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens must be between 0"),
        ({"min_tokens": 7, "max_tokens": 5}, "min_tokens", "min_tokens must be between 0 and 5"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options goes with stream: true"),
        ({"echo": True}, "echo", "echo goes with continue_final_message"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt", "are both true"),
        ({"prompt": "a"}, "prompt", "unknown field 'prompt'"),
        ({"audio": {"voice": "x"}}, "audio", "unknown field 'audio'"),
        ({"n": 2, "best_of": 3, "stream": True}, "stream", "stream is refused beside a best_of of 3"),
    ],
)
def test_what_cannot_be_asked_is_told_by_a_sentence(fields: dict[str, Any], param: str | None, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat({"messages": HELLO, **fields})
    assert said in str(caught.value)
    assert getattr(caught.value, "param", None) == param


def test_arguments_of_calls_become_objects_for_the_template() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}} for text in ('{"a": 1}', "", "x")
    ]
    chat = parse_chat({"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]})
    messages = chat.plans[0].request.messages
    assert messages is not None
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == [{"a": 1}, {}, "x"]


def test_what_the_worker_refuses_has_the_names_of_this_route(system: System) -> None:
    with httpx.Client(base_url=f"{system.http_url}/v1", trust_env=False, timeout=60) as web:
        long = {"messages": HELLO, "max_completion_tokens": 500, "stream": True}
        answer = web.post("/chat/completions", json=long)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "max_completion_tokens 500" in answer.json()["error"]["message"]
        role = {"messages": [{"role": "user", "content": "a"}] * 300}
        assert "leave out the oldest messages" in web.post("/chat/completions", json=role).json()["error"]["message"]
        nobody = web.post("/chat/completions", json={"messages": HELLO, "model": "nobody's"})
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "model_not_found")


def test_a_job_of_a_chat_by_other_ways_in(system: System, engine: Engine) -> None:
    text = answer(engine, "hello", 5)
    with Client(system.redis_url) as client:
        assert client.enqueue(HELLO, max_new_tokens=5).result(60).text == text
        chats: list[Any] = [{"messages": HELLO}, HELLO, {"messages": HELLO, "max_new_tokens": 3}]
        assert [one.text for one in client.map(chats, max_new_tokens=5)] == [text, text, answer(engine, "hello", 3)]
        with client.stream(HELLO, max_new_tokens=5) as pieces:
            assert "".join(pieces) == text
    with httpx.Client(base_url=f"{system.http_url}/v1", trust_env=False, timeout=60) as web:
        made = web.post("/jobs", json={"messages": HELLO, "max_new_tokens": 5})
        done = web.get(f"/jobs/{made.json()['id']}?wait=60").json()
        assert done["result"]["text"] == text
        assert "prompt is missing" in web.post("/jobs", json={"max_new_tokens": 5}).text


def test_a_model_without_a_template_is_a_404_that_names_the_other_route(
    redis: Redis, queue_name: str, start_endpoint: StartEndpoint
) -> None:
    url = start_endpoint().url
    names = {MODEL_FIELD: "small", MODELS_FIELD: '["small", "other"]'}
    told: dict[Any, Any] = {"birth": utcformat(now()), **names, CHAT_FIELD: ""}
    redis.hset("rq:worker:silent", mapping=told)
    redis.sadd(workers_key(queue_name), "rq:worker:silent")
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as web:
        for body, name in (({}, "small"), ({"model": "other"}, "other"), ({"stream": True}, "small")):
            refused = web.post("/v1/chat/completions", json={"messages": HELLO, **body})
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"]) == (404, WRONG, "no_chat_template")
            assert f"the model {name!r} has no chat template" in error["message"]
            assert "/v1/completions" in error["message"]
    redis.delete("rq:worker:silent")


def test_a_worker_without_a_template_says_the_same(turns: Turns, client: Client) -> None:
    job = client.enqueue(HELLO)
    turns.until(lambda: job.status() == "failed", "the job to fail")
    with pytest.raises(NoChatTemplate, match=r"no chat template: continue prompts \(by POST /v1/completions, or"):
        job.result(10)


def test_what_a_template_says_of_a_message_is_in_no_log(
    turns: Turns, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "the chat template refuses these messages: what is"

    def refuse(_template: ChatTemplate, values: dict[str, Any], _continues: bool) -> str:
        raise BadRequest(f"{said} {values['messages'][0]['content'][6:]}?")

    monkeypatch.setattr(ChatTemplate, "render", refuse)
    job = client.enqueue([{"role": "user", "content": "I say my secret word"}])
    turns.until(lambda: job.status() == "failed", "the job to fail")
    with pytest.raises(BadRequest, match="what is my secret word"):
        job.result(10)
    assert "refuses these messages: [prompt]" in caplog.text
    assert "secret" not in caplog.text


def test_the_bytes_of_tokens() -> None:
    assert bytes_of(" the") == b" the"
    assert bytes_of("bytes:\\xe2\\x80") == b"\xe2\x80"
    assert bytes_of("bytes:a\\xff") == b"a\xff"
