"""What `map` takes for many prompts, and what it refuses by a sentence; which prompt an error is about."""

from __future__ import annotations

import asyncio
import io
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt2 import AsyncClient, Client, GenerationRequest, GenerationResult
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    JobFailed,
    JobTimedOut,
    NotDurable,
    PromptTooLong,
    QueueFull,
    ResultTimeout,
)

NOWHERE = "redis://127.0.0.1:1"


class Table:
    """A stand-in for tables: iterated, they give the names of their columns, or their rows."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __iter__(self) -> Iterator[Any]:
        return iter(["id", "text"])


class LazyTable:
    """A stand-in for polars' LazyFrame: to ask for its columns costs time, and warns."""

    @property
    def columns(self) -> list[str]:
        raise AssertionError("asked for its columns")

    def collect(self) -> None: ...


class Column:
    """A stand-in for a column, as of Dask: it has one dimension, and `columns` all the same."""

    ndim, columns = 1, ("text",)

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])


class ArrowColumn:
    """A stand-in for pyarrow's columns: their elements are no strings."""

    def __iter__(self) -> Iterator[object]:
        return iter([object(), object()])

    def to_pylist(self) -> list[str]:
        return ["a", "b"]


async def one_by_one(*prompts: Any) -> AsyncIterator[Any]:
    for prompt in prompts:
        await asyncio.sleep(0)
        yield prompt


FRAME = Table(columns=["id", "text"])
REFUSED: list[tuple[Any, str]] = [
    ("My name is", r"not str: for one prompt, write \[prompt\]"),
    (np.str_("My name is"), r"not str_: for one prompt, write \[prompt\]"),
    (b"a\nb", r"not bytes: write data\.decode\(\)\.splitlines\(\) for a prompt a line"),
    (bytearray(b"a"), "not bytearray: write data"),
    (Path("prompts.txt"), r"not \w+Path: write path\.read_text\(\)\.splitlines\(\) .* `fastgpt2 batch FILE`"),
    (io.StringIO("a\nb\n"), r'not StringIO: its lines have line ends.*\(line\.rstrip\("\\n"\) for line in file\)'),
    (None, r"not null: give a list, such as \[prompt\]"),
    (3, "not int: give a list"),
    (str, "not type: give a list"),
    (GenerationRequest("a"), r"not GenerationRequest: give a list, such as \[prompt\]"),
    ({"prompt": "a"}, r"not dict: for one prompt with its fields, write \[prompt\]"),
    ({"prompt": [1, 2]}, r"not dict: for one prompt with its fields, write \[prompt\]"),
    ({"prompt": ["a", "b"], "id": [1, 2]}, r'not dict: give the list that it holds, prompts\["prompt"\]'),
    ({7: "a", 8: "b"}, r"not dict: give what it holds, list\(prompts\.values\(\)\)"),
    ({"train": FRAME}, r'not dict: it holds tables; give a column of one, such as prompts\["train"\]\["text"\]'),
    ({"a", "b"}, r"not set: it has no order.*write sorted\(prompts\)"),
    (FRAME, r'not Table: it is a table; give one of its columns, such as prompts\["text"\]'),
    (Table(columns=np.array(["x", "prompt"])), r'such as prompts\["prompt"\]'),
    (Table(column_names=["x", "y"], columns=[object()]), r'such as prompts\["x"\]'),
    (Table(column_names=None), r'such as prompts\["prompt"\]'),
    (LazyTable(), r'such as prompts\.collect\(\)\["prompt"\]'),
    (np.array([["a", "b"]]), r"not ndarray: it has 2 dimensions; give one column, such as prompts\[:, 0\]"),
    (np.array("a"), "not ndarray: give a list"),
    (np.array([5, 7]), r"not ndarray: it holds numbers; for the token ids of one prompt, write \[token_ids\]"),
    ([5, 7], r"not list: it holds numbers; for the token ids of one prompt, write \[token_ids\]"),
    ((5, 7), "not tuple: it holds numbers"),
    ([np.int64(5)], "not list: it holds numbers"),
]  # fmt: skip
CALLS: list[Callable[[Any], Any]] = [
    Client(NOWHERE).map,
    Client(NOWHERE).as_completed,
    AsyncClient(NOWHERE).map,
    AsyncClient(NOWHERE).as_completed,
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("prompts", "words"), REFUSED)
def test_what_holds_no_prompts_is_refused_at_the_call(call: Callable[[Any], Any], prompts: Any, words: str) -> None:
    with pytest.raises(BadRequest, match="^prompts must be a list or another iterable of prompts, .*" + words):
        call(prompts)


@pytest.mark.parametrize("call", CALLS)
def test_so_is_what_is_wrong_for_every_prompt(call: Callable[..., Any]) -> None:
    for fields, words in (
        ({"in_flight": 0}, "in_flight must be a whole number"),
        ({"num_beams": 4}, "num_beams is refused"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"session": 1}, "unknown field 'session'"),
        ({"inflight": 8}, "unknown field 'inflight'; in_flight may be meant; known are .*, priority, .*, progress$"),
    ):
        with pytest.raises(BadRequest, match=words) as caught:
            call(["a"], **fields)
        assert caught.value.index is None


def test_a_misspelt_field_of_the_job_is_named() -> None:
    wrong: Any = {"priorty": "low"}
    for prompt in ("a", {"prompt": "a", **wrong}, GenerationRequest("a")):
        fields = {} if isinstance(prompt, dict) else wrong
        with pytest.raises(BadRequest, match="unknown field 'priorty'; priority may be meant; known are max_new_tok"):
            Client(NOWHERE).enqueue(prompt, **fields)


def test_only_the_client_for_asyncio_reads_asynchronously() -> None:
    with pytest.raises(BadRequest, match=r"not async_generator: .* is for AsyncClient\.map"):
        Client(NOWHERE).map(one_by_one("a"))  # type: ignore[call-overload]


def of_each_kind() -> Iterator[Any]:
    """Yield prompts of 1 token each, as many ways as they can be given; the fifth asks for 3 tokens instead of 2."""
    yield "a"
    yield [66]
    yield (66,)
    yield {"prompt": "a"}
    yield {"prompt": [66], "max_new_tokens": 3, "stop": (stop for stop in ["never there"]), "priority": "high"}
    yield GenerationRequest("a", 2, ignore_eos=True)
    yield np.str_("a")


@pytest.mark.usefixtures("served")
def test_prompts_of_every_kind(client: Client, redis_server: Any) -> None:
    fields: Any = {"max_new_tokens": 2, "result_ttl": 60}
    for taken in (
        [*of_each_kind()][:1], ("a",), iter(["a"]), np.array(["a"]), np.array(["a"], object), {"x": "a"}.values(),
    ):  # fmt: skip
        (result,) = client.map(taken, **fields)
        assert len(result.token_ids) == 2
    for column in (Column(), ArrowColumn()):
        assert len(list(client.map(column, **fields))) == 2  # type: ignore[arg-type]
    assert list(client.map([], **fields)) == list(client.map(np.array([]), **fields)) == []
    # A request that has been made has its fields, so these do not stand beside it.
    found = list(client.map(of_each_kind(), return_exceptions=True, ignore_eos=True, max_new_tokens=2))
    assert [len(one.token_ids) if isinstance(one, GenerationResult) else one.index for one in found] == [
        2, 2, 2, 2, 3, 5, 2,
    ]  # fmt: skip
    assert client.enqueue({"prompt": "a", "max_new_tokens": 1}).result(30).usage.completion_tokens == 1
    assert "".join(client.stream({"prompt": "a", "max_new_tokens": 3}, max_new_tokens=9))

    async def read() -> list[int]:
        async with AsyncClient(redis_server.url, client.queue_name) as other:
            many = (n for n in range(40))
            asked = one_by_one(*({"prompt": "a", "max_new_tokens": 1 + n % 3} for n in many))
            return [len(one.token_ids) async for one in other.map(asked, in_flight=5, ignore_eos=True)]

    assert asyncio.run(read()) == [1 + n % 3 for n in range(40)]


class TestErrors:
    PROMPTS: tuple[Any, ...] = (
        "a", {"prompt": "Bad " * 20, "num_beams": 2}, "the " * 600, {"max_new_tokens": 3}, [1, "x"], 2.5,
        {"prompt": "b", 3: 4}, GenerationRequest("c", 500), [1] * 600, Table(prompt=Table()), (1, Table()),
        float("nan"),
    )  # fmt: skip
    NOTES = (
        (1, BadRequest, f"'{('Bad ' * 20)[:60]}...'"),
        (2, PromptTooLong, f"'{('the ' * 600)[:60]}...'"),
        (3, BadRequest, "a mapping of 'max_new_tokens'"),
        (4, BadRequest, "[1, 'x']"),
        (5, BadRequest, "2.5"),
        (6, BadRequest, "'b'"),
        (7, JobTimedOut, "'c'"),
        (8, PromptTooLong, f"[{', '.join('1' * 12)}, ...]"),
        (9, BadRequest, "of the type Table"),
        (10, BadRequest, "[1, of the type Table]"),
        (11, BadRequest, "nan"),
    )

    def assert_named(self, error: Any, call: str) -> None:
        number, kind, shown = self.NOTES[error.index - 1]
        assert isinstance(error, kind)
        assert error.__notes__ == [f"prompt number {number} (counted from 0) of {call}: {shown}"]

    @pytest.mark.usefixtures("served")
    def test_each_says_which_prompt_it_is_about(self, client: Client, redis_server: Any) -> None:
        fields: Any = {"return_exceptions": True, "timeout": 0.001}
        found = list(client.map(self.PROMPTS, **fields))[1:]
        later = sorted(client.as_completed(self.PROMPTS, **fields), key=lambda end: end[0])[1:]
        assert [error.index for error in found if isinstance(error, FastGPT2Error)] == list(range(1, 12))
        for error in found:
            self.assert_named(error, "map")
        for number, error in later:
            assert isinstance(error, FastGPT2Error)
            assert error.index == number
            self.assert_named(error, "as_completed")
        with pytest.raises(PromptTooLong) as caught:
            list(client.map(["a", "the " * 600]))
        assert caught.value.index == 1

        async def read() -> list[Any]:
            async with AsyncClient(redis_server.url, client.queue_name) as other:
                return [one async for one in other.map(one_by_one(*self.PROMPTS), **fields)]

        for error in asyncio.run(read())[1:]:
            self.assert_named(error, "map")

    def test_a_text_that_is_missing_at_the_beginning_is_an_error_of_its_own(self, client: Client) -> None:
        """A column of pandas has NaN there, which is a number."""
        column: Any = np.array([float("nan"), "a"], object)
        error = next(client.map(column, return_exceptions=True))
        assert isinstance(error, BadRequest)
        assert (error.index, str(error)) == (0, "prompt must be a string or a list of token ids, not nan")

    def test_prompts_that_break_off(self, client: Client, redis_server: Any) -> None:
        """What an asynchronous iterable raises comes out, and it is read no further when the run ends."""
        given: list[str] = []

        async def breaking() -> AsyncIterator[str]:
            yield "a"
            raise OSError("the disk is broken")

        async def endless() -> AsyncIterator[str]:
            while True:
                given.append("a")
                yield "a"

        async def read() -> None:
            async with AsyncClient(redis_server.url, client.queue_name) as other:
                with pytest.raises(OSError, match="the disk is broken"):
                    [one async for one in other.map(breaking())]
                results = other.map(endless(), in_flight=3)
                task = asyncio.ensure_future(anext(results))
                while await other.connection.llen(f"rq:queue:{client.queue_name}") < 3:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                before = len(given)
                for _ in range(100):
                    await asyncio.sleep(0)
                assert len(given) == before <= 3 + 3 + 1, "at most as many as there is room for are read ahead"
                assert await other.connection.llen(f"rq:queue:{client.queue_name}") == 0

        asyncio.run(read())

    @pytest.mark.parametrize(
        "error",
        [
            JobFailed("id", "why", "Kind"), JobTimedOut("id", "why"), QueueFull("q", 3, 2), ResultTimeout("late"),
            NotDurable("not yet", ["a", "b"]), BadRequest("no"),
        ],
    )  # fmt: skip
    def test_they_come_out_of_a_pickle_as_they_were(self, error: FastGPT2Error) -> None:
        error.name_prompt(3, "a", "map")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
