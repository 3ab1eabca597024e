"""The pointwise half on a GPU: a GEMM with the rest of the half as its epilogue.

    out[m, d] = scale[d] * act(sum_c x[m, c] * weight[d, c] + bias[d]) + shift[d]

m counts the N H W pixels of a channels-last tensor, whose channels are neighbours in memory: both
operands are row-major along the sum, which is what the tensor cores' loads want. Without fusion,
activation and BatchNorm would each read and write the whole tensor once more.

One program computes BLOCK_M x BLOCK_N outputs and walks the sum in steps of BLOCK_K. A step moves
(BLOCK_M + BLOCK_N) BLOCK_K elements to shared memory for BLOCK_M BLOCK_N BLOCK_K multiply-adds:
64 a element at 128 x 128, in bf16 32 a byte. num_stages - 1 steps are on their way at once, copied
asynchronously. The float32 sums stay in registers: 128 a thread at 128 x 128 and four warps.

Two kernels differ in how tiles are addressed: by pointers, for every GPU and every shape, or by
tensor descriptors, which the copy engine (TMA) of sm_90 and later reads.

Source: Trockman and Kolter 2022, section 2: ``BN(sigma(ConvPointwise(z)))``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import support
from ..configs import PointwiseConfig, lookup_pointwise
from ..precision import dot_precision
from ..support import cdiv
from . import operands
from .epilogue import finish, tile_of
from .launch import launch


# M changes with every batch size and says nothing about alignment: no kernel of its own for it, and
# none for M beyond 32 bits.
@triton.jit(do_not_specialize=["M"])
def pointwise_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    M: tl.int64,
    n_vectors,
    k_vectors,
    stride_vectors,
    ACT: tl.constexpr,
    VECTOR_N: tl.constexpr,
    VECTOR_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x [M, K] with rows ``stride`` apart, weight [N, K], out [M, N]; one tile a program.

    N = n_vectors VECTOR_N, K = k_vectors VECTOR_K, stride = stride_vectors VECTOR_K (see
    `operands.vector_width`). M may pass 2^31, and so may M * stride: a tile's start is int64,
    offsets inside it are int32. WIDEN: multiply in float32 (Triton's interpreter).

    Rows and columns past the end read the last one again instead of nothing: their sums are thrown
    away, and the copies of the loop need no predicate. Only the sum's own tail is masked.
    """
    N = n_vectors * VECTOR_N
    K = k_vectors * VECTOR_K
    stride = stride_vectors * VECTOR_K
    tiles_m = tl.cdiv(M, BLOCK_M).to(tl.int32)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n * BLOCK_N
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    columns_left = tl.minimum(N - first_column, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    rows = tl.minimum(m, rows_left - 1)
    columns = tl.minimum(n, columns_left - 1)
    x_tile = x + first_row * stride + (rows[:, None] * stride + k[None, :])
    w_tile = weight + first_column.to(tl.int64) * K + (columns[None, :] * K + k[:, None])
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=k[None, :] < K - start, other=0.0)
            b = tl.load(w_tile, mask=k[:, None] < K - start, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    values = finish(sums, bias, scale, shift, first_column + n, N, ACT)
    o_tile = out + first_row * N + first_column + (m[:, None] * N + n[None, :])
    inside = (m < rows_left)[:, None] & (n < columns_left)[None, :]
    tl.store(o_tile, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def pointwise_descriptor_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    M,
    N,
    K,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The same by tensor descriptors: x [M, K], weight [N, K], out [M, N]; M below 2^31.

    Reads past an edge give zero and writes past it are dropped by the copy engine: no masks.
    With HALVES the tile ends in two halves of its columns, one in registers at a time.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M
    column = tile_n * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = x.load([row, start])
        b = weight.load([column, start])
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b.T, sums, input_precision=PRECISION)

    if HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        n = column + tl.arange(0, HALF)
        halves = tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1))
        left, right = tl.split(halves)
        values = finish(left, bias, scale, shift, n, N, ACT)
        out.store([row, column], values.to(out.dtype))
        values = finish(right, bias, scale, shift, n + HALF, N, ACT)
        out.store([row, column + HALF], values.to(out.dtype))
    else:
        n = column + tl.arange(0, BLOCK_N)
        values = finish(sums, bias, scale, shift, n, N, ACT)
        out.store([row, column], values.to(out.dtype))


def pointwise_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    out: Tensor | None = None,
    config: PointwiseConfig | None = None,
) -> Tensor:
    """``scale * act(W x + bias) + shift`` in one kernel, on the current device and stream.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16. Channels-last, or a slice of such by channel
            or image, is read in place; other layouts are copied first.
        weight: (D, C, 1, 1), dtype of x.
        bias: (D,) of a floating dtype, or None.
        scale, shift: (D,) float32.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        out: where to put the result: its shape and dtype, channels-last; not x itself.
        config: another tile than `configs.lookup_pointwise` gives.

    Returns:
        (N, D, H, W), channels-last, dtype of x. Sums are float32, rounded once at the end; float32
        products are exact unless PyTorch's matrix products may use TF32.

    Raises:
        ValueError: an operand's shape, dtype, device or layout does not fit.
    """
    operands.check("pointwise_mix", x, weight, bias, scale, shift, act)
    if weight.shape[2] != 1:
        raise ValueError(f"pointwise_mix: weight must be (D, C, 1, 1), got {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"pointwise_mix: x is {x.dtype} but weight is {weight.dtype}")
    images, K, height, width = x.shape
    N = weight.shape[0]
    M = images * height * width
    out = operands.result("pointwise_mix", out, (images, N, height, width), x)
    if out.numel() == 0:
        return out
    weight = weight.contiguous()
    x, stride = operands.pixel_rows(x, M)
    precision = dot_precision(x.dtype)
    vector_n, vector_k = operands.vector_width(N), operands.vector_width(K, stride)
    describable = _describable(x, weight, out, M, stride)
    if config is None:
        config = lookup_pointwise(
            support.architecture(x.device),
            x.dtype,
            rows=M,
            columns=N,
            vector_bytes=vector_k * x.element_size(),
            tf32=precision == "tf32",
            descriptors=describable,
        )
    blocks = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    options = {
        "ACT": act,
        "PRECISION": precision,
        "WIDEN": operands.interpreted(pointwise_kernel),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.descriptors and describable:
        a = _describe(x, (M, K), stride, config.block_m, config.block_k)
        b = _describe(weight, (N, K), K, config.block_n, config.block_k)
        o = _describe(out, (M, N), N, config.block_m, config.block_n // (1 + config.halves))
        made = (a, b, bias, scale, shift, o, M, N, K)
        launch(pointwise_descriptor_kernel, blocks, *made, HALVES=config.halves, **options)
        return out
    launch(
        pointwise_kernel,
        blocks,
        x,
        weight,
        bias,
        scale,
        shift,
        out,
        M,
        N // vector_n,
        K // vector_k,
        stride // vector_k,
        VECTOR_N=vector_n,
        VECTOR_K=vector_k,
        EVEN_K=K % config.block_k == 0,
        **options,
    )
    return out


def _describable(x: Tensor, weight: Tensor, out: Tensor, rows: int, stride: int) -> bool:
    """Whether the copy engine can address the operands: 16-byte steps, int32 coordinates."""
    size = x.element_size()
    strides = (stride, weight.shape[1], out.shape[1])
    return (
        0 < rows < 2**31
        and all(s > 0 and s * size % 16 == 0 for s in strides)
        and all(t.data_ptr() % 16 == 0 for t in (x, weight, out))
    )


def _describe(
    t: Tensor, shape: tuple[int, int], stride: int, block_rows: int, block_columns: int
) -> Any:
    return TensorDescriptor(t, list(shape), [stride, 1], [block_rows, block_columns])
