"""Compiled operations are right in every instruction set, give a row its bits whatever stands beside it, and link.

Those of this CPU's instruction sets run, against NumPy in float64. Of the others the assembly is made, and looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgpt2.engine.kernels.activation import ACTIVATIONS, write_activation
from fastgpt2.engine.kernels.attention import BLOCK, AttentionArrays, NewTokens
from fastgpt2.engine.kernels.attention_compiled import CompiledAttention, HeadShape, write_attention
from fastgpt2.engine.kernels.compiled import CompiledProduct
from fastgpt2.engine.kernels.instruction_set import INSTRUCTION_SETS, InstructionSet
from fastgpt2.engine.kernels.ir import Module
from fastgpt2.engine.kernels.layer_norm import layer_norm, write_layer_norm
from fastgpt2.engine.kernels.machine_code import Compiler, MachineCode
from fastgpt2.engine.kernels.object_file import link
from fastgpt2.engine.kernels.operations import LinearShare
from fastgpt2.engine.kernels.panels import (
    COMPILED_WIDTH,
    LARGEST_INT8,
    STORED_TYPES,
    Panels,
    compute_scales,
    narrow,
    to_lines,
    to_panels,
    widen,
)
from fastgpt2.engine.kernels.product import SCALED_TOGETHER, write_product
from fastgpt2.engine.kernels.program import NativeCall, Program, arguments_of, meet

Array = NDArray[np.float32]
Write = Callable[[Module, InstructionSet], None]

HERE = set(Compiler().features)
RUNNABLE = [one for one in INSTRUCTION_SETS if one.needs() <= HERE]
# x86's and ARM's, whatever this CPU is.
TRIPLES = {True: "x86_64-unknown-linux-gnu", False: "aarch64-unknown-linux-gnu"}
# The instruction that the code is about, and the register that it is wide.
EXPECTED = {
    ("avx512-bf16-vnni", "float32"): r"vfmadd\d+ps.*zmm",
    ("avx512-bf16-vnni", "bfloat16"): r"vdpbf16ps.*zmm",
    ("avx512-bf16-vnni", "int8"): r"vpdpbusd.*zmm",
    ("avx512-vnni", "bfloat16"): r"vfmadd\d+ps.*zmm",
    ("avx512-vnni", "int8"): r"vpdpbusd.*zmm",
    ("avx512", "int8"): r"vfmadd\d+ps.*zmm",
    ("avx2-vnni", "int8"): r"\{vex\}\s+vpdpbusd.*ymm",
    ("avx2", "float32"): r"vfmadd\d+ps.*ymm",
    ("avx", "float32"): r"vmulps.*ymm",
    ("neon-bf16-dotprod", "bfloat16"): r"bfdot",
    ("neon-bf16-dotprod", "int8"): r"sdot",
    ("neon-dotprod", "int8"): r"sdot",
    ("neon", "float32"): r"fmla.*4s",
    ("any", "float32"): r"mulps.*xmm|fmla",
}


def compiler_of(instructions: InstructionSet) -> Compiler:
    """Return LLVM for an instruction set: that of this CPU, restricted, or that of another."""
    if instructions in RUNNABLE:
        return Compiler(instructions, features=instructions.features)
    return Compiler(
        instructions, features=instructions.features, triple=TRIPLES[not instructions.name.startswith("neon")]
    )


class Codes:
    """Code that is compiled once for all tests here, by instruction set and unit."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], MachineCode] = {}

    def get(self, instructions: InstructionSet, unit: str, write: Write) -> MachineCode:
        key = instructions.name, unit
        if key not in self._known:
            compiler = compiler_of(instructions)
            self._known[key] = compiler.load(compiler.compile(write))
        return self._known[key]


@pytest.fixture(scope="module")
def codes() -> Codes:
    return Codes()


each_runnable = pytest.mark.parametrize("instructions", RUNNABLE, ids=lambda one: one.name)
each_kind = pytest.mark.parametrize("weights", STORED_TYPES)


def test_this_cpu_has_instruction_sets_to_run() -> None:
    assert INSTRUCTION_SETS[-1] in RUNNABLE
    assert len(RUNNABLE) > 1


@pytest.mark.parametrize(("name", "weights"), EXPECTED, ids=lambda part: part)
def test_the_instructions_are_those_that_the_cpu_has_for_it(name: str, weights: str) -> None:
    (instructions,) = (one for one in INSTRUCTION_SETS if one.name == name)
    compiler = compiler_of(instructions)
    text = compiler.assembly(lambda module, isa: write_product(module, weights, isa))
    # One for each sum of each tile, at least of those with one row.
    assert len(re.findall(EXPECTED[name, weights], text)) > 10


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS, ids=lambda one: one.name)
def test_all_that_is_compiled_can_be_mapped_anywhere(instructions: InstructionSet) -> None:
    """The linker knows all relocations that LLVM makes of this code, on x86 and on ARM."""
    compiler = compiler_of(instructions)
    for weights in STORED_TYPES:
        image = link(compiler.compile(lambda module, isa: write_product(module, weights, isa)))  # noqa: B023
        assert set(image.offsets) == {"pack_rows", "multiply", "embed"}
    assert set(link(compiler.compile(write_attention_64)).offsets) == {"attention"}
    assert set(link(compiler.compile(write_norms)).offsets) == {"layer_norm", "add_layer_norm"}


def write_attention_64(module: Module, instructions: InstructionSet) -> None:
    write_attention(module, instructions, HeadShape(64, 12, 1024))


def write_norms(module: Module, _instructions: InstructionSet) -> None:
    write_layer_norm(module)


# Products


def product_of(codes: Codes, instructions: InstructionSet, weights: str) -> CompiledProduct:
    code = codes.get(instructions, weights, lambda module, isa: write_product(module, weights, isa))
    return CompiledProduct(weights, code)


def stored(weights: str, columns: Array) -> tuple[Panels, NDArray[np.float64]]:
    """Return a matrix as it lies in a packed file, and the numbers that it is."""
    n_in, n_out = columns.shape
    lines = to_lines(to_panels(narrow(weights, columns), COMPILED_WIDTH))
    scales, numbers = None, widen(narrow(weights, columns)).astype(np.float64)
    if weights == "int8":
        scales = np.zeros(len(lines) * COMPILED_WIDTH, np.float32)
        scales[:n_out] = compute_scales(columns)
        numbers = numbers * scales[:n_out]
    return Panels(lines[:, None], n_in, scales), numbers


def rounded(weights: str, instructions: InstructionSet, x: Array) -> NDArray[np.float64]:
    """Return the rows as the CPU multiplies them, by the words of docs/kernels.md."""
    if instructions.dot(weights) is None:
        return x.astype(np.float64)
    if weights == "bfloat16":
        return widen(narrow("bfloat16", x)).astype(np.float64)
    out = np.empty(x.shape, np.float64)
    for at in range(0, x.shape[1], SCALED_TOGETHER):
        group = x[:, at : at + SCALED_TOGETHER].astype(np.float64)
        scale = np.abs(group).max(axis=1, keepdims=True) / LARGEST_INT8
        out[:, at : at + SCALED_TOGETHER] = np.rint(group / np.where(scale > 0, scale, 1)) * scale
    return out


def multiply(product: CompiledProduct, x: Array, panels: Panels, bias: Array | None) -> Array:
    """Multiply rows that lie apart, as in a buffer that is wider, into columns of a wider buffer."""
    rows = x.shape[0]
    wide = np.full((rows, x.shape[1] + 3), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    buffer = np.full((rows, 16 + panels.columns + 8), 7.0, np.float32)
    product.linear(wide, LinearShare(panels, bias, 16), buffer, np.array([rows]))()
    assert (buffer[:, :16] == 7.0).all()
    assert (buffer[:, 16 + panels.columns :] == 7.0).all()
    return buffer[:, 16 : 16 + panels.columns]


@each_runnable
@each_kind
def test_products_are_right_and_a_rows_bits_its_own(codes: Codes, instructions: InstructionSet, weights: str) -> None:
    rng = np.random.default_rng(0)
    product = product_of(codes, instructions, weights)
    for n_out, n_in in [(16, 1), (32, 3), (37, 4), (80, 33), (144, 70), (176, 768), (32, 3072)]:
        panels, numbers = stored(weights, rng.standard_normal((n_in, n_out), np.float32))
        bias = np.zeros(panels.columns, np.float32)
        bias[:n_out] = rng.standard_normal(n_out, np.float32)
        x = rng.standard_normal((60, n_in), np.float32)
        x[:, 0] *= 30  # one that is far larger than the others
        seen = rounded(weights, instructions, x)
        right = seen @ numbers + bias[:n_out]
        # Sums of float32 products err by some units in the last place of the magnitudes that are added. Which of two
        # neighbours a tie is rounded to may differ.
        bound = np.abs(seen) @ np.abs(numbers) * 1e-5 + np.abs(bias[:n_out]) * 1e-6 + 1e-30
        alone = np.concatenate([multiply(product, x[i : i + 1], panels, bias) for i in range(60)])
        assert (np.abs(alone[:, :n_out] - right) <= bound).mean() > 0.999
        assert np.abs(alone[:, :n_out] - right).max() <= np.abs(right).max() * 0.01
        for rows in (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 24, 25, 40, 60):
            np.testing.assert_array_equal(multiply(product, x[:rows], panels, bias), alone[:rows])
        without = multiply(product, x[:2], panels, None)
        np.testing.assert_allclose(without[:, :n_out] + bias[:n_out], alone[:2, :n_out], rtol=1e-4, atol=1e-4)


@each_runnable
@each_kind
def test_what_is_not_finite_is_not_hidden(codes: Codes, instructions: InstructionSet, weights: str) -> None:
    """A network whose numbers overflow is told from one that works, whichever way rows are rounded."""
    product = product_of(codes, instructions, weights)
    panels, _ = stored(weights, np.ones((100, 16), np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((3, 100), np.float32)
        x[1, 70] = bad
        out = multiply(product, x, panels, None)
        assert np.isfinite(out[[0, 2]]).all()
        assert not np.isfinite(out[1]).any()


@each_runnable
@each_kind
def test_embeddings_are_the_columns_of_the_table(codes: Codes, instructions: InstructionSet, weights: str) -> None:
    rng = np.random.default_rng(1)
    product = product_of(codes, instructions, weights)
    for n_embd in (5, 8, 70):
        table, numbers = stored(weights, rng.standard_normal((n_embd, 40), np.float32))
        wpe = rng.standard_normal((9, n_embd), np.float32)
        ids, positions = np.array([39, 0, 17, 17]), np.array([8, 0, 3, 4])
        x = np.zeros((6, n_embd + 2), np.float32)
        scales = wpe if table.scales is None else table.scales
        arguments = arguments_of(*(ids, positions, np.array([4]), table.array, scales, wpe, x, x.strides[0], n_embd))
        NativeCall([(product.code.address("embed"), arguments)], None)()
        np.testing.assert_allclose(x[:4, :n_embd], numbers.T[ids] + wpe[positions], rtol=1e-6, atol=1e-6)
        assert not x[4:].any()
        assert not x[:, n_embd:].any()


def test_no_panels_and_no_rows_are_no_work(codes: Codes) -> None:
    """A process has no panels if there are more processes than panels."""
    product = product_of(codes, RUNNABLE[0], "int8")
    none = Panels(np.empty((0, 1, 2, 64), np.int8), 5, np.empty(0, np.float32))
    assert multiply(product, np.ones((3, 5), np.float32), none, None).shape == (3, 0)
    two, _ = stored("int8", np.ones((5, 32), np.float32))
    x, out = np.ones((1, 5), np.float32), np.full((1, 32), 7.0, np.float32)
    product.linear(x, LinearShare(two, None, 0), out, np.array([0]))()
    assert (out == 7.0).all()


def test_arrays_that_the_code_would_misread_are_refused(codes: Codes) -> None:
    product = product_of(codes, RUNNABLE[0], "int8")
    good, _ = stored("int8", np.ones((5, 48), np.float32))
    x, out = np.ones((2, 5), np.float32), np.empty((2, 48), np.float32)
    product.linear(x, LinearShare(good, None, 0), out, np.array([2]))()
    wrong = [
        good.array.astype(np.float32),
        good.array[:, :, ::-1],
        np.ones((3, 1, 3, 64), np.int8),
        np.ones((3, 1, 2, 32), np.int8),
    ]
    for array in wrong:
        with pytest.raises(ValueError, match="not laid out"):
            product.linear(x, LinearShare(Panels(array, 5, good.scales), None, 0), out, np.array([2]))
    for rows, result in ((x[:, :4], out), (x, out[:, :40]), (x.T, out), (x, out.T)):
        with pytest.raises(ValueError, match="not laid out"):
            product.linear(rows, LinearShare(good, None, 0), result, np.array([2]))


# What stands between two products


@each_runnable
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS)))
def test_activations_are_numpys(codes: Codes, instructions: InstructionSet, name: str) -> None:
    code = codes.get(instructions, name, lambda module, _isa: write_activation(module, name))
    rng = np.random.default_rng(2)
    edges = np.array([0.0, -0.0, 1e-6, -1e-6, 0.6, 0.65, 88, -88, 200, -200, np.inf, np.nan], np.float32)
    numbers = np.concatenate([rng.standard_normal(501).astype(np.float32) * 5, edges])
    expected, got = numbers.copy(), np.stack([numbers, numbers, numbers])
    with np.errstate(all="ignore"):
        ACTIVATIONS[name](expected, np.empty_like(expected))
    arguments = arguments_of(got, got.strides[0], np.array([2]), got.shape[1])
    NativeCall([(code.address("activation"), arguments)], None)()
    np.testing.assert_allclose(got[0], expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(got[1], got[0])
    np.testing.assert_array_equal(got[2], numbers)
    # An element's bits do not depend on its place: vectors and what is left over compute alike.
    shifted = numbers[3:].copy()[None]
    arguments = arguments_of(shifted, shifted.strides[0], np.array([1]), shifted.shape[1])
    NativeCall([(code.address("activation"), arguments)], None)()
    np.testing.assert_array_equal(shifted[0], got[0, 3:])


@each_runnable
@pytest.mark.parametrize("n", [1, 7, 64, 100, 768])
def test_layer_norms_are_numpys(codes: Codes, instructions: InstructionSet, n: int) -> None:
    code = codes.get(instructions, "norms", write_norms)
    rng = np.random.default_rng(3)
    x, added = (rng.standard_normal((5, n), np.float32) * 3 + 1 for _ in range(2))
    weight, bias = rng.standard_normal(n, np.float32), rng.standard_normal(n, np.float32)
    for name, before in (("layer_norm", x), ("add_layer_norm", x + added)):
        expected, mine, out = np.empty_like(x), x.copy(), np.zeros((6, n + 1), np.float32)
        layer_norm(before, weight, bias, np.float32(1e-5), expected, np.empty((5, 1), np.float32))
        arguments = arguments_of(
            *(mine, mine.strides[0], added, added.strides[0], weight, bias, out, out.strides[0]),
            *(np.array([5]), n, 1e-5, 1.0 / n),
        )
        NativeCall([(code.address(name), arguments)], None)()
        np.testing.assert_allclose(out[:5, :n], expected, rtol=1e-4, atol=3e-5)
        np.testing.assert_array_equal(mine, before)
        assert not out[5:].any()


class Attended:
    """New tokens of two sequences, and what float64 makes of them."""

    def __init__(self, dim: int, heads: int) -> None:
        rng = np.random.default_rng(4)
        self.dim, self.heads, self.n = dim, heads, dim * heads
        self.lengths = {2: 70, 0: 45}  # by slot
        self.scale = 0.3
        self.qkv = rng.standard_normal((sum(self.lengths.values()), 3 * self.n + 5), np.float32)

    def first_row(self, slot: int) -> int:
        return 0 if slot == 2 else self.lengths[2]

    def expected(self) -> NDArray[np.float64]:
        q, k, v = (
            self.qkv[:, i * self.n : (i + 1) * self.n].astype(np.float64).reshape(-1, self.heads, self.dim)
            for i in range(3)
        )
        out = np.zeros((len(self.qkv), self.n))
        for slot, length in self.lengths.items():
            first = self.first_row(slot)
            for row in range(first, first + length):
                scores = np.einsum("hd,phd->hp", q[row], k[first : row + 1]) * self.scale
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                shares /= shares.sum(axis=1, keepdims=True)
                out[row] = np.einsum("hp,phd->hd", shares, v[first : row + 1]).ravel()
        return out

    def run(self, code: MachineCode, steps: list[list[tuple[int, int, int]]]) -> Array:
        """Attend steps of (slot, start, length); what a step does not write is no number."""
        blocks = 3
        keys = np.full((3, 2, blocks, self.heads, self.dim, BLOCK), np.nan, np.float32)
        values = np.full((3, 2, self.heads, blocks * BLOCK, self.dim), np.nan, np.float32)
        out = np.full((len(self.qkv), self.n + 3), 7.0, np.float32)
        arrays = AttentionArrays(self.qkv, out, keys, values, [0.0, self.scale])
        half = self.heads // 2
        shares = [CompiledAttention(arrays, heads, code) for heads in ((0, half), (half, self.heads))]
        for step in steps:
            tokens = [NewTokens(slot, at, self.first_row(slot) + at, n) for slot, at, n in step]
            for share in shares:
                share.prepare(tokens)
                share.call(1)()
        assert (out[:, self.n :] == 7.0).all()
        assert np.isnan(keys[:, 0]).all()
        assert np.isnan(keys[1]).all()
        return out[:, : self.n]


@each_runnable
@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (25, 3), (4, 1), (96, 2)])
def test_attention_is_right_and_a_rows_bits_its_own(
    codes: Codes, instructions: InstructionSet, dim: int, heads: int
) -> None:
    shape = HeadShape(dim, heads, 3 * BLOCK)
    code = codes.get(instructions, str(shape), lambda module, isa: write_attention(module, isa, shape))
    attended = Attended(dim, heads)
    whole = attended.run(code, [[(2, 0, 70), (0, 0, 45)]])
    np.testing.assert_allclose(whole, attended.expected(), rtol=1e-5, atol=2e-6)
    one_by_one = [[(slot, at, 1)] for slot, length in attended.lengths.items() for at in range(length)]
    np.testing.assert_array_equal(attended.run(code, one_by_one), whole)
    pieces = [[(0, 0, 7)], [(0, 7, 13), (2, 0, 1)], [(2, 1, 31)], [(2, 32, 38), (0, 20, 1)], [(0, 21, 24)]]
    np.testing.assert_array_equal(attended.run(code, pieces), whole)


# Programs


class Meeting:
    """A place where this process waits for itself: the other one comes when it is waited for asleep."""

    def __init__(self) -> None:
        self.count, self.own, self.other = (memoryview(np.zeros(1, np.int64).data) for _ in range(3))
        self.others, self.arrived_at, self.naps = [self.other], 0.0, 0

    def wait(self) -> None:
        raise AssertionError("compiled programs wait by themselves")

    def wait_asleep(self) -> None:
        self.naps += 1
        self.other[0] = self.count[0]


def test_a_program_goes_on_where_it_waited() -> None:
    meeting, order = Meeting(), list[str]()
    both = meet(meeting)
    program = Program([both, both, lambda: order.append(f"python after {meeting.own[0]}"), both])
    program.run()
    assert (meeting.naps, int(meeting.own[0]), order) == (3, 3, ["python after 2"])
    meeting.other[0] = 5  # it has come twice already
    program.run()
    assert (meeting.naps, int(meeting.own[0])) == (4, 6)
