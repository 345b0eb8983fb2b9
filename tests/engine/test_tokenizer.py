"""Text and token ids are those of OpenAI's own encoder.py, run over the real GPT-2 vocabulary."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import TokenizerError

golden: dict[str, list[dict[str, Any]]] = json.loads((GOLDEN / "tokenization.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2-tokenizer")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((GOLDEN / "gpt2-tokenizer.json.gz").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(gpt2_folder)


def test_encodes_as_openai_does(gpt2: Tokenizer) -> None:
    assert len(golden["texts"]) >= 120
    for entry in golden["texts"]:
        assert gpt2.encode(entry["text"]) == entry["ids"], entry["text"]


def test_decodes_as_openai_does(gpt2: Tokenizer) -> None:
    for entry in golden["texts"] + golden["partial"]:
        assert gpt2.decode(entry["ids"]) == entry["decoded"]


def test_pieces_are_whole_characters_and_add_up(gpt2: Tokenizer) -> None:
    cut = 0
    for entry in golden["texts"] + golden["partial"]:
        detokenizer = gpt2.detokenizer()
        pieces = [detokenizer.push(token_id) for token_id in entry["ids"]]
        assert "".join(pieces) + detokenizer.flush() == entry["decoded"]
        cut += sum(not piece for piece in pieces)
    assert cut > 50, "no character was split over tokens: the test has lost its point"


def test_a_character_over_several_tokens_comes_with_the_last(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("🦜")
    assert len(ids) == 3
    detokenizer = gpt2.detokenizer()
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "🦜"]


def test_agrees_with_the_library_that_it_wraps(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(gpt2_folder / "tokenizer.json"))
    for entry in golden["texts"] + golden["partial"]:
        assert gpt2.decode(entry["ids"]) == library.decode(entry["ids"], skip_special_tokens=True)


def test_vocabulary_and_merges_alone_make_the_same_tokenizer(gpt2_folder: Path, tmp_path: Path) -> None:
    model = json.loads((gpt2_folder / "tokenizer.json").read_text("utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), "utf-8")
    rebuilt = Tokenizer.from_folder(tmp_path)
    for entry in golden["texts"]:
        assert rebuilt.encode(entry["text"]) == entry["ids"], entry["text"]
        assert rebuilt.decode(entry["ids"]) == entry["decoded"]


@pytest.mark.thorough
def test_longest_token_bounds_every_text(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    # In the file a token is written with one character for each of its bytes.
    vocabulary = json.loads((gpt2_folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    longest = gpt2.longest_token_bytes
    assert longest >= max(map(len, vocabulary)) == 128
    for entry in golden["texts"]:
        assert len(entry["text"].encode()) <= longest * len(entry["ids"])


def test_the_longest_token_is_found_beyond_gaps_in_the_numbers(tmp_path: Path) -> None:
    """The vocabulary's longest token has an id far beyond the number of tokens."""
    stored = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
    vocabulary = stored["model"]["vocab"]
    longest = max(vocabulary, key=len)
    vocabulary[longest] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    assert Tokenizer.from_folder(tmp_path).longest_token_bytes == Tokenizer.from_folder(DEMO_FOLDER).longest_token_bytes


def test_ids_that_nobody_has_stand_for_nothing(gpt2: Tokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.token_bytes(50256) == b""
    assert gpt2.token_bytes(1 << 30) == b""


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    stored = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    text = "It is a capital mistake to theorize before one has data."
    assert Tokenizer.from_folder(tmp_path).encode(text) == Tokenizer.from_folder(DEMO_FOLDER).encode(text)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "BPE"}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"holds neither tokenizer\.json nor vocab\.json with merges\.txt"):
        Tokenizer.from_folder(tmp_path)
