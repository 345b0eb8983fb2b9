"""The instruction sets that compiled operations are written for: how wide a register is, and what multiplies in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What a CPU offers.

    Attributes:
        name: for people, and for the name of what was compiled.
        lanes: float32 numbers in a register.
        sums: registers that may hold sums; the others hold what is multiplied.
        dots: LLVM's name of the instruction that multiplies and adds the words of weights of a kind, for each kind
            that the CPU has one for. Other weights are widened to float32.
        features: what LLVM calls these instructions, to compile for a CPU that this one is not.
    """

    name: str
    lanes: int
    sums: int
    dots: tuple[tuple[str, str], ...] = ()
    features: str = ""

    @property
    def x86(self) -> bool:
        return "avx" in self.name

    def needs(self) -> set[str]:
        """Return the features that the CPU must have, by LLVM's names."""
        return {feature[1:] for feature in self.features.split(",") if feature}

    def dot(self, weights: str) -> str | None:
        return dict(self.dots).get(weights)


# LLVM's intrinsics. bfloat16: four or more lanes of a + b0 * c0 + b1 * c1. int8: a + the sum of four products, of
# unsigned and signed bytes on x86 and of signed ones on ARM.
_BF16_512 = ("bfloat16", "llvm.x86.avx512bf16.dpbf16ps.512")
_VNNI_512 = ("int8", "llvm.x86.avx512.vpdpbusd.512")
_VNNI_256 = ("int8", "llvm.x86.avx512.vpdpbusd.256")
_BF16_ARM = ("bfloat16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16")
_SDOT_ARM = ("int8", "llvm.aarch64.neon.sdot.v4i32.v16i8")

_AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+fma"

# The generic ones come last: `instruction_set_of` takes the first whose features are all there.
INSTRUCTION_SETS = (
    InstructionSet("avx512-bf16-vnni", 16, 24, (_BF16_512, _VNNI_512), f"{_AVX512},+avx512bf16,+avx512vnni"),
    InstructionSet("avx512-vnni", 16, 24, (_VNNI_512,), f"{_AVX512},+avx512vnni"),
    InstructionSet("avx512", 16, 24, (), _AVX512),
    InstructionSet("avx2-vnni", 8, 12, (_VNNI_256,), "+avx2,+fma,+avxvnni"),
    InstructionSet("avx2", 8, 12, (), "+avx2,+fma"),
    InstructionSet("avx", 8, 12, (), "+avx"),
    InstructionSet("neon-bf16-dotprod", 4, 24, (_BF16_ARM, _SDOT_ARM), "+neon,+bf16,+dotprod"),
    InstructionSet("neon-dotprod", 4, 24, (_SDOT_ARM,), "+neon,+dotprod"),
    InstructionSet("neon", 4, 24, (), "+neon"),
    InstructionSet("any", 4, 12),
)


def instruction_set_of(features: Collection[str]) -> InstructionSet:
    """Return the best one of a CPU with these features, by LLVM's names."""
    for offered in INSTRUCTION_SETS:
        if offered.needs().issubset(features):
            return offered
    raise AssertionError("the last instruction set asks for nothing")
