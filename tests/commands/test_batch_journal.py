"""`fastgpt2 batch` and an output that is there: what belongs to a line is kept, and what is missing is run."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.running import wait_until

from fastgpt2.commands.batch.journal import Journal
from fastgpt2.commands.batch.lines import Line
from fastgpt2.commands.batch.records import LINE_RECORDS
from fastgpt2.commands.batch.report import Report
from fastgpt2.errors import BadRequest

pytest_plugins = ["support.batches"]

Batch = Callable[..., tuple[int, str, str]]

OUT = Path("out.jsonl")
PROMPTS = ["One", "Two", "Three", "Two", "Four"]


def write_lines(*prompts: str) -> None:
    Path("in.txt").write_text("".join(prompt + "\n" for prompt in prompts))


def read_results(path: Path = OUT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def batch(pool_batch: Batch) -> Batch:
    """Return a function that runs the command once, and before it once for the five prompts."""
    write_lines(*PROMPTS)
    assert pool_batch("in.txt", "-o", "out.jsonl")[0] == 0
    return pool_batch


@pytest.mark.parametrize(
    ("prompts", "kept", "removed"),
    [
        (["One", "Two", "Drei", "Two", "Four"], 4, 1),
        (["Zero", "One", "Two", "Three", "Two", "Four"], 5, 0),
        (["One", "Two", "Three", "Two", "Four", "Five"], 5, 0),
        (["Two", "Three", "Four"], 3, 2),
        (["Four", "Two", "Three", "Two", "One"], 5, 0),
        (["One", "One", "Two", "Three", "Two", "Four", "Two"], 5, 0),
    ],
    ids=["corrected", "inserted", "appended", "removed", "turned round", "repeated"],
)
def test_lines_are_known_by_their_content(batch: Batch, prompts: list[str], kept: int, removed: int) -> None:
    before = read_results()
    write_lines(*prompts)
    status, _, err = batch("in.txt", "-o", "out.jsonl")
    assert (status, f"{len(prompts)} lines in out.jsonl ({kept} of them from before)" in err) == (0, True)
    after = read_results()
    assert [result["index"] for result in after] == list(range(len(prompts)))
    texts = {prompt: result["text"] for prompt, result in zip(PROMPTS, before, strict=True)}
    times = {json.dumps(result["timings"]) for result in before}
    assert [r["text"] for r, p in zip(after, prompts, strict=True) if p in texts] == [
        texts[prompt] for prompt in prompts if prompt in texts
    ]
    assert sum(json.dumps(result["timings"]) in times for result in after) == kept
    aside = Path("out.jsonl.removed.jsonl")
    assert len(read_results(aside) if aside.exists() else []) == removed
    assert (f"moved to out.jsonl.removed.jsonl: {removed} result" in err) == bool(removed)
    content = OUT.read_bytes()
    assert batch("in.txt", "-o", "out.jsonl")[2].startswith(f"{len(prompts)} lines in out.jsonl ({len(prompts)} of")
    assert OUT.read_bytes() == content


@pytest.mark.parametrize("options", [["--model", "there/is/none"], ["--redis-url", "redis://127.0.0.1:1/0"]])
def test_a_run_that_has_nothing_to_do_needs_no_pool(batch: Batch, options: list[str]) -> None:
    before = OUT.read_bytes()
    for more in ([], ["--retry-errors"]):
        status, _, err = batch("in.txt", "-o", "out.jsonl", *options, *more)
        assert (status, err.splitlines()[0].partition(":")[0]) == (0, "5 lines in out.jsonl (5 of them from before)")
    assert OUT.read_bytes() == before


def test_an_output_of_an_earlier_release_is_continued(batch: Batch) -> None:
    """Its lines had the same digest, and no mark of the options."""
    results = read_results()
    for result in results:
        result["input"] = result["input"].partition("-")[0]
    request = {"prompt": "One", "max_new_tokens": 4, "ignore_eos": True, "id": None}
    assert results[0]["input"] == hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    OUT.write_text("".join(json.dumps(result) + "\n" for result in results[:3]))
    status, _, err = batch("in.txt", "-o", "out.jsonl")
    assert (status, "(3 of them from before)" in err) == (0, True)
    assert read_results()[:3] == results[:3]
    assert len(read_results()) == 5


class TestErrors:
    ERROR = "job x ran out of time: 1 s"

    @pytest.fixture
    def failed(self, batch: Batch) -> str:  # noqa: ARG002 - it has written the output
        """Make the third result an error. Returns its text."""
        results = read_results()
        text: str = results[2]["text"]
        name = results[2]["input"]
        results[2] = {"index": 2, "error": self.ERROR, "error_type": "JobTimedOut", "input": name}
        OUT.write_text("".join(json.dumps(result) + "\n" for result in results))
        return text

    def test_they_are_tried_again_on_request(self, batch: Batch, failed: str) -> None:
        before = OUT.read_bytes()
        status, _, err = batch("in.txt", "-o", "out.jsonl")
        assert (status, OUT.read_bytes()) == (1, before)
        assert "1 of 5 lines is an error: 1 JobTimedOut; --retry-errors tries them again" in err
        assert batch("in.txt", "-o", "out.jsonl", "--model", "there/is/none", "--retry-errors")[0] == 3, (
            "a pool is needed"
        )
        status, _, err = batch("in.txt", "-o", "out.jsonl", "--retry-errors")
        assert (status, "(4 of them from before)" in err) == (0, True)
        results = read_results()
        assert results[2]["text"] == failed
        assert [next(iter(result)) for result in results] == ["index"] * 5
        assert not any("replaces" in result for result in results)
        assert OUT.read_bytes().splitlines()[3:] == before.splitlines()[3:]

    def test_a_run_that_tries_again_may_be_killed(self, batch: Batch, failed: str) -> None:
        """The new result stands at the end then, and says which one it replaces."""
        lines = OUT.read_bytes().splitlines(keepends=True)
        again = {**json.loads(lines[4]), "index": 2, "text": failed, "input": json.loads(lines[2])["input"]}
        again["replaces"] = len(lines[0]) + len(lines[1])
        OUT.write_bytes(b"".join(lines[:4]) + json.dumps(again).encode() + b"\n" + lines[4][:20])
        status, _, err = batch("in.txt", "-o", "out.jsonl")
        assert (status, "(4 of them from before)" in err) == (0, True)
        assert [result["index"] for result in read_results()] == [0, 1, 2, 3, 4]
        assert read_results()[2]["text"] == failed

    @pytest.mark.usefixtures("failed")
    def test_those_of_lines_that_are_gone_are_dropped(self, batch: Batch) -> None:
        write_lines("One", "Two", "3", "Two", "Four")
        status, _, err = batch("in.txt", "-o", "out.jsonl")
        assert (status, "dropped: 1 error of lines that the input does not have any more" in err) == (0, True)
        assert not Path("out.jsonl.removed.jsonl").exists()
        assert len(read_results()) == 5

    def test_if_the_first_lines_all_fail_nothing_is_written(self, batch: Batch) -> None:
        OUT.unlink()
        Path("in.jsonl").write_text('{"prompt": 1}\n' * 19 + "{\n" + '"a"\n' * 20)
        status, _, err = batch("in.jsonl", "-o", "out.jsonl")
        first, last = err.splitlines()
        assert (status, first) == (1, "the first error, line 1: prompt must be a string or a list of token ids")
        assert last.startswith("fastgpt2 batch: the first 20 lines all fail, line 1 so: prompt must be a string or ")
        assert last.endswith("go on regardless with --keep-going")
        assert OUT.read_bytes() == b""
        status, _, err = batch("in.jsonl", "-o", "out.jsonl", "--keep-going")
        assert (status, "20 of 40 lines are errors: 20 BadRequest" in err) == (1, True)
        assert ["error" in result for result in read_results()] == [True] * 20 + [False] * 20

    def test_a_few_lines_that_all_fail_are_written(self, batch: Batch) -> None:
        Path("in.jsonl").write_text("{\n" * 19)
        status, _, err = batch("in.jsonl", "-o", "few.jsonl")
        assert (status, "19 of 19 lines are errors" in err, len(read_results(Path("few.jsonl")))) == (1, True, 19)


class TestTables:
    ROWS = (("a", "One"), ("b", "Two"), ("a", "Two"))

    def write(self, *rows: tuple[str, ...]) -> None:
        with Path("in.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    @pytest.mark.parametrize("out", ["out.csv", "table.jsonl", "out.jsonl.gz", "out.parquet"])
    def test_what_stands_beside_the_prompts_may_change(self, pool_batch: Batch, out: str) -> None:
        self.write(("label", "prompt"), *self.ROWS)
        assert pool_batch("in.csv", "-o", out)[0] == 0
        before = Path(out).read_bytes()
        assert "(3 of them from before)" in pool_batch("in.csv", "-o", out)[2]
        assert Path(out).read_bytes() == before, "it is not even written again"
        self.write(("label", "new", "prompt"), ("b", "1", "Two"), ("A", "2", "One"), ("c", "3", "Three"))
        status, _, err = pool_batch("in.csv", "-o", out)
        assert (status, "3 lines in" in err, "(2 of them from before)" in err) == (0, True, True)
        assert f"moved to {out}.removed.jsonl: 1 result of lines" in err
        rows = self.rows_of(Path(out))
        assert [(row["label"], row["new"], row["prompt"]) for row in rows] == [
            ("b", "1", "Two"), ("A", "2", "One"), ("c", "3", "Three")
        ]  # fmt: skip
        assert not Path(f"{out}.partial.jsonl").exists()
        written = Path(out).read_bytes()
        status, _, err = pool_batch("in.csv", "-o", out, "--max-new-tokens", "3")
        assert status == 0, "the options of the fixture come last"
        status, _, err = pool_batch("in.csv", "-o", out, "--temperature", "0.5")
        assert (status, f"{out} holds results of other options" in err) == (2, True)
        assert (Path(out).read_bytes(), Path(f"{out}.partial.jsonl").exists()) == (written, False)

    def rows_of(self, path: Path) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        with pa.input_stream(str(path)) as stream:
            text = stream.read().decode()
        if "csv" in path.name:
            return list(csv.DictReader(io.StringIO(text)))
        return [json.loads(line) for line in text.splitlines()]


def test_a_line_takes_little_memory(tmp_path: Path) -> None:
    """Of a line, its digest and the place of its record are kept; here of 10,000, and the first one is new."""
    count = 10_000
    path = tmp_path / "out.jsonl"
    with path.open("w") as file:
        for n in range(count):
            file.write(f'{{"index": {n}, "text": "{"x" * 200}", "input": "{n:016x}"}}\n')
    with path.open("r+b", buffering=0) as file:
        tracemalloc.start()
        journal = Journal(file, "out.jsonl", LINE_RECORDS, "")
        journal.load()
        error = BadRequest("none")
        assert journal.match(Line(error, f"{count:016x}")) is None
        assert all(journal.match(Line(error, f"{n:016x}")) == n for n in range(count))
        journal.write({"index": 0, "input": f"{count:016x}"}, 0, None)
        assert not journal.is_final()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 250 * count, "the file has 250 bytes a line"
    assert journal.left_over() == 0


def test_without_a_terminal_it_tells_now_and_then_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(total=10, shows_bar=False, interval=0.01)
    report.keep(None)
    report.add(2, ("BadRequest", "wrong\nindeed"), 0)
    report.add(3, ("BadRequest", "another"), 0)
    report.add(4, None, 40)
    told = ""

    def has_told() -> bool:
        nonlocal told
        told += capsys.readouterr().err
        return "4 of 10 lines, 2 errors, " in told

    wait_until(has_told, "a line")
    report.close()
    # On a machine that is busy, a line of the time before stands in front.
    assert "the first error, line 2: wrong indeed\n" in told
    assert told.count("first error") == 1
    assert " tokens/s, " in told
    lines = report.summary("out.csv", True)
    assert lines[0].startswith("4 lines in out.csv (1 of them from before): 2 results, 40 tokens in ")
    assert lines[1] == "2 of 4 lines are errors: 2 BadRequest; --retry-errors tries them again"
