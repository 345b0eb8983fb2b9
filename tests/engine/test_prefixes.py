"""Prefixes: kept keys and values give the same tokens as none, stay within their memory, and are reported."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from redis import Redis
from support.machines import TWO_PROCESSES, needs_helpers
from support.running import GOLDEN, StartEndpoint, StartWorker, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.engine.decoding.prompt_rows import PromptRows
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.engine.kernels.attention import BLOCK
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.network.arena import PAGE, Arena
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import KVCache
from fastgpt2.engine.network.prefixes import Prefixes, block_bytes
from fastgpt2.engine.network.step import Segment
from fastgpt2.errors import BadRequest, CheckpointError
from fastgpt2.protocol.keys import totals_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.recycling import private_memory

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
DEMO = read_config(DEMO_FOLDER)
# Bytes of a block of the demo model: keys and values, 5 layers of 224 numbers of 4 bytes.
A_BLOCK = 2 * 5 * 224 * 4 * BLOCK
# A page holds two blocks of this model.
TINY = GPT2Config(vocab_size=100, n_positions=256, n_embd=8, n_layer=1, n_head=2)


def load(**options: Any) -> Engine:
    return Engine.load("demo", **{"max_batch": 4, "threads": 1, **options})


@pytest.fixture(scope="module", params=["large", "small", TWO_PROCESSES])
def keeping(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Load an engine that keeps all prefixes that come, or so few that most must go again."""
    memory = 9 * A_BLOCK if request.param == "small" else 1000 * A_BLOCK
    made = load(threads=2 if request.param == "two processes" else 1, prefix_memory=memory)
    made.warm_up()
    yield made
    made.decoder.model.close()


@pytest.fixture
def fresh() -> Engine:
    return load(prefix_memory=100 * A_BLOCK)


def some_ids(seed: int, count: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(DEMO.vocab_size) for _ in range(count)]


def cached(engine: Engine, ids: list[int], **options: Any) -> int:
    return engine.generate(ids, **{"max_new_tokens": 1, "ignore_eos": True, **options}).usage.cached_tokens


def check_same(expected: GenerationResult, got: GenerationResult, exact: bool) -> None:
    """Check that tokens are the same, and bits where the machine promises that; elsewhere ties may differ."""
    assert expected.logprobs is not None
    assert got.logprobs is not None
    if exact:
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        return
    for theirs, ours in zip(expected.logprobs, got.logprobs, strict=True):
        if theirs.token_id != ours.token_id:
            gap = (theirs.top[0].logprob or 0) - (theirs.top[1].logprob or 0)
            assert gap < 1e-4, "a tie"
            return
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


# The same tokens.


@pytest.fixture(scope="module")
def families(engine: Engine) -> tuple[list[GenerationRequest], list[GenerationResult]]:
    """Make prompts that begin as others do, some of these as others again; and what follows where none is kept."""
    dice = random.Random(0)
    stems = [some_ids(n, dice.choice([16, 31, 32, 33, 64, 100, 250])) for n in range(5)]
    stems += [dice.choice(stems) + some_ids(10 + n, dice.randint(1, 80)) for n in range(5)]
    prompts = [dice.choice(stems) + some_ids(20 + n, dice.randint(0, 40)) for n in range(50)]
    prompts += [dice.choice(prompts)[: dice.randint(1, 100)] for _ in range(10)]
    requests = [GenerationRequest(tuple(ids), dice.randint(1, 12), ignore_eos=True, logprobs=2) for ids in prompts]
    return requests, engine.run(requests)


@pytest.mark.thorough
def test_families_of_prompts(keeping: Engine, families: tuple[list[GenerationRequest], list[GenerationResult]]) -> None:
    """In batches of random company."""
    requests, expected = families
    dice = random.Random(1)
    reused, order = 0, list(range(len(requests)))
    for _ in range(2):
        dice.shuffle(order)
        for index, result in zip(order, keeping.run([requests[index] for index in order]), strict=True):
            check_same(expected[index], result, keeping.decoder.model.exact)
            reused += result.usage.cached_tokens
    assert expected[0].usage.cached_tokens == 0
    assert reused > 0


def test_the_continuations_of_transformers(keeping: Engine) -> None:
    """What transformers generated comes as prompts, cut here and there: ours goes on as transformers did."""
    asked = [(entry, cut) for entry in ENTRIES for cut in (40, 72)]
    prompts = [entry["prompt_ids"] + entry["ids"][:cut] for entry, cut in asked]
    results = keeping.generate(prompts, max_new_tokens=12, ignore_eos=True)
    for (entry, cut), result in zip(asked, results, strict=True):
        assert list(result.token_ids) == entry["ids"][cut : cut + 12]
    assert sum(result.usage.cached_tokens > 0 for result in results) > 10


def test_the_same_logits(keeping: Engine) -> None:
    """A sequence goes on from copied keys and values, its rest cut anywhere, as their own sequence does."""
    network, dice = keeping.decoder.model, random.Random(5)
    for seed in range(20):
        ids = some_ids(seed, dice.randint(BLOCK + 1, 300))
        prefixes = Prefixes(DEMO, 20 * A_BLOCK)
        slot = network.cache.allot()
        expected = read(network, slot, ids, 300)
        prefixes.keep(network.cache, slot, ids)
        other = network.cache.allot()
        known = prefixes.copy_to(network.cache, other, ids[:-1])
        assert known == network.cache.lengths[other] == (len(ids) - 1) // BLOCK * BLOCK
        for number in range(known // BLOCK):
            for ours, theirs in zip(network.cache.block(other, number), network.cache.block(slot, number), strict=True):
                assert np.array_equal(ours, theirs)
        got = read(network, other, ids[known:], dice.choice([1, 7, 30]))
        assert got.argmax() == expected.argmax()
        if network.exact:
            assert np.array_equal(got, expected)
        np.testing.assert_allclose(got, expected, atol=1e-3)
        network.cache.release(slot)
        network.cache.release(other)


def read(network: GPT2, slot: int, ids: list[int], at_once: int) -> NDArray[np.float32]:
    """Read a prompt, `at_once` tokens a step. Return the logits behind the last."""
    for at in range(0, len(ids), min(at_once, network.max_rows)):
        logits = network.forward([Segment(slot, ids[at : at + min(at_once, network.max_rows)])])
    last: NDArray[np.float32] = logits[0].copy()
    return last


# What is found.


@pytest.mark.parametrize(
    ("length", "known"), [(1, 0), (31, 0), (32, 0), (33, 32), (64, 32), (65, 64), (96, 64), (300, 288)]
)
def test_the_same_prompt_again(fresh: Engine, length: int, known: int) -> None:
    ids = some_ids(1, length)
    assert cached(fresh, ids) == 0
    assert cached(fresh, ids) == known
    assert cached(fresh, ids, max_new_tokens=8) == known


def test_as_far_as_they_are_alike(fresh: Engine) -> None:
    ids = some_ids(1, 100)
    assert cached(fresh, ids) == 0
    assert cached(fresh, ids[:65]) == 64
    assert cached(fresh, ids[:64]) == 32
    assert cached(fresh, ids[:20]) == 0
    assert cached(fresh, [*ids, *some_ids(2, 50)]) == 96
    for place, known in ((99, 96), (96, 96), (95, 64), (32, 32), (31, 0), (0, 0)):
        other = [*ids]
        other[place] = (other[place] + 1) % DEMO.vocab_size
        assert cached(fresh, other) == known, place
    # Blocks are known by what comes before them, too.
    assert cached(fresh, ids[32:]) == 0


@pytest.mark.parametrize(("generated", "known"), [(2, 0), (3, 32), (34, 32), (35, 64)])
def test_what_was_generated_is_the_beginning_of_the_next_prompt(fresh: Engine, generated: int, known: int) -> None:
    """All of it is reused but the last token, which has not been run."""
    ids = some_ids(3, 30)
    result = fresh.generate(ids, max_new_tokens=generated, ignore_eos=True)
    turn = [*ids, *result.token_ids, *some_ids(4, 40)]
    again = fresh.generate(turn, max_new_tokens=8, ignore_eos=True)
    assert again.usage.cached_tokens == known
    alone = load(prefix_memory=0).generate(turn, max_new_tokens=8, ignore_eos=True)
    assert (again.token_ids, alone.usage.cached_tokens) == (alone.token_ids, 0)


def test_prompts_that_come_together(fresh: Engine) -> None:
    """The second prompt begins to be read after the first, and finds as much of the first as has been read."""
    header = some_ids(5, 300)
    results = fresh.generate([[*header, *some_ids(n, 10)] for n in range(8)], max_new_tokens=3, ignore_eos=True)
    # A step reads 256 rows of the first; the next reads the rest, and the others for which there is a slot.
    assert [result.usage.cached_tokens for result in results] == [0, *[256] * 3, *[288] * 4]
    # Some of it is known before. The second does not make do with that, as it has to wait anyway.
    header = some_ids(6, 300)
    assert cached(fresh, header[:40]) == 0
    results = fresh.generate([[*header, *some_ids(n, 10)] for n in range(2)], max_new_tokens=3, ignore_eos=True)
    assert [result.usage.cached_tokens for result in results] == [32, 288]


def test_known_rows_are_not_counted_as_rows(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a sequence that decodes, a prompt that is known takes one step; and it counts as a short one."""
    monkeypatch.setattr(fresh.decoder, "prompt_rows", PromptRows(64, 64))
    ids = some_ids(6, 400)
    assert cached(fresh, ids) == 0
    decoder = fresh.decoder
    decoding = decoder.admit(decoder.prepare(GenerationRequest((1,), 100, ignore_eos=True)))
    decoder.step()
    known, unknown = (
        decoder.admit(decoder.prepare(GenerationRequest(tuple(each), 5, ignore_eos=True)))
        for each in (ids, some_ids(7, 300))
    )
    decoder.step()
    assert (len(known.token_ids), known.cached_tokens) == (1, 384)
    assert len(unknown.pending) == 300 - (64 - 16)
    for sequence in (decoding, known, unknown):
        decoder.finish(sequence)


def test_what_was_read_of_a_prompt_that_is_dropped_is_kept(fresh: Engine) -> None:
    decoder, ids = fresh.decoder, some_ids(8, 400)
    dropped = decoder.admit(decoder.prepare(GenerationRequest(tuple(ids), 5)))
    decoder.step()
    assert len(dropped.pending) == 400 - 256
    decoder.finish(dropped)
    assert cached(fresh, ids) == 256


def test_a_prompt_that_is_scored_takes_nothing_and_leaves_nothing(fresh: Engine) -> None:
    ids = some_ids(9, 100)
    first = fresh.generate(ids, max_new_tokens=1, prompt_logprobs=1)
    assert fresh.decoder.prefix_bytes == 0
    assert cached(fresh, ids) == 0
    second = fresh.generate(ids, max_new_tokens=1, prompt_logprobs=1)
    assert second.usage.cached_tokens == 0
    assert second.prompt_logprobs == first.prompt_logprobs
    assert len(second.prompt_logprobs or ()) == 100


def test_nothing_is_kept_that_is_no_number(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["h.0.ln_1.weight"] = weights["h.0.ln_1.weight"] * np.float16("nan")
    save_file(weights, folder / "model.safetensors")
    engine = Engine.load(folder, max_batch=1)
    with pytest.raises(CheckpointError, match="not finite"):
        engine.generate([1] * 100)
    assert engine.decoder.prefixes is not None
    assert engine.decoder.prefix_bytes == 0


# What goes, by hand.


class Shelf:
    """Prefixes of a tiny model with room for four blocks, and slots whose contents tell which prompt they belong to."""

    def __init__(self) -> None:
        self.prefixes = Prefixes(TINY, 2 * PAGE)
        assert self.prefixes.n_blocks == 4
        self.cache = KVCache(TINY, 2, Arena(KVCache.specs(TINY, 2)))

    def keep(self, name: str) -> None:
        """Keep a prompt of one block a letter. Its block "b" behind "a" is not a block "b" behind "c"."""
        for number in range(len(name)):
            keys, values = self.cache.block(0, number)
            keys[:], values[:] = self._marks(name, number)
        self.cache.lengths[0] = BLOCK * len(name)
        self.prefixes.keep(self.cache, 0, self._ids(name))

    def find(self, name: str) -> str:
        """Return as much of a prompt as is kept, after checking its contents."""
        known = self.prefixes.copy_to(self.cache, 1, self._ids(name))
        assert known % BLOCK == 0
        assert known == self.cache.lengths[1]
        for number in range(known // BLOCK):
            keys, values = self.cache.block(1, number)
            of_keys, of_values = self._marks(name, number)
            assert np.all(keys == of_keys), name
            assert np.all(values == of_values), name
        return name[: known // BLOCK]

    @staticmethod
    def _ids(name: str) -> list[int]:
        return [ord(letter) - 30 for letter in name for _ in range(BLOCK)]

    @staticmethod
    def _marks(name: str, number: int) -> tuple[float, float]:
        mark = float(int.from_bytes(name[: number + 1].encode(), "big") % 999_983)
        return mark, -mark


def test_the_least_recently_used_goes_first() -> None:
    shelf = Shelf()
    for name in ("a", "b", "c", "d"):
        shelf.keep(name)
    assert shelf.find("a") == "a"
    shelf.keep("b")  # here already, and used again
    shelf.keep("e")
    shelf.keep("f")
    assert [shelf.find(name) for name in "abcdef"] == ["a", "b", "", "", "e", "f"]
    assert shelf.prefixes.bytes_committed == shelf.prefixes.bytes_limit == 2 * PAGE


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    shelf = Shelf()
    shelf.keep("abc")
    shelf.keep("x")
    shelf.keep("y")
    assert shelf.find("abc") == "ab"
    assert shelf.find("x") == "x"
    shelf.keep("z")
    assert [shelf.find(name) for name in ("y", "abc")] == ["", "ab"]
    shelf.keep("wv")
    assert [shelf.find(name) for name in ("abc", "wv", "x", "z")] == ["ab", "wv", "", ""]


def test_a_beginning_that_is_shared_stays_while_its_ends_go() -> None:
    shelf = Shelf()
    for end in "abcdefghij":
        shelf.keep(f"HH{end}")
        assert shelf.find(f"HH{end}") == f"HH{end}"
    assert [shelf.find(f"HH{end}") for end in "hij"] == ["HH", "HHi", "HHj"]


def test_what_followed_a_block_that_went_is_not_found_behind_its_like() -> None:
    """A block follows an entry, not tokens: what was computed behind other tokens is not taken for it."""
    shelf = Shelf()
    shelf.keep("ab")
    for name in "cdef":
        shelf.keep(name)
    shelf.keep("a")
    assert shelf.find("ab") == "a"
    shelf.keep("xb")
    assert [shelf.find(name) for name in ("ab", "xb")] == ["a", "xb"]


def test_of_a_prompt_longer_than_the_room_the_beginning_is_kept() -> None:
    shelf = Shelf()
    shelf.keep("z")
    shelf.keep("abcdef")
    assert [shelf.find(name) for name in ("abcdef", "z")] == ["abcd", ""]
    shelf.keep("abcdef")
    shelf.keep("abxyz")
    assert [shelf.find(name) for name in ("abxyz", "abcdef")] == ["abxy", "ab"]


def test_only_what_a_slot_holds_is_kept() -> None:
    shelf = Shelf()
    shelf.cache.lengths[0] = 2 * BLOCK - 1
    shelf.prefixes.keep(shelf.cache, 0, [7] * 100)
    assert shelf.prefixes.copy_to(shelf.cache, 1, [7] * 100) == BLOCK


@pytest.mark.parametrize("seed", range(3))
def test_much_use_mixes_nothing_up(seed: int) -> None:
    """What is found has the contents of its own prompt, and what was kept last is found."""
    shelf, dice = Shelf(), random.Random(seed)
    names = [
        "".join(dice.choice("ab") for _ in range(depth)) + dice.choice("cde") for depth in (0, 1, 2, 3) for _ in "1234"
    ]
    for _ in range(500):
        name = dice.choice(names)
        if dice.random() < 0.5:
            shelf.keep(name)
            assert shelf.find(name) == name[:4]
        else:
            shelf.find(name)


# Memory.

FILL = """
import random, sys
from fastgpt2 import Engine
from fastgpt2.worker.recycling import private_memory

limit = int(sys.argv[1])
engine = Engine.load("demo", max_batch=4, threads=1, prefix_memory=limit)
dice = random.Random(1)
def prompts(): return [[dice.randrange(2000) for _ in range(300)] for _ in range(12)]
# First, all other memory is committed.
prefixes, engine.decoder.prefixes = engine.decoder.prefixes, None
for _ in range(2):
    engine.generate(prompts(), max_new_tokens=2, ignore_eos=True)
engine.decoder.prefixes = prefixes
assert engine.decoder.prefix_bytes == 0
before = private_memory()
for _ in range(4):
    engine.generate(prompts(), max_new_tokens=2, ignore_eos=True)
print(private_memory() - before, engine.decoder.prefix_bytes, engine.decoder.prefix_bytes_limit)
"""


@pytest.mark.processes
@pytest.mark.skipif(private_memory() is None, reason="this system does not say how much memory a process has")
def test_the_process_stays_within_the_limit() -> None:
    limit = 40 * A_BLOCK + PAGE
    done = subprocess.run([sys.executable, "-c", FILL, str(limit)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, told, told_limit = map(int, done.stdout.split())
    assert told == told_limit == 40 * A_BLOCK
    assert told // 2 <= grown <= limit + (1 << 20)


WORN = """
import random, sys
from fastgpt2 import Engine
from fastgpt2.protocol.connection import connect
from fastgpt2.worker.worker import GenerationWorker
from fastgpt2.worker.recycling import Recycling

engine = Engine.load("demo", max_batch=4, threads=1, prefix_memory=64_000_000)
dice = random.Random(1)
engine.generate([[7] * 400] * 4, max_new_tokens=2, ignore_eos=True)
worker = GenerationWorker(engine, connect(sys.argv[1]), sys.argv[2], recycling=Recycling(None, 24_000_000))
worker.recycling.start()
for _ in range(20):
    engine.generate([dice.randrange(2000) for _ in range(400)], max_new_tokens=2, ignore_eos=True)
print(engine.decoder.prefix_bytes)
print(worker._reason_to_recycle())
worker.recycling._next_check = 0
print(worker.recycling.due(0, engine.decoder.model.cache.bytes_reserved, 1e9) is not None)
"""


@pytest.mark.skipif(private_memory() is None, reason="this system does not say how much memory a process has")
def test_what_is_kept_is_no_growth_of_a_worker(redis_server: RedisServer, queue_name: str) -> None:
    command = [sys.executable, "-c", WORN, redis_server.url, queue_name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, reason, without = done.stdout.splitlines()
    assert int(kept) == 64_000_000 // A_BLOCK * A_BLOCK
    assert reason == "None"
    assert without == "True", "else nothing was tested"


def test_an_eighth_of_the_memory_for_keys_and_values() -> None:
    kv_memory = 64 * 512 * 2 * 5 * 224 * 4
    decoder = load(kv_memory=kv_memory).decoder
    assert (decoder.model.cache.bytes_limit, decoder.prefix_bytes_limit) == (kv_memory, kv_memory // 8)
    assert decoder.prefix_bytes == 0
    assert block_bytes(DEMO) == A_BLOCK


def test_off() -> None:
    ids = some_ids(1, 100)
    # Where an eighth of kv_memory has no room for a block, there are none, too.
    for engine in (load(prefix_memory=0), load(max_batch=1, kv_memory=16 * A_BLOCK, prefix_memory=0)):
        assert engine.decoder.prefixes is None
        assert (engine.decoder.prefix_bytes, engine.decoder.prefix_bytes_limit) == (0, 0)
        assert [cached(engine, ids) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("memory", [-1, 1, A_BLOCK - 1])
def test_too_little_for_a_block_is_refused(memory: int) -> None:
    with pytest.raises(BadRequest, match=f"prefix_memory is {memory} bytes; a block of 32 .* needs {A_BLOCK}, and 0"):
        load(prefix_memory=memory)
    assert load(prefix_memory=A_BLOCK).decoder.prefix_bytes_limit == A_BLOCK


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("1KB", f"prefix_memory is 1000 bytes; a block of 32 of this model's positions needs {A_BLOCK}"),
        ("-1", "--prefix-memory: '-1' is not a size like 2GB or 512MiB"),
        ("lots", "--prefix-memory: 'lots' is not a size like 2GB or 512MiB"),
    ],
)
def test_bad_sizes_are_refused_in_a_line(redis_server: RedisServer, size: str, message: str) -> None:
    command = [sys.executable, "-m", "fastgpt2", "worker", "--model", "demo", "--redis-url", redis_server.url]
    done = subprocess.run([*command, f"--prefix-memory={size}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastgpt2 worker: {message}")


FORKED = """
import os, sys
from fastgpt2 import Engine
engine = Engine.load("demo", threads=int(sys.argv[1]))
engine.warm_up()
header = [7 * n % 2000 for n in range(200)]
def ask(*own): return engine.generate(header + list(own), max_new_tokens=8, ignore_eos=True)
expected = {n: Engine.load("demo", threads=1, prefix_memory=0).generate(header + [n], max_new_tokens=8,
    ignore_eos=True).token_ids for n in range(8)}
ask(1)
pid = os.fork()
for n in range(8):
    if pid == 0:
        engine.generate([n + 1] * 300, max_new_tokens=2)
    got = ask(n)
    assert got.token_ids == expected[n], n
    assert got.usage.cached_tokens == 192
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert engine.generate([1] * 300, max_new_tokens=1).usage.cached_tokens == 0, "the copy's are its own"
print("done")
"""


@pytest.mark.processes
@pytest.mark.parametrize("threads", ["1", pytest.param("2", marks=needs_helpers)])
def test_a_forked_copy_has_its_own(threads: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, threads], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


# What is reported.


def test_all_the_way(
    redis: Redis, client: Client, queue_name: str, start_worker: StartWorker, start_endpoint: StartEndpoint
) -> None:
    start_worker(FASTGPT2_NAME=f"w-{queue_name}", FASTGPT2_PREFIX_MEMORY="50MB")
    header = some_ids(11, 100)
    with httpx.Client(base_url=start_endpoint().url, trust_env=False, timeout=30) as web:
        first = client.enqueue([*header, 1], max_new_tokens=2, ignore_eos=True).result(30)
        second = client.enqueue([*header, 2], max_new_tokens=2, ignore_eos=True)
        assert (first.usage.cached_tokens, second.result(30).usage.cached_tokens) == (0, 96)
        assert first.usage.total_tokens == 103
        record = web.get(f"/v1/jobs/{second.id}").json()
        assert record["result"]["usage"] == {"prompt_tokens": 101, "completion_tokens": 2, "cached_tokens": 96}
        asked = {"prompt": [[*header, 3], [*header[:40], 4]], "max_tokens": 2, "ignore_eos": True}
        usage = web.post("/v1/completions", json=asked).json()["usage"]
        expected = {"prompt_tokens": 142, "completion_tokens": 4, "total_tokens": 146}
        nothing = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
        expected_details = {"cached_tokens": 96 + 32}
        assert usage == {
            **expected, "prompt_tokens_details": expected_details, "completion_tokens_details": nothing
        }  # fmt: skip
        streamed = {**asked, "prompt": [*header, 5], "stream": True, "stream_options": {"include_usage": True}}
        events = web.post("/v1/completions", json=streamed).text.split("\n\n")
        last = json.loads(events[-3].removeprefix("data: "))
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}
        total = 96 + 96 + 32 + 96
        wait_until(lambda: int(redis.hget(totals_key(queue_name), "cached_tokens") or 0) == total, "all to be counted")
        status = web.get("/status").json()
        assert status["totals"]["cached_tokens"] == total
        assert status["totals"]["prompt_tokens"] == 2 * 101 + 142 + 101
        (worker,) = status["workers"]
        assert worker["prefix_bytes_limit"] == 50_000_000 // A_BLOCK * A_BLOCK
        wait_until(lambda: web.get("/status").json()["workers"][0]["prefix_bytes"] == 3 * A_BLOCK, "it to be told")
        metrics = web.get("/metrics").text.splitlines()
        assert f"fastgpt2_cached_tokens_total {total}.0" in metrics
        assert f'fastgpt2_worker_prefix_bytes{{worker="w-{queue_name}"}} {3.0 * A_BLOCK}' in metrics
        listed = web.get("/v1/jobs").json()["data"]
        assert sorted(job["cached_tokens"] for job in listed) == [0, 32, 96, 96, 96]


def test_a_worker_told_not_to(client: Client, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_PREFIX_MEMORY="0")
    ids = some_ids(12, 100)
    results = [client.enqueue(ids, max_new_tokens=5, ignore_eos=True).result(30) for _ in range(2)]
    assert [result.usage.cached_tokens for result in results] == [0, 0]
    assert results[0].token_ids == results[1].token_ids
