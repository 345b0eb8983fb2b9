"""The shipped model with its tokens written as sentencepiece has them: the same ids, the text by another decoder."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.running import GOLDEN
from tokenizers import AddedToken, decoders, models

from fastgpt2 import Engine
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def as_sentencepiece_has_it(data: bytes, token_id: int) -> str:
    """Return a byte-level token as another vocabulary writes it: a space as ▁, a lone byte or a newline as <0x0A>."""
    if len(data) == 1 and (data[0] >= 0x80 or data == b"\n"):
        return f"<0x{data[0]:02X}>"
    try:
        return data.decode().replace(" ", "▁")
    except UnicodeDecodeError:
        return f"<part of a character {token_id}>"


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    plain = Tokenizer.from_folder(DEMO_FOLDER)
    vocabulary = {as_sentencepiece_has_it(plain.token_bytes(i), i): i for i in range(1, plain.vocab_size)}
    made = tokenizers.Tokenizer(models.WordLevel({**vocabulary, "</s>": 0}, unk_token="</s>"))
    made.decoder = LLAMA
    made.add_special_tokens([AddedToken("</s>", special=True)])
    return made


@pytest.fixture(scope="module")
def engine(backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path_factory.mktemp("sentencepiece") / "model")
    (folder / "tokenizer.json").write_text(backend.to_str(), "utf-8")
    # Without the name of a class, a GPT-2's tokenizer would be taken for a byte-level one.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    return Engine.load(str(folder), max_batch=2, threads=1)


def admit(engine: Engine, request: GenerationRequest) -> Sequence:
    return engine.decoder.admit(engine.decoder.prepare(request))


def only(engine: Engine, token_id: int) -> Any:
    """Return logits under which this token is the likeliest."""
    logits = np.zeros(engine.config.vocab_size, np.float32)
    logits[token_id] = 9
    return logits


def beyond(backend: tokenizers.Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Return what transformers' `decode` gives for all ids less what it gives for the prompt's."""
    return backend.decode(prompt + new)[len(backend.decode(prompt)) :]


def test_texts_are_those_of_the_byte_level_tokenizer(engine: Engine, backend: tokenizers.Tokenizer) -> None:
    same = 0
    for entry in ENTRIES[:24]:
        result = engine.generate(entry["prompt_ids"], max_new_tokens=60, ignore_eos=True)
        assert list(result.token_ids) == entry["ids"][:60]
        assert result.text == beyond(backend, entry["prompt_ids"], entry["ids"][:60])
        same += entry["text"].startswith(result.text)
    assert same > 20, "rows of bytes that are no text, and characters of parts, are few"


def test_the_stream_is_the_text(engine: Engine) -> None:
    for entry in ENTRIES[:8]:
        for echo in (False, True):
            request = GenerationRequest(tuple(entry["prompt_ids"]), 60, ("zebra", "\n\n\n\n"), True, echo=echo)
            sequence, given = admit(engine, request), ""
            while not sequence.finished:
                engine.decoder.step()
                assert sequence.text.startswith(given)
                given = sequence.text[: sequence.settled]
            assert given == sequence.text


def test_an_echo_is_the_text_of_all_ids(engine: Engine, backend: tokenizers.Tokenizer) -> None:
    for entry in ENTRIES[:8]:
        ids = entry["prompt_ids"]
        echoed = engine.generate(ids, max_new_tokens=20, ignore_eos=True, echo=True)
        assert echoed.text == backend.decode([*ids, *echoed.token_ids])


def test_offsets_cut_the_text_into_its_tokens(engine: Engine) -> None:
    for entry in ENTRIES[:8]:
        result = engine.generate(entry["prompt_ids"], max_new_tokens=60, ignore_eos=True, logprobs=0)
        assert result.logprobs is not None
        ends = [*(one.text_offset for one in result.logprobs[1:]), len(result.text)]
        parts = [result.text[one.text_offset : end] for one, end in zip(result.logprobs, ends, strict=True)]
        assert "".join(parts) == result.text
        shown = [one.token for one in result.logprobs]
        assert sum(part == token for part, token in zip(parts, shown, strict=True)) > 50


def test_a_newline_that_is_a_byte_stops_at_once(engine: Engine) -> None:
    """It would be text were the text to end there, so that no token more is wanted to know."""
    newline = engine.tokenizer.encode("<0x0A>")[0]
    tried = 0
    for entry in ENTRIES:
        if newline not in entry["ids"][1:40] or "\n" not in entry["text"]:
            continue
        tried += 1
        at = entry["ids"].index(newline)
        result = engine.generate(entry["prompt_ids"], max_new_tokens=60, ignore_eos=True, stop="\n", logprobs=0)
        assert list(result.token_ids) == entry["ids"][: at + 1]
        assert result.text == entry["text"][: entry["text"].index("\n")]
        assert (result.finish_reason, result.stop_reason) == ("stop", "\n")
        # Within the least length it is no match, wherever it is known to be text.
        longer = engine.generate(
            entry["prompt_ids"], max_new_tokens=at + 2, min_new_tokens=at + 1, ignore_eos=True, stop="\n"
        )
        assert longer.text.startswith(result.text + "\n")
    assert tried > 3


def test_a_special_token_behind_what_is_held_back(engine: Engine) -> None:
    """The stop string begins in a row of bytes that has not ended yet."""
    newline, a = engine.tokenizer.encode("<0x0A>")[0], engine.tokenizer.encode("a")[0]
    request = GenerationRequest("a", 9, stop=("\n</s>",), ignore_eos=True)
    sequence = admit(engine, request)
    for token_id in (a, newline, 0):
        engine.decoder._accept(sequence, only(engine, token_id), token_id, 0.0)
    assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == ("a", "stop", "\n</s>")


def test_what_is_held_back_is_in_a_partial_result(engine: Engine) -> None:
    sequence = admit(engine, GenerationRequest("a", 9, ignore_eos=True))
    for token in ("a", "<0x0A>"):
        token_id = engine.tokenizer.encode(token)[0]
        engine.decoder._accept(sequence, only(engine, token_id), token_id, 0.0)
    assert (sequence.text, sequence.settled) == ("a", 1)
    engine.decoder.finish(sequence)
    assert sequence.result("demo", "cancelled").text == "a\n"
