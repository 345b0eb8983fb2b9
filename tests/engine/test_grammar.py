"""Guided texts: what masks allow, against `re`, `json` and jsonschema; and what hostile grammars may take."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from llguidance import LLMatcher
from numpy.typing import NDArray
from support.running import GOLDEN, wait_until

from fastgpt2.engine.decoding import grammar
from fastgpt2.engine.decoding.grammar import Grammar, Grammars, Matcher
from fastgpt2.engine.decoding.grammar_trial import Trial
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest

REGEXES = [
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"(yes|no|maybe)( indeed)?",
    r"[a-z0-9._]{1,20}@[a-z0-9-]{1,20}\.(com|org|net)",
    r"^\$?[1-9][0-9]{0,2}(,[0-9]{3}){0,3}(\.[0-9]{2})?$",
    r"(?i)straße [0-9]{1,3}",
    r"(?x) [a-c]{2,5}  # letters / no digits" + "\n" + r"| [0-9]{1,3} \. ",
    r"[^a-zA-Z\x00-\x1f]{1,12}",
    r"\w{1,9} \S{1,9}/[a-zA-Zäöü]{1,9}\\?",
    r"(.{2}\n){1,3}",
    r"a*?b{2,}?(c|cd|cde){3}",
    r"[äöü€😀]{1,6}",
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "€"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"anyOf": [{"const": "x"}, {"type": "string", "pattern": "^[0-9]{3}$"}, {"type": "null"}]},
    {"type": "string", "format": "date"},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [0, 1]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2-tokenizer")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((GOLDEN / "gpt2-tokenizer.json.gz").read_bytes()))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_folder(DEMO_FOLDER)


@pytest.fixture(scope="module")
def grammars(gpt2: Tokenizer) -> Grammars:
    return Grammars(gpt2, gpt2.vocab_size)


@pytest.fixture
def small(demo: Tokenizer) -> Grammars:
    return Grammars(demo, demo.vocab_size)


def found_harmless(*_: object) -> str:
    return ""


@pytest.fixture(autouse=True)
def _untried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile grammars without a trial in tests that may start no process."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr(Trial, "run", found_harmless)


def ask(**guide: Any) -> GenerationRequest:
    return GenerationRequest("x", **guide)


def compiled(grammars: Grammars, **guide: Any) -> Grammar:
    return grammars.compile(ask(**guide), [1]).result(60)


def refusal(grammars: Grammars, **guide: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        compiled(grammars, **guide)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def allowed(matcher: Matcher, vocab_size: int) -> set[int]:
    scores = np.zeros(vocab_size, np.float32)
    matcher.mask(scores)
    return set(np.flatnonzero(scores == 0).tolist())


class Walk:
    """A text that a seeded model of random scores writes through the masks of a grammar."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._scores, self._dice = np.empty(vocab_size, np.float32), np.random.default_rng(seed)

    def run(self, matcher: Matcher, tokens: int, visit: Callable[[list[int]], None] = lambda _: None) -> list[int]:
        """Return the tokens of a text that has come to its end, or has this many tokens."""
        ids = list[int]()
        visit(ids)
        while len(ids) < tokens and not matcher.is_complete:
            # A text that may end does so every third time.
            if matcher.may_end and self._dice.random() < 0.3:
                break
            ids.append(self._next(matcher))
            matcher.push(ids[-1])
            visit(ids)
        return ids

    def _next(self, matcher: Matcher) -> int:
        scores: NDArray[np.float32] = self._scores
        self._dice.standard_normal(out=scores, dtype=np.float32)
        matcher.mask(scores)
        best = int(scores.argmax())
        assert scores[best] > -np.inf
        return best


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_match_their_regular_expression(grammars: Grammars, gpt2: Tokenizer, regex: str) -> None:
    guide, pattern, ended = compiled(grammars, regex=regex), re.compile(regex), 0
    for seed in range(12):
        matcher = guide.matcher()

        def may_end_where_it_matches(ids: list[int], matcher: Matcher = matcher) -> None:
            data = b"".join(map(gpt2.token_bytes, ids))
            try:
                whole = pattern.fullmatch(data.decode()) is not None
            except UnicodeDecodeError:
                whole = False
            assert matcher.may_end == whole, data

        Walk(gpt2.vocab_size, seed).run(matcher, 40, may_end_where_it_matches)
        ended += matcher.may_end
    assert ended > 6


@pytest.mark.parametrize("schema", SCHEMAS)
def test_texts_are_json_of_their_schema(grammars: Grammars, gpt2: Tokenizer, schema: Any) -> None:
    guide, ended = compiled(grammars, json_schema=schema), 0
    for seed in range(12):
        matcher = guide.matcher()
        text = gpt2.decode(Walk(gpt2.vocab_size, seed).run(matcher, 300))
        if matcher.may_end:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
            assert not re.search(r"[\n\t\r]|  ", re.sub(r'"(\\.|[^"\\])*"', "_", text)), "of blanks there is one"
    assert ended > 6


def test_any_json_may_be_asked_for_and_none_may_not(grammars: Grammars, gpt2: Tokenizer) -> None:
    matcher = compiled(grammars, json_schema=True).matcher()
    for token_id in gpt2.encode('{"a": [1, null]}'):
        matcher.push(token_id)
    assert matcher.is_complete
    assert refusal(grammars, json_schema=False).startswith("json_schema cannot be used: Unsatisfiable schema")


def test_a_mask_allows_exactly_the_tokens_that_lead_to_a_choice(grammars: Grammars, gpt2: Tokenizer) -> None:
    choices = (" positive", " negative", " neutral", "pos/it\n", "€", " positively", "a b", "\\d", "x" * 20)
    guide, data = compiled(grammars, choices=choices), [choice.encode() for choice in choices]
    tokens = [gpt2.token_bytes(i) for i in range(gpt2.vocab_size)]
    for choice, seed in itertools.product(data, range(2)):
        matcher, dice, text = guide.matcher(), np.random.default_rng(seed), b""
        while text != choice:
            rests = {one[len(text) : end] for one in data if one.startswith(text) for end in range(len(one) + 1)}
            leads = {i for i, token in enumerate(tokens) if token and token in rests}
            assert allowed(matcher, gpt2.vocab_size) == leads
            assert matcher.may_end == (text in data)
            token_id = int(dice.choice([i for i in sorted(leads) if choice.startswith(text + tokens[i])]))
            matcher.push(token_id)
            text += tokens[token_id]
        assert matcher.may_end
        assert matcher.is_complete == (choice != b" positive")


def place(matcher: Matcher, vocab_size: int) -> tuple[bool, bool, set[int]]:
    """Return all that a matcher tells."""
    tokens = set() if matcher.is_complete else allowed(matcher, vocab_size)
    return matcher.may_end, matcher.is_complete, tokens


@pytest.mark.parametrize("guide", [{"json_schema": PERSON}, {"choices": ["one", "one two", "three"]}])
def test_pushed_tokens_are_forgotten_one_by_one(grammars: Grammars, gpt2: Tokenizer, guide: dict[str, Any]) -> None:
    size, places = gpt2.vocab_size, list[Any]()
    matcher = compiled(grammars, **guide).matcher()
    ids = Walk(size, 3).run(matcher, 200, lambda _: places.append(place(matcher, size)))
    assert len(ids) > 1
    for expected in reversed(places[:-1]):
        matcher.pop()
        assert place(matcher, size) == expected
    for token_id, expected in zip(ids, places[1:], strict=True):
        matcher.push(token_id)
        assert place(matcher, size) == expected


def test_the_models_vocabulary_may_be_smaller_or_larger_than_the_tokenizers(demo: Tokenizer) -> None:
    letters = {i for i in range(demo.vocab_size) if re.fullmatch(rb"[a-z]+", demo.token_bytes(i))}
    for vocab_size in (demo.vocab_size - 500, demo.vocab_size, demo.vocab_size + 100):
        matcher = compiled(Grammars(demo, vocab_size), regex="[a-z]+").matcher()
        assert allowed(matcher, vocab_size) == {i for i in letters if i < vocab_size}


def test_a_vocabulary_that_cannot_write_the_text_is_told(demo: Tokenizer) -> None:
    small = Grammars(demo, next(i for i in range(demo.vocab_size) if demo.token_bytes(i) == b"z"))
    assert refusal(small, choices=["zz"]) == "choices allows no text that this model's tokens can write: change it"
    matcher = compiled(small, choices=["az"]).matcher()
    matcher.push(demo.encode("a")[0])
    assert not matcher.may_end
    with pytest.raises(BadRequest, match="allows no text that this model's tokens can write"):
        matcher.mask(np.zeros(10, np.float32))
    # Where the text may end, it is at its end.
    matcher = compiled(small, choices=["a", "az"]).matcher()
    matcher.push(demo.encode("a")[0])
    assert matcher.is_complete


def test_a_token_that_is_not_allowed_is_refused_and_the_text_goes_on(small: Grammars, demo: Tokenizer) -> None:
    matcher = compiled(small, regex="ab").matcher()
    with pytest.raises(BadRequest):
        matcher.push(demo.encode("b")[0])
    matcher.push(demo.encode("a")[0])
    matcher.pop()
    matcher.push(demo.encode("a")[0])


TOKENIZERS = sorted(path.name for path in (GOLDEN / "tokenizers").iterdir() if path.is_dir())
# Its decoder takes away spaces before marks, whichever tokens they come from.
CLEANED = {"bert-cased"}
# It has the first bytes of characters, and none to go on with.
HALVES = {"metaspace-no-class", "unigram-no-class"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_the_bytes_of_their_tokens_in_every_tokenizer(name: str) -> None:
    tokenizer = Tokenizer.from_folder(GOLDEN / "tokenizers" / name)
    prompt = [next(i for i in range(tokenizer.vocab_size) if re.fullmatch(rb" ?[a-z]+", tokenizer.token_bytes(i)))]
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    assert tokenizer.has_fixed_bytes == (name not in CLEANED)
    if name in CLEANED:
        with pytest.raises(BadRequest, match="no text can be guided"):
            grammars.compile(ask(regex="x"), prompt)
        return
    pattern = r"[ -~]{1,30}" if name in HALVES else r"[^\x00-\x1f]{1,30}"
    guide = grammars.compile(ask(regex=pattern), prompt).result(60)
    for seed in range(8):
        matcher, detokenizer = guide.matcher(), tokenizer.detokenizer(prompt)
        ids = Walk(tokenizer.vocab_size, seed).run(matcher, 60)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text.encode() == b"".join(map(tokenizer.token_bytes, ids))
        assert matcher.may_end == (re.fullmatch(pattern, text) is not None)


def test_a_text_is_not_guided_from_its_beginning_where_that_is_written_otherwise() -> None:
    tokenizer = Tokenizer.from_folder(GOLDEN / "tokenizers" / "llama-json")
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    start = tokenizer.encode("")
    with pytest.raises(BadRequest, match="from its beginning: give a prompt"):
        grammars.compile(ask(choices=["a"]), start)


# Each with what is said of it.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a\\"}, "regex ends with a backslash, which escapes nothing: leave it out or write two"),
    ({"regex": "[^\\s\\S]"}, "regex allows no text that this model's tokens can write: change it"),
    ({"regex": "()"}, "regex allows no text but an empty one: allow another"),
    ({"regex": "a^b"}, "regex cannot be used: lookarounds not supported yet; Start in regex /a^b/"),
    ({"regex": "(?=a)b"}, "regex cannot be used: look-around, including look-ahead and look-behind, is not supported"),
    ({"regex": "(a)\\1"}, "regex cannot be used: backreferences are not supported"),
    ({"regex": "(?P<stop>a)b"}, 'regex has a group named "stop", a name that is taken: name the group otherwise'),
    ({"regex": "(" * 300 + "a" + ")" * 300}, "regex cannot be used: exceed the maximum number of nested paren"),
    ({"regex": "a?" * 2000 + "a" * 2000}, "regex is too complex: simplify it"),
    ({"json_schema": {"not": {}}}, "json_schema cannot be used: no text is guided by not; leave this out"),
    (
        {"json_schema": {"type": "array", "uniqueItems": True, "contains": {}}},
        "json_schema cannot be used: no text is guided by contains, uniqueItems; leave this out",
    ),
    (
        {"json_schema": {"oneOf": [{"type": "number"}, {"type": "integer"}]}},
        "json_schema cannot be used: two schemas of a oneOf may describe the same value; ask for anyOf instead",
    ),
    ({"json_schema": {"$ref": "file:///etc/passwd"}}, "json_schema cannot be used: Resource 'file:///etc/passwd' is"),
    ({"json_schema": {"type": "string", "format": "x"}}, "json_schema cannot be used: Unknown format: x"),
    ({"json_schema": {"type": "integer", "multipleOf": 999999937}}, "json_schema is too complex: simplify it"),
    (
        {
            "json_schema": {
                "allOf": [{"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(4)]} for i in range(20)]
            }
        },
        "json_schema is too complex: simplify it",
    ),
]


@pytest.mark.parametrize(("guide", "sentence"), REFUSED)
def test_what_cannot_be_used_is_a_sentence(grammars: Grammars, guide: dict[str, Any], sentence: str) -> None:
    assert refusal(grammars, **guide).startswith(sentence)


def test_a_regular_expression_cannot_leave_its_place(grammars: Grammars, gpt2: Tokenizer) -> None:
    for text in ("a/\nstart: /b", "/", "\\/\n%json {}", "a/i", "//", "#"):
        matcher = compiled(grammars, regex=re.escape(text)).matcher()
        for token_id in gpt2.encode(text):
            matcher.push(token_id)
        assert matcher.is_complete


def nested(schema: Any, levels: int) -> Any:
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


# They may be compiled, and then their texts may meet a limit, or be written to their ends.
HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a{1,1000}){1,1000}"},
    {"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
    {"regex": "(.*a){30}"},
    {"regex": "(a*)*b"},
    {"regex": ".*[aeiou].{0,40}x.{0,40}y"},
    {"regex": "((.{1,50}a){1,50}|(.{1,49}b){1,50}|(.{1,48}[^c]){1,50})*z"},
    {"regex": "\\w{1,1000000000}"},
    {"regex": "a*" * 4000},
    {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 10**9}},
    {"json_schema": {"type": "string", "minLength": 10**9}},
    {"json_schema": {"type": "string", "pattern": "(.*a){30}"}},
    {"json_schema": nested({}, 100)},
    {"json_schema": {"enum": [f"value {i}" for i in range(4000)]}},
    {"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {
        "json_schema": {
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {}},
            "$ref": "#/$defs/d0",
        }
    },
    {"choices": ["a" * 1023 + chr(0x4E00 + i) for i in range(256)]},
    {"choices": ["a" * (4 * i + 1) for i in range(256)]},
]


@pytest.mark.processes
@pytest.mark.parametrize("guide", HOSTILE, ids=lambda guide: str(guide)[:40])
def test_a_hostile_grammar_gives_a_text_or_a_sentence(
    grammars: Grammars, gpt2: Tokenizer, guide: dict[str, Any]
) -> None:
    try:
        end = str(Walk(gpt2.vocab_size, 1).run(compiled(grammars, **guide).matcher(), 100))
    except BadRequest as error:
        end = str(error)
    assert re.match(r"\[|(regex|json_schema) (is too complex|cannot be used|allows no text)", end)


@pytest.mark.processes
@pytest.mark.parametrize(
    "schema",
    [
        # Hours, and gigabytes.
        {"type": "array", "items": {"anyOf": [{"type": "integer", "multipleOf": 900 + 7 * n} for n in range(8)]}},
        {"allOf": [{"type": "string", "pattern": f"{chr(97 + i % 26)}.*{chr(97 + i // 26)}"} for i in range(600)]},
    ],
    ids=["time", "memory"],
)
def test_what_would_never_end_is_refused_and_the_next_grammar_is_served(small: Grammars, schema: Any) -> None:
    expected = "json_schema is too complex: it takes more than 2 s or 256 MB to compile; simplify it"
    assert refusal(small, json_schema=schema) == expected
    compiled(small, json_schema=PERSON)


@pytest.mark.processes
def test_the_process_of_the_trials_is_started_again_and_does_not_outlive_its_owner() -> None:
    trial = Trial()
    source = "start: /a/"
    assert trial.run("regex", source) == ""
    assert "invalid regex" in trial.run("regex", "start: /(/")
    first = trial._process
    assert first is not None
    first.kill()
    wait_until(lambda: first.poll() is not None, "the process to end")
    assert trial.run("regex", source) == ""
    second = trial._process
    assert second is not None
    assert second is not first
    del trial
    assert second.poll() is not None


@pytest.mark.processes
def test_a_trial_that_left_as_it_had_nothing_to_do_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves while the question is on its way to it."""
    trial, asked = Trial(), list[bytes]()
    ask = trial._ask

    def ask_and_leave(line: bytes) -> bytes:
        asked.append(line)
        if len(asked) > 1:
            return ask(line)
        trial._process = trial._start()
        assert trial._process.stdin is not None
        trial._process.stdin.close()
        trial._stop = weakref.finalize(trial, print)
        return b""

    monkeypatch.setattr(trial, "_ask", ask_and_leave)
    assert trial.run("regex", "start: /a/") == ""
    assert len(asked) == 2


def test_a_compiled_grammar_is_kept_and_so_is_a_refusal(small: Grammars) -> None:
    for guide in ({"regex": "abc"}, {"choices": ["a", "b"]}, {"json_schema": {"type": "null"}}, {"regex": "("}):
        first = small.compile(ask(**guide), [1])
        assert small.compile(ask(**guide), [1]) is first
        first.exception(60)
        assert small.compile(ask(**guide), [1]) is first
    assert small.compile(ask(regex="abd"), [1]) is not small.compile(ask(regex="abc"), [1])


def test_what_failed_by_accident_is_tried_again(small: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError("no process can be started")

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "run", fail)
        assert isinstance(small.compile(ask(regex="a"), [1]).exception(60), OSError)
    assert small.compile(ask(regex="a"), [1]).exception(60) is None


def test_kept_grammars_are_bounded_by_number_and_size(small: Grammars) -> None:
    for n in range(grammar.KEPT_GRAMMARS + 5):
        compiled(small, choices=[f"a{n}"])
    assert len(small._kept) == grammar.KEPT_GRAMMARS
    latest = small.compile(ask(choices=[f"a{n}"]), [1])
    for n in range(6):
        small.compile(ask(choices=[f"{n}{i}".ljust(1024, "x") for i in range(256)]), [1])
    assert sum(map(grammar._characters, small._kept)) <= grammar.KEPT_CHARACTERS
    assert small.compile(ask(choices=["a20"]), [1]) is not latest
    small._thread.shutdown(cancel_futures=True)  # type: ignore[union-attr]


def test_compiling_happens_beside_the_caller(small: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    go, threads = threading.Event(), list[str]()

    def wait(*_: object) -> str:
        threads.append(threading.current_thread().name)
        go.wait(60)
        return ""

    monkeypatch.setattr(Trial, "run", wait)
    future = small.compile(ask(regex="abc"), [1])
    assert not future.done()
    go.set()
    assert isinstance(future.result(60), Grammar)
    assert threads == ["grammars_0"]


def test_a_grammar_that_many_tokens_have_used_is_compiled_anew(
    small: Grammars, demo: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "TOKENS_A_GRAMMAR", 2)
    first = compiled(small, regex="a+")
    matcher = first.matcher()
    for _ in range(3):
        assert compiled(small, regex="a+") is first
        matcher.push(demo.encode("a")[0])
    second = compiled(small, regex="a+")
    assert second is not first
    # Those that are under way go on.
    matcher.push(demo.encode("a")[0])
    assert matcher.may_end


def write(guide: Grammar, vocab_size: int, seed: int) -> list[int] | str:
    """Return a text's tokens, or what ended it."""
    try:
        return Walk(vocab_size, seed).run(guide.matcher(), 40)
    except BadRequest as error:
        return str(error)


def lower_limit(monkeypatch: pytest.MonkeyPatch, states: int) -> None:
    """Have a grammar grow to its limit in a few texts."""
    limits = llguidance.LLParserLimits(max_lexer_states=states, verbose_errors=False)
    monkeypatch.setattr(grammar, "limits", lambda: limits)


@pytest.mark.parametrize("states", [300, 600])
def test_a_text_meets_no_limit_that_other_texts_have_brought_near(
    demo: Tokenizer, monkeypatch: pytest.MonkeyPatch, states: int
) -> None:
    lower_limit(monkeypatch, states)
    size, starts, compile_anew = demo.vocab_size, list[int](), Grammar.compile_anew

    def note(self: Grammar) -> LLMatcher | None:
        starts.append(self.tokens)
        return compile_anew(self)

    monkeypatch.setattr(Grammar, "compile_anew", note)
    regex = ".{0,200}q.{0,60}"
    shared = compiled(Grammars(demo, size), regex=regex)
    together = [write(shared, size, seed) for seed in range(12)]
    assert starts, "the limit was not met"
    assert together == [write(compiled(Grammars(demo, size), regex=regex), size, seed) for seed in range(12)]
    assert all(isinstance(text, list) for text in together)


def test_a_limit_in_mid_text_ends_that_text_alone(demo: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lower_limit(monkeypatch, 200)
    guide = compiled(Grammars(demo, demo.vocab_size), regex="(b.*|c.{0,60}[aeiou].{0,60}[^x]{3,9}y)")
    good, bad = guide.matcher(), guide.matcher()
    good.push(demo.encode("b")[0])
    bad.push(demo.encode("c")[0])
    with pytest.raises(BadRequest, match=r"regex is too complex: simplify it \(met at token \d+ of the text\)"):
        Walk(demo.vocab_size, 1).run(bad, 40)
    assert guide.is_worn
    Walk(demo.vocab_size, 1).run(good, 40)
    assert good.may_end


def test_without_the_library_a_guided_request_is_a_sentence(small: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guides: list[dict[str, Any]] = [{"choices": ["a"]}, {"regex": "a"}, {"json_schema": {}}]
    for guide in guides:
        assert refusal(small, **guide).startswith(
            f"{next(iter(guide))} needs llguidance, which is not installed where the model runs"
        )
        assert refusal(small, **guide).endswith("pip install 'fastgpt2[guided]'")


def test_no_choice_at_all_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"^choices is an empty list: give a string, or leave choices out$"):
        GenerationRequest("", choices=[])  # type: ignore[arg-type]
