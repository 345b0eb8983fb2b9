"""Of a prompt that is too long, the last tokens are read: the result is that of a prompt of these tokens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastgpt2 import Engine
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult, Timings
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, PromptTooLong

TEXT = "It was a dark night, and nobody who lived in Baker Street slept well. " * 3
FRAMED = [("<|endoftext|>", 0)]


def plain(result: GenerationResult) -> GenerationResult:
    return replace(result, timings=Timings(0.0, 0.0, 0.0), usage=replace(result.usage, cached_tokens=0))


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_the_result_is_that_of_the_last_tokens(engine: Engine, count: int) -> None:
    ids = engine.tokenizer.encode(TEXT)
    options: dict[str, Any] = {"max_new_tokens": 6, "logprobs": 1, "prompt_logprobs": 1, "echo": True}
    expected = plain(engine.generate(ids[-count:], **options))
    assert expected.usage.prompt_tokens == count
    for prompt in (TEXT, ids):
        found: Any = engine.generate(prompt, **options, truncate_prompt_tokens=count)
        assert plain(found) == expected
    assert expected.text.startswith(engine.tokenizer.decode(ids[-count:]))


def test_a_shorter_prompt_is_read_as_it_is(engine: Engine) -> None:
    count = len(engine.tokenizer.encode(TEXT))
    whole = plain(engine.generate(TEXT, max_new_tokens=3, echo=True))
    for most in (count, count + 1, 131072, -1, None):
        assert plain(engine.generate(TEXT, max_new_tokens=3, echo=True, truncate_prompt_tokens=most)) == whole
    empty = engine.generate("", max_new_tokens=3, truncate_prompt_tokens=1)
    assert plain(empty) == plain(engine.generate("", max_new_tokens=3))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"max_new_tokens": 12}, 500),
        ({"max_new_tokens": 0}, 512),
        ({"max_new_tokens": 511}, 1),
        ({}, 492),  # 20 new ones by default
        ({"min_new_tokens": 30}, 482),
    ],
)
def test_as_many_as_leave_room_for_the_new_tokens(engine: Engine, options: dict[str, Any], kept: int) -> None:
    """The model has 512 positions."""
    prompt = list(range(1, 1001))
    request = {**options, "ignore_eos": True, "stop_token_ids": list(range(64)), "truncate_prompt_tokens": -1}
    prepared = engine.decoder.prepare(GenerationRequest(tuple(prompt), **request))
    assert prepared.ids == prompt[-kept:]
    with pytest.raises(PromptTooLong, match="prompt tokens 1000"):
        engine.decoder.prepare(GenerationRequest(tuple(prompt), **{**request, "truncate_prompt_tokens": None}))


def test_what_does_not_fit_all_the_same(engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="prompt tokens 600, over the model's 512 positions"):
        engine.generate([5] * 1000, truncate_prompt_tokens=600)
    with pytest.raises(PromptTooLong, match="prompt tokens 1 and max_new_tokens 600 make 601, over the model's 512 po"):
        engine.generate([5] * 1000, truncate_prompt_tokens=-1, max_new_tokens=600)
    for wrong in (0, -2, 131073, 1.5, "5", True):
        with pytest.raises(BadRequest, match="truncate_prompt_tokens must be "):
            engine.generate("a", truncate_prompt_tokens=wrong)  # type: ignore[arg-type]
    # What was cut off may hold what the model does not have.
    assert engine.generate([9999, 5], max_new_tokens=1, truncate_prompt_tokens=1).usage.prompt_tokens == 1


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts a token before every text, and two behind it."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path_factory.mktemp("framed") / "model")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|> <|endoftext|>", special_tokens=FRAMED
    )
    (folder / "tokenizer.json").write_text(backend.to_str(), "utf-8")
    # Without the name of a class, a GPT-2's tokenizer would be taken for a byte-level one.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    return folder


def test_what_stands_around_every_text_stays(framed: Path) -> None:
    tokenizer = Tokenizer.from_folder(framed)
    end, within = 0, tokenizer.encode_part("one two<|endoftext|> three four")
    assert tokenizer.encode("one two<|endoftext|> three four") == [end, *within, end, end]
    assert end in within, "a special token of the text itself is none that stands around it"
    library = tokenizers.Tokenizer.from_file(str(framed / "tokenizer.json"))
    for count in range(3, len(within) + 5):
        kept = within[max(0, len(within) + 3 - count) :]
        found = tokenizer.encode_last("one two<|endoftext|> three four", count)
        assert found == ([end, *kept, end, end], count < len(within) + 3)
        # transformers tells the library to truncate so with `truncation_side="left"`.
        library.enable_truncation(count, direction="left")
        assert library.encode("one two<|endoftext|> three four").ids == found[0]
    assert [len(tokenizer.encode_last("one two", count)[0]) for count in (1, 2)] == [1, 2]
