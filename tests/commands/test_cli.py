"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from support.running import GOLDEN, StartWorker, jobs_held, run, wait_until

from fastgpt2 import Client, settings
from fastgpt2.cli import COMMANDS, build_parser
from fastgpt2.commands.arguments import Command
from fastgpt2.engine.decoding.lookup import MOST_DRAFTS
from fastgpt2.engine.loading import BLAS_CHOICES, DRAFTS_CHOICES, WEIGHTS_CHOICES
from fastgpt2.errors import BadRequest
from fastgpt2.setting import Setting
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

pytestmark = pytest.mark.processes

ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]


class TestGenerate:
    def test_prints_prompt_and_continuation(self) -> None:
        done = run("generate", "--model", "demo", "--max-new-tokens", "100", "--ignore-eos", ENTRY["prompt"])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == ENTRY["prompt"] + ENTRY["text"] + "\n"

    def test_timings_in_the_manner_of_the_original(self) -> None:
        done = run("generate", "--model", "demo", "--max-new-tokens", "4", "--ignore-eos", "--timings", "My name is")
        names = [re.fullmatch(r"([a-z ]+) \d+\.\d\d ms", line) for line in done.stderr.splitlines()]
        assert [m and m[1] for m in names] == [
            "mapped", "tokenizer", "loaded and encoded", "loop in", "loop in", "loop in", "loop in", "total",
        ]  # fmt: skip
        assert done.stdout.startswith("My name is")

    def test_json(self) -> None:
        done = run("generate", "--model", "demo", "--max-new-tokens", "5", "--ignore-eos", "--json", ENTRY["prompt"])
        value = json.loads(done.stdout)
        assert value["token_ids"] == ENTRY["ids"][:5]
        assert (value["finish_reason"], value["model"]) == ("length", "demo")
        assert value["drafting"] == {"steps": 4, "drafted": 0, "accepted": 0}

    def test_a_terminal_that_knows_no_unicode(self) -> None:
        done = run("generate", "--model", "demo", "--max-new-tokens", "1", "“Holmes” 🦜", PYTHONIOENCODING="ascii")
        assert done.returncode == 0
        assert done.stdout.startswith("?Holmes? ?")

    def test_stop(self) -> None:
        stop = ENTRY["text"][6:9]
        done = run("generate", "--model", "demo", "--stop", stop, "--max-new-tokens", "50", ENTRY["prompt"])
        assert done.stdout == ENTRY["prompt"] + ENTRY["text"][: ENTRY["text"].index(stop)] + "\n"

    def test_stop_tokens(self) -> None:
        ids = f"{ENTRY['ids'][5]}, 2047"
        done = run("generate", "--model", "demo", "--stop-token-ids", ids, "--json", ENTRY["prompt"])
        result = json.loads(done.stdout)
        assert (result["finish_reason"], result["stop_reason"]) == ("stop", ENTRY["ids"][5])
        assert len(result["token_ids"]) == 1 + ENTRY["ids"].index(ENTRY["ids"][5])

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--max-new-tokens", "-1", "a"], 2, "--max-new-tokens: '-1' is not between 0 and"),
            (["--max-new-tokens", "x", "a"], 2, "--max-new-tokens: 'x' is not a whole number"),
            (["--max-new-tokens", "600", "a"], 2, "over the model's 512 positions"),
            (["--model", str(Path(__file__).parent), "a"], 3, "holds no config.json"),
            (["--model", "no such model", "a"], 3, "no such folder, nor a hub id"),
            (["--stop-token-ids", "1,x", "a"], 2, "'1,x' is not a list of token ids with commas between them"),
            (["--stop-token-ids", "4000000000", "a"], 2, "--stop-token-ids holds 4000000000, which is no token id"),
            (["--min-new-tokens", "9", "--max-new-tokens", "3", "a"], 2, "min_new_tokens must be between 0 and 3"),
            (["--logprobs", "21", "a"], 2, "--logprobs: '21' is not between 0 and 20"),
            (["--num-beams", "4", "a"], 2, "unknown option --num-beams: no beams are searched here"),
            (["--model", "", "a"], 2, "--model is empty"),
            ([], 2, "PROMPT is missing: fastgpt2 generate [OPTIONS] PROMPT"),
        ],
    )
    def test_mistakes_get_a_sentence(self, arguments: list[str], code: int, message: str) -> None:
        done = run("generate", *arguments, FASTGPT2_MODEL="demo")
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""

    def test_a_prompt_that_is_no_unicode(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "fastgpt2", "generate", "--model", "demo", b"\xff\xfe"],
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert b"not valid Unicode" in done.stderr


class TestQueue:
    def test_enqueue_wait_result_and_status(
        self, redis_server: RedisServer, client: Client, start_worker: StartWorker
    ) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        idle = run("status", **where)
        assert "no workers; start some with `fastgpt2 up`" in idle.stdout
        start_worker(FASTGPT2_NAME=f"w-{client.queue_name}")
        options = ["--max-new-tokens", "9", "--ignore-eos"]
        waited = run("enqueue", "--wait", *options, ENTRY["prompt"], **where)
        assert (waited.returncode, waited.stderr) == (0, "")
        job_id = run("enqueue", *options, ENTRY["prompt"], **where).stdout.strip()
        result = run("result", job_id, "--json", **where)
        assert json.loads(result.stdout)["token_ids"] == ENTRY["ids"][:9]
        assert waited.stdout == ENTRY["prompt"] + json.loads(result.stdout)["text"] + "\n"
        assert run("result", job_id, **where).stdout == json.loads(result.stdout)["text"] + "\n"
        text = run("status", **where).stdout
        assert f"queue {client.queue_name}: 0 waiting; jobs: 2 finished" in text
        assert f"worker w-{client.queue_name}: idle, model demo (compiled-float32" in text
        assert ", 1 process), up " in text
        assert "last minute: " in text
        assert " tokens/s, 2 finished, 0 failed" in text
        status = json.loads(run("status", "--json", **where).stdout)
        assert status["jobs"]["finished"] == 2

    def test_without_a_worker_or_a_redis(self, redis_server: RedisServer, client: Client) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        done = run("enqueue", "--wait", "--timeout", "0.2", "a", **where)
        assert done.returncode == 1
        assert "no result within 0.2 s; no worker listens" in done.stderr
        for command in (["status"], ["enqueue", "a"], ["result", "x"]):
            done = run(*command, "--redis-url", "redis://:hunter2@127.0.0.1:1/0")
            assert done.returncode == 4
            assert "Redis at redis://***@127.0.0.1:1/0 cannot be used" in done.stderr
            assert "hunter2" not in done.stderr + done.stdout
            assert "Traceback" not in done.stderr
        done = run("result", "nonsense", **where)
        assert (done.returncode, "no job 'nonsense'" in done.stderr) == (1, True)

    def interrupt_stream(self, where: dict[str, str]) -> tuple[int, str]:
        """Interrupt a command that prints a text as it comes; return its status and what it says of that."""
        options = ["--stream", "--max-new-tokens", "480", "--ignore-eos"]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "enqueue", *options, "a"],
            env={**os.environ, **where},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Who runs these tests in the background of a shell ignores SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.read(12), "some text, before the job's end"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def test_stream(self, redis_server: RedisServer, client: Client, start_worker: StartWorker) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        start_worker()
        done = run("enqueue", "--stream", "--max-new-tokens", "100", "--ignore-eos", ENTRY["prompt"], **where)
        assert (done.returncode, done.stdout, done.stderr) == (0, ENTRY["prompt"] + ENTRY["text"] + "\n", "")
        both = run("enqueue", "--stream", "--json", "a", **where)
        assert (both.returncode, "leave one out" in both.stderr) == (2, True)
        with jobs_held():
            status, errors = self.interrupt_stream(where)
        assert status == 130
        job_id = re.search(r"job (\S+) is cancelled", errors)
        assert job_id is not None
        assert client.status(job_id[1]) == "canceled"
        assert "Traceback" not in errors

    def test_cancel(self, redis_server: RedisServer, client: Client) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        job = client.enqueue("a", max_new_tokens=1)
        assert run("cancel", job.id, **where).stdout == f"job {job.id} is cancelled\n"
        again = run("cancel", job.id, **where)
        assert (again.returncode, again.stdout) == (0, f"job {job.id} had ended: canceled\n")
        done = run("result", job.id, **where)
        assert (done.returncode, f"job {job.id} was cancelled" in done.stderr) == (1, True)
        done = run("cancel", "nonsense", **where)
        assert (done.returncode, "no job 'nonsense'" in done.stderr) == (1, True)

    def test_options_of_a_job(self, redis_server: RedisServer, client: Client, start_worker: StartWorker) -> None:
        where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name}
        run("enqueue", "--priority", "low", "a", **where)
        assert client.connection.llen(f"rq:queue:{client.queue_name}-low") == 1
        full = run("enqueue", "--max-queue", "1", "a", **where)
        assert (full.returncode, "is full: 1 job waits, the limit is 1" in full.stderr) == (1, True)
        start_worker()
        long = ["--max-new-tokens", "480", "--ignore-eos"]
        late = run("enqueue", "--wait", "--deadline", "1e-6", *long, ENTRY["prompt"], **where)
        assert (late.returncode, "ran out of time" in late.stderr) == (1, True)
        few = ["--max-new-tokens", "9", "--min-new-tokens", "9", "--ignore-eos"]
        done = run("enqueue", "--wait", "--json", "--logprobs", "1", "--echo", *few, ENTRY["prompt"], **where)
        value = json.loads(done.stdout)
        assert value["text"].startswith(ENTRY["prompt"])
        assert [entry["token_id"] for entry in value["logprobs"]] == ENTRY["ids"][:9]
        plain = run("enqueue", "--wait", *few, ENTRY["prompt"], **where)
        assert run("enqueue", "--wait", "--echo", *few, ENTRY["prompt"], **where).stdout == plain.stdout

    def test_the_commands_that_up_prints_work(self, system: System) -> None:
        done = run("enqueue", "--wait", "My name is", FASTGPT2_REDIS_URL=system.redis_url)
        assert done.stdout.startswith("My name is")


class TestSettings:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_option_is_in_the_help_with_its_variable(self, command: str) -> None:
        text = " ".join(run(command, "--help").stdout.split())
        for setting in COMMANDS[command].settings:
            assert setting.option in text
            assert f"[{setting.variable}" in text
            if not setting.is_flag:
                assert f"default: {setting.shown or setting.default}" in text

    def test_no_two_settings_share_a_variable_in_one_command(self) -> None:
        for command in COMMANDS.values():
            names = [setting.name for setting in command.settings]
            assert len(names) == len(set(names))

    def test_option_before_environment_before_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert settings.WORKERS.resolve() == 2
        monkeypatch.setenv("FASTGPT2_WORKERS", "5")
        assert settings.WORKERS.resolve() == 5
        assert settings.WORKERS.resolve("7") == 7
        monkeypatch.setenv("FASTGPT2_WORKERS", "")
        assert settings.WORKERS.resolve() == 2
        monkeypatch.setenv("FASTGPT2_IGNORE_EOS", "yes")
        assert settings.IGNORE_EOS.resolve() is True
        assert (
            settings.IGNORE_EOS.resolve(build_parser().parse_args(["generate", "--no-ignore-eos", "a"]).ignore_eos)
            is False
        )

    @pytest.mark.parametrize(
        ("setting", "text", "message"),
        [
            (settings.WORKERS, "two", "FASTGPT2_WORKERS: 'two' is not a whole number"),
            (settings.PORT, "70000", "FASTGPT2_PORT: '70000' is not between 0 and 65535"),
            (settings.TIMEOUT, "soon", "FASTGPT2_TIMEOUT: 'soon' is not a number of seconds"),
            (settings.TIMEOUT, "nan", "FASTGPT2_TIMEOUT: 'nan' is not a number of seconds"),
            (settings.JSON, "maybe", "FASTGPT2_JSON: 'maybe' is neither yes nor no"),
            (settings.QUEUE, "two words", "FASTGPT2_QUEUE: 'two words' must be one word"),
            (settings.BLAS, "atlas", "FASTGPT2_BLAS: 'atlas' is not one of auto, openblas, mkl"),
            (settings.WEIGHTS, "int4", "FASTGPT2_WEIGHTS: 'int4' is not one of float32, bfloat16, int8"),
            (settings.DRAFTS, "16", "FASTGPT2_DRAFTS: '16' is not off, auto, int8 or a number from 1 to 15"),
            (settings.DRAFTS, "0", "FASTGPT2_DRAFTS: '0' is not off, auto, int8 or a number from 1 to 15"),
            (settings.PRIORITY, "urgent", "FASTGPT2_PRIORITY: 'urgent' is not one of high, normal, low"),
            (settings.KV_MEMORY, "much", "FASTGPT2_KV_MEMORY: 'much' is not a size like 2GB or 512MiB"),
            (settings.KV_MEMORY, "0", "FASTGPT2_KV_MEMORY: '0' is not between 1 byte and 1 PiB"),
            (settings.PREFIX_MEMORY, "-1", "FASTGPT2_PREFIX_MEMORY: '-1' is not a size like 2GB or 512MiB"),
            (settings.PREFIX_MEMORY, "2PB", "FASTGPT2_PREFIX_MEMORY: '2PB' is not a size like 2GB or 512MiB"),
            (settings.PREFIX_MEMORY, "9999TB", "FASTGPT2_PREFIX_MEMORY: '9999TB' is not between 1 byte and 1 PiB"),
            (settings.TEMPERATURE, "hot", "FASTGPT2_TEMPERATURE: 'hot' is not a number"),
            (settings.DO_SAMPLE, "maybe", "FASTGPT2_DO_SAMPLE: 'maybe' is neither yes nor no"),
            (settings.LOG_LEVEL, "loud", "FASTGPT2_LOG_LEVEL: 'loud' is not one of debug, info, warning, error"),
        ],
    )
    def test_a_bad_variable_is_named(
        self, monkeypatch: pytest.MonkeyPatch, setting: Setting[Any], text: str, message: str
    ) -> None:
        monkeypatch.setenv(setting.variable, text)
        with pytest.raises(BadRequest, match=re.escape(message)):
            setting.resolve()

    @pytest.mark.parametrize(
        ("text", "count"),
        [("2GB", 2 * 10**9), ("512MiB", 512 << 20), ("1.5gi", 3 << 29), ("100", 100), ("3 k", 3000), ("1T", 10**12)],
    )
    def test_sizes(self, text: str, count: int) -> None:
        assert settings.KV_MEMORY.resolve(text) == count

    @pytest.mark.parametrize(("text", "count"), [("0", 0), ("off", 0), ("OFF", 0), ("1MB", 10**6)])
    def test_a_size_that_may_be_nothing(self, text: str, count: int) -> None:
        assert settings.PREFIX_MEMORY.resolve(text) == count

    def test_the_choices_of_a_blas_are_those_of_the_engine(self) -> None:
        assert [settings.BLAS.resolve(choice.upper()) for choice in BLAS_CHOICES] == list(BLAS_CHOICES)
        assert settings.BLAS.resolve() == "auto"

    def test_so_are_those_of_weights_and_drafts(self) -> None:
        assert [settings.WEIGHTS.resolve(choice.upper()) for choice in WEIGHTS_CHOICES] == list(WEIGHTS_CHOICES)
        assert [settings.DRAFTS.resolve(choice.upper()) for choice in DRAFTS_CHOICES] == list(DRAFTS_CHOICES)
        assert [settings.DRAFTS.resolve(text) for text in ("1", str(MOST_DRAFTS))] == [1, MOST_DRAFTS]
        assert (settings.WEIGHTS.resolve(), settings.DRAFTS.resolve()) == ("float32", "auto")

    @pytest.mark.parametrize("option", ["--drafts=16", "--weights=int4"])
    @pytest.mark.parametrize("command", [["generate", "a"], ["worker"], ["up"], ["pack"]], ids=lambda words: words[0])
    def test_what_is_none_of_them_is_wrong_usage(self, command: list[str], option: str) -> None:
        done = run(*command, option, FASTGPT2_MODEL="demo")
        name, _, value = option.partition("=")
        assert (done.returncode, f"{name}: '{value}' is not" in done.stderr) == (2, True)

    def test_a_blas_reaches_the_engine(self) -> None:
        """The setting comes by option, by variable, and from `up` to its workers."""
        done = run("generate", "--blas", "atlas", "a", FASTGPT2_MODEL="demo")
        assert (done.returncode, "--blas: 'atlas' is not one of" in done.stderr) == (2, True)
        code = """if True:
            import sys
            from fastgpt2 import Engine, settings
            from fastgpt2.cli import main
            from fastgpt2.system import up
            Engine.load = lambda *_, **given: sys.exit(f"blas {given['blas']}, threads {given['threads']}")
            if sys.argv[1] != "up":
                main(sys.argv[1:])
            up.Pool.start = lambda pool: None
            started = up.System(settings.of_system(blas="mkl", port="0"))
            started.redis_url = "redis://127.0.0.1:1/0"
            started._start_children()
            print([child.environment["FASTGPT2_BLAS"] for child in started.pool.children], file=sys.stderr)
        """

        def said(*arguments: str, **environment: str) -> str:
            command = [sys.executable, "-c", code, *arguments]
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
            )
            return done.stderr.strip()

        assert said("generate", "--blas", "openblas", "--threads", "2", "a") == "blas openblas, threads 2"
        assert said("worker", "--log-level", "error", FASTGPT2_BLAS="mkl") == "blas mkl, threads None"
        assert said("up") == "['mkl', 'mkl', 'mkl']"

    @pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
    def test_what_a_command_runs_is_there(self, command: Command) -> None:
        assert callable(resolve_name(command.runs))

    def test_top_level(self) -> None:
        assert run("--version").stdout == f"fastgpt2 {__import__('fastgpt2').__version__}\n"
        assert run().returncode == 2
        assert "unknown command 'nonsense'" in run("nonsense").stderr
        for name in COMMANDS:
            assert f"    {name} " in run("--help").stdout


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = f"{sys.executable} -m fastgpt2 generate --model demo --json 'My name is' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = f"{sys.executable} -m fastgpt2 generate --model demo 'My name is' > /dev/full"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "fastgpt2 generate: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [("generate --help >/dev/full", 1), ("--version >/dev/full", 1), ("--help >&-", 0), ("cache -h >&-", 0),
     ("generate --nosuch 2>/dev/full", 2), ("nosuch 2>&-", 2), ("generate --stop 2>&- >&-", 2)],
)  # fmt: skip
def test_streams_that_take_nothing(words: str, code: int) -> None:
    script = f"{sys.executable} -m fastgpt2 {words}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (code, "", False)


def test_a_closed_standard_output() -> None:
    script = f"{sys.executable} -m fastgpt2 generate --model demo 'My name is' >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_demo_runs_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    ms = r"\d+ ms"
    script = Path(__file__).parent.parent.parent / "examples" / "demo.py"
    whole = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.count("--- ") == 6
    assert (
        len(re.findall(rf"\[(stop|length); \d+ \+ \d+ tokens; queue {ms}, prefill {ms}, decode {ms}\]", whole.stdout))
        == 6
    )
    assert re.search(r"; with seed=\d+ they come again:\n(  My name is.*\n){3}\n", whole.stdout)
    assert '[{"generated_text":"The game is' in whole.stdout
    assert "all stopped" in whole.stdout

    log = tmp_path / "demo.log"
    with log.open("w") as out:
        broken_off = subprocess.Popen([sys.executable, str(script)], stdout=out, stderr=subprocess.STDOUT)
    try:
        children = Path(f"/proc/{broken_off.pid}/task/{broken_off.pid}/children")
        wait_until(lambda: len(children.read_text().split()) == 4, "the system's processes")
        pids = children.read_text().split()
        broken_off.send_signal(signal.SIGINT)
        assert broken_off.wait(40) == 130
    finally:
        broken_off.kill()
        broken_off.wait()
    assert "interrupted; everything has been stopped" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
