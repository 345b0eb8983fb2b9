"""The activation functions of the inner layer, by the names that transformers has for them.

Each has a NumPy form, which works in place with scratch of x's shape, and a compiled form, which makes a vector of a
vector. gelu_fast, gelu_new and gelu_pytorch_tanh are one formula. Source: `transformers/activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.panels import Array

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.ir import Code, Module, Value

# Abramowitz & Stegun 7.1.26: erf(x) to within 1.5e-7.
_ERF_SCALE = 0.3275911
_ERF_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)

# Cephes' tanhf (Moshier 1992): the polynomial below 0.625, where 1 - 2 / (exp(2 x) + 1) would lose digits.
_TANH_POLYNOMIAL = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_SMALL = 0.625


def gelu_new(x: Array, scratch: Array) -> None:
    """Apply Hendrycks & Gimpel 2016's tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    np.multiply(x, x, out=scratch)
    scratch *= np.float32(0.044715 * math.sqrt(2.0 / math.pi))
    scratch += np.float32(math.sqrt(2.0 / math.pi))
    scratch *= x
    np.tanh(scratch, out=scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def _compiled_gelu_new(code: Code, x: Value) -> Value:
    # 0.5 (1 + tanh(y)) is the sigmoid of 2 y.
    twice = code.fma(x * x, 2 * 0.044715 * math.sqrt(2.0 / math.pi), 2 * math.sqrt(2.0 / math.pi)) * x
    return x * _sigmoid_of(code, twice)


def gelu(x: Array, scratch: Array) -> None:
    """Multiply x with the normal distribution function of x."""
    np.multiply(x, np.float32(math.sqrt(0.5)), out=scratch)
    scratch[...] = _erf(scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def _erf(x: Array) -> NDArray[np.float64]:
    """Return erf(x), which numpy lacks; float64 inside."""
    magnitude = np.abs(x, dtype=np.float64)
    t = 1.0 / (1.0 + _ERF_SCALE * magnitude)
    poly = np.zeros_like(t)
    for coefficient in _ERF_POLYNOMIAL:
        poly = (poly + coefficient) * t
    result: NDArray[np.float64] = np.copysign(1.0 - poly * np.exp(-magnitude * magnitude), x)
    return result


def _compiled_gelu(code: Code, x: Value) -> Value:
    magnitude = code.absolute(x) * math.sqrt(0.5)
    t = 1.0 / code.fma(magnitude, _ERF_SCALE, 1.0)
    poly = t * _ERF_POLYNOMIAL[0]
    for coefficient in _ERF_POLYNOMIAL[1:]:
        poly = (poly + coefficient) * t
    # What the normal distribution function lacks to 1 at |x|, and what it is at -|x|.
    tail = poly * code.exp(magnitude * magnitude * -1.0) * 0.5
    return x * code.where(x < 0.0, tail, 1.0 - tail)


def quick_gelu(x: Array, scratch: Array) -> None:
    """Multiply x with the sigmoid of 1.702 x."""
    np.multiply(x, np.float32(1.702), out=scratch)
    _sigmoid(scratch)
    x *= scratch


def _compiled_quick_gelu(code: Code, x: Value) -> Value:
    return x * _sigmoid_of(code, x * 1.702)


def silu(x: Array, scratch: Array) -> None:
    """Multiply x with the sigmoid of x."""
    scratch[...] = x
    _sigmoid(scratch)
    x *= scratch


def _compiled_silu(code: Code, x: Value) -> Value:
    return x * _sigmoid_of(code, x)


def _sigmoid(x: Array) -> None:
    # By tanh, which saturates where exp would overflow.
    x *= np.float32(0.5)
    np.tanh(x, out=x)
    x += np.float32(1.0)
    x *= np.float32(0.5)


def _sigmoid_of(code: Code, x: Value) -> Value:
    return 1.0 / (code.exp(x * -1.0) + 1.0)


def relu(x: Array, scratch: Array) -> None:  # noqa: ARG001  (as the others)
    """Replace what is negative by zero."""
    np.maximum(x, np.float32(0.0), out=x)


def _compiled_relu(code: Code, x: Value) -> Value:
    return code.where(x < 0.0, 0.0, x)


def tanh(x: Array, scratch: Array) -> None:  # noqa: ARG001
    """Replace x by its hyperbolic tangent."""
    np.tanh(x, out=x)


def _compiled_tanh(code: Code, x: Value) -> Value:
    magnitude = code.absolute(x)
    square = x * x
    poly = code.floats(_TANH_POLYNOMIAL[0], x.lanes)
    for coefficient in _TANH_POLYNOMIAL[1:]:
        poly = code.fma(poly, square, coefficient)
    small = code.fma(poly * square, x, x)
    # Never beyond 1, whatever exp is at most.
    large = 1.0 - 2.0 / (code.exp(magnitude * 2.0) + 1.0)
    return code.where(magnitude < _TANH_SMALL, small, code.copy_sign(large, x))


ACTIVATIONS: dict[str, Callable[[Array, Array], None]] = {
    "gelu_new": gelu_new,
    "gelu_fast": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}

_COMPILED: dict[Callable[[Array, Array], None], Callable[[Code, Value], Value]] = {
    gelu_new: _compiled_gelu_new,
    gelu: _compiled_gelu,
    quick_gelu: _compiled_quick_gelu,
    relu: _compiled_relu,
    silu: _compiled_silu,
    tanh: _compiled_tanh,
}


def write_activation(module: Module, name: str) -> None:
    """Write the operation `activation`, in place: x, bytes from row to row, where the number of rows
    stands, columns."""
    code = module.operation("activation")
    x, stride, rows, columns = code.arguments("pini")
    function = _COMPILED[ACTIVATIONS[name]]
    with code.loop(0, rows) as row:
        one = x + row.index * stride
        for at, lanes in code.each(columns, 2 * code.module.lanes):
            code.store(function(code, code.load_floats(one + at, lanes)), one + at)
    code.end()
