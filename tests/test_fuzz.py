"""Hostile input: whatever comes ends in one of our errors or in a valid value, in bounded time and memory.

`HYPOTHESIS_PROFILE=long` tries a hundred times as many examples; without it the examples are the same each time.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import struct
import tempfile
import tracemalloc
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from starlette.testclient import TestClient
from support.running import GOLDEN, StartWorker, wait_until

from fastgpt2.api.client.reader import Assembly, JobReader
from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.service import Bounds
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult, Timings, Usage
from fastgpt2.engine.model.checkpoint import NUMPY_TYPES, Checkpoint
from fastgpt2.engine.model.config import GPT2Config, read_config, read_index
from fastgpt2.engine.model.generation_config import read_generation_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.model.packing import open_packed
from fastgpt2.engine.model.torch_file import MAX_SHARING
from fastgpt2.engine.text.auto_tokenizer import load_tokenizer
from fastgpt2.engine.text.regex_trial import RegexTrial
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, CheckpointError, ConfigError, FastGPT2Error, TokenizerError
from fastgpt2.fields import fields_of
from fastgpt2.protocol import untrusted
from fastgpt2.protocol.messages import JobOptions, entry_to_piece, parse_job, result_from_json, result_to_json
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.rq_job import GenerationJob

pytestmark = pytest.mark.thorough

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
TASK = "fastgpt2.worker.tasks.generate"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]


def fuzz(count: int) -> settings:
    return settings(
        max_examples=count * (100 if LONG else 1),
        derandomize=not LONG,
        deadline=5000,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "F32", "model.safetensors", "a" * 5000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)
deep = st.integers(100, 200_000).map(lambda n: b"[" * n + b"]" * n)
json_bytes = st.one_of(st.binary(max_size=200), values.map(lambda value: json.dumps(value).encode()), deep)


@contextmanager
def little_memory(most: int = 64 << 20) -> Iterator[None]:
    """Assert that the block takes little memory of Python's own, and of numpy's, which tracemalloc sees too."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# What stands in Redis.


@fuzz(150)
@given(
    st.one_of(
        json_bytes,
        values.map(lambda value: pickle.dumps(value, protocol=4)),
        st.binary(max_size=60).map(lambda tail: b"\x80\x04" + tail),
    )
)
@example(b"\x80\x04\x95" + b"\xff" * 8)
@example(b"\x80\x04\x8e" + struct.pack("<Q", 2**62))  # BINBYTES8 of four exabytes
@example(b"\x80\x04\x96" + struct.pack("<Q", 2**62))  # BYTEARRAY8
@example(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
@example(b"\x80\x04]r\xff\xff\xff\x7f.")  # LONG_BINPUT into the two thousand millionth place
@example(b"\x80\x04" + b"(" * 100_000 + b".")
@example(b"\x80\x04K\x01" + b"\x85" * 300_000 + b".")
def test_a_payload_is_plain_values_or_a_value_error(data: bytes) -> None:
    with little_memory():
        try:
            value = untrusted.read(data)
        except ValueError:
            return
    assert isinstance(value, None | bool | int | float | str | bytes | list | tuple | dict)


@fuzz(150)
@given(
    st.lists(values, max_size=3),
    st.dictionaries(
        st.sampled_from([*fields_of(GenerationRequest), *fields_of(JobOptions), "num_beams", "temprature", "x"]),
        values,
    ),
)
def test_arguments_are_a_request_or_a_bad_request(args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        request, _ = parse_job(args, kwargs)
    except BadRequest as error:
        said = str(error)
    else:
        said = ""
        assert isinstance(request.prompt, str | tuple)
    assert len(said) < 2000


@fuzz(150)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                b"data",
                b"status",
                b"created_at",
                b"enqueued_at",
                b"timeout",
                b"meta",
                b"origin",
                b"result_ttl",
                b"dependency_ids",
                b"success_callback_name",
                b"retries_left",
                b"fastgpt2_crashes",
                b"worker_name",
            ]
        ),
        st.one_of(st.binary(max_size=60), json_bytes, json_bytes.map(zlib.compress)),
    )
)
@example({b"data": zlib.compress(bytes(100_000_000), 1)})
@example({b"data": b'["os.system", null, ["true"], {}]', b"success_callback_name": b"os.system"})
def test_an_entry_is_asked_for_a_request_and_nothing_more(fields: dict[bytes, bytes]) -> None:
    with little_memory(128 << 20):
        job = GenerationJob("x", connection=Redis(), serializer=untrusted.JSONOnlySerializer)
        try:
            job.restore(fields)
        except MemoryError:
            raise
        except Exception:  # the ledger fails such a job with it
            return
        try:
            job.parse()
        except BadRequest:
            return
    assert job.func_name == TASK


@fuzz(100)
@given(
    values,
    st.dictionaries(
        st.sampled_from([b"type", b"return_value", b"exc_string"]),
        st.one_of(
            st.binary(max_size=40),
            st.just(b"1"),
            st.just(b"2"),
            values.map(lambda value: base64.b64encode(json.dumps(value).encode())),
        ),
    ),
    st.binary(max_size=30),
)
def test_what_a_client_reads_is_an_outcome_or_one_of_our_errors(
    value: Any, entry: dict[bytes, bytes], meta: bytes
) -> None:
    with suppress(FastGPT2Error):
        result_from_json(value)
    with suppress(FastGPT2Error):
        JobReader("x").on_state([(b"finished", b"", meta), [(b"1-0", entry)]], 0.0)
    with suppress(KeyError, TypeError, ValueError):
        entry_to_piece(entry)


_RESULT = result_to_json(
    GenerationResult("ab", (1, 2), "stop", Usage(1, 2), Timings(0.0, 0.0, 0.0), "m", seed=3, cumulative_logprob=-1.0)
)
damage = st.dictionaries(st.sampled_from([*_RESULT, "logprobs", "choice_index", "alternatives"]), values, max_size=3)


@fuzz(150)
@given(damage, st.lists(damage, max_size=3))
def test_a_damaged_result_is_one_of_our_errors_or_has_its_types(first: Any, others: list[Any]) -> None:
    texts = [{**_RESULT, **other} for other in others]
    with suppress(FastGPT2Error):
        result = result_from_json({**_RESULT, "alternatives": texts, **first})
        for text in (result, *result.alternatives):
            assert isinstance(text.text, str)
            assert isinstance(text.seed, int | None)
            assert isinstance(text.choice_index, int)
            assert all(isinstance(token_id, int) for token_id in text.token_ids)


tokens = st.fixed_dictionaries(
    {"token_id": st.one_of(st.integers(0, 5), scalars), "token": st.one_of(st.just("a"), scalars), "logprob": scalars},
    optional={"text_offset": st.one_of(st.integers(-1, 9), scalars), "top": values},
)


@fuzz(150)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([b"attempt", b"at", b"text", b"token_at", b"logprobs", b"choice_index"]),
            st.one_of(
                st.sampled_from([b"0", b"1", b"-1", b"99999999999999999999", b"ab", b"\xff"]),
                st.lists(tokens, max_size=4).map(lambda value: json.dumps(value).encode()),
                json_bytes,
            ),
            min_size=3,
        ),
        max_size=6,
    )
)
def test_a_stream_is_pieces_that_fit_each_other_whatever_stands_in_it(entries: list[dict[bytes, bytes]]) -> None:
    assembly, text, count = Assembly(), "", 0
    with little_memory():
        for entry in entries:
            try:
                piece = entry_to_piece(entry)
            except (KeyError, TypeError, ValueError):
                continue
            new = assembly.add(piece) if piece is not None else None
            if new is not None:
                assert 0 <= new.at <= len(text)
                assert 0 <= new.token_at <= count
                text, count = text[: new.at] + new.text, new.token_at + len(new.logprobs)
        assert assembly.text == text


# What stands on the disk.


def header(tensors: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


numbers = st.one_of(
    st.integers(-5, 64),
    st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63, 2**64, -1, 2**70]),
    st.floats(),
    st.text(max_size=3),
)
tensor = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "F64", "BOOL", "Q4", ""]), scalars),
        "shape": st.one_of(st.lists(numbers, max_size=4), scalars),
        "data_offsets": st.one_of(st.tuples(numbers, numbers).map(list), st.lists(numbers, max_size=3), scalars),
    }
)
_F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@fuzz(200)
@given(
    st.one_of(
        st.binary(max_size=100),
        st.dictionaries(st.text(max_size=5), tensor, max_size=4).map(lambda t: header(t, data=bytes(64))),
        st.tuples(deep, st.just(None)).map(lambda pair: header(pair[0])),
        st.integers(0, 2**64 - 1).map(lambda n: header({"a": _F32}, n, bytes(16))),
        values.map(lambda value: header(value, data=bytes(64))),
    )
)
@example(header({"a": _F32}, 2**63, bytes(16)))
@example(header({"a": _F32}, 100_000_000, bytes(16)))
@example(header({"a": {**_F32, "shape": [2**32, 2**32]}}, data=bytes(16)))
@example(header({"a": {**_F32, "shape": [-2, -2]}}, data=bytes(16)))
@example(header({"a": _F32, "b": {**_F32, "data_offsets": [8, 24]}}, data=bytes(24)))
@example(header({"a": {**_F32, "data_offsets": [16, 0]}}, data=bytes(16)))
@example(header({"a": {**_F32, "data_offsets": [4, 20]}}, data=bytes(20)))
@example(
    header(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        data=bytes(16),
    )
)
@example(header({"__metadata__": {"a": 1}, "a": _F32}, data=bytes(16)))
@example(header(b'{"a":' + b"[" * 100_000, data=bytes(16)))
def test_a_weights_file_is_bounded_views_or_a_checkpoint_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, little_memory():
        (Path(folder) / "model.safetensors").write_bytes(data)
        try:
            checkpoint = Checkpoint.open(Path(folder))
            views = {name: checkpoint.view(name) for name in checkpoint.tensors}
        except CheckpointError:
            return
        assert sum(view.nbytes for view in views.values()) <= len(data)
        del views, checkpoint


_TORCH_FILES = [
    (GOLDEN / "torch_files" / name).read_bytes()
    for name in (
        "no_checksums/pytorch_model.bin",  # so that changes reach the machine that reads the pickle
        "training/pytorch_model.bin",
        "shared_and_strided_old_format/pytorch_model.bin",
        "nanogpt/ckpt.pt",
    )
]


@fuzz(300)
@given(
    st.sampled_from(_TORCH_FILES),
    st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
    st.integers(0, 3),
)
@example(_TORCH_FILES[2], [(0, b"")], 0)
def test_a_torch_file_is_bounded_views_or_a_checkpoint_error(
    data: bytes, changes: list[tuple[int, bytes]], cut: int
) -> None:
    changed = bytearray(data)
    for at, piece in changes:
        at %= len(data)
        changed[at : at + len(piece)] = piece
    del changed[len(changed) - cut :]
    with tempfile.TemporaryDirectory() as folder, little_memory():
        for name in ("pytorch_model.bin", "ckpt.pt"):
            (Path(folder) / name).write_bytes(changed)
            try:
                checkpoint = Checkpoint.open(Path(folder))
                views = [
                    checkpoint.view(name) for name, info in checkpoint.tensors.items() if info.dtype in NUMPY_TYPES
                ]
            except CheckpointError:
                continue
            finally:
                (Path(folder) / name).unlink()
            assert sum(view.nbytes for view in views) <= max(MAX_SHARING * len(changed), 1 << 20)
            for view in views:
                view.tobytes()
            del views, checkpoint


@fuzz(150)
@given(
    st.one_of(
        json_bytes,
        st.dictionaries(
            st.sampled_from(["weight_map", "metadata"]),
            st.one_of(values, st.dictionaries(st.text(max_size=8), scalars, max_size=5)),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
@example(b'{"weight_map": {"a": "../../../../etc/passwd"}}')
@example(b'{"weight_map": {"a": "/etc/passwd"}}')
@example(b'{"weight_map": {"a": "x/../../y.safetensors"}}')
@example(b'{"weight_map": {"a": "a\\u0000.safetensors"}}')
@example(b'{"weight_map": {"a": ".."}}')
@example(b'{"weight_map": {"a": "' + b"x" * 5000 + b'.safetensors"}}')
def test_an_index_names_files_of_its_own_folder(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, little_memory():
        path = Path(folder) / "model.safetensors.index.json"
        path.write_bytes(data)
        try:
            shards = read_index(path)
        except CheckpointError:
            return
        for shard in shards.values():
            assert (path.parent / shard).resolve().parent == path.parent.resolve(), shard
        with pytest.raises(CheckpointError):
            Checkpoint.open(Path(folder))


_CONFIG: dict[str, Any] = json.loads((DEMO_FOLDER / "config.json").read_text())


@fuzz(200)
@given(
    st.one_of(
        json_bytes,
        st.dictionaries(st.sampled_from(sorted(_CONFIG)), values, min_size=1, max_size=3).map(
            lambda change: json.dumps({**_CONFIG, **change}).encode()
        ),
    )
)
@example(json.dumps({**_CONFIG, "n_layer": 10**9}).encode())
@example(json.dumps({**_CONFIG, "n_embd": 0}).encode())
@example(json.dumps({**_CONFIG, "n_head": -1}).encode())
@example(json.dumps({**_CONFIG, "layer_norm_epsilon": float("nan")}).encode())
@example(json.dumps({**_CONFIG, "eos_token_id": [10**30]}).encode())
def test_a_config_is_of_a_bounded_model_or_a_config_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, little_memory():
        path = Path(folder) / "config.json"
        path.write_bytes(data)
        try:
            config = read_config(path.parent)
        except ConfigError:
            return
    assert isinstance(config, GPT2Config)
    assert 0 < config.n_layer < 10**6
    assert config.n_embd % config.n_head == 0


_SETTINGS = ("eos_token_id", "bos_token_id", "min_length", "bad_words_ids", "num_beams", "do_sample", "penalty_alpha")


@fuzz(200)
@given(
    st.one_of(
        json_bytes,
        st.dictionaries(st.sampled_from(_SETTINGS), values, max_size=3).map(lambda fields: json.dumps(fields).encode()),
    )
)
@example(b'{"eos_token_id": [' + b"1," * 100_000 + b"1]}")
@example(b'{"eos_token_id": [1e308, 1e400, NaN]}')
@example(b'{"suppress_tokens": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"stop_strings": "\\ud800"}')
def test_generation_settings_are_bounded_or_a_config_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, little_memory():
        (Path(folder) / "generation_config.json").write_bytes(data)
        try:
            found = read_generation_config(Path(folder), GPT2Config(vocab_size=100))
        except ConfigError:
            return
    assert 0 <= found.start_token_id < 100
    assert all(0 <= one < 100 for one in found.eos_token_ids)
    assert len("".join(found.notes).encode()) < 20_000


_TOKENIZER = (DEMO_FOLDER / "tokenizer.json").read_bytes()


@fuzz(60)
@given(
    st.one_of(
        json_bytes,
        st.tuples(st.integers(0, len(_TOKENIZER) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda cut: _TOKENIZER[: cut[0]] + cut[1] + _TOKENIZER[cut[0] + len(cut[1]) :]
        ),
        st.integers(0, len(_TOKENIZER)).map(lambda n: _TOKENIZER[:n]),
    )
)
@example(b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}')
@example(b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}')
def test_a_tokenizer_is_usable_or_a_tokenizer_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(data)
        try:
            tokenizer = Tokenizer.from_folder(Path(folder))
            ids = tokenizer.encode("My name is")
            assert tokenizer.longest_token_bytes >= 1
            assert isinstance(tokenizer.decode(ids), str)
        except (TokenizerError, BadRequest):
            pass


_PLACES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_PATTERNS = st.sampled_from(["", "a", " ", "b"]).map(lambda text: {"String": text}) | st.sampled_from(
    ["[ab]+", "", "(?=a)", "(a|b)+", r"(.)\1", "a*", "[^a]", r"\s+(?!\S)"]
).map(lambda regex: {"Regex": regex})
_STEPS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("Replace"), "pattern": _PATTERNS, "content": st.text("ab é", max_size=3) | st.just("a" * 9999)}
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("Split"),
            "pattern": _PATTERNS,
            "behavior": st.sampled_from(["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]),
            "invert": st.booleans(),
        }
    ),
    st.sampled_from(["NFKD", "Lowercase", "ByteLevel", "Fuse", "ByteFallback", "Nmt"]).map(lambda name: {"type": name}),
    st.sampled_from(["", "a", "x" * 99999]).map(lambda text: {"type": "Prepend", "prepend": text}),
    st.sampled_from([0, 1, 1 << 62]).map(lambda length: {"type": "FixedLength", "length": length}),
    st.tuples(st.sampled_from([0, 1, 1 << 40]), st.sampled_from([0, 1, 1 << 40])).map(
        lambda ends: {"type": "Strip", "content": "a", "start": ends[0], "stop": ends[1]}
    ),
)


@fuzz(30)
@given(st.dictionaries(st.sampled_from(sorted(_PLACES)), st.lists(_STEPS, max_size=12), min_size=1), st.text("ab é"))
def test_steps_of_a_tokenizer_make_ids_and_a_text_or_a_sentence(steps: dict[str, list[Any]], text: str) -> None:
    pipeline = {place: {"type": "Sequence", _PLACES[place]: some} for place, some in steps.items()}
    with tempfile.TemporaryDirectory() as folder, patch.object(RegexTrial, "run"), little_memory():
        (Path(folder) / "tokenizer.json").write_text(json.dumps({**json.loads(_TOKENIZER), **pipeline}))
        with suppress(TokenizerError, BadRequest):
            tokenizer = Tokenizer.from_folder(Path(folder))
            ids = tokenizer.encode(text)
            detokenizer = tokenizer.detokenizer()
            pieces = [detokenizer.push(token_id) for token_id in ids]
            assert len("".join(pieces) + detokenizer.flush()) < 1 << 20
            tokenizer.decode(ids)


_KINDS = GOLDEN / "tokenizers"
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FIELDS = st.sampled_from(
    [
        "tokenizer_class",
        "auto_map",
        "bos_token",
        "pad_token",
        "image_token",
        "additional_special_tokens",
        "extra_special_tokens",
        "added_tokens_decoder",
        "model_specific_special_tokens",
        "add_bos_token",
        "add_prefix_space",
        "legacy",
        "extra_ids",
        "content",
        "0",
    ]
)


def load_or_refuse(kind: str, files: dict[str, bytes]) -> None:
    """Load a kind's folder with some files changed: that ends with a tokenizer or a TokenizerError."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (_KINDS / kind).iterdir():
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        with suppress(TokenizerError):
            load_tokenizer(Path(folder))


@fuzz(60)
@given(
    st.sampled_from(["gpt2-two-files", "gpt2-declared", "bert", "t5", "pieces-bpe", "unigram"]),
    st.sampled_from(_SMALL_FILES),
    st.dictionaries(_FIELDS, values | st.dictionaries(_FIELDS, values, max_size=3), max_size=5),
)
def test_small_files_of_a_tokenizer_make_one_or_a_tokenizer_error(kind: str, name: str, fields: dict[str, Any]) -> None:
    load_or_refuse(kind, {name: json.dumps(fields).encode()})


_PIECES = (_KINDS / "t5" / "spiece.model").read_bytes()


@fuzz(60)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(_PIECES) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda cut: _PIECES[: cut[0]] + cut[1] + _PIECES[cut[0] + len(cut[1]) :]
        ),
        st.integers(0, len(_PIECES)).map(lambda n: _PIECES[:n]),
    )
)
def test_a_model_of_sentencepiece_makes_a_tokenizer_or_a_tokenizer_error(data: bytes) -> None:
    load_or_refuse("t5", {"spiece.model": data})


@fuzz(60)
@given(st.binary(max_size=300))
@example(header({"a": _F32}, 2**63, bytes(16)))
def test_a_packed_file_that_is_none_is_one_of_our_errors(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(FastGPT2Error):
            open_packed(os.dup(file.fileno()))


# What comes over HTTP.


@pytest.fixture(scope="module")
def web() -> Iterator[TestClient]:
    with RedisServer() as server:
        app = create_app(server.url, "fuzz", Bounds(timeout=0.05), lambda: False)
        with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
            yield client


bodies = st.one_of(
    json_bytes,
    st.fixed_dictionaries({"inputs": values}, optional={"parameters": values, "x": values}).map(
        lambda v: json.dumps(v).encode()
    ),
    st.dictionaries(
        st.sampled_from(["max_new_tokens", "stop", "timeout", "priority", "logprobs", "return_full_text", "echo"]),
        values,
    ).map(lambda v: json.dumps({"inputs": "a", "parameters": v}).encode()),
)


@fuzz(120)
@given(bodies)
@example(b'{"inputs": "\\ud800"}')
@example(b'{"inputs": "a", "inputs": "b", "parameters": {"max_new_tokens": 1e999}}')
@example(b'{"inputs": "a", "parameters": {"max_new_tokens": ' + b"9" * 5000 + b"}}")
@example(b"\xff\xfe{\x00}\x00")
@example(b"")
def test_a_body_is_answered_by_a_sentence(web: TestClient, body: bytes) -> None:
    answer = web.post("/", content=body)
    # 504: it was a valid job, and there is no worker here.
    assert answer.status_code in (400, 504), (answer.status_code, answer.text)
    assert set(answer.json()) == {"error", "error_type"}
    assert len(answer.content) < 4000


# All of it against a worker.


def test_a_worker_goes_on_among_hostile_entries(
    redis: Redis, start_worker: StartWorker, queue_name: str, tmp_path: Path
) -> None:
    rng = random.Random(5)
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    fields = ["data", "status", "created_at", "timeout", "meta", "origin", "result_ttl", "dependency_ids"]
    fields += ["retry_intervals", "group_id", "fastgpt2_attempts", "fastgpt2_crashes", "worker_name", "failure_ttl"]
    junk = [
        b"",
        b"\xff\xfe",
        b"nonsense",
        b"-1",
        b"99999999999999999999",
        b"[" * 5000,
        b"{}",
        b"None",
        rng.randbytes(50),
    ]
    good, bad = [], []
    for n in range(60):
        job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5, ignore_eos=True)
        if n % 6 == 0:
            good.append(job)
            continue
        bad.append(job.id)
        for field in rng.sample(fields, rng.randint(1, 3)):
            redis.hset(job.key, field, rng.choice(junk))
    for kind in ("rq:job:", "rq:executions:", "rq:results:", "fastgpt2:stream:"):
        job_id = str(uuid.uuid4())
        if kind != "rq:job:":
            job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5, ignore_eos=True, stream=True, job_id=None)
            job_id = job.id
            bad.append(job_id)
        redis.set(f"{kind}{job_id}", "no hash, no stream", ex=600)
        if kind == "rq:job:":
            redis.rpush(queue.key, job_id)
    redis.rpush(queue.key, b"\xff\xfe", "", "a" * 10_000, "x:y:z")
    last = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5, ignore_eos=True)
    process = start_worker(FASTGPT2_MAX_BATCH="4")
    for job in (*good, last):
        wait_until(lambda job=job: job.get_status().value == "finished", "the good jobs to finish")  # type: ignore[misc]
        value: Any = job.return_value(refresh=True)
        assert value["token_ids"] == ENTRY["ids"][:5]
    wait_until(lambda: not redis.keys(f"fastgpt2:taken:*:{queue_name}"), "everything to be let go of")
    assert redis.llen(queue.key) == 0
    assert process.poll() is None
    ends = {job_id: redis.hget(f"rq:job:{job_id}", "status") for job_id in bad}
    assert set(ends.values()) <= {b"finished", b"failed", b"stopped", b"canceled", None}, ends
    assert "Traceback" not in (tmp_path / "worker-0.log").read_text()
