"""The pure functions that a GPT-2 is made of. float32 in, float32 out; shapes beside each signature.

Sources: Radford et al. 2019; `transformers/models/gpt2/modeling_gpt2.py` and `transformers/activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.weights import LayerNorm, Linear

Array = NDArray[np.float32]


def linear(x: Array, layer: Linear) -> Array:  # [rows, n_in] -> [rows, n_out]
    y: Array = x @ layer.weight
    y += layer.bias
    return y


def layer_norm(x: Array, norm: LayerNorm, epsilon: float) -> Array:  # [rows, n_embd] -> [rows, n_embd]
    """Ba et al. 2016, with the biased variance, as torch.nn.LayerNorm."""
    centred: Array = x - x.mean(axis=-1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred)[:, None] / np.float32(x.shape[-1])
    centred *= 1.0 / np.sqrt(variance + np.float32(epsilon))
    centred *= norm.weight
    centred += norm.bias
    return centred


def softmax_in_place(x: Array) -> None:  # over the last axis
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)


def gelu_new(x: Array) -> Array:
    """The tanh approximation of Hendrycks & Gimpel 2016: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    inner: Array = x * x
    inner *= np.float32(0.044715)
    inner += np.float32(1.0)
    inner *= x
    inner *= np.float32(math.sqrt(2.0 / math.pi))
    np.tanh(inner, out=inner)
    inner += np.float32(1.0)
    inner *= x
    inner *= np.float32(0.5)
    return inner


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x."""
    result: Array = _erf(x * np.float32(math.sqrt(0.5)))
    result += np.float32(1.0)
    result *= x
    result *= np.float32(0.5)
    return result


def _erf(x: Array) -> Array:
    """Abramowitz & Stegun 7.1.26, of absolute error below 1.5e-7 (numpy has no erf); float64 inside."""
    magnitude = np.abs(x, dtype=np.float64)
    t = 1.0 / (1.0 + 0.3275911 * magnitude)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    result: Array = np.copysign(1.0 - poly * np.exp(-magnitude * magnitude), x).astype(np.float32)
    return result


def quick_gelu(x: Array) -> Array:
    return x * _sigmoid(np.float32(1.702) * x)


def silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _sigmoid(x: Array) -> Array:
    # By way of tanh, which saturates where exp would overflow.
    return np.float32(0.5) * (np.float32(1.0) + tanh(np.float32(0.5) * x))


def relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0.0))


def tanh(x: Array) -> Array:
    result: Array = np.tanh(x)
    return result


# gelu_fast, gelu_new and gelu_pytorch_tanh are one formula under the names of three implementations.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
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
