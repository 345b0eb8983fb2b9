"""Whatever steps a tokenizer has, a prompt takes bounded memory, and what fails in the library is one sentence."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2.engine.engine import Engine
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text import bounds
from fastgpt2.engine.text.bounds import MAX_TOKEN_CHARACTERS, Normalization, steps_of
from fastgpt2.engine.text.regex_trial import RegexTrial, is_harmless
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, TokenizerError

DEMO: dict[str, Any] = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
BYTES = DEMO["pre_tokenizer"]
NEVER = "a" * 60 + "c"


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def several(name: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


def split(regex: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return several("pretokenizers", step, BYTES)


def template(*single: Any, ids: int = 1) -> dict[str, Any]:
    end = {"id": "<|endoftext|>", "ids": [0] * ids, "tokens": ["<|endoftext|>"] * ids}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": pair,
        "special_tokens": {"<|endoftext|>": end},
    }


TEXT, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}


def load(folder: Path, **changes: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps({**DEMO, **changes}), "utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture(autouse=True)
def _untried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut texts without a trial in tests that may start no process."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr(RegexTrial, "run", lambda *_: None)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take 512 MB more than it has, so that a test fails and the machine does not."""
    with Path("/proc/self/statm").open() as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"normalizer": replace("(a|aa)+$", "x", "Regex")}, NEVER),
        ({"pre_tokenizer": split("(a|aa)+$")}, NEVER),
        ({"pre_tokenizer": split("(?:a?){30}(?:a|aa)+$")}, NEVER),
        ({"normalizer": replace("", "xyz")}, "a" * 60),
        ({"normalizer": replace("(?=.)", "xyz", "Regex")}, "é"),
    ],
)
def test_a_prompt_at_which_the_library_panics_is_refused_alone(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    tokenizer = load(tmp_path, **changes)
    for encode in (tokenizer.encode, tokenizer.encode_part, tokenizer.offsets):
        with pytest.raises(
            BadRequest, match=r"cannot encode this (prompt|text) \(.+\): leave out .*, or give token ids"
        ):
            encode(text)
    assert tokenizer.encode(" A b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})}, "index out of bounds"),
        ({"post_processor": template({"SpecialToken": {"id": "none", "type_id": 0}})}, "no entry found for key"),
        ({"post_processor": template(TEXT, *[END] * 1000, ids=100)}, "puts 100000 tokens around a text"),
        ({"post_processor": template(*[TEXT] * 1000)}, "makes 1000 copies of a text"),
        (
            {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000_000}},
            "more than 65536 bytes of the shortest text",
        ),
        ({"normalizer": replace("[ac]", "b" * 1_000_000, "Regex")}, "more than 65536 bytes of the shortest text;"),
        ({"normalizer": several("normalizers", *[{"type": "ByteLevel"}] * 20)}, "more than 65536 bytes"),
        ({"pre_tokenizer": several("pretokenizers", *[BYTES] * 16)}, "65536 times as long; the limit is 64"),
        ({"decoder": replace("a", "b" * 1000)}, "decoder may make a text 1000 times as long; the limit is 64"),
        ({"decoder": several("decoders", *[replace("a", "aaaa")] * 60)}, "decoder may make a text millions of times"),
        ({"decoder": several("decoders", DEMO["decoder"], replace("", "ab" * 99))}, "as long; the limit is 64"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_what_fails_for_every_text_is_told_when_the_tokenizer_is_loaded(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(TokenizerError) as caught:
        load(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert said in str(caught.value)
    assert "; correct its files, or give a tokenizer by --tokenizer ID|PATH" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("normalizer", "limit"),
    [
        (several("normalizers", *[replace("a", "aaaa")] * 14), 65536),
        (replace("a", "b" * 1_000_000), 65536),
        (replace("[ac]", "b" * 10_000, "Regex"), 65536),
        (several("normalizers", replace("a", "\ufdfa" * 100), *[{"type": "NFKD"}] * 9), 65536),
        (several("normalizers", replace("a", "é"), *[{"type": "ByteLevel"}] * 14), 65536),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_a_prompt_that_would_grow_without_bound_is_refused_first(
    tmp_path: Path, normalizer: dict[str, Any], limit: int
) -> None:
    tokenizer = load(tmp_path, normalizer=normalizer)
    with pytest.raises(BadRequest, match=f"would make more than {limit} bytes of this prompt: shorten it, or give"):
        tokenizer.encode("a" * 60)
    assert tokenizer.encode(" b")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Prepend", "prepend": "x" * 15_000},
        several("normalizers", replace(r"\A.", "x" * 90, "Regex"), replace("x", "y" * 15)),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_a_prompt_that_grows_behind_each_added_token_is_refused_first(
    tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    """The library normalizes each part between two such tokens alone."""
    tokenizer = load(tmp_path, normalizer=normalizer)
    with pytest.raises(BadRequest, match=r"normalizer would make more than [0-9]+ bytes of this prompt: shorten it"):
        tokenizer.encode("<|endoftext|>a" * 20_000)
    assert tokenizer.encode("<|endoftext|>a" * 2)


@pytest.mark.usefixtures("little_memory")
def test_an_added_token_that_would_grow_without_bound_is_refused_before_the_library_reads_it(tmp_path: Path) -> None:
    added = {**DEMO["added_tokens"][0], "id": 3000, "content": "a" * 60, "normalized": True}
    normalizer = several("normalizers", *[replace("a", "aaaa")] * 14)
    with pytest.raises(TokenizerError, match="would make more than 65536 bytes of added token 'aaaa"):
        load(tmp_path, normalizer=normalizer, added_tokens=[*DEMO["added_tokens"], added])
    settings = {"added_tokens_decoder": {"3000": {**added, "__type": "AddedToken"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="would make more than 65536 bytes of added token 'aaaa"):
        load(tmp_path, normalizer=normalizer)


def test_a_huge_token_stands_for_no_text(tmp_path: Path) -> None:
    vocabulary = {**DEMO["model"]["vocab"], "a" * (MAX_TOKEN_CHARACTERS + 1): 3000, "a" * MAX_TOKEN_CHARACTERS: 3001}
    tokenizer = load(tmp_path, model={**DEMO["model"], "vocab": vocabulary})
    assert tokenizer.decode([3000]) == ""
    assert tokenizer.decode([3001]) == "a" * MAX_TOKEN_CHARACTERS


@pytest.mark.parametrize("text", ["ﷺ" * 4000, "a b " * 20_000, " " * 100_000, "株式会社㍿" * 2000, "é" * 50_000])
def test_no_real_normalizer_comes_near_the_bounds(text: str) -> None:
    for kind in ("gpt-sw3", "fnet", "rembert", "pieces-unigram", "bert", "byte-fallback", "gpt2-json"):
        tokenizer = Tokenizer.from_folder(GOLDEN / "tokenizers" / kind)
        assert tokenizer._normalization.objection(text, "this prompt", tokenizer._split_growth) == ""


def test_the_growth_of_a_step_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To go through a table of sentencepiece's takes longer than to encode a prompt."""
    tokenizer = Tokenizer.from_folder(GOLDEN / "tokenizers" / "gpt-sw3")
    monkeypatch.setattr(bounds, "_growth", lambda _step: pytest.fail("found again"))
    assert tokenizer.encode("Ærøskøbing ﷺ " * 1000)


def test_the_steps_one_by_one_give_what_the_library_gives() -> None:
    for kind in ("gpt-sw3", "fnet", "bert"):
        backend = Tokenizer.from_folder(GOLDEN / "tokenizers" / kind)._backend
        text = "Ærøskøbing ﷺ  ½ naïve\u3000株式会社"
        alone = text
        for step in Normalization(steps_of(backend.normalizer, "normalizers"))._made:
            alone = step.normalize_str(alone)
        assert alone == backend.normalizer.normalize_str(text)


def test_an_engine_goes_on_after_a_panic(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text(json.dumps({**DEMO, "pre_tokenizer": split("(a|aa)+$")}), "utf-8")
    engine = Engine.load(str(tmp_path), max_batch=1)
    for options in ({}, {"prompt_logprobs": 0}, {"bad_words": [NEVER]}):
        with pytest.raises(BadRequest):
            engine.generate(NEVER, **options)
    assert engine.generate(" A b", max_new_tokens=2).usage.completion_tokens == 2


HARMLESS = [
    "[ab]+",
    " {2,}",
    r"\s{2,}|[\n\r\t]",
    "<usr>|new",
    r"\[MASK\]|\[CLS\]",
    ".",
    r"\A▁",
    " ?\\p{L}+",
    "\\p{N}{1,3}",
]
HARMFUL = ["(a+)+b", "a+b", r"\s+(?!\S)", "(a|b)", "a*b*", "a{1,99}{1,99}", r"(.)\1", "a++b", "", "a|", "a?" * 30 + "a"]
HARMFUL += [r"\g<0>", r"a\Kb", "(?=a)", "[a[b]]+", "a+?", "a$"]


def test_which_expressions_may_take_any_time() -> None:
    assert [regex for regex in HARMLESS if not is_harmless(regex)] == []
    assert [regex for regex in HARMFUL if is_harmless(regex)] == []


def test_no_tokenizer_of_transformers_needs_a_trial() -> None:
    for kind in sorted((GOLDEN / "tokenizers").iterdir()):
        if kind.is_dir():
            assert Tokenizer.from_folder(kind)._trial is None, kind


def test_an_empty_expression_needs_a_trial(tmp_path: Path) -> None:
    assert load(tmp_path, pre_tokenizer=split(""))._trial is not None
    with pytest.raises(TokenizerError, match="may take any time, ''; "):
        load(tmp_path, decoder=several("decoders", DEMO["decoder"], replace("", "x", "Regex")))


@pytest.mark.processes
def test_an_expression_that_would_never_end_is_refused_and_others_go_on(tmp_path: Path) -> None:
    """Thirty thousand letters would take the library hours, in which no other job gets a token."""
    added = {**DEMO["added_tokens"][0], "id": 3000, "content": "<x>", "special": False}
    tokenizer = load(tmp_path, pre_tokenizer=split(r"(a+)\1+b"), added_tokens=[*DEMO["added_tokens"], added])
    for text in ("a" * 30_000, "b<x>" + "a" * 30_000 + "<x>b"):
        with pytest.raises(
            BadRequest, match="expressions take more than 2 s or 1024 MB for this prompt: change it, or"
        ):
            tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("aaab <x> A b")) == "aaab <x> A b"
    assert len(tokenizer.encode("aaab")) == len(tokenizer.offsets("aaab"))


def test_a_decoder_may_not_take_any_time(tmp_path: Path) -> None:
    decoder = several("decoders", DEMO["decoder"], replace("(a+)+b", "x", "Regex"))
    with pytest.raises(
        TokenizerError, match=r"decoder has a regular expression that may take any time, '\(a\+\)\+b'; "
    ):
        load(tmp_path, decoder=decoder)
