"""Activations inside a GPU kernel, in float32, without calls or branches.

float64 is computed by PyTorch's own formulas, with the compiler's erf and exp: the polynomial and
the machine's ex2 are of float32's precision.

What IEEE arithmetic gives PyTorch's formula is kept: NaN stays NaN, relu(NaN) is NaN,
gelu(+inf) = +inf, and gelu, silu and hardswish of -inf are NaN (-inf * 0).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(h):
    """GELU in its erf form, h * Phi(h) with Phi the normal distribution.

    Phi(-u) = 2^p(u) for u = |h|, p a polynomial of degree 8 fitted so that u * Phi(-u) is right to
    7e-9; Phi(h) is that or 1 minus that. No clamp: p falls without end, and far out Phi is exactly
    0 or 1. 8 multiply-adds, one ex2 and four more, where erff takes 24 and a branch. Errors on
    [-12, 12]: at most 3.8e-7 (PyTorch's erf form: 3.7e-7), left of -1.5 at most 3.5e-8 (2.6e-7).
    """
    u = tl.abs(h)
    p = u * -1.690397994e-06 + 2.508325997e-05
    p = p * u - 1.144624184e-04
    p = p * u - 3.233428579e-04
    p = p * u + 7.333385292e-03
    p = p * u - 5.271419883e-02
    p = p * u - 4.591154456e-01
    p = p * u - 1.151123285e00
    p = p * u - 9.999988739e-01
    tail = tl.exp2(p)
    return h * tl.where(h < 0, tail, 1.0 - tail)


@triton.jit
def _gelu_float64(h):
    """GELU by erf, as PyTorch has it: h / 2 * (1 + erf(h / sqrt(2)))."""
    return h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def activate(h, ACT: tl.constexpr):
    """The activation named ``ACT`` of a float32 or float64 tensor of any shape, elementwise.

    ``ACT`` is a name in `convmixer_fast.arch.ACTIVATIONS`: gelu, relu, silu, hardswish, identity.
    """
    if ACT == "gelu":
        if h.dtype == tl.float64:
            return _gelu_float64(h)
        else:
            return _gelu(h)
    elif ACT == "relu":
        # Not maximum(): it would make 0 of NaN.
        return tl.where(h < 0, 0.0, h)
    elif ACT == "silu":
        if h.dtype == tl.float64:
            return h / (1.0 + tl.exp(-h))
        else:
            # exp(-h) as 2^(-h log2 e): the machine's own instruction.
            return h / (1.0 + tl.exp2(h * -1.4426950408889634))
    elif ACT == "hardswish":
        # The factor h keeps NaN where minimum and maximum lose it.
        return h * tl.minimum(tl.maximum(h + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return h
