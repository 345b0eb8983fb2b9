"""`fastgpt2 batch` reads and writes the formats that prompts come in; and says so in a sentence where it cannot."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.running import GOLDEN

from fastgpt2.cli import main
from fastgpt2.commands.batch.openai_lines import CHATS_URL
from fastgpt2.commands.batch.records import TABLE_COLUMNS
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer

pytest_plugins = ["support.batches"]
Batch = Callable[..., tuple[int, str, str]]

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
LINES = [entry for entry in ENTRIES if "\n" not in entry["prompt"] and entry["prompt"]]
PROMPTS = [entry["prompt"] for entry in LINES[:4]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The golden texts of four tokens."""
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    return [tokenizer.decode(entry["ids"][:4]) for entry in LINES[:4]]


def write_csv(path: Path, rows: list[list[Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class TestTables:
    ROWS: ClassVar = [[n, 'a, "b"\nc', prompt, f"label {n}"] for n, prompt in enumerate(PROMPTS)]

    @pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
    def test_columns_stand_beside_the_results(
        self, tmp_path: Path, pool_batch: Batch, texts: list[str], ending: str, delimiter: str
    ) -> None:
        write_csv(tmp_path / f"in.{ending}", [["id", "note", "prompt", "text"], *self.ROWS], delimiter)
        status, out, err = pool_batch(f"in.{ending}", "-o", f"out.{ending}")
        assert (status, out) == (0, "")
        assert err.startswith(f"4 lines in out.{ending}: 4 results, 16 tokens in ")
        rows = read_csv(tmp_path / f"out.{ending}", delimiter)
        assert list(rows[0]) == ["id", "note", "prompt", "input_text", *TABLE_COLUMNS]
        assert [list(row.values())[:4] for row in rows] == [[str(cell) for cell in row] for row in self.ROWS]
        assert [row["text"] for row in rows] == texts
        assert {(row["completion_tokens"], row["finish_reason"], row["error"]) for row in rows} == {("4", "length", "")}
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"in.{ending}", f"out.{ending}"], (
            "nothing else is left"
        )

    def test_json_lines_of_a_table(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        write_csv(tmp_path / "in.csv", [["id", "text"], *([n, prompt] for n, prompt in enumerate(PROMPTS))])
        assert pool_batch("in.csv", "-o", "out.jsonl")[0] == 0
        results = read_jsonl(tmp_path / "out.jsonl")
        assert [(r["index"], r["id"], r["input_text"]) for r in results] == [
            (n, str(n), prompt) for n, prompt in enumerate(PROMPTS)
        ]
        assert [r["text"] for r in results] == texts

    def test_objects_of_which_a_field_is_the_prompt(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        rows: list[dict[str, Any]] = [
            {"q": prompt, "n": n, "x": 1.5, "more": {"a": [n]}, "max_new_tokens": None}
            for n, prompt in enumerate(PROMPTS)
        ]
        rows[1]["x"] = 2
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"other": 1}]))
        status, _, err = pool_batch("in.jsonl", "--prompt-column", "q", "-o", "out.parquet")
        assert status == 1
        assert "the first error, line 5: there is no field 'q'; the fields are 'other'" in err
        table = pq.read_table(tmp_path / "out.parquet")
        types = {field.name: str(field.type) for field in table.schema}
        assert types == {
            "q": "string", "n": "int64", "x": "double", "more": "string", "max_new_tokens": "string", "other": "int64",
            **dict.fromkeys(TABLE_COLUMNS, "string"),
            **dict.fromkeys(("prompt_tokens", "completion_tokens", "seed"), "int64"),
        }  # fmt: skip
        written = table.to_pylist()
        assert [row["text"] for row in written] == [*texts, None]
        assert [row["x"] for row in written] == [1.5, 2.0, 1.5, 1.5, None]
        assert json.loads(written[2]["more"]) == {"a": [2]}
        assert written[4]["error_type"] == "BadRequest"

    def test_parquet_keeps_its_types(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        given = pa.table(
            {
                "day": pa.array([date(2020, 1, n) for n in range(1, 6)]),
                "prompt": pa.array([*PROMPTS, None]).dictionary_encode(),
                "price": pa.array([Decimal("1.10")] * 5),
                "tags": pa.array([["a", None], [], None, ["b"], []], pa.list_(pa.string())),
                "raw": pa.array([b"\xff", b"", None, b"a", b"b"]),
                "error": pa.array([1, 2, 3, 4, 5], pa.int8()),
            }
        )
        pq.write_table(given, tmp_path / "in.parquet", row_group_size=2)
        status, _, err = pool_batch("in.parquet", "-o", "out.parquet")
        assert (status, "line 5: the prompt is null" in err) == (1, True)
        table = pq.read_table(tmp_path / "out.parquet")
        expected = given.rename_columns(["day", "prompt", "price", "tags", "raw", "input_error"])
        assert table.select(expected.column_names).equals(expected)
        assert table["text"].to_pylist() == [*texts, None]
        status, _, err = pool_batch("in.parquet", "-o", "out.jsonl")
        first = read_jsonl(tmp_path / "out.jsonl")[0]
        assert {name: first[name] for name in ("day", "price", "tags", "raw", "input_error")} == {
            "day": "2020-01-01", "price": "1.10", "tags": ["a", None], "raw": "/w==", "input_error": 1
        }  # fmt: skip

    def test_malformed_rows_are_errors_in_place(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        (tmp_path / "in.csv").write_bytes(
            b"\xef\xbb\xbfprompt,note\r\n"
            + f'"{PROMPTS[0]}",a\r\n\r\n'.encode()
            + b"one, two, three\r\nshort\r\n"
            + b'"quo"ted",x\r\n'
            + b"\xe9t\xe9,latin\r\n"
            + f'"{PROMPTS[1]}","caf\xc3\xa9"'.encode("latin-1")
        )
        status, _, err = pool_batch("in.csv", "-o", "out.csv")
        assert status == 1
        assert err.startswith("the first error, line 4: the row has 3 values, the header 2; a value that holds ',' ")
        rows = read_csv(tmp_path / "out.csv")
        assert [row["text"] for row in rows] == [texts[0], "", "", "", "", texts[1]]
        assert ["the row has 1 value" in rows[2]["error"], "malformed" in rows[3]["error"]] == [True, True]
        assert "the column 'prompt' is not UTF-8" in rows[4]["error"]
        assert rows[5]["note"] == "café"

    def test_a_table_on_standard_output(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        (tmp_path / "in.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n")
        status, out, _ = pool_batch("in.txt", "--output-format", "csv")
        assert status == 0
        rows = list(csv.DictReader(out.splitlines()))
        assert [(row["prompt"], row["text"]) for row in rows] == list(zip(PROMPTS[:2], texts, strict=False))

    def test_several_texts_and_log_probabilities_stand_in_details(self, tmp_path: Path, pool_batch: Batch) -> None:
        line = {"prompt": PROMPTS[0], "n": 2, "temperature": 0.9, "logprobs": 0, "id": 7}
        (tmp_path / "in.jsonl").write_text(json.dumps(line))
        assert pool_batch("in.jsonl", "-o", "out.csv")[0] == 0
        (row,) = read_csv(tmp_path / "out.csv")
        details = json.loads(row["details"])
        assert (row["id"], row["prompt"], len(details["logprobs"]), len(details["alternatives"])) == (
            "7", PROMPTS[0], 4, 1
        )  # fmt: skip
        assert int(row["seed"]) >= 0


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed(tmp_path: Path, pool_batch: Batch, texts: list[str], compression: str) -> None:
    def unpack(path: Path) -> str:
        with pa.input_stream(str(path), compression={"gz": "gzip", "zst": "zstd"}[compression]) as stream:
            text: str = stream.read().decode()
            return text

    for ending, content in (("txt", f"{PROMPTS[0]}\n"), ("csv", f'n,prompt\n1,"{PROMPTS[0]}"\n')):
        with pa.output_stream(tmp_path / f"in.{ending}.{compression}") as stream:
            stream.write(content.encode())
    assert pool_batch(f"in.txt.{compression}", "-o", f"out.jsonl.{compression}")[0] == 0
    assert json.loads(unpack(tmp_path / f"out.jsonl.{compression}"))["text"] == texts[0]
    assert pool_batch(f"in.csv.{compression}", "-o", f"out.csv.{compression}")[0] == 0
    (row,) = csv.DictReader(unpack(tmp_path / f"out.csv.{compression}").splitlines())
    assert (row["n"], row["text"]) == ("1", texts[0])
    status, _, err = pool_batch(f"in.csv.{compression}", "-o", f"out.csv.{compression}")
    assert (status, "1 line in out.csv" in err, "1 of them from before" in err) == (0, True, True)


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_pipe_gets_a_table_at_the_end_and_stays_a_pipe(
    tmp_path: Path, pool_batch: Batch, texts: list[str], compression: str
) -> None:
    write_csv(tmp_path / "in.csv", [["prompt"], *([prompt] for prompt in PROMPTS)])
    pipe = tmp_path / f"out.csv{compression}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status, out, err = pool_batch("in.csv", "-o", pipe.name)
        written = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert (status, out) == (0, "")
    assert err.startswith(f"4 lines in {pipe.name}: 4 results, 16 tokens in ")
    table = (gzip.decompress(written) if compression else written).decode()
    assert [row["text"] for row in csv.DictReader(io.StringIO(table, newline=""))] == texts
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", pipe.name]


def test_a_device_that_is_full(tmp_path: Path, pool_batch: Batch) -> None:
    write_csv(tmp_path / "in.csv", [["prompt"], PROMPTS[:1]])
    status, _, err = pool_batch("in.csv", "-o", "/dev/full", "--output-format", "csv")
    assert (status, err.splitlines()[-1]) == (
        1, "fastgpt2 batch: /dev/full: cannot be written (No space left on device)"
    )  # fmt: skip
    assert not list(Path("/dev").glob("full.*"))


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


class TestOpenAI:
    def test_lines_in_and_out(self, tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
        from openai.types import Completion  # here, as it takes long to import
        from openai.types.chat import ChatCompletion

        lines = [
            request("one", model="demo", prompt=PROMPTS[0], max_tokens=4),
            request("many", model="demo", prompt=PROMPTS[:2], n=2, temperature=0.5, max_tokens=3),
            request("ids", prompt=LINES[1]["prompt_ids"], logprobs=1, echo=True),  # the options' four tokens
            request("chat", CHATS_URL, model="demo", messages=[{"role": "user", "content": "a"}], logprobs=True),
            request("vector", "/v1/embeddings", model="demo", input="a"),
            request("other", model="gpt-4", prompt="a"),
            request("wrong", model="demo", prompt="a", max_tokens=-1),
            request("streamed", model="demo", prompt="a", stream=True),
            request("long", model="demo", prompt="a", max_tokens=5000),
            {"custom_id": 5, "method": "POST", "url": "/v1/completions", "body": {}},
        ]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{")
        status, _, err = pool_batch("in.jsonl", "-o", "out.jsonl")
        assert status == 1
        assert "the first error, line 5: url must be /v1/completions or /v1/chat/completions, not '/v1/emb" in err
        results = read_jsonl(tmp_path / "out.jsonl")
        assert [set(result) for result in results] == [{"id", "custom_id", "response", "error"}] * 11
        assert [r["custom_id"] for r in results] == [line["custom_id"] for line in lines[:9]] + [None, None]
        assert len({r["id"] for r in results}) == 11
        bodies = []
        for result in results[:3]:
            response = result["response"]
            assert (result["error"], response["status_code"], response["request_id"][:4]) == (None, 200, "req_")
            bodies.append(response["body"])
        one, many = (Completion.model_validate(body, strict=True) for body in bodies[:2])
        (ids,) = bodies[2]["choices"]
        assert (one.choices[0].text, one.model, one.object) == (texts[0], "demo", "text_completion")
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert many.usage is not None
        assert many.usage.completion_tokens == 12
        assert ids["text"] == PROMPTS[1] + texts[1]
        assert len(ids["logprobs"]["tokens"]) == len(LINES[1]["prompt_ids"]) + 4
        chat = ChatCompletion.model_validate(results[3]["response"]["body"], strict=True)
        assert (chat.choices[0].message.role, chat.object) == ("assistant", "chat.completion")
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 4  # by the options
        assert (results[4]["response"], results[4]["error"]["code"]) == (None, "invalid_url")
        refused = [(r["response"]["status_code"], r["response"]["body"]["error"]) for r in results[5:9]]
        assert [(status, error["param"], error["code"]) for status, error in refused] == [
            (404, None, "model_not_found"), (400, "max_tokens", None), (400, "stream", None),
            (400, None, "context_length_exceeded"),
        ]  # fmt: skip
        assert [r["error"]["code"] for r in results[9:]] == ["invalid_custom_id", "invalid_json"]

    def test_the_next_run_knows_its_lines(self, tmp_path: Path, pool_batch: Batch) -> None:
        lines = [request(f"r{n}", prompt=prompt) for n, prompt in enumerate(PROMPTS)]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
        assert pool_batch("in.jsonl", "-o", "out.jsonl")[0] == 0
        before = read_jsonl(tmp_path / "out.jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
        status, _, err = pool_batch("in.jsonl", "-o", "out.jsonl")
        assert (status, "3 of them from before" in err) == (0, True)
        after = read_jsonl(tmp_path / "out.jsonl")
        assert [line["custom_id"] for line in after] == ["r3", "r2", "r1", "r0"]
        assert after[1:] == before[::-1]
        assert pool_batch("in.jsonl", "-o", "out.csv")[2].endswith(
            "OpenAI's lines are answered by OpenAI's lines, not as csv; let the name of the output end with .jsonl\n"
        )


REFUSED: list[tuple[str, bytes, list[str], str]] = [
    ("in.json", b' \n[{"prompt": "a"}]', [], "in.json begins with a JSON array; write an object a line: jq -c '.[]'"),
    ("in.jsonl", b'["a",\n"b"]', [], "in.jsonl begins with a JSON array"),
    ("in.json", b'{\n "prompt": "a"\n}', [], "in.json holds an object of several lines"),
    ("in.dat", b"a", [], "in.dat: '.dat', the ending of its name, tells no format; give the format with --format: txt"),
    ("in", b"a", [], "in: its name has no ending; give the format with --format: txt"),
    ("in.csv.bak", b"a", [], "'.bak', the ending of its name, tells no format"),
    ("in.xlsx", b"PK\x03\x04", [], "in.xlsx is a spreadsheet; save it as csv"),
    ("in.csv", b"PK\x03\x04\x14\x00", [], "in.csv is a zip archive or a spreadsheet"),
    ("in.txt", gzip.compress(b"a\n", mtime=0), [], "in.txt is compressed by gzip; let its name end with .gz"),
    ("in.txt", b"\x28\xb5\x2f\xfd\x00", [], "in.txt is compressed by zstd"),
    ("in.txt.gz", b"a\n", [], "in.txt.gz is not compressed by gzip"),
    ("in.txt", b"PAR1\x15\x04\x00\x15", [], "in.txt is a Parquet file; read it as a file with --format parquet"),
    ("in.parquet", b"prompt\na\n", [], "in.parquet is no Parquet file; give its format with --format"),
    ("in.parquet", b"PAR1 and no more", [], "in.parquet is no Parquet file, or a damaged one"),
    ("in.txt", "a prompt\n".encode("utf-16"), [], "in.txt is UTF-16; make it UTF-8: iconv -f UTF-16"),
    ("in.csv", "prompt\na\n".encode("utf-16-be"), [], "in.csv is UTF-16"),
    ("in.txt", b"\x01\x02\x03\x00\x04" * 9, [], "in.txt holds zero bytes, so that it is no txt"),
    ("in.csv", b"", [], "the input has no header: its first row must name the columns"),
    ("in.csv", b"a,b\n1,2\n", [], "which column is the prompt? name it with --prompt-column; the columns are 'a', 'b'"),
    ("in.csv", b"a,b\n1,2\n", ["--prompt-column", "c"], "there is no column 'c'; the columns are 'a', 'b'"),
    ("in.csv", b"a,a\n1,2\n", [], "two columns are named 'a'; rename one of them"),
    ("in.csv", b"a;prompt\n1;2\n", [], "if another character stands between columns, give it with --delimiter ';'"),
    ("in.csv", b'prompt\na\n"b\nc\n', [], "line 3: a quote begins a value that does not end; close it"),
    ("in.csv", b"prompt,a\rb,1\rc,2\r", [], "in.csv has lines that end with CR alone; let them end with LF: tr"),
    ("in.txt", b"a\rb\r", [], "in.txt has lines that end with CR alone"),
    ("in.txt", b"a\n", ["--prompt-column", "a"], "--prompt-column does not go with txt, only with csv, tsv, parquet"),
    ("in.jsonl", b'"a"\n', ["--delimiter", ";"], "--delimiter does not go with jsonl, only with csv, tsv"),
    ("in.txt", b"a\n", ["-o", "out.xml"], "out.xml: '.xml', the ending of its name, tells no format"),
    ("in.txt", b"a\n", ["-o", "out.parquet.gz"], "Parquet compresses its columns itself"),
    ("in.txt", b"a\n", ["--output-format", "parquet"], "Parquet can be written into a file only; name one with -o"),
    ("in.txt", b"a\n", ["-o", "folder.csv"], "folder.csv: cannot be written (Is a directory)"),
    ("in.txt", b"a\n", ["-o", "other.csv"], "other.csv holds something else than results; begin anew with --restart"),
    ("in.csv", b"prompt\na\n", ["--delimiter", "ab"], "--delimiter: 'ab' is not one character that may stand between"),
]


@pytest.mark.parametrize(("name", "content", "arguments", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_or_written_is_told_in_one_sentence(
    tmp_path: Path, run_batch: Batch, name: str, content: bytes, arguments: list[str], message: str
) -> None:
    """None of these needs a Redis."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    status, out, err = run_batch(name, *arguments)
    assert (status in (1, 2), out, err.count("\n")) == (True, "", 1)
    assert err.startswith("fastgpt2 batch: ")
    assert message in err
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
    assert not list(tmp_path.glob("*.partial.jsonl*"))


def test_without_pyarrow(tmp_path: Path, run_batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    (tmp_path / "in.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("in.parquet", "in.txt.zst"):
        status, _, err = run_batch(name)
        assert (status, "needs pyarrow, which is not installed: pip install 'fastgpt2[data]'" in err) == (1, True)


def test_the_only_column_is_taken_and_told(tmp_path: Path, pool_batch: Batch, texts: list[str]) -> None:
    write_csv(tmp_path / "in.csv", [["question"], [PROMPTS[0]]])
    status, out, err = pool_batch("in.csv")
    assert (status, json.loads(out)["text"]) == (0, texts[0])
    assert "the prompts are taken from the only column, 'question'\n" in err
    write_csv(tmp_path / "in.csv", [["a", "b"], [1, PROMPTS[0]]], ";")
    status, out, _ = pool_batch("in.csv", "--delimiter", ";", "--prompt-column", "b")
    assert (status, json.loads(out)["text"]) == (0, texts[0])


def test_the_samples_of_the_documentation(
    tmp_path: Path, run_batch: Batch, pool: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are written, its commands run, and what they write is as it says, but for times and random numbers."""
    for name, value in pool.items():
        monkeypatch.setenv(name, value)
    page = (GOLDEN.parents[1] / "docs" / "batch.md").read_text("utf-8")
    files = {
        name: re.sub(r"^    ", "", text, flags=re.M)
        for name, text in re.findall(r"^`([\w.]+)`:\n\n((?:    .*\n)+)", page, re.M)
    }
    assert sorted(files) == ["prompts.csv", "prompts.jsonl", "requests.jsonl", "results.csv"]
    for name in ("prompts.csv", "prompts.jsonl", "requests.jsonl"):
        (tmp_path / name).write_text(files[name])
    commands = re.findall(r"^    fastgpt2 batch (.*)$", page, re.M)
    assert [run_batch(*command.split())[0] for command in commands] == [0, 1, 1, 1]
    assert (tmp_path / "results.csv").read_text() == files["results.csv"]
    results = read_jsonl(tmp_path / "results.jsonl")
    answers = read_jsonl(tmp_path / "answers.jsonl")
    shown = re.findall(r'^    ({"i.*)$', page, re.M)
    assert shown[1::2] == [json.dumps(results[2]), json.dumps(answers[1])]
    first, answer = (json.loads(line.replace("{...}", "{}").replace(", ...}", "}")) for line in (shown[0], shown[2]))
    assert list(first) == list(results[0])
    assert (list(answer), list(answer["response"])) == (list(answers[0]), list(answers[0]["response"]))


def test_the_help_names_no_option_that_the_command_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main(["batch", "--help"])
    text = re.sub(r"-\n *", "-", capsys.readouterr().out)  # where a line was broken
    listed = {name for line in re.findall(r"^  (-.*?)(?:  |$)", text, re.M) for name in re.findall(r"--[\w-]+", line)}
    assert set(re.findall(r"--[a-z][\w-]+", text)) - {"--no-do-sample", "--no-OPTION"} <= listed
