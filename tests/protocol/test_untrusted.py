"""Everything in Redis is read as plain values, from JSON and from pickles, and can do nothing else."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from support.running import GOLDEN, StartWorker, wait_until

from fastgpt2.protocol.untrusted import MAX_PAYLOAD_BYTES, MAX_PICKLE_OPCODES, is_pickle, read

ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
TASK = "fastgpt2.worker.tasks.generate"

VALUES: list[Any] = [
    None,
    [True, False, 0, 255, 65536, -1, 1 << 40, -(1 << 70), 0.5],
    "a", "é" * 300, "x" * 70_000, b"bytes", b"y" * 300,
    (), ("a",), ("a", 1), ("a", 1, 2), (1, 2, 3, 4), [], {},
    {"a": {"b": ["c", "c"]}},
    (TASK, None, ("prompt",), {"max_new_tokens": 20, "stop": ["\n", "x"]}),
    list(range(3000)),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_through(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    if protocol == 2 and "bytes" in str(type(value)):
        return  # there a pickle of bytes calls codecs.encode
    assert is_pickle(data)
    assert read(data) == value


def test_json_comes_through() -> None:
    assert read(b'["a", 1, null, {"b": "\xc3\xa9"}]') == ["a", 1, None, {"b": "é"}]
    assert not is_pickle(b"[]")


class Reduced:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_calls_something_is_not_loaded(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "sprung"
    for value in (Reduced(trap), [1, {"a": Reduced(trap)}], Path("x"), {1, 2}, bytearray(3), print, 1j):
        with pytest.raises(ValueError, match=r"more than plain values \(it has the opcode \w+\): plain are "):
            read(pickle.dumps(value, protocol))
    assert not trap.exists()


PROTO = b"\x80\x04"
HOSTILE = {
    # An index into the memo, which the C unpickler makes room for: 2^31 entries.
    "memo": PROTO + b"Nr" + struct.pack("<I", (1 << 31) - 1) + b".",
    # A bytearray of 2^40 bytes is allocated before a byte of it is read.
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "string that is not there": PROTO + b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc.",
    "persistent": PROTO + b"Pid\n.",
    "extension": PROTO + b"\x82\x01.",
    "global by name": b"\x80\x02cos\nsystem\n.",
    "global by stack": PROTO + b"\x8c\x02os\x8c\x06system\x93.",
    "build": PROTO + b"}}b.",
    "empty": b"\x80",
    "no end": PROTO + b"N",
    "empty stack": PROTO + b".",
    "no mark": PROTO + b"t.",
    "memo that is not there": PROTO + b"h\x05.",
    "unhashable key": PROTO + b"}]Ns.",
    "not utf-8": PROTO + b"\x8c\x02\xff\xfe.",
    "protocol 200": b"\x80\xc8N.",
    "many opcodes": PROTO + b"N" * (MAX_PICKLE_OPCODES + 1) + b".",
    "long": b"\x80\x02" + b"x" * MAX_PAYLOAD_BYTES,
    "deep": PROTO + b"(" * 5000 + b"t" * 5000 + b".",
    "deep json": b"[" * 200_000,
    "not json": b"\xff\xfe",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_is_refused(name: str) -> None:
    data = HOSTILE[name]
    try:
        value = read(data)
    except ValueError:
        return
    assert name == "deep", f"{name} was read as {str(value)[:80]}"


def test_default_enqueue_is_served_and_its_result_read(
    redis: Redis, queue_name: str, start_worker: StartWorker
) -> None:
    """RQ's default serializer, at both ends."""
    start_worker()
    queue = Queue(queue_name, connection=redis)
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=10, ignore_eos=True, meta={"mine": (1, "two")})
    wait_until(lambda: job.get_status().value == "finished", "the job to finish")
    value: Any = job.return_value()
    assert value["token_ids"] == ENTRY["ids"][:10]
    assert job.get_meta(refresh=True) == {"mine": (1, "two")}
    timed = queue.enqueue(TASK, ENTRY["prompt"], timeout=1e-6)
    wait_until(lambda: timed.get_status().value == "failed", "the job to fail")
    assert timed.get_meta(refresh=True)["partial"]["finish_reason"] == "timeout"
