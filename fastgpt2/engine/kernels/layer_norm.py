"""Layer norm, and the addition of what a block has computed before it: Ba et al. 2016, as torch.nn.LayerNorm.

The variance is the biased one. `layer_norm` is NumPy's form; `write_layer_norm` writes the compiled one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastgpt2.engine.kernels.panels import Array

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.ir import Code, Module, Value


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: np.float32, out: Array, scale: Array) -> None:
    """Normalize rows. x, out [rows, n]; weight, bias [n]; scale [rows, 1], overwritten."""
    per_column = np.float32(1.0 / x.shape[1])
    np.add.reduce(x, axis=1, keepdims=True, out=scale)
    scale *= per_column
    np.subtract(x, scale, out=out)
    np.vecdot(out, out, out=scale[:, 0])
    scale *= per_column
    scale += epsilon
    np.sqrt(scale, out=scale)
    out /= scale
    out *= weight
    out += bias


def write_layer_norm(module: Module) -> None:
    """Write the operations `layer_norm` and `add_layer_norm`, which first adds other rows to the rows, in place.

    Arguments: x, bytes from row to row, the rows to add, bytes from row to row, weight, bias, out, bytes from row to
    row, where the number of rows stands, columns, epsilon, 1 / columns.
    """
    for name, adds in (("layer_norm", False), ("add_layer_norm", True)):
        code = module.operation(name)
        x, x_stride, added, added_stride, weight, bias, out, out_stride, rows, n, epsilon, share = code.arguments(
            "pipipppiniff"
        )
        with code.loop(0, rows) as row:
            one = x + row.index * x_stride
            if adds:
                _write_addition(code, one, added + row.index * added_stride, n)
            mean = _write_sum(code, one, n, None) * share
            variance = _write_sum(code, one, n, mean) * share
            scale = code.constant_float(1.0) / code.sqrt(variance + epsilon)
            _write_scaling(code, (one, weight, bias, out + row.index * out_stride), n, mean, scale)
        code.end()


def _write_addition(code: Code, x: Value, added: Value, n: Value) -> None:
    for at, lanes in code.each(n, 4 * code.module.lanes):
        code.store(code.load_floats(x + at, lanes) + code.load_floats(added + at, lanes), x + at)


def _write_sum(code: Code, x: Value, n: Value, mean: Value | None) -> Value:
    """Write the sum of a row, or of the squares of its distances from the mean: by lanes, then what is left over."""

    def term(at: Value, lanes: int) -> Value:
        number = code.load_floats(x + at, lanes)
        return number if mean is None else (number - mean) * (number - mean)

    wide = 4 * code.module.lanes
    with code.loop(0, n, wide, [code.floats(0.0, wide)]) as many:
        many.values[0] = many.values[0] + term(many.index * 4, wide)
    with code.loop(many.index, n, 1, [code.sum(many.values[0])]) as one:
        one.values[0] = one.values[0] + term(one.index * 4, 1)
    return one.values[0]


def _write_scaling(code: Code, places: tuple[Value, Value, Value, Value], n: Value, mean: Value, scale: Value) -> None:
    x, weight, bias, out = places
    for at, lanes in code.each(n, 4 * code.module.lanes):
        number = (code.load_floats(x + at, lanes) - mean) * scale
        code.store(code.fma(number, code.load_floats(weight + at, lanes), code.load_floats(bias + at, lanes)), out + at)
