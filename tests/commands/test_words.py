"""What the command line says of wrong words: one sentence that names the word, the limit as it is, and a remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastgpt2 import settings
from fastgpt2.cli import COMMANDS, main, read_arguments, resolve_values
from fastgpt2.commands import suggestions
from fastgpt2.commands.arguments import options_of
from fastgpt2.errors import BadRequest
from fastgpt2.setting import Setting

SETTINGS = {(setting.name, setting): name for name, command in COMMANDS.items() for setting in command.settings}
VALUED = [(name, setting) for (_, setting), name in SETTINGS.items() if not setting.is_flag]
BAD = (
    "", " ", "x", "-1", "0", "-0.5", "nan", "inf", "-inf", "1e999", "9" * 5000, "½", "1,2", "a b", "-x", "\n", "\x1b[1m"
)  # fmt: skip
ENOUGH = {"batch": ["f"], "cancel": ["j"], "enqueue": ["a"], "generate": ["a"], "result": ["j"]}


def values_of(name: str, *words: str) -> dict[str, Any]:
    return resolve_values(COMMANDS[name], read_arguments(name, words))


def take(name: str, setting: Setting[Any], text: str) -> str:
    """Return what is said of a text as the value of an option; empty if it is taken."""
    try:
        values_of(name, f"{setting.option}={text}", *ENOUGH.get(name, []))
    except BadRequest as error:
        return str(error)
    return ""


def said(*words: str) -> str:
    """Return what is said of the words of a command line that cannot be read."""
    with pytest.raises(BadRequest) as caught:
        values_of(*words)
    return str(caught.value)


class TestValues:
    @pytest.mark.parametrize(("name", "setting"), VALUED, ids=lambda value: getattr(value, "name", value))
    def test_a_bad_value_gets_one_sentence_that_names_the_option(self, name: str, setting: Setting[Any]) -> None:
        for text in BAD:
            sentence = take(name, setting, text)
            if sentence:
                assert re.match(rf"(a )?{setting.option}\b", sentence)
                assert sentence.isprintable()
                assert len(sentence) < 400
        assert take(name, setting, "") == f"{setting.option} is empty; leave it out for the default"

    @pytest.mark.parametrize(("name", "setting"), VALUED, ids=lambda value: getattr(value, "name", value))
    def test_a_bound_is_taken_or_refused_as_the_sentence_says(self, name: str, setting: Setting[Any]) -> None:
        for sentence in {take(name, setting, text) for text in ("-1000000000", "0", "99999999999999999999999")}:
            if found := re.search(r"between (-?[\d.]+) and (-?[\d.]+)", sentence):
                low, high = found.groups()
                assert (take(name, setting, low), take(name, setting, high)) == ("", "")
                step = 1 if setting.metavar in ("N", "K", "PORT") else 0.001
                for beyond in (number(low) - step, number(high) + step):
                    assert "between" in take(name, setting, str(beyond))
            elif found := re.search(r"more than (\d+) and at most (\d+)", sentence):
                low, high = found.groups()
                assert (bool(take(name, setting, low)), take(name, setting, high)) == (True, "")
                assert (take(name, setting, f"{low}.001"), bool(take(name, setting, f"{high}.1"))) == ("", True)
            else:
                assert not re.search(r"\bfrom|\bto\b|least|most", sentence) or setting is settings.DRAFTS

    @pytest.mark.parametrize(("name", "setting"), VALUED, ids=lambda value: getattr(value, "name", value))
    def test_what_a_sentence_names_as_possible_is(self, name: str, setting: Setting[Any]) -> None:
        if found := re.search("is not one of (.+)", take(name, setting, "nonsense")):
            assert all(take(name, setting, word) == "" for word in found[1].split(", "))

    def test_a_variable_is_named_where_it_gives_the_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTGPT2_TOP_P", "3")
        monkeypatch.setenv("FASTGPT2_BAD_WORD", "x" * 300)
        assert said("generate", "a") == "FASTGPT2_TOP_P must be between 0 and 1, not 3.0"
        assert "FASTGPT2_BAD_WORD must hold words of" in said("generate", "--top-p", "1", "a")

    def test_what_may_be_given_several_times_is_kept_whole(self) -> None:
        words = ["--stop", "A", "--stop=B", "--bad-word", "x", "--bad-word", "y", "--choice", "c", "--choice", "d"]
        ids = ["--stop-token-ids", "1", "--stop-token-ids", "2,3", "--suppress-tokens", "4", "--suppress-tokens", "5"]
        values = values_of("batch", *words, *ids, "--logit-bias", "1=2", "--logit-bias", '{"3": 4}', "f")
        assert (values["stop"], values["bad_word"], values["choice"]) == (("A", "B"), ("x", "y"), ("c", "d"))
        assert (values["stop_token_ids"], values["suppress_tokens"]) == ((1, 2, 3), (4, 5))
        assert values["logit_bias"] == {1: 2.0, "3": 4}

    @pytest.mark.parametrize(
        ("words", "option", "value"),
        [
            (["--stop=-x", "a"], "stop", ("-x",)),
            (["--stop=---", "a"], "stop", ("---",)),
            (["--stop=--", "a", "--stop=-- -"], "stop", ("--", "-- -")),
            (["--stop=--json", "a"], "stop", ("--json",)),
            (["--stop", "- x", "a"], "stop", ("- x",)),
            (["--stop=", "a"], "stop", None),
            (["--logit-bias", "1=-1", "a"], "logit_bias", {1: -1.0}),
            (["--seed", "-3", "a"], "seed", -3),
            (["-n3", "a"], "n", 3),
            (["-n", "3", "a"], "n", 3),
            (["a", "--n=3"], "n", 3),
            (["--", "---"], "prompt", "---"),
            (["--", "--"], "prompt", "--"),
            (["--", "--a=b c"], "prompt", "--a=b c"),
            (["a", "--"], "prompt", "a"),
            (["-5 degrees"], "prompt", "-5 degrees"),
            (["--", "-n is a letter"], "prompt", "-n is a letter"),
            (["-5"], "prompt", "-5"),
            (["-"], "prompt", "-"),
            (["- one\n- two"], "prompt", "- one\n- two"),
            (["--json", "--", "--no-json"], "prompt", "--no-json"),
            ([""], "prompt", ""),
        ],
    )
    def test_texts_that_begin_with_a_dash(self, words: list[str], option: str, value: object) -> None:
        if value is None:
            assert said("generate", *words) == "--stop is empty; leave it out for the default"
        else:
            assert values_of("generate", *words)[option] == value


def number(text: str) -> float:
    return float(text) if "." in text else int(text)


class TestWords:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ("status --temperature hi", "unknown option --temperature; fastgpt2 enqueue, batch and generate have it"),
            ("worker --workers 2", "unknown option --workers; fastgpt2 up"),
            ("pool --name w", "unknown option --name; fastgpt2 worker has it"),
            ("generate --max_new_tokens 5 a", "unknown option --max_new_tokens; did you mean --max-new-tokens?"),
            ("generate --max-tokens=5 a", "unknown option --max-tokens; did you mean --max-new-tokens?"),
            ("generate --MAX-NEW-TOKENS 5 a", "unknown option --MAX-NEW-TOKENS; did you mean --max-new-tokens?"),
            ("generate --temperatur 1 a", "unknown option --temperatur; did you mean --temperature?"),
            ("generate -temperature 1 a", "unknown option -temperature; did you mean --temperature?"),
            ("generate -m demo a", "unknown option -m; did you mean --model?"),
            ("status --max-tokens 5", "unknown option --max-tokens; fastgpt2 enqueue, batch and generate have --max"),
            ("generate --prompt a", "unknown option --prompt; PROMPT is given without one: fastgpt2 generate [OPTIO"),
            ("batch -i f", "unknown option -i; FILE is given without one: fastgpt2 batch [OPTIONS] FILE"),
            ("generate --num-beams 4 a", "unknown option --num-beams: no beams are searched here; ask for several t"),
            ("worker --device cuda", "unknown option --device: models run on CPUs here; leave it out"),
            ("api --api-key x", "unknown option --api-key: the token is given by the variable FASTGPT2_TOKEN or by "),
            ("enqueue --host h a", "unknown option --host; fastgpt2 up and api have it"),
            ("up --frobnicate", "unknown option --frobnicate; `fastgpt2 up --help` lists the options"),
            ("generate -frob", "unknown option -frob; `fastgpt2 generate --help` lists the options. A PROMPT that b"),
            ("generate --json=1 a", "--json takes no value; write --json, or --no-json"),
            ("generate --do-sample true a", "--do-sample takes no value such as 'true'; write --do-sample, or --no-"),
            ("generate a --temperature", "--temperature needs a value: --temperature T; a value that begins with a"),
            ("generate --stop --json a", "--stop needs a value: --stop TEXT; a value that begins with a dash is wri"),
            ("generate --stop -x a", "--stop needs a value: --stop TEXT; a value that begins with a dash is written -"),
            ("generate --stop -- a", "--stop needs a value: --stop TEXT; a value that begins with a dash is written -"),
            ("generate a -n", "--n needs a value: --n N; a value that begins with a dash is written --n=-x"),
            ("batch f -output=x", "unknown option -output; did you mean --output?"),
            ("generate ---", "unknown option ---; `fastgpt2 generate --help` lists the options. A PROMPT that begins "),
            ("generate -one\ntwo", "unknown option '-one\\ntwo'; `fastgpt2 generate --help` lists the options. A PROM"),
            ("up -host h", "unknown option -host; did you mean --host?"),
            ("status -- --json", "'--json' is one word too many: fastgpt2 status [OPTIONS]"),
            ("result j -", "'-' is one word too many: fastgpt2 result [OPTIONS] JOB"),
            ("generate", "PROMPT is missing: fastgpt2 generate [OPTIONS] PROMPT"),
            ("result --json", "JOB is missing: fastgpt2 result [OPTIONS] JOB"),
            ("generate My name is", "'name' is one word too many: fastgpt2 generate [OPTIONS] PROMPT. Put quotes ar"),
            ("generate -- a --json", "'--json' is one word too many: fastgpt2 generate [OPTIONS] PROMPT. Behind --,"),
            ("generate \u2013\u2013temperature 1 a", "\u2013\u2013temperature begins with another dash than that of"),
            ("up --served-model-name a b", "'b' is one word too many: give --served-model-name once for each value"),
            ("up --alias a", "unknown option --alias; did you mean --served-model-name?"),
            ("status now", "'now' is one word too many: fastgpt2 status [OPTIONS]"),
            ("batch a b", "'b' is one word too many: fastgpt2 batch [OPTIONS] FILE, with one FILE"),
            ("cache --dry", "unknown option --dry; did you mean --dry-run?"),
            ("enqueue --max a", "unknown option --max; did you mean --max-new-tokens or --max-queue?"),
            ("generate --top 1 a", "unknown option --top; did you mean --top-k or --top-p?"),
            ("pack ", "--model is empty; leave it out for the default"),
            ("result ", "JOB is empty: fastgpt2 result [OPTIONS] JOB"),
            ("cache lst", "ACTION: invalid choice: 'lst' (choose from"),
            ("pack a --model b", "model is given twice, with and without --model; leave one out"),
        ],
    )  # fmt: skip
    def test_each_wrong_word_alone_is_named(self, words: str, sentence: str) -> None:
        assert said(*words.split(" ")).startswith(sentence)

    @pytest.mark.parametrize("words", [["--stop-sequence=a b"], ["--stop-sequence=a b", "a"]])
    def test_an_unknown_option_whose_value_has_a_space_is_no_prompt(self, words: list[str]) -> None:
        assert said("generate", *words) == "unknown option --stop-sequence; did you mean --stop?"

    def test_a_letter_that_is_missing_is_no_matter(self) -> None:
        for name, command in COMMANDS.items():
            for option in options_of(command):
                if len(option) < 7:
                    continue
                for wrong in (option[:4] + option[5:], option[:-1], f"{option}s", option[1:], option.upper()):
                    sentence = said(name, wrong) if wrong not in options_of(command) else "did you mean"
                    assert "did you mean" in sentence or "; fastgpt2 " in sentence, f"{name} {wrong}: {sentence}"

    def test_the_tables_of_other_programs_lead_somewhere(self) -> None:
        ours = {option for command in COMMANDS.values() for option in options_of(command)}
        assert set(suggestions._MEANT.values()) <= ours
        assert not {f"--{name}" for name in [*suggestions._MEANT, *suggestions._ELSEWHERE]} & ours
        assert not suggestions._MEANT.keys() & suggestions._ELSEWHERE.keys()
        assert set(suggestions._COMMANDS.values()) <= COMMANDS.keys()
        assert not suggestions._COMMANDS.keys() & COMMANDS.keys()
        named = {command.positional.name for command in COMMANDS.values() if command.positional}
        assert suggestions._ARGUMENTS.keys() <= named


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("serve", "fastgpt2: unknown command 'serve'; did you mean fastgpt2 up?"),
        ("genrate a", "fastgpt2: unknown command 'genrate'; did you mean fastgpt2 generate?"),
        ("help generate", "fastgpt2: unknown command 'help'; did you mean fastgpt2 --help?"),
        ("xyzzy", "fastgpt2: unknown command 'xyzzy'; there are up, worker, pool"),
        ("--model demo generate a", "fastgpt2: options come after the command: fastgpt2 COMMAND --model ...; fastgp"),
        ("--verbose", "fastgpt2: unknown option --verbose; the first word is a command, such as fastgpt2 generate"),
        ("generate --stop", "fastgpt2 generate: --stop needs a value: --stop TEXT"),
        ("enqueue --deadline 0 a", "fastgpt2 enqueue: --deadline: '0' is out of bounds: more than 0 and at most 100"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_status_2(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(sentence)


class TestEscapes:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            (r"\n", "\n"),
            (r"\\n", r"\n"),
            (r"a\tb\r", "a\tb\r"),
            (r"\"\'", "\"'"),
            (r"\u00e9\U0001F600", "é😀"),
            ("a", "a"),
        ],
    )
    @pytest.mark.parametrize("name", ["generate", "enqueue", "batch"])
    def test_texts_of_the_command_line_are_read(
        self, name: str, written: str, meant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ["--stop", written, "--bad-word", written, "--choice", written]
        values = values_of(name, "--escape", *options, written)
        assert (values["stop"], values["bad_word"], values["choice"]) == ((meant,), (meant,), (meant,))
        assert values.get("prompt", meant) == meant
        assert values.get("file", written) == written, "the name of a file is no text"
        assert values_of(name, *options, written)["stop"] == (written,)
        monkeypatch.setenv("FASTGPT2_STOP", written)
        monkeypatch.setenv("FASTGPT2_ESCAPE", "yes")
        assert values_of(name, "x")["stop"] == (meant,)
        assert values_of(name, "--no-escape", "x")["stop"] == (written,)

    @pytest.mark.parametrize("written", [r"\d", "a\\", r"\u12", r"\U00110000", r"\x41"])
    def test_what_is_none_is_refused(self, written: str) -> None:
        assert re.match(
            r"--stop holds \\.*, which is no escape; there are \\\\", said("batch", "--escape", "--stop", written, "f")
        )
        assert "PROMPT holds" in said("generate", "--escape", written)

    def test_who_may_mean_one_is_told(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fastgpt2.commands.arguments.Command.run", lambda *_: 0)

        def told(*words: str) -> str:
            assert main(words) == 0
            return capsys.readouterr().err

        sentence = "holds a backslash and a letter, and is taken as it stands; with --escape, \\n is a line end"
        assert told("batch", "--stop", r"\n", "f").startswith(f"fastgpt2 batch: --stop {sentence}")
        assert told("generate", "--escape", "--stop", r"\n", "a") == ""
        assert told("generate", "--stop", "\n", "--regex", r"\n", r"C:\new") == ""
        monkeypatch.setenv("FASTGPT2_STOP", r"\n\n")
        assert told("generate", "a").startswith(f"fastgpt2 generate: FASTGPT2_STOP {sentence}")
        assert told("generate", "--stop", "x", "a") == ""
        assert told("status") == ""


def test_notes_on_words_that_do_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.commands.arguments.Command.run", lambda _, values: values["n"])
    assert main(["generate", "-n", "2", "--n=3", "--json", "--no-json", "--stop", "a", "--stop", "b", "a"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "fastgpt2 generate: --n is given 2 times; the last one counts",
        "fastgpt2 generate: --json and --no-json are both given; the last one counts",
    ]
    assert main(["generate", "-n", "2", "--n=2", "a"]) == 2
    assert capsys.readouterr().err == ""


def test_variables_that_are_no_settings_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt2.commands.arguments.Command.run", lambda *_: 0)
    for variable, value in {
        "FASTGPT2_MAXBATCH": "3",
        "FASTGPT2_MAX_TOKENS": "secret",
        "FASTGPT2_REDISURL": "redis://:secret@x",
        # These are nobody's mistake.
        "FASTGPT2_API_SERVICE_HOST": "10.0.0.1",
        "FASTGPT2_API_SERVICE_PORT_HTTP": "80",
        "FASTGPT2_API_PORT": "tcp://10.0.0.1:80",
        "FASTGPT2_API_PORT_80_TCP_ADDR": "10.0.0.1",
        "FASTGPT2_CACHE": "/tmp",
        "FASTGPT2_IMAGE": "a",
        "FASTGPT2_HOME": "/srv",
        "FASTGPT2_MODEL": "demo",
    }.items():
        monkeypatch.setenv(variable, value)
    assert main(["status"]) == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "fastgpt2 status: FASTGPT2_MAXBATCH is no setting of fastgpt2; did you mean FASTGPT2_MAX_BATCH?",
        "fastgpt2 status: FASTGPT2_MAX_TOKENS is no setting of fastgpt2; did you mean FASTGPT2_MAX_NEW_TOKENS?",
        "fastgpt2 status: FASTGPT2_REDISURL is no setting of fastgpt2; did you mean FASTGPT2_REDIS_URL?",
    ]
    monkeypatch.setenv("FASTGPT2_SUPERVISOR_PID", "1")
    assert main(["status"]) == 0
    assert capsys.readouterr().err == "", "a pool has said it for its processes"


def test_a_value_may_be_the_letter_of_an_option() -> None:
    assert values_of("batch", "n", "-o", "o")["output"] == "o"
