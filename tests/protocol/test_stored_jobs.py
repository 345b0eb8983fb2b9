"""A job as it lies in Redis: its call, its failure, and the prompt that is not shown."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

import pytest

from fastgpt2.protocol.stored_jobs import (
    HIDDEN,
    MAX_FAILURE_BYTES,
    hide_prompts,
    read_call,
    read_failure,
    split_failure,
)

TASK = "fastgpt2.worker.tasks.generate"
QUOTED = "a\nsecret 'é' prompt"


def packed(text: str) -> bytes:
    """Pack a text as `rq.results.Result` does."""
    return base64.b64encode(zlib.compress(text.encode()))


class TestCall:
    @pytest.mark.parametrize("pack", [zlib.compress, bytes], ids=["packed", "plain"])
    @pytest.mark.parametrize("dumps", [lambda value: json.dumps(value).encode(), pickle.dumps], ids=["JSON", "pickle"])
    def test_as_rq_writes_it(self, pack: Any, dumps: Any) -> None:
        call = read_call(pack(dumps((TASK, None, ["Hi"], {"max_new_tokens": 3}))))
        assert call is not None
        assert (call.function, call.args, call.kwargs, call.prompt) == (TASK, ["Hi"], {"max_new_tokens": 3}, "Hi")

    def test_a_prompt_by_name_and_the_messages_of_a_chat(self) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        chat = {"prompt": "", "messages": messages}
        for kwargs, prompt in (({"prompt": "Hi"}, "Hi"), (chat, messages), ({}, None), ({"prompt": ""}, "")):
            call = read_call(json.dumps([TASK, None, [], kwargs]).encode())
            assert call is not None
            assert call.prompt == prompt
            assert prompt is None or prompt in call.secrets

    @pytest.mark.parametrize(
        "data",
        [
            b"", b"x", b"[]", b"[1,2,3,4]", b'["f",null,{},[]]', b'{"a":1}', b"[" * 100_000, b"\x80\x04", b"\xff" * 20,
            pickle.dumps((TASK, None, (print,), {})), zlib.compress(b" " * 10_000_000), zlib.compress(b"x")[:-3],
        ],
    )  # fmt: skip
    def test_what_is_none(self, data: bytes) -> None:
        assert read_call(data) is None


class TestFailure:
    def test_as_rq_writes_it(self) -> None:
        text = "Traceback (most recent call last):\n  File x\nfastgpt2.errors.PoisonJob: 4 workers died\n"
        assert read_failure(packed(text)) == text
        assert split_failure(text) == ("PoisonJob", "4 workers died")
        assert split_failure("MemoryError\n\n") == ("MemoryError", "MemoryError")
        assert split_failure("something else!") == ("", "something else!")
        assert split_failure("") == ("", "no reason was recorded")

    @pytest.mark.parametrize("data", [b"", b"x", b"\xff\x00", base64.b64encode(b"no zlib"), packed("whole")[:-8]])
    def test_what_is_none(self, data: bytes) -> None:
        assert read_failure(data) in ("", "whole")

    def test_it_is_bounded(self) -> None:
        assert len(read_failure(packed("x" * (MAX_FAILURE_BYTES + 5)))) == MAX_FAILURE_BYTES


class TestHiding:
    @pytest.mark.parametrize(
        ("prompt", "text", "shown"),
        [
            ("My secret prompt", "no: My secret prompt, nor My secret prompt.", f"no: {HIDDEN}, nor {HIDDEN}."),
            ("My secret prompt" * 9, f"not {('My secret prompt' * 9)[:60]!r}...", f"not '{HIDDEN}'..."),
            (QUOTED, f"not {QUOTED!r}", None),
            ("a\nsecret é prompt", 'not "a\\nsecret \\u00e9 prompt"', f'not "{HIDDEN}"'),
            ("a", "a prompt such as 'a' or \"a\"", f"a prompt such as {HIDDEN} or {HIDDEN}"),
            ("", "nothing is hidden ''", "nothing is hidden ''"),
            ([464, 2068, 7586, 21831], "not [464, 2068, 7586, 21831]", f"not [{HIDDEN}]"),
            ([{"role": "user", "content": "My secret"}], "user said My secret!", f"user said {HIDDEN}!"),
            ([{"role": "user", "content": [{"type": "text", "text": "My secret"}]}], "My secret", HIDDEN),
            ([{"tool_calls": [{"function": {"arguments": {"a": ["My secret"]}}}]}], "no My secret", f"no {HIDDEN}"),
            (None, "as it is", "as it is"),
            (7, "7 as it is", "7 as it is"),
        ],
    )
    def test_a_prompt_in_a_sentence(self, prompt: Any, text: str, shown: str | None) -> None:
        found = hide_prompts(text, [prompt])
        if shown is None:
            assert "secret" not in found
        else:
            assert found == shown

    @pytest.mark.parametrize(
        ("content", "said", "is_hidden"),
        [
            ("Hello. My PIN is 4711, mind it", "I never heard: my pin is 4711", True),
            ("Dear\n  John,\nmy secret", "I refuse Dear John, my secret", True),
            ("4711", "no 4711 here", True),
            ("4711", "no 14711 here", False),
            ("Which roles are there?", "Conversation roles must alternate user/assistant/user/assistant/...", False),
            ("", "after user comes assistant", False),
        ],
    )
    def test_what_a_template_says_of_a_message(self, content: str, said: str, is_hidden: bool) -> None:
        messages = [{"role": "user", "content": "x"}] * 300 + [{"role": "user", "content": content}]
        for head, tail in (("refuses these messages: ", ""), ("cannot render these messages (", ")")):
            text = f"fastgpt2.errors.BadRequest: the chat template {head}{said}{tail}"
            shown = f"fastgpt2.errors.BadRequest: the chat template {head}{HIDDEN}" if is_hidden else text
            assert hide_prompts(text, [messages]) == shown

    def test_deep_and_long_ones_end(self) -> None:
        deep: Any = "My secret"
        for _ in range(500):
            deep = [deep]
        assert hide_prompts("x", [deep]) == "x"
        assert hide_prompts("ab" * 30_000, ["ab" * 500_000]) == HIDDEN
        nearly = "a" * 24 + "b" * 500_000
        assert hide_prompts("a" * 240_000, [nearly]) == HIDDEN * 10_000
