"""The epilogue of a 1x1 convolution that PyTorch computed, in one pass.

    h[m, n] = scale[n] * act(h[m, n] + bias[n]) + shift[n], in place

m counts the N H W pixels of a channels-last tensor. Where PyTorch's library multiplies faster than
a kernel with this in its epilogue, bias, activation and BatchNorm still need not be three passes:
each element is read once and written once, which is the bound.

One program takes a tile of elements, 32 a thread of four warps. float64 is computed in float64, by
PyTorch's own formulas (see `activation.py`), 8 a thread: erf is 38 multiply-adds, and GELU takes 50
to 70 registers, at 32 a thread 168 to 187.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import operands
from .epilogue import finish

#: Rows and columns of a tile.
TILE, TILE_FLOAT64 = (16, 256), (8, 128)
DTYPES = (*operands.DTYPES, torch.float64)


# M changes with every batch size and says nothing about alignment: no kernel of its own for it, and
# none for M beyond 32 bits.
@triton.jit(do_not_specialize=["M"])
def after_product_kernel(
    h,
    bias,
    scale,
    shift,
    M: tl.int64,
    n_vectors,
    ACT: tl.constexpr,
    VECTOR_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h [M, N], N = n_vectors VECTOR_N (see `operands.vector_width`); one tile a program.

    M may pass 2^31: a tile's start is int64, offsets inside it are int32.
    """
    N = n_vectors * VECTOR_N
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_row = (tile // tiles_n).to(tl.int64) * BLOCK_M
    columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    inside = (m < rows_left)[:, None] & (columns < N)[None, :]
    place = h + first_row * N + (m[:, None] * N + columns[None, :])
    sums = tl.load(place, mask=inside, other=0.0)
    if h.dtype.element_ty != tl.float64:
        sums = sums.to(tl.float32)
    values = finish(sums, bias, scale, shift, columns, N, ACT)
    tl.store(place, values.to(h.dtype.element_ty), mask=inside)


def after_product_(
    h: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """``scale * act(h + bias) + shift`` written over h, on the current device and stream.

    Args:
        h: (N, D, H, W), float64, float32, float16 or bfloat16, channels-last without gaps: a 1x1
            convolution's result, without its bias; overwritten.
        bias: (D,) of a floating dtype, or None.
        scale, shift: (D,) float32, for float64 h float64.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.

    Returns:
        h. Computed in float32, of float64 in float64, rounded once.

    Raises:
        ValueError: an operand's shape, dtype, device or layout does not fit.
    """
    images, N, height, width = h.shape
    if h.dtype not in DTYPES:
        raise ValueError(
            f"after_product_: h must be float64, float32, float16 or bfloat16, got {h.dtype}"
        )
    operands.check_vectors("after_product_", h, N, bias, scale, shift, act)
    operands.result("after_product_", h, (images, N, height, width), h)
    M = images * height * width
    if h.numel() == 0:
        return h
    vector_n = operands.vector_width(N)
    block_m, block_n = TILE_FLOAT64 if h.dtype == torch.float64 else TILE
    after_product_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        h,
        bias,
        scale,
        shift,
        M,
        N // vector_n,
        ACT=act,
        VECTOR_N=vector_n,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return h
