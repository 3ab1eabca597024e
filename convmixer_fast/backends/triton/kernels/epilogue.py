"""The order of tiles and the epilogue of a tile, which both GEMMs share.

`pointwise.py` and `stem.py` differ in where their left operand comes from. After the last
multiply-add they do the same: bias, activation, BatchNorm, one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a program's tile, all int32: columns within groups of ``GROUP_M`` rows.

    Programs that run side by side then read few different rows of either operand, and those stay
    in the L2 cache: a wave of P = GROUP_M^2 tiles reads 2 GROUP_M tile rows, in plain order P + 1.
    """
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def finish(sums, bias, scale, shift, columns, N, ACT: tl.constexpr):
    """scale * act(sums + bias) + shift on a tile [rows, columns] of float32 or float64 sums.

    bias: pointer to N values of any floating dtype, or None; scale, shift: pointers to N of the
    sums' dtype; columns: int32 numbers of the tile's columns. Columns past N hold nothing of use.
    """
    inside = columns < N
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0.0).to(sums.dtype)[None, :]
    a = tl.load(scale + columns, mask=inside, other=0.0)
    b = tl.load(shift + columns, mask=inside, other=0.0)
    return activate(sums, ACT) * a[None, :] + b[None, :]
