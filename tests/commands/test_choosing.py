"""How a text is chosen, said on the command line: options, lines of a batch, what is printed."""

from __future__ import annotations

import io
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from support.running import run

from fastgpt2 import Client, Engine, settings
from fastgpt2.cli import COMMANDS, read_arguments, resolve_values
from fastgpt2.commands.batch.lines import LineReader
from fastgpt2.commands.prompts import build_request, note_idle_options, note_unprinted
from fastgpt2.engine.decoding.chat_options import CHAT_FIELDS
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import BadRequest
from fastgpt2.setting import Setting
from fastgpt2.setting_values import MAX_SCHEMA_FILE
from fastgpt2.system.redis_server import RedisServer

PROMPT = "My name is"
DRAWN = ["--temperature", "0.9", "--top-p", "0.95", "--repetition-penalty", "1.2", "--max-new-tokens", "12"]
FIELDS: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 12}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SEED_TOLD = re.compile(r"seed (\d+): the same command with --seed \1 gives (this text|these texts) again\n")


def request_of(*options: str) -> GenerationRequest:
    """Return the request that `fastgpt2 generate` makes of these options."""
    arguments = read_arguments("generate", [*options, PROMPT])
    return build_request(resolve_values(COMMANDS["generate"], arguments))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("demo", prefix_memory=0, drafts="off")


def drawn(engine: Engine, **more: Any) -> list[GenerationResult]:
    """Return the texts that the engine gives to the request of `DRAWN`."""
    result = engine.generate(PROMPT, **{**FIELDS, **more})
    return [result, *result.alternatives]


class TestOptions:
    def test_every_field_of_a_request_has_an_option_with_its_default(self) -> None:
        given = {setting.field or setting.name: setting.default for setting in settings.OF_REQUEST}
        # What only programs ask for, and what --chat and --system make of the prompt.
        others = {"prompt", "prompt_logprobs", "choice_index", *CHAT_FIELDS}
        known = {field.name: field.default for field in fields(GenerationRequest) if field.default is not MISSING}
        assert given == {name: default for name, default in known.items() if name not in others}

    def test_options_become_the_request(self) -> None:
        assert request_of() == GenerationRequest(PROMPT)
        assert request_of(*DRAWN, "--seed", "-3", "-n", "2", "--best-of", "4", "--top-k", "-1") == GenerationRequest(
            PROMPT, **FIELDS, seed=-3, n=2, best_of=4, top_k=-1
        )
        assert request_of(
            "--do-sample", "--min-p", "0.1", "--typical-p", "0.9", "--n", "3", "--no-repeat-ngram-size", "3",
            "--presence-penalty", "-1.5", "--frequency-penalty", "1e-3", "--suppress-tokens", "1, 2",
            "--logit-bias", "198=-100, 464=2.5", "--bad-word", "a, b", "--bad-word", "c", "--stop", "x", "--stop", "y",
        ) == GenerationRequest(
            PROMPT, do_sample=True, min_p=0.1, typical_p=0.9, n=3, no_repeat_ngram_size=3, presence_penalty=-1.5,
            frequency_penalty=0.001, suppress_tokens=(1, 2), logit_bias={198: -100, 464: 2.5}, bad_words=("a, b", "c"),
            stop=("x", "y"),
        )  # fmt: skip
        assert request_of("--choice", "yes", "--choice", "no").choices == ("yes", "no")
        assert request_of("--regex", "[0-9]+").regex == "[0-9]+"
        assert request_of("--temperature", "1", "--no-do-sample").samples is False
        assert request_of("--logit-bias", '{"198": -1}').logit_bias == {198: -1.0}

    def test_a_schema_is_json_or_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "schema.json"
        file.write_text('{\n  "type": "integer"\n}\n', "utf-8")
        given = ('{"type": "integer"}', str(file))
        assert {request_of("--json-schema", one).json_schema for one in given} == {'{"type": "integer"}'}
        file.write_bytes(b"\xff")
        (tmp_path / "long.json").write_text(" " * (MAX_SCHEMA_FILE + 1))
        for text, message in (
            (str(tmp_path / "none"), "is neither a JSON object nor a file that can be read (No such file"),
            (str(tmp_path), "is neither a JSON object nor a file that can be read (Is a directory)"),
            (str(file), "is a file that is not UTF-8"),
            (str(tmp_path / "long.json"), f"is a file of more than {MAX_SCHEMA_FILE} characters"),
        ):  # fmt: skip
            with pytest.raises(BadRequest, match=re.escape(f"--json-schema: {text!r} {message}")):
                request_of("--json-schema", text)

    def test_a_variable_gives_one_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTGPT2_STOP", "[a], b")
        monkeypatch.setenv("FASTGPT2_DO_SAMPLE", "no")
        monkeypatch.setenv("FASTGPT2_N", "2")
        request = request_of()
        assert (request.stop, request.do_sample, request.n) == (("[a], b",), False, 2)
        assert request_of("--stop", "c").stop == ("c",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--temperature", "hot"], "--temperature: 'hot' is not a number"),
            (["--temperature", "101"], "--temperature must be between 0 and 100, not 101.0"),
            (["--temperature", "nan"], "--temperature must be between 0 and 100, not nan"),
            (["--top-p", "1.5"], "--top-p must be between 0 and 1, not 1.5"),
            (["--top-k", "2.5"], "--top-k: '2.5' is not a whole number"),
            (["--n", "0"], "--n must be between 1 and 128, not 0"),
            (["-n", "3", "--best-of", "2"], "best_of is 2 and n is 3"),
            (["--seed", str(1 << 64)], "--seed must be between"),
            (["--repetition-penalty", "0"], "--repetition-penalty must be between 0.01 and 100, not 0.0"),
            (["--presence-penalty", "3"], "--presence-penalty must be between -2 and 2, not 3.0"),
            (["--logit-bias", "198"], "--logit-bias: '198' is neither a list such as 198=-100,464=2.5 nor a JSON"),
            (["--logit-bias", "198=much"], "--logit-bias: '198=much' is neither a list such as"),
            (["--logit-bias", "{198}"], "--logit-bias: '{198}' is not a JSON object"),
            (["--logit-bias", "198=101"], "--logit-bias of token 198 must be between -100 and 100"),
            (["--bad-word", ""], "--bad-word is empty; leave it out for the default"),
            (["--suppress-tokens", "a"], "--suppress-tokens: 'a' is not a list of token ids with commas between them"),
            (["--choice", "a", "--regex", "b"], "choices and regex are both given; a text is guided by one"),
            (["--json-schema", "{"], "--json-schema is no JSON schema (Expecting"),
        ],
    )  # fmt: skip
    def test_mistakes_get_a_sentence(self, options: list[str], message: str) -> None:
        with pytest.raises(BadRequest, match=re.escape(message)):
            request_of(*options)

    @pytest.mark.parametrize(
        ("request_", "told"),
        [
            (GenerationRequest(PROMPT), ""),
            (GenerationRequest(PROMPT, repetition_penalty=1.1), ""),
            (GenerationRequest(PROMPT, top_p=0.9, n=2), "--top-p, --n: nothing is drawn at random without "),
            (GenerationRequest(PROMPT, seed=0), "--seed: nothing is drawn at random without "),
            (GenerationRequest(PROMPT, seed=0, temperature=0), ""),
            (GenerationRequest(PROMPT, seed=0, do_sample=True), ""),
            (GenerationRequest(PROMPT, seed=0, do_sample=False), ""),
        ],
    )  # fmt: skip
    def test_what_does_nothing_is_named(
        self, capsys: pytest.CaptureFixture[str], request_: GenerationRequest, told: str
    ) -> None:
        note_idle_options(request_)
        out, err = capsys.readouterr()
        assert (out, err[: len(told)], bool(err)) == ("", told, bool(told))

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"json": False, "logprobs": None}, ""),
            ({"json": True, "logprobs": 2}, ""),
            ({"json": False, "logprobs": 0}, "--logprobs: log probabilities are printed with --json alone\n"),
            ({"json": False, "logprobs": 2, "wait": False, "stream": False}, ""),
            ({"json": True, "logprobs": 2, "wait": False, "stream": False}, "--json: without --wait, the job's id "),
            ({"json": True, "logprobs": None, "wait": True, "stream": False}, ""),
        ],
    )  # fmt: skip
    def test_what_is_not_printed_is_named(
        self, capsys: pytest.CaptureFixture[str], values: dict[str, Any], told: str
    ) -> None:
        note_unprinted(values)
        out, err = capsys.readouterr()
        assert (out, err[: len(told)], bool(err)) == ("", told, bool(told))


@pytest.mark.processes
class TestGenerate:
    def test_a_text_can_be_had_again_by_its_seed(self, engine: Engine) -> None:
        done = run("generate", "--model", "demo", *DRAWN, PROMPT)
        told = SEED_TOLD.fullmatch(done.stderr)
        assert done.returncode == 0
        assert told is not None, done.stderr
        again = run("generate", "--model", "demo", *DRAWN, "--seed", told[1], PROMPT)
        assert (again.stdout, again.stderr) == (done.stdout, "")
        (result,) = drawn(engine, seed=int(told[1]))
        assert done.stdout == f"{PROMPT}{result.text}\n"

    def test_several_texts_have_headings(self, engine: Engine) -> None:
        done = run("generate", "--model", "demo", *DRAWN, "--seed", "7", "-n", "3", PROMPT)
        results = drawn(engine, seed=7, n=3)
        assert done.stdout == "".join(
            f"--- text {number} of 3 ---\n{PROMPT}{result.text}\n" for number, result in enumerate(results, 1)
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len({result.text for result in results}) == 3

    def test_more_texts_than_are_decoded_together(self, engine: Engine) -> None:
        done = run("generate", "--model", "demo", *DRAWN, "--seed", "7", "-n", "20", "--json", PROMPT)
        value = json.loads(done.stdout)
        texts = [one["text"] for one in (value, *value["alternatives"])]
        assert texts == [result.text for result in drawn(engine, seed=7, n=20)]
        assert done.stderr == ""

    def test_the_best_of_several(self, engine: Engine) -> None:
        done = run("generate", "--model", "demo", *DRAWN, "--seed", "7", "--best-of", "5", "--json", PROMPT)
        value = json.loads(done.stdout)
        (best,) = drawn(engine, seed=7, best_of=5)
        assert (value["text"], value["seed"]) == (best.text, 7)
        assert value["cumulative_logprob"] == pytest.approx(best.cumulative_logprob)

    def test_greedy_texts_have_no_seed(self) -> None:
        done = run("generate", "--model", "demo", "--temperature", "0", "--json", PROMPT)
        plain = run("generate", "--model", "demo", "--json", PROMPT)
        values = [json.loads(one.stdout) for one in (done, plain)]
        assert values[0]["token_ids"] == values[1]["token_ids"]
        assert "seed" not in values[0]
        assert done.stderr == plain.stderr == ""


@pytest.mark.processes
class TestForms:
    def test_one_of_some_choices(self) -> None:
        done = run("generate", "--model", "demo", "--choice", " Holmes", "--choice", " Watson", "--json", "Sherlock")
        value = json.loads(done.stdout)
        assert (value["text"], value["finish_reason"], done.stderr) == (" Holmes", "stop", "")
        assert value["cumulative_logprob"] < 0

    def test_a_regular_expression(self) -> None:
        done = run("generate", "--model", "demo", "--regex", " [0-9]{4}", "The year was")
        assert re.fullmatch(r"The year was [0-9]{4}\n", done.stdout), done.stderr

    def test_a_schema_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "person.json"
        file.write_text(json.dumps(PERSON), "utf-8")
        options = ["--json-schema", str(file), "--max-new-tokens", "100", "--temperature", "1", "--seed", "3"]
        done = run("generate", "--model", "demo", *options, "A person: ")
        person = json.loads(done.stdout.removeprefix("A person: "))
        assert (set(person), type(person["age"])) == ({"name", "age"}, int)

    def test_a_form_that_is_none(self) -> None:
        done = run("generate", "--model", "demo", "--regex", "(", "a")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("fastgpt2 generate: ")
        assert "Traceback" not in done.stderr

    @pytest.mark.usefixtures("served")
    def test_the_queue_gives_the_same(self, redis_server: RedisServer, client: Client) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        choices = ["--choice", " Holmes", "--choice", " Watson"]
        done = run("enqueue", "--wait", *choices, "Sherlock", **where)
        assert (done.stdout, done.stderr) == ("Sherlock Holmes\n", "")
        assert run("enqueue", "--stream", *choices, "Sherlock", **where).stdout == done.stdout


@pytest.mark.processes
class TestQueue:
    @pytest.mark.usefixtures("served")
    def test_texts_of_the_queue_are_those_of_the_engine(
        self, engine: Engine, redis_server: RedisServer, client: Client
    ) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        done = run("enqueue", "--wait", *DRAWN, "--seed", "7", "-n", "2", PROMPT, **where)
        first, second = (result.text for result in drawn(engine, seed=7, n=2))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"--- text 1 of 2 ---\n{PROMPT}{first}\n--- text 2 of 2 ---\n{PROMPT}{second}\n"
        several = run("enqueue", "--stream", *DRAWN, "-n", "2", PROMPT, **where)
        assert (several.returncode, several.stdout) == (2, "")
        assert "--stream prints one text as it comes, not 2; print them at the end by --wait" in several.stderr

    @pytest.mark.parametrize("how", ["--stream", "--wait"])
    @pytest.mark.usefixtures("served")
    def test_a_seed_is_told(self, engine: Engine, redis_server: RedisServer, client: Client, how: str) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        done = run("enqueue", how, *DRAWN, PROMPT, **where)
        told = SEED_TOLD.fullmatch(done.stderr)
        assert told is not None, done.stderr
        (result,) = drawn(engine, seed=int(told[1]))
        assert done.stdout == f"{PROMPT}{result.text}\n"
        again = run("enqueue", how, *DRAWN, "--seed", told[1], PROMPT, **where)
        assert (again.stdout, again.stderr) == (done.stdout, "")

    @pytest.mark.usefixtures("served")
    def test_a_job_tells_its_seed_later(self, engine: Engine, redis_server: RedisServer, client: Client) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        job = run("enqueue", *DRAWN, PROMPT, **where).stdout.strip()
        done = run("result", job, **where)
        told = re.fullmatch(r"seed (\d+): the same request with this seed gives this text again\n", done.stderr)
        assert told is not None, done.stderr
        (result,) = drawn(engine, seed=int(told[1]))
        assert done.stdout == f"{result.text}\n"
        whole = run("result", job, "--json", **where)
        assert (json.loads(whole.stdout)["seed"], whole.stderr) == (int(told[1]), "")


class TestLines:
    def test_every_field_of_a_request_may_stand_in_a_line(self) -> None:
        given: dict[str, Any] = {
            **FIELDS, "do_sample": True, "top_k": 40, "min_p": 0.1, "typical_p": 0.9, "seed": 7, "n": 2, "best_of": 3,
            "choice_index": 1, "no_repeat_ngram_size": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5,
            "logit_bias": {"198": -100}, "bad_words": ["x", [3, 4]], "suppress_tokens": [5], "choices": ["a", "b"],
        }  # fmt: skip
        line = json.dumps({"prompt": PROMPT, **given, "id": 1})
        (read,) = LineReader(True, {}).read(lines_of(line))
        assert not isinstance(read.item, BadRequest)
        assert read.item.request == GenerationRequest(PROMPT, **given)

    def test_options_are_for_all_lines_and_a_line_says_otherwise(self) -> None:
        reader = LineReader(True, {"temperature": 0.5, "seed": 3})
        lines = list(reader.read(lines_of('"a"', '{"prompt": "a", "temperature": 0}', '{"prompt": "a", "seed": 4}')))
        asked = [line.item.request for line in lines if not isinstance(line.item, BadRequest)]
        assert [(request.temperature, request.seed) for request in asked] == [(0.5, 3), (0, 3), (0.5, 4)]

    def test_what_changes_a_text_changes_the_digest_and_nothing_else_does(self) -> None:
        given: tuple[dict[str, Any], ...] = (
            {}, {"temperature": 1}, {"temperature": 1, "seed": 1}, {"top_k": 5}, {"n": 2}, {"logit_bias": {"5": 1}},
            {"bad_words": ["a"]}, {"choices": ["a"]}, {"regex": "a"}, {"json_schema": {"type": "integer"}},
        )  # fmt: skip
        digests = [digest_of(**more) for more in given]
        assert len(set(digests)) == len(digests)
        assert digest_of(top_p=None, n=1, timeout=5) == digests[0]
        assert digest_of(json_schema='{"type":  "integer"}') == digests[-1]
        # The digest of a line of 0.1.0: its output is continued.
        assert digests[0] == "7eb5c17137b28129"


def lines_of(*lines: str) -> Any:
    return io.BytesIO("\n".join(lines).encode())


def digest_of(**more: Any) -> str:
    (line,) = LineReader(True, {}).read(lines_of(json.dumps({"prompt": PROMPT, **more})))
    assert not isinstance(line.item, BadRequest), line.item
    return line.digest


def test_settings_of_lists_can_be_joined() -> None:
    ids: Setting[tuple[int, ...]] = settings.STOP_TOKEN_IDS
    assert ids.resolve(["1,2", "3"]) == (1, 2, 3)
