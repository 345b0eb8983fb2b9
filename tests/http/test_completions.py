"""OpenAI's completions, asked for by OpenAI's own Python client, with real workers behind them."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from support.running import GOLDEN, hang_up, jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.protocol.keys import queue_of, registry_key
from fastgpt2.system.up import System

if TYPE_CHECKING:  # late: every process of a run collects this file, and most never need the second that it takes
    from openai import AsyncOpenAI, OpenAI

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
# As the golden file has it: end-of-text tokens are gone past.
GO_ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def url(system: System) -> str:
    return f"{system.http_url}/v1"


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[OpenAI]:
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


@pytest.fixture
def queue(system: System) -> Iterator[Client]:
    with Client(system.redis_url) as client:
        yield client


def text_of(engine: Engine, ids: list[int]) -> str:
    return engine.tokenizer.decode(ids)


def test_a_completion(ai: OpenAI, engine: Engine) -> None:
    entry = ENTRIES[0]
    got = ai.completions.create(model="demo", prompt=entry["prompt"], max_tokens=20, extra_body=GO_ON)
    (choice,) = got.choices
    assert choice.text == text_of(engine, entry["ids"][:20])
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (got.object, got.model, got.id[:5]) == ("text_completion", "demo", "cmpl-")
    assert got.usage is not None
    prompt_tokens = len(entry["prompt_ids"])
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (prompt_tokens, 20)
    assert got.usage.total_tokens == prompt_tokens + 20
    assert got._request_id


def test_prompts_of_all_kinds(ai: OpenAI, engine: Engine) -> None:
    first, second = ENTRIES[0], ENTRIES[1]
    expected = [text_of(engine, entry["ids"][:7]) for entry in (first, second)]
    for prompts in (
        [first["prompt"], second["prompt"]],
        [first["prompt_ids"], second["prompt_ids"]],
    ):
        got = ai.completions.create(model="demo", prompt=prompts, max_tokens=7, extra_body=GO_ON)
        assert [choice.text for choice in got.choices] == expected
        assert [choice.index for choice in got.choices] == [0, 1]
        assert got.usage is not None
        assert got.usage.completion_tokens == 14
    ids = ai.completions.create(model="demo", prompt=first["prompt_ids"], max_tokens=7, extra_body=GO_ON)
    assert [choice.text for choice in ids.choices] == expected[:1]
    # OpenAI's default is 16 tokens; no prompt begins a new text.
    new = ai.completions.create(model="demo", prompt=None, extra_body=GO_ON)
    assert new.choices[0].text == engine.generate("", max_new_tokens=16, ignore_eos=True).text


def test_streams(ai: OpenAI, engine: Engine) -> None:
    entry = ENTRIES[2]
    chunks = list(
        ai.completions.create(
            model="demo",
            prompt=entry["prompt"],
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=GO_ON,
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text_of(engine, entry["ids"][:30])
    assert len(chunks) > 10, "it comes as it is generated"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_of_several_prompts(ai: OpenAI, engine: Engine) -> None:
    prompts = [entry["prompt"] for entry in ENTRIES[:5]]
    texts, ends = [""] * 5, [""] * 5
    for chunk in ai.completions.create(model="demo", prompt=prompts, max_tokens=12, stream=True, extra_body=GO_ON):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] += choice.finish_reason or ""
    assert texts == [text_of(engine, entry["ids"][:12]) for entry in ENTRIES[:5]]
    assert ends == ["length"] * 5


def test_the_asynchronous_client_and_many_at_once(url: str, engine: Engine) -> None:
    async def ask(client: AsyncOpenAI, entry: dict[str, Any], stream: bool) -> str:
        asked: Any = {"model": "demo", "prompt": entry["prompt"], "max_tokens": 9, "extra_body": GO_ON}
        if not stream:
            whole = await client.completions.create(**asked)
            return str(whole.choices[0].text)
        return "".join([c.choices[0].text async for c in await client.completions.create(stream=True, **asked)])

    async def ask_all() -> list[str]:
        from openai import AsyncOpenAI

        http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http) as client:
            return await asyncio.gather(*(ask(client, entry, n % 2 == 0) for n, entry in enumerate(ENTRIES)))

    assert asyncio.run(ask_all()) == [text_of(engine, entry["ids"][:9]) for entry in ENTRIES]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_echo(ai: OpenAI, engine: Engine, stream: bool) -> None:
    entry = ENTRIES[0]
    whole = text_of(engine, entry["ids"][:30])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    expected = whole[: whole.index(stop)]
    asked: Any = {"model": "demo", "prompt": entry["prompt"], "max_tokens": 30, "stop": [stop], "extra_body": GO_ON}
    for echo, text in ((False, expected), (True, entry["prompt"] + expected)):
        if stream:
            chunks = list(ai.completions.create(stream=True, echo=echo, **asked))
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            (choice,) = ai.completions.create(echo=echo, **asked).choices
            assert (choice.text, choice.finish_reason) == (text, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_what_stopped_it_is_told_as_vllm_does(ai: OpenAI, engine: Engine, stream: bool) -> None:
    entry = ENTRIES[1]
    at = 6
    assert entry["ids"][at] not in entry["ids"][:at]
    text = text_of(engine, entry["ids"][:at])
    for asked, reason in (
        ({"stop_token_ids": [2047, entry["ids"][at]]}, entry["ids"][at]),
        ({"stop": [text_of(engine, [entry["ids"][at]])]}, text_of(engine, [entry["ids"][at]])),
    ):
        fields: Any = {"model": "demo", "prompt": entry["prompt"], "max_tokens": 30, "extra_body": {**asked, **GO_ON}}
        if stream:
            chunks = list(ai.completions.create(stream=True, **fields))
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            choice: Any = chunks[-1].choices[0]
            assert not any("stop_reason" in chunk.choices[0].to_dict() for chunk in chunks[:-1])
        else:
            choice = ai.completions.create(**fields).choices[0]
            assert choice.text == text
        assert (choice.finish_reason, choice.stop_reason) == ("stop", reason)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(ai: OpenAI, engine: Engine, stream: bool) -> None:
    entry = ENTRIES[3]
    asked: Any = {"model": "demo", "prompt": entry["prompt"], "max_tokens": 8, "logprobs": 3, "extra_body": GO_ON}
    if stream:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chunk in ai.completions.create(stream=True, **asked):
            if chunk.choices[0].logprobs is not None:
                for name, found in lists.items():
                    found += getattr(chunk.choices[0].logprobs, name)
    else:
        got = ai.completions.create(**asked).choices[0].logprobs
        assert got is not None
        lists = got.to_dict()
    # From the engine, whose own are compared with transformers' in test_logprobs.py.
    expected = engine.generate(entry["prompt"], max_new_tokens=8, logprobs=3, ignore_eos=True)
    assert expected.logprobs is not None
    assert lists["tokens"] == [one.token for one in expected.logprobs]
    assert lists["token_logprobs"] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)
    assert "".join(lists["tokens"]) == expected.text
    offsets = [len("".join(lists["tokens"][:n])) for n in range(8)]
    assert lists["text_offset"] == offsets
    for top, token, logprob in zip(lists["top_logprobs"], lists["tokens"], lists["token_logprobs"], strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == logprob, "greedy: the likeliest is the one taken"


def test_scoring_a_text(ai: OpenAI, engine: Engine) -> None:
    """What evaluation harnesses ask for: nothing new, and how likely the prompt was."""
    text = "It was the best of times"
    (choice,) = ai.completions.create(model="demo", prompt=text, max_tokens=0, echo=True, logprobs=1).choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert choice.logprobs is not None
    tokens, logprobs = choice.logprobs.tokens or [], choice.logprobs.token_logprobs or []
    assert "".join(tokens) == text
    assert logprobs[0] is None
    # Each as the likelihood of its being generated next: independent of how prompts are read.
    for n in (1, len(tokens) - 1):
        before = "".join(tokens[:n])
        (top,) = engine.generate(before, max_new_tokens=1, logprobs=20, ignore_eos=True).logprobs or ()
        known = {one.token: one.logprob for one in top.top}
        if tokens[n] in known:
            assert logprobs[n] == pytest.approx(known[tokens[n]], abs=1e-4)
        else:
            assert logprobs[n] < min(value for value in known.values() if value is not None)
    assert all(value < 0 and math.isfinite(value) for value in logprobs[1:])
    streamed = list(ai.completions.create(model="demo", prompt=text, max_tokens=2, echo=True, logprobs=0, stream=True))
    first = streamed[0].choices[0]
    assert first.text.startswith(text)
    assert first.logprobs is not None
    assert (first.logprobs.tokens or [])[: len(tokens)] == tokens


def test_models(ai: OpenAI) -> None:
    import openai

    (model,) = ai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "fastgpt2")
    assert ai.models.retrieve("demo").created == model.created > 1_700_000_000
    for ask in (
        lambda: ai.models.retrieve("gpt-4"),
        lambda: ai.completions.create(model="gpt-4", prompt="a"),
        lambda: ai.completions.create(model="gpt-4", prompt="a", stream=True),
    ):
        with pytest.raises(
            openai.NotFoundError, match="no worker serves the model 'gpt-4'; served are: demo"
        ) as caught:
            ask()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 0.9, "seed": 5}, {"echo": True, "logprobs": 0}])
def test_each_event_of_a_stream_can_tell_the_usage(ai: OpenAI, options: Any) -> None:
    """As vLLM does: the tokens of the event's own text so far, and those of its prompt."""
    asked: Any = {"model": "demo", "prompt": ["My name is", "It"], "max_tokens": 9, "extra_body": GO_ON, **options}
    every: Any = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = ai.completions.create(stream=True, stream_options=every, **asked)
    whole = ai.completions.create(**asked)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    counts: dict[int, list[tuple[int, int]]] = {}
    for chunk in chunks:
        assert chunk.usage is not None
        assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        counts.setdefault(chunk.choices[0].index, []).append((chunk.usage.prompt_tokens, chunk.usage.completion_tokens))
    assert counts.keys() == {choice.index for choice in whole.choices}
    texts = options.get("n", 1)
    for index, found in counts.items():
        (prompt_tokens,) = {one for one, _ in found}
        assert prompt_tokens == (3 if index < texts else 1)
        generated = [one for _, one in found]
        assert generated == sorted(generated)
        assert generated[-1] == 9
        assert "logprobs" in options or generated[0] < 9


def test_the_usage_so_far_comes_with_that_of_the_end_only(ai: OpenAI) -> None:
    asked: Any = {"model": "demo", "prompt": "My name is", "max_tokens": 3, "stream": True}
    several: list[Any] = [
        {"continuous_usage_stats": True},
        {"include_usage": False, "continuous_usage_stats": True},
        {},
    ]
    for options in several:
        chunks = list(ai.completions.create(**asked, stream_options=options))
        assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
        assert chunks[-1].choices
    at_the_end: Any = {"include_usage": True, "include_obfuscation": None}
    *chunks, last = ai.completions.create(**asked, stream_options=at_the_end)
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.usage is not None
    # Without a stream, flags that are false ask for nothing.
    assert ai.completions.create(model="demo", prompt="a", max_tokens=1, extra_body={"stream_options": {}}).choices


def test_a_prompt_is_truncated_as_by_vllm(ai: OpenAI, engine: Engine) -> None:
    import openai

    prompt = "my words " * 600
    ids = engine.tokenizer.encode(prompt)
    for most, kept in ((9, ids[-9:]), (-1, ids[-508:])):
        got = ai.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=4,
            echo=True,
            logprobs=0,
            extra_body={"truncate_prompt_tokens": most},
        )
        expected = engine.generate(kept, max_new_tokens=4, echo=True)
        assert got.choices[0].text == expected.text
        assert got.choices[0].logprobs is not None
        assert len(got.choices[0].logprobs.tokens or ()) == len(kept) + 4
        assert got.usage is not None
        assert got.usage.prompt_tokens == len(kept)
    with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens must be -1, for as many as fit, or betw"):
        ai.completions.create(model="demo", prompt=prompt, extra_body={"truncate_prompt_tokens": 0})


NEUTRAL = {
    "n": 1, "best_of": 1, "temperature": 0, "top_p": 0.9, "presence_penalty": 0, "frequency_penalty": 0.0,
    "logit_bias": {}, "suffix": "", "seed": 7, "user": "somebody", "stop": None, "logprobs": None,
    "top_k": -1, "min_p": 0.0, "typical_p": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words": [],
    "suppress_tokens": [], "use_beam_search": False, "length_penalty": 1.0, "response_format": {"type": "text"},
    "structured_outputs": {"json_object": False, "grammar": None}, "guided_json": None, "guided_decoding_backend": "x",
}  # fmt: skip


def test_what_makes_no_difference_is_taken(ai: OpenAI, engine: Engine) -> None:
    got = ai.completions.create(model="demo", prompt="My name is", max_tokens=5, extra_body={**NEUTRAL, **GO_ON})
    assert got.choices[0].text == engine.generate("My name is", max_new_tokens=5, ignore_eos=True).text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": -0.7}, "temperature", "temperature must be between 0 and 100, not -0.7"),
        ({"temperature": True}, "temperature", "temperature must be a number, not true"),
        ({"temperature": "0"}, "temperature", 'temperature must be a number, not the string "0"'),
        ({"n": 0}, "n", "n must be between 1 and 128, not 0"),
        ({"n": 3, "best_of": 2}, "best_of", "best_of is 2 and n is 3"),
        (
            {"n": 5, "prompt": ["a"] * 205},
            "prompt",
            "prompt holds 205 prompts, for 5 texts each; the limit is 1024 tex",
        ),
        ({"top_p": 7}, "top_p", "top_p must be between 0 and 1, not 7"),
        ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": "-1"}, "frequency_penalty", "frequency_penalty must be a number"),
        ({"logit_bias": {"5": -101}}, "logit_bias", "logit_bias of token 5 must be between -100 and 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias holds 'x', which is no token id"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "logit_bias holds token id 9999, and the model's vocabulary"),
        ({"bad_words": [[]]}, "bad_words", "bad_words must hold words of 1 to 256 tokens, not of 0"),
        ({"guided_choice": [""]}, "guided_choice", "guided_choice must hold strings of 1 to 1024 characters, not of"),
        ({"use_beam_search": True}, "use_beam_search", "use_beam_search must be false or left out: there is no beam"),
        ({"num_beams": 4}, "num_beams", "num_beams is refused: no beams are searched here"),
        ({"guided_grammar": "root"}, "guided_grammar", "guided_grammar must be left out: a text is guided by choices"),
        ({"regex": "a", "guided_choice": ["a"]}, "regex", "regex and guided_choice are both given; a text is guided"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format.type must be one of text, json_"),
        ({"suffix": "the end"}, "suffix", "suffix must be empty or left out: GPT-2 continues texts"),
        ({"seed": "x"}, "seed", "seed must be a whole number"),
        ({"user": 3}, "user", "user must be a string"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be between 0 and 1048576, not -1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be a whole number"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens must be between 0 and 8, not 9"),
        ({"logprobs": 21}, "logprobs", "logprobs must be between 0 and 20, not 21"),
        ({"stop": ["x"] * 17}, "stop", "stop holds 17 strings; the limit is 16"),
        ({"stop": 3}, "stop", "stop must be a string or a list of strings"),
        ({"stop": [""]}, None, "a stop string must have 1 to 256 characters"),
        ({"stop_token_ids": 5}, "stop_token_ids", "stop_token_ids must be a list of token ids, not 5"),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids", "stop_token_ids holds 65 token ids; the limit is 64"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "stop_token_ids holds token id 9999, and the model's voc"),
        ({"stream": "yes"}, "stream", "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options goes with stream: true"),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "stream_options",
            "stream_options has an unknown part 'x'; known are",
        ),
        ({"echo": 1}, "echo", "echo must be true or false"),
        ({"prompt": {}}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": []}, "prompt", "prompt is an empty list"),
        ({"prompt": ["a", [1]]}, "prompt", "prompt, a list, must hold prompts of one kind"),
        ({"prompt": ["a"] * 257}, "prompt", "prompt holds 257 prompts; the limit is 256 a request"),
        ({"prompt": [1.5]}, "prompt", "prompt, a list, must hold token ids, not 1.5"),
        ({"prompt": [99999999]}, "prompt", "prompt holds token id 99999999, and the model's vocabulary has"),
        ({"prompt": "a\ud800"}, "prompt", "lone surrogate"),
        ({"model": 3}, "model", "model must be a string"),
        ({"priority": "urgent"}, "priority", "priority must be one of high, normal, low"),
        ({"temprature": 0}, "temprature", "unknown field 'temprature'; temperature may be meant; known"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_refused(
    url: str, fields: dict[str, Any], param: str | None, message: str, stream: bool
) -> None:
    body = json.dumps({"model": "demo", "prompt": "a", "stream": stream, **fields})
    got = httpx.post(f"{url}/completions", content=body, trust_env=False, timeout=60)
    if "stream_options" in fields and "stream" not in fields and stream:
        return  # then it is right
    error = got.json()["error"]
    assert (got.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["code"] is None
    assert error["message"].startswith(message) or message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(ai: OpenAI, stream: bool) -> None:
    import openai

    # The first the endpoint can tell by its bytes, the second only the worker, by its tokens.
    for prompt, max_tokens in (("the " * 700, 16), ("the " * 300, 400)):
        with pytest.raises(openai.BadRequestError, match="512 positions") as caught:
            ai.completions.create(model="demo", prompt=prompt, max_tokens=max_tokens, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "max_new_tokens" not in str(caught.value)


LONG: dict[str, Any] = {"model": "demo", "prompt": "a", "max_tokens": 500, **GO_ON}


def count(queue: Client, state: str) -> int:
    """Return how many jobs that name the model are in one of RQ's states."""
    return int(queue.connection.zcard(registry_key(state, queue_of(queue.queue_name, "normal", "demo"))))


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_cancels_his_jobs(url: str, queue: Client, stream: bool) -> None:
    body = {**LONG, "stream": stream, "prompt": ["a", "b"], "max_tokens": 511 - 5}
    canceled = count(queue, "canceled")
    with jobs_held():
        if stream:
            with httpx.stream("POST", f"{url}/completions", json=body, trust_env=False) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            hang_up(url, "/v1/completions", body, lambda: count(queue, "started") > 0)
        wait_until(lambda: count(queue, "canceled") == canceled + 2, "both jobs to be cancelled")
        wait_until(lambda: count(queue, "started") == 0, "the workers to let go of them")


def test_a_job_that_is_cancelled_by_others(url: str) -> None:
    errors: list[Any] = []

    def ask() -> None:
        with httpx.stream("POST", f"{url}/completions", json={**LONG, "stream": True}, trust_env=False) as answer:
            job_id = answer.headers["x-job-id"]
            assert httpx.delete(f"{url}/jobs/{job_id}", trust_env=False).json()["cancelled"] is True
            errors.extend(line for line in answer.iter_lines() if "error" in line or "DONE" in line)

    with jobs_held():
        asker = threading.Thread(target=ask)
        asker.start()
        asker.join(60)
    assert errors[-1] == "data: [DONE]"
    assert json.loads(errors[0].removeprefix("data: "))["error"]["code"] == "job_cancelled"
