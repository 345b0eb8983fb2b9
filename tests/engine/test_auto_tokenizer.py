"""The tokenizer of every kind of folder is the one that transformers loads; what cannot be loaded is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2.engine.model.config import TOKENIZER_EXTRAS, TOKENIZER_SETS
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text import auto_tokenizer
from fastgpt2.engine.text.auto_tokenizer import LoadedTokenizer, load_tokenizer
from fastgpt2.errors import TokenizerError

KINDS = GOLDEN / "tokenizers"
golden: dict[str, Any] = json.loads((KINDS / "answers.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", golden["kinds"])
def test_text_becomes_the_ids_that_transformers_gives(kind: str) -> None:
    expected = golden["kinds"][kind]
    loaded = load_tokenizer(KINDS / kind)
    for text, ids in zip(golden["texts"], expected["ids"], strict=True):
        assert loaded.backend.encode(text).ids == ids, text
    assert loaded.backend.get_vocab_size() == expected["size"]
    assert (loaded.eos_token_id, loaded.bos_token_id) == (expected["eos"], expected["bos"])
    assert loaded.notes == ()


def test_every_set_of_files_is_tried() -> None:
    """Among the kinds is one for each of the sets of files that a download may bring."""
    folders = [{file.name for file in (KINDS / kind).iterdir()} for kind in golden["kinds"]]
    for names in TOKENIZER_SETS:
        assert any(folder.issuperset(names) for folder in folders), names
    for name in TOKENIZER_EXTRAS:
        assert any(name in folder for folder in folders), name


def copy_of(kind: str, folder: Path, **files: Any) -> Path:
    """Copy a kind's folder; `files` are JSON files by their stems, which replace or join its own."""
    shutil.copytree(KINDS / kind, folder, dirs_exist_ok=True)
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), "utf-8")
    return folder


def without_files(kind: str, folder: Path, *names: str) -> Path:
    shutil.copytree(KINDS / kind, folder, dirs_exist_ok=True)
    for name in names:
        (folder / name).unlink()
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message.replace(str(folder), "FOLDER")


def clean_up(folder: Path) -> bool:
    return load_tokenizer(folder).clean_up


def test_spaces_before_punctuation_go_only_where_transformers_takes_them_out(tmp_path: Path) -> None:
    asked = {"clean_up_tokenization_spaces": True}
    forced = {**asked, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    assert clean_up(KINDS / "bert-cased")
    assert not clean_up(KINDS / "bert")
    assert not clean_up(KINDS / "byte-fallback")  # which asks for it, and is a BPE
    assert clean_up(copy_of("gpt2-json", tmp_path, tokenizer_config=forced))


def test_code_of_a_repository_is_not_run_and_that_is_said(tmp_path: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    loaded = load_tokenizer(copy_of("own-class", tmp_path, tokenizer_config=config))
    (note,) = loaded.notes
    assert "auto_map" in note
    assert "not run" in note


def test_a_folder_that_is_no_models_has_a_tokenizer_too(tmp_path: Path) -> None:
    """A folder for `--tokenizer` may have no config.json, or that of another model."""
    for kind in ("gpt2-two-files", "gpt2-json"):
        loaded = load_tokenizer(without_files(kind, tmp_path / kind, "config.json"))
        assert loaded.backend.encode("Hello").ids == load_tokenizer(KINDS / kind).backend.encode("Hello").ids
    bert = copy_of("bert", tmp_path / "bert", config={"model_type": "bert"})
    (bert / "tokenizer_config.json").unlink()
    assert (
        load_tokenizer(bert).backend.encode("Hello").ids == load_tokenizer(KINDS / "bert").backend.encode("Hello").ids
    )


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 10}
    assert load_tokenizer(copy_of("gpt2-json", tmp_path, config=config)).backend.get_vocab_size() > 10


def test_the_model_first_or_last_makes_no_difference(tmp_path: Path) -> None:
    stored = json.loads((KINDS / "gpt2-declared" / "tokenizer.json").read_text("utf-8"))
    turned = {"model": stored.pop("model"), **stored}
    loaded = load_tokenizer(copy_of("gpt2-declared", tmp_path, tokenizer=turned))
    expected = golden["kinds"]["gpt2-declared"]["ids"]
    assert [loaded.backend.encode(text).ids for text in golden["texts"]] == expected


def test_only_the_head_of_a_usual_file_is_parsed_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading GPT-2's tokenizer would otherwise take a third longer."""

    lengths = []
    parse = json.JSONDecoder.raw_decode

    def parsed(decoder: json.JSONDecoder, text: str, idx: int = 0) -> tuple[Any, int]:
        value, end = parse(decoder, text, idx)
        lengths.append(end - idx)
        return value, end

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", parsed)
    assert isinstance(load_tokenizer(DEMO_FOLDER), LoadedTokenizer)
    assert 0 < max(lengths) < 1000 < (DEMO_FOLDER / "tokenizer.json").stat().st_size


def test_nothing_that_is_a_tokenizer(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        "FOLDER: holds neither tokenizer.json nor vocab.json with merges.txt; give a tokenizer by --tokenizer ID|PATH"
    )


def test_a_vocabulary_whose_class_no_file_names(tmp_path: Path) -> None:
    """transformers would make a GPT-2 tokenizer without tokens of it. Naming the class, as the sentence says, helps."""
    folder = without_files("bert", tmp_path, "tokenizer_config.json")
    assert "holds neither tokenizer.json nor vocab.json with merges.txt, which its tokenizer needs" in refusal(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(folder).backend.encode("Hello").ids


def test_half_of_two_files(tmp_path: Path) -> None:
    message = refusal(without_files("gpt2-two-files", tmp_path, "merges.txt"))
    assert "but vocab.json" in message


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("BertJapaneseTokenizer", "MeCab"),
        ("CpmTokenizerFast", "jieba"),
        ("EsmTokenizer", "Python code of transformers"),
        ("LukeTokenizer", '"tokenizer_class": "PreTrainedTokenizerFast"'),
    ],
)
def test_a_class_that_there_is_none_of_here(tmp_path: Path, name: str, remedy: str) -> None:
    message = refusal(copy_of("gpt2-json", tmp_path, tokenizer_config={"tokenizer_class": name}))
    assert remedy in message
    assert "--tokenizer" in message


def test_a_vocabulary_of_tiktoken(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert "tokenizer.model: a vocabulary of tiktoken, which fastgpt2 does not read; save it" in refusal(folder)


def test_a_class_that_does_not_go_with_the_file(tmp_path: Path) -> None:
    folder = copy_of("gpt2-json", tmp_path, tokenizer_config={"tokenizer_class": "AlbertTokenizer"})
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in refusal(folder)
    copy_of("gpt2-json", tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(folder).backend.encode("Hello").ids


@pytest.mark.parametrize(
    ("kind", "files", "named"),
    [
        ("gpt2-json", {"tokenizer": {"model": None}}, "tokenizer.json"),
        ("gpt2-json", {"tokenizer": []}, "tokenizer.json"),
        ("gpt2-two-files", {"vocab": {"a": 2**40}}, "vocab.json"),
        ("gpt2-two-files", {"vocab": {"a": -1}}, "vocab.json"),
        ("gpt2-two-files", {"vocab": {"a": "b"}}, "vocab.json"),
        ("gpt2-two-files", {"tokenizer_config": []}, "tokenizer_config.json: not a JSON object"),
        ("gpt2-two-files", {"tokenizer_config": {"add_prefix_space": "yes"}}, "add_prefix_space must be true or false"),
        ("gpt2-two-files", {"tokenizer_config": {"tokenizer_class": 5}}, "tokenizer_class must be a name"),
        ("gpt2-two-files", {"tokenizer_config": {"bos_token": 5}}, "an added token is '5'"),
        (
            "gpt2-two-files",
            {"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}},
            "the added token 'y' has the id x",
        ),
        ("gpt2-two-files", {"tokenizer_config": {"added_tokens_decoder": 1}}, "added_tokens_decoder must be an object"),
        ("gpt2-two-files", {"tokenizer_config": {"extra_special_tokens": 1}}, "extra_special_tokens must be a list"),
        ("gpt2-two-files", {"added_tokens": {"a": 2**40}}, "has the id 1099511627776"),
        ("gpt2-two-files", {"special_tokens_map": {"eos_token": {"content": None}}}, "an added token is"),
        ("t5", {"tokenizer_config": {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9}}, "extra_ids must be"),
        (
            "t5",
            {"tokenizer_config": {"tokenizer_class": "T5Tokenizer", "eos_token": None}},
            "eos_token beside every text",
        ),
    ],
)
def test_a_malformed_file_is_a_sentence(tmp_path: Path, kind: str, files: dict[str, Any], named: str) -> None:
    assert named in refusal(copy_of(kind, tmp_path, **files))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vocab.json", "gpt2-two-files"), ("merges.txt", "gpt2-two-files"), ("vocab.txt", "bert"), ("spiece.model", "t5")],
)
def test_bytes_that_are_no_text_are_a_sentence(tmp_path: Path, name: str, kind: str) -> None:
    folder = copy_of(kind, tmp_path)
    (folder / name).write_bytes(b"\x80\x04\x95\xff\xfe" * 9)
    refusal(folder)


def test_tokenizers_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.engine.text.tokenizer_json.MAX_TOKENIZER_BYTES", 100)
    for kind in ("gpt2-json", "gpt2-two-files", "bert", "t5"):
        assert "a file of this kind has at most 100" in refusal(copy_of(kind, tmp_path / kind))
    monkeypatch.setattr(auto_tokenizer, "MAX_SETTINGS_BYTES", 10)
    assert "has at most 10" in refusal(copy_of("bert", tmp_path / "config"))


class PanicException(BaseException):
    """Named as what Rust's panics become, which are no Exception."""


def test_a_panic_of_the_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: Any) -> None:
        raise PanicException("index out of\nbounds")

    folder = copy_of("gpt2-json", tmp_path)
    monkeypatch.setattr(auto_tokenizer, "add_tokens", panic)
    assert refusal(folder).endswith("not a tokenizer that can be read (index out of bounds)")
