"""The small functions that a GPT-2 is made of, in place: float32, shapes beside each signature.

Sources: Radford et al. 2019; `transformers/models/gpt2/modeling_gpt2.py` and `transformers/activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.weights import LayerNorm

Array = NDArray[np.float32]


def layer_norm(x: Array, norm: LayerNorm, epsilon: np.float32, out: Array, scale: Array) -> None:
    """Ba et al. 2016, with the biased variance, as torch.nn.LayerNorm.

    x, out [rows, n_embd]; scale [rows, 1], overwritten.
    """
    share = np.float32(1.0 / x.shape[1])
    np.add.reduce(x, axis=1, keepdims=True, out=scale)
    scale *= share
    np.subtract(x, scale, out=out)
    np.vecdot(out, out, out=scale[:, 0])
    scale *= share
    scale += epsilon
    np.sqrt(scale, out=scale)
    out /= scale
    out *= norm.weight
    out += norm.bias


def gelu_new(x: Array, scratch: Array) -> None:
    """The tanh approximation of Hendrycks & Gimpel 2016: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    np.multiply(x, x, out=scratch)
    scratch *= np.float32(0.044715 * math.sqrt(2.0 / math.pi))
    scratch += np.float32(math.sqrt(2.0 / math.pi))
    scratch *= x
    np.tanh(scratch, out=scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def gelu(x: Array, scratch: Array) -> None:
    """x times the normal distribution function of x."""
    np.multiply(x, np.float32(math.sqrt(0.5)), out=scratch)
    scratch[...] = _erf(scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def _erf(x: Array) -> NDArray[np.float64]:
    """Abramowitz & Stegun 7.1.26, of absolute error below 1.5e-7 (numpy has no erf); float64 inside."""
    magnitude = np.abs(x, dtype=np.float64)
    t = 1.0 / (1.0 + 0.3275911 * magnitude)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    result: NDArray[np.float64] = np.copysign(1.0 - poly * np.exp(-magnitude * magnitude), x)
    return result


def quick_gelu(x: Array, scratch: Array) -> None:
    np.multiply(x, np.float32(1.702), out=scratch)
    _sigmoid(scratch)
    x *= scratch


def silu(x: Array, scratch: Array) -> None:
    scratch[...] = x
    _sigmoid(scratch)
    x *= scratch


def _sigmoid(x: Array) -> None:
    # By way of tanh, which saturates where exp would overflow.
    x *= np.float32(0.5)
    np.tanh(x, out=x)
    x += np.float32(1.0)
    x *= np.float32(0.5)


def relu(x: Array, scratch: Array) -> None:  # noqa: ARG001  (as the others)
    np.maximum(x, np.float32(0.0), out=x)


def tanh(x: Array, scratch: Array) -> None:  # noqa: ARG001
    np.tanh(x, out=x)


# In place, with scratch of x's shape. gelu_fast, gelu_new and gelu_pytorch_tanh are one formula under three names.
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
