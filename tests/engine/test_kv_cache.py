"""The KV cache's memory is reserved, refused and given back, and never exceeds its limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.machines import needs_helpers

from fastgpt2 import Engine
from fastgpt2.engine.decoding.decoder import Decoder
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.kernels.attention import BLOCK, MOST_PADDING
from fastgpt2.engine.machine import fair_share_of_kv_memory, usable_memory
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.network.arena import PAGE, Arena
from fastgpt2.engine.network.kv_cache import KVCache, sequence_bytes
from fastgpt2.errors import BadRequest

DEMO = read_config(DEMO_FOLDER)
# 5 layers x 224 numbers x keys and values x 4 bytes. In this model a layer's block, and a head's values of it, are
# whole pages.
DEMO_POSITION = 5 * 224 * 2 * 4


def cache_of(config: GPT2Config, n_slots: int, positions: int, shared: bool = False) -> KVCache:
    """Make a cache whose memory holds this many positions of the demo model."""
    arena = Arena(KVCache.specs(config, n_slots), shared=shared)
    return KVCache(config, n_slots, arena, positions * DEMO_POSITION)


def test_bytes_of_a_sequence_by_hand() -> None:
    assert sequence_bytes(DEMO, 0) == 0
    assert sequence_bytes(DEMO, 1) == BLOCK * DEMO_POSITION
    assert sequence_bytes(DEMO, 33) == 2 * BLOCK * DEMO_POSITION
    assert sequence_bytes(DEMO) == 512 * DEMO_POSITION
    assert sequence_bytes(GPT2Config()) == 1024 * 12 * 768 * 2 * 4
    # 3 heads of 5: a block has 640 bytes a head, 1920 a layer. There are two blocks, and no run begins at a page.
    odd = GPT2Config(vocab_size=10, n_positions=40, n_embd=15, n_layer=2, n_head=3)
    assert sequence_bytes(odd, 1) == sequence_bytes(odd, 40) == (3 + 3) * PAGE


def test_reservations_are_counted_refused_and_given_up() -> None:
    cache = cache_of(DEMO, n_slots=8, positions=512)
    assert cache.bytes_limit == 512 * DEMO_POSITION
    first, second = cache.allot(300), cache.allot(100)
    assert cache.bytes_reserved == (320 + 128) * DEMO_POSITION
    assert cache.has_room(64)
    assert not cache.has_room(65)
    assert not cache.has_room()
    assert cache.free_slots == 6
    with pytest.raises(IndexError, match="memory for keys and values is taken"):
        cache.allot(65)
    assert cache.free_slots == 6
    cache.release(second)
    assert cache.bytes_reserved == 320 * DEMO_POSITION, "nothing was written there"
    assert cache.has_room(192)
    cache.release(first)
    assert cache.bytes_reserved == 0
    assert cache.allot() == 0


def test_what_free_slots_keep_counts_and_makes_way() -> None:
    cache = cache_of(DEMO, n_slots=4, positions=512)
    slots = [cache.allot(128) for _ in range(4)]
    for slot in slots:
        cache.lengths[slot] = 120
        cache.release(slot)
    assert cache.bytes_reserved == 512 * DEMO_POSITION
    # The slot takes over its own memory: nothing has to go.
    assert cache.allot(100) == 0
    assert cache.bytes_reserved == 512 * DEMO_POSITION
    # 128 positions more than the 128 it has: one of the others gives way, the last.
    assert cache.allot(256) == 1
    assert cache.bytes_reserved == 512 * DEMO_POSITION
    assert not cache.has_room(129)
    # What slot 0 keeps from before is more than it needs now.
    cache.release(0)
    cache.release(1)
    slots = [cache.allot(32) for _ in range(4)]
    assert cache.bytes_reserved == (128 + 128 + 128 + 32) * DEMO_POSITION
    for slot in slots:
        cache.release(slot)
    assert cache.allot() == 0, "the whole of the limit, even though every slot kept something"
    assert cache.bytes_reserved == 512 * DEMO_POSITION


def test_free_slots_keep_a_quarter_of_all_slots_together() -> None:
    cache = cache_of(DEMO, n_slots=4, positions=4 * 512)
    slots = [cache.allot() for _ in range(4)]
    for slot, length in zip(slots, (448, 64, 320, 32), strict=True):
        cache.lengths[slot] = length
    for slot, kept in ((0, 448), (1, 448 + 64)):
        cache.release(slot)
        # The other slots are reserved as far as they may grow.
        assert cache.bytes_reserved == (kept + 512 * (3 - slot)) * DEMO_POSITION
    # Four quarters are 512 positions. The slots that would be used last give up theirs, until the rest is within 512.
    cache.release(2)
    assert cache.bytes_reserved == (448 + 64 + 512) * DEMO_POSITION
    cache.release(3)
    assert cache.bytes_reserved == (448 + 64) * DEMO_POSITION
    assert cache.allot(448) == 0
    assert cache.bytes_reserved == (448 + 64) * DEMO_POSITION


def test_memory_that_processes_share_is_reserved_as_far_as_it_is_read() -> None:
    cache = cache_of(DEMO, n_slots=2, positions=512, shared=True)
    cache.allot(100)
    assert cache.bytes_reserved == 192 * DEMO_POSITION
    assert MOST_PADDING == 64
    cache.release(0)
    cache.allot(500)
    assert cache.bytes_reserved == 512 * DEMO_POSITION


def test_a_copy_has_the_bits_of_its_original() -> None:
    cache = cache_of(DEMO, n_slots=3, positions=512)
    source, other = cache.allot(100), cache.allot(100)
    rng = np.random.default_rng(0)
    for number in range(3):
        for part in cache.block(source, number):
            part[:] = rng.standard_normal(part.shape)
    cache.lengths[source] = 90
    assert cache.copy(source, other, BLOCK + 1) == BLOCK + 1 == cache.lengths[other]
    for ours, theirs in zip(cache.block(other, 0), cache.block(source, 0), strict=True):
        assert np.array_equal(ours, theirs)
    keys, values = cache.block(other, 1)
    assert np.array_equal(keys[..., 0], cache.block(source, 1)[0][..., 0])
    assert np.array_equal(values[:, :, 0], cache.block(source, 1)[1][:, :, 0])
    assert not any(part.any() for part in cache.block(other, 2)), "no more was copied than was asked for"
    with pytest.raises(ValueError, match=f"slot {source} has 90 positions, not 91"):
        cache.copy(source, other, 91)


def test_fewer_slots_may_be_used_than_there_are() -> None:
    cache = cache_of(DEMO, n_slots=4, positions=2048)
    slot = cache.allot(10)
    with pytest.raises(ValueError, match="slots are in use"):
        cache.use_slots(2)
    cache.lengths[slot] = 10
    cache.release(slot)
    cache.use_slots(2)
    assert (cache.usable_slots, cache.free_slots, cache.bytes_reserved) == (2, 2, 0)
    assert [cache.allot(), cache.allot()] == [0, 1]
    assert not cache.has_room(1)


def test_a_decoder_takes_in_what_there_is_memory_for() -> None:
    engine = Engine.load("demo", max_batch=4, kv_memory=sequence_bytes(DEMO))
    decoder: Decoder = engine.decoder
    assert decoder.model.cache.bytes_limit == 512 * DEMO_POSITION
    large = decoder.prepare(GenerationRequest((7,) * 400, 16, ignore_eos=True))
    small = decoder.prepare(GenerationRequest((7,) * 40, 16, ignore_eos=True))
    running = decoder.admit(large)
    assert not decoder.has_room(large)
    assert decoder.has_room(small)
    decoder.admit(small)
    assert decoder.model.cache.bytes_reserved == (416 + 64) * DEMO_POSITION
    assert not decoder.has_room(small)
    with pytest.raises(IndexError, match="memory for keys and values is taken"):
        decoder.admit(small)
    assert len(decoder.running) == 2
    decoder.finish(running)
    assert decoder.has_room(small)
    while decoder.running:
        decoder.step()
    # Three of these at once would need 1,248 positions: they come one after the other.
    expected = engine.generate([7] * 400, max_new_tokens=16, ignore_eos=True).token_ids
    results = engine.generate([[7] * 400] * 3, max_new_tokens=16, ignore_eos=True)
    assert [result.token_ids for result in results] == [expected] * 3


def test_too_little_for_one_sequence_is_refused() -> None:
    needed = 512 * DEMO_POSITION
    with pytest.raises(
        BadRequest, match=f"kv_memory is {needed - 1} bytes; one sequence .*512 positions needs {needed}"
    ):
        Engine.load("demo", kv_memory=needed - 1)
    assert Engine.load("demo", kv_memory=needed).generate([7] * 511).usage.total_tokens == 512


def test_a_share_of_the_memory_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fair_share_of_kv_memory() == usable_memory() // 4
    assert Engine.load("demo").decoder.model.cache.bytes_limit == usable_memory() // 4
    monkeypatch.setenv("FASTGPT2_POOL_WORKERS", "3")
    assert fair_share_of_kv_memory() == usable_memory() // 4 // 3
    monkeypatch.setenv("FASTGPT2_POOL_WORKERS", str(1 << 40))
    assert Engine.load("demo").decoder.model.cache.bytes_limit == sequence_bytes(DEMO), (
        "never less than for one sequence"
    )


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/a/b\n", {"a/memory.max": "500000\n", "a/b/memory.max": "max\n"}, 500_000),
        ("0::/a/b\n", {"memory.max": "300000\n", "a/b/memory.max": "400000\n"}, 300_000),
        ("4:cpu,memory:/c\n0::/\n", {"memory/c/memory.limit_in_bytes": "700000\n"}, 700_000),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/\n", {}, None),
    ],
    ids=range(7),
)
def test_what_control_groups_allow(tmp_path: Path, groups: str, limits: dict[str, str], expected: int | None) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory(tmp_path) == (physical if expected is None else expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_huge_page_commits_more_than_is_written() -> None:
    arena = Arena(KVCache.specs(DEMO, 16))
    KVCache(DEMO, 16, arena)
    for name in ("keys", "values"):
        address = arena[name].ctypes.data
        flags = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            bounds = line.split(" ")[0].split("-")
            if len(bounds) == 2:
                inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
            elif line.startswith("VmFlags:") and inside:
                flags = line
        assert " nh" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists(), name


# Gives a decoder more sequences than there is memory for, long and short ones mixed. Prints how much more the process
# came to hold than after every buffer had been in use.
FILL = """
import os, random, sys
from fastgpt2 import Engine
from fastgpt2.engine.decoding.records import GenerationRequest

def held():
    if network._arena.fd is not None:
        return os.fstat(network._arena.fd).st_blocks * 512
    lines = open("/proc/self/status").read().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

threads, kv_memory = map(int, sys.argv[1:])
engine = Engine.load("demo", max_batch=16, threads=threads, kv_memory=kv_memory, prefix_memory=0)
decoder, network = engine.decoder, engine.decoder.model
assert network.wait_until_ready()
engine.generate([7] * 500, max_new_tokens=1)
engine.generate([[7]] * 16, max_new_tokens=2, ignore_eos=True)
network.cache.use_slots(16)  # this gives all memory of keys and values back
before = held()
dice, most, reserved, together = random.Random(1), 0, 0, 0
lengths = [dice.choice([20, 120, 470]) for _ in range(30)]
waiting = [decoder.prepare(GenerationRequest((7,) * length, 16, ignore_eos=True)) for length in lengths]
while waiting or decoder.running:
    while waiting and decoder.has_room(waiting[-1]):
        decoder.admit(waiting.pop())
    decoder.step()
    together = max(together, len(decoder.running))
    reserved = max(reserved, decoder.model.cache.bytes_reserved)
    most = max(most, held() - before)
print(most, reserved, together)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=needs_helpers)])
def test_the_process_stays_within_the_limit(threads: int) -> None:
    limit = 2 * sequence_bytes(DEMO)
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(threads), str(limit)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    most, reserved, together = map(int, done.stdout.split())
    assert reserved <= limit
    # The process allocates little else meanwhile.
    assert most <= limit + (1 << 20)
    assert most >= limit // 2, "else nothing was tested"
    assert together > 2
