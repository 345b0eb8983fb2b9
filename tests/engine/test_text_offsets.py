"""Offsets tell where tokens begin in the text: compared by hand, and by counting the bytes before them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import with_end_of_text
from support.running import GOLDEN

from fastgpt2 import Engine, TokenLogprob
from fastgpt2.engine.decoding.decoder import Decoder
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.detokenizer import ByteDetokenizer
from fastgpt2.engine.text.tokenizer import Tokenizer

continuations: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))[
    "continuations"
]
TEXTS = ["Sherlock Holmes", "“You see,” 中文 😀, café.", "🦜", "a  b\n\n🦜🦜", "\ufffd é", "The Count <|endoftext|> He"]


def offsets(told: tuple[TokenLogprob, ...] | None) -> list[int]:
    assert told is not None
    return [one.text_offset for one in told]


def counted(pieces: list[bytes]) -> list[int]:
    """Count the offsets of pieces of valid UTF-8, in which characters begin with bytes other than 10xxxxxx."""
    found, before = [], b""
    for piece in pieces:
        begun = sum(byte & 0xC0 != 0x80 for byte in before + piece[:1])
        found.append(begun - 1 if piece else begun)
        before += piece
    return found


def of_prompt(engine: Engine, prompt: str | list[int], **options: Any) -> list[int]:
    return offsets(engine.generate(prompt, max_new_tokens=0, prompt_logprobs=0, **options).prompt_logprobs)


@pytest.mark.parametrize("text", TEXTS)
def test_of_a_prompt_that_is_text(engine: Engine, text: str) -> None:
    ids = engine.tokenizer.encode(text)
    pieces = [b"<|endoftext|>" if i == 0 else engine.tokenizer.token_bytes(i) for i in ids]
    assert b"".join(pieces) == text.encode()
    assert of_prompt(engine, text) == of_prompt(engine, text, echo=True) == counted(pieces)


def test_of_a_prompt_by_hand(engine: Engine) -> None:
    # "A", " p", "ar", "r", "ot", ":", " ", four bytes of a parrot, "!"
    assert of_prompt(engine, "A parrot: 🦜!") == [0, 1, 3, 5, 6, 8, 9, 10, 10, 10, 10, 11]


def test_of_a_prompt_by_ids(engine: Engine) -> None:
    byte = {engine.tokenizer.token_bytes(i): i for i in range(1, engine.config.vocab_size)}
    by_bytes = [byte[bytes([b])] for b in "é🦜".encode()]
    assert of_prompt(engine, by_bytes) == [0, 0, 1, 1, 1, 1]
    # A special token has no text, not even within a character.
    assert of_prompt(engine, [0, byte[b"a"], 0, byte[b"\xc3"], 0, byte[b"\xa9"], byte[b"b"]]) == [0, 0, 1, 1, 1, 1, 2]
    # A byte that breaks off a character stands behind a U+FFFD; one that continues no character is a U+FFFD.
    broken = [byte[b"\xf0"], byte[b"\x9f"], byte[b"a"], byte[b"\xc3"], byte[b"\xc3"], byte[b"\xa9"], byte[b"\xa9"]]
    assert engine.tokenizer.decode(broken) == "\ufffda\ufffdé\ufffd"
    assert of_prompt(engine, broken) == [0, 0, 1, 2, 3, 3, 4]


def test_any_ids_by_decoding_up_to_each(engine: Engine) -> None:
    """The first byte of a token belongs to the last character of the text that ends with this byte."""
    dice = random.Random(5)
    tokenizer = engine.tokenizer
    single = [i for i in range(1, engine.config.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    for _ in range(60):
        ids = [dice.choice(single) if dice.random() < 0.8 else dice.randrange(1, 2048) for _ in range(30)]
        pieces = [tokenizer.token_bytes(i) for i in ids]
        expected = [len((b"".join(pieces[:n]) + pieces[n][:1]).decode(errors="replace")) - 1 for n in range(len(ids))]
        assert of_prompt(engine, ids) == expected


@pytest.mark.parametrize("echo", [False, True])
def test_of_what_is_generated(engine: Engine, echo: bool) -> None:
    for entry in continuations[:8]:
        result = engine.generate(entry["prompt"], max_new_tokens=60, ignore_eos=True, logprobs=1, echo=echo)
        pieces = [engine.tokenizer.token_bytes(i) for i in result.token_ids]
        start = len(entry["prompt"]) if echo else 0
        expected = [start + at for at in counted(pieces)]
        assert offsets(result.logprobs) == expected
        assert result.logprobs is not None
        for one, following in zip(result.logprobs, [*expected[1:], len(result.text)], strict=True):
            if not one.token.startswith(("bytes:", "<|")):
                assert result.text[one.text_offset : following] == one.token
            assert all(other.text_offset == 0 for other in one.top)


def test_a_character_that_the_prompt_begins(engine: Engine) -> None:
    """The tokens are given to the decoder by hand, as no model can be made to end a parrot."""
    decoder = engine.decoder
    whole = engine.tokenizer.encode("A parrot: 🦜")
    for echo, begin in ((True, len("A parrot: ")), (False, 0)):
        request = GenerationRequest(tuple(whole[:-1]), 5, logprobs=0, echo=echo)
        sequence = decoder.admit(decoder.prepare(request))
        take(decoder, sequence, [whole[-1], whole[0], whole[1]])
        assert offsets(tuple(sequence.logprobs)) == [begin, begin + 1, begin + 2]
        # Without the echo, the text begins where it differs from what the prompt reads as.
        assert sequence.text == ("A parrot: 🦜A p" if echo else "🦜A p")


def take(decoder: Decoder, sequence: Any, ids: list[int]) -> None:
    """Have the decoder accept these tokens as the likeliest, one after the other."""
    for token_id in ids:
        logits = np.zeros(decoder.model.config.vocab_size, np.float32)
        logits[token_id] = 9
        decoder._accept(sequence, logits, token_id, 0.0)
    decoder.finish(sequence)


def test_what_a_stop_string_cuts_off_lies_beyond(engine: Engine) -> None:
    entry = continuations[1]
    texts = [engine.tokenizer.decode([token_id]) for token_id in entry["ids"]]
    # It reaches from within token 5 to the end of token 8.
    stop = "".join(texts[5:9])[1:]
    result = engine.generate(entry["prompt"], max_new_tokens=60, stop=stop, logprobs=0)
    assert result.finish_reason == "stop"
    assert len(result.token_ids) == 9
    assert len(texts[5]) > 1
    begins = [len("".join(texts[:n])) for n in range(9)]
    assert offsets(result.logprobs) == begins
    assert [at < len(result.text) for at in begins] == [True] * 6 + [False] * 3


def test_an_end_of_text_lies_beyond(engine: Engine) -> None:
    byte = {engine.tokenizer.token_bytes(i): i for i in range(1, 2048)}
    for request in (GenerationRequest("a", 9, logprobs=0), GenerationRequest("a", 9, logprobs=0, stop_token_ids=(77,))):
        end = 77 if request.stop_token_ids else 0
        sequence = engine.decoder.admit(engine.decoder.prepare(request))
        take(engine.decoder, sequence, [byte[b"a"], byte[b"b"], end])
        assert (sequence.text, sequence.finish_reason) == ("ab", "stop")
        assert offsets(tuple(sequence.logprobs)) == [0, 1, 2]
        # It also lies behind an unfinished character, which the end turns into U+FFFD.
        sequence = engine.decoder.admit(engine.decoder.prepare(request))
        take(engine.decoder, sequence, [byte[b"a"], byte[b"\xc3"], end])
        assert (sequence.text, sequence.finish_reason) == ("a\ufffd", "stop")
        assert offsets(tuple(sequence.logprobs)) == [0, 1, 2]


def test_an_end_of_text_that_is_no_special_token_is_text(tmp_path: Path) -> None:
    entry = continuations[0]
    engine = with_end_of_text(tmp_path, [entry["ids"][10]])
    first = entry["ids"].index(entry["ids"][10])
    result = engine.generate(entry["prompt"], max_new_tokens=100, logprobs=0)
    assert result.finish_reason == "stop"
    end = engine.tokenizer.decode([entry["ids"][10]])
    assert result.text[offsets(result.logprobs)[first] :] == end


def test_offsets_do_not_hang_on_the_tokenizer_s_own_settings(tmp_path: Path) -> None:
    """The tokenizer's `trim_offsets` would leave out leading spaces."""
    stored = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
    assert stored["post_processor"]["type"] == "ByteLevel"
    stored["post_processor"]["trim_offsets"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    trimming, plain = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(DEMO_FOLDER)
    for text in TEXTS:
        assert trimming.encode(text) == plain.encode(text)
        assert trimming.offsets(text) == plain.offsets(text)


def test_what_breaks_a_character_off(engine: Engine) -> None:
    byte = {engine.tokenizer.token_bytes(i): i for i in range(1, 2048)}
    detokenizer = engine.tokenizer.detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    assert not detokenizer.unfinished
    assert not detokenizer.breaks_off(byte[b"\xa9"]), "there is none"
    detokenizer.push(byte[b"\xe2"])
    assert detokenizer.unfinished
    assert not detokenizer.breaks_off(byte[b"\x80"])
    assert not detokenizer.breaks_off(0), "a token without text"
    assert detokenizer.breaks_off(byte[b"a"])
    assert detokenizer.breaks_off(byte[b"\xe2"])
    assert detokenizer.push(byte[b"\x80"]) == "", "asking has changed nothing"
    assert detokenizer.push(byte[b"\x9c"]) == "“"
