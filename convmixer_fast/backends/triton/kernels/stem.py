"""The stem on a GPU: a GEMM over gathered pixels.

    out[n, d, oh, ow] = scale[d] * act(sum_{c,i,j} weight[d, c, i, j] * x[n, c, oh p + i, ow p + j]
                                       + bias[d]) + shift[d]

The sum over (c, i, j) runs in the weight's own order, so that the weight is a matrix as it lies.
Pixels are read through their strides: NCHW, channels-last, any slice, float or uint8; the result
is channels-last. The one change of layout in the network, and the normalisation of uint8 images,
cost no pass of their own.

A warp's 32 pixels are runs of p neighbours. Each is read again for every BLOCK_N channels, from L1
or L2: an image of 3 x 224 x 224 bytes is small against the (224 / p)^2 D outputs that are written.

Source: Trockman and Kolter 2022, section 2: patch embeddings by a convolution with stride p.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import PointwiseConfig, lookup_stem
from ..precision import dot_precision
from ..support import cdiv, is_capturing
from . import operands
from .epilogue import finish, tile_of


@triton.jit(do_not_specialize=["M", "patches", "patches_w"])
def stem_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    gain,
    offset,
    M: tl.int64,
    patches,
    patches_w,
    n_vectors,
    k_vectors,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ACT: tl.constexpr,
    P: tl.constexpr,
    VECTOR_N: tl.constexpr,
    VECTOR_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x by four strides, weight [N, K], out [M, N]; one tile a program, as in `pointwise_kernel`.

    M = images * patches patches, patches_w of them in a row of an image; K = C P P. Addresses of
    pixels are int64: an image may have more than 2^31 elements. Divisions by P are by a constant.
    gain and offset [C] are for uint8 pixels, which become gain * x - offset; None for others.
    """
    N = n_vectors * VECTOR_N
    K = k_vectors * VECTOR_K
    dtype = weight.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M).to(tl.int32)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n * BLOCK_N
    rows_left = tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    columns_left = tl.minimum(N - first_column, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # One int64 division for the tile; the rows' own are int32. Rows past the end repeat the last.
    image = first_row // patches
    patch = (first_row - image * patches).to(tl.int32) + tl.minimum(m, rows_left - 1)
    images = image + patch // patches
    patch = patch % patches
    top = (patch // patches_w).to(tl.int64) * P
    left = (patch % patches_w).to(tl.int64) * P
    corners = x + (images * stride_n + top * stride_h + left * stride_w)
    columns = tl.minimum(n, columns_left - 1)
    w_tile = weight + first_column.to(tl.int64) * K + (columns[None, :] * K + k[:, None])

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        term = start + k
        inside = term < K
        channel = term // (P * P)
        row = (term // P) % P
        column = term % P
        offsets = (
            channel.to(tl.int64) * stride_c
            + row.to(tl.int64) * stride_h
            + column.to(tl.int64) * stride_w
        )
        a = tl.load(corners[:, None] + offsets[None, :], mask=inside[None, :], other=0)
        if gain is not None:
            # Past the sum's end 0 * 0 - 0.
            factor = tl.load(gain + channel, mask=inside, other=0.0)
            less = tl.load(offset + channel, mask=inside, other=0.0)
            a = a.to(tl.float32) * factor[None, :] - less[None, :]
        a = a.to(dtype)
        b = tl.load(w_tile, mask=inside[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        w_tile += BLOCK_K

    values = finish(sums, bias, scale, shift, first_column + n, N, ACT)
    o_tile = out + first_row * N + first_column + (m[:, None] * N + n[None, :])
    stored = (m < rows_left)[:, None] & (n < columns_left)[None, :]
    tl.store(o_tile, values.to(out.dtype.element_ty), mask=stored)


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    out: Tensor | None = None,
    config: PointwiseConfig | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """``scale * act(W patches(x) + bias) + shift`` in one kernel, on the current device and stream.

    Args:
        x: (N, C, H, W) of any strides; float32, float16 or bfloat16, rounded to the weight's
            dtype, or uint8. Rows and columns that fill no patch are not read.
        weight: (D, C, p, p), float32, float16 or bfloat16.
        bias: (D,) of a floating dtype, or None.
        scale, shift: (D,) float32.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        out: where to put the result: its shape and dtype, channels-last.
        config: another tile than `configs.lookup_stem` gives.
        mean, std: a number for each of C channels, for uint8 and only then: pixels are normalised
            to (x / 255 - mean) / std in float32 and rounded to the weight's dtype.

    Returns:
        (N, D, H // p, W // p), channels-last, dtype of the weight. Sums are float32, rounded once.

    Raises:
        ValueError: an operand's shape, dtype, device or layout does not fit.
    """
    operands.check("patch_embed", x, weight, bias, scale, shift, act)
    _check_pixels(x, mean, std)
    images, channels, height, width = x.shape
    N, _, p, _ = weight.shape
    patches_h, patches_w = height // p, width // p
    patches = patches_h * patches_w
    if patches >= 2**31 - 256:
        raise ValueError(f"patch_embed: {patches_h} x {patches_w} patches an image are too many")
    out = operands.result("patch_embed", out, (images, N, patches_h, patches_w), weight)
    if out.numel() == 0:
        return out
    weight = weight.contiguous()
    M, K = images * patches, channels * p * p
    if config is None:
        config = lookup_stem(weight.dtype)
    gain = offset = None
    if mean is not None and std is not None:
        gain, offset = _gain_and_offset(tuple(mean), tuple(std), x.device)
    vector_n, vector_k = operands.vector_width(N), operands.vector_width(K)
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    stem_kernel[grid](
        x,
        weight,
        bias,
        scale,
        shift,
        out,
        gain,
        offset,
        M,
        patches,
        patches_w,
        N // vector_n,
        K // vector_k,
        *x.stride(),
        ACT=act,
        P=p,
        VECTOR_N=vector_n,
        VECTOR_K=vector_k,
        PRECISION=dot_precision(weight.dtype),
        WIDEN=operands.interpreted(stem_kernel),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


_normal: dict[tuple[tuple[float, ...], tuple[float, ...], torch.device], tuple[Tensor, Tensor]] = {}
_lock = threading.Lock()


def _gain_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tensors (C,) float32 with which ``gain * x - offset`` is ``(x / 255 - mean) / std``.

    Made once for a device: a copy from the host at every call would hold up the GPU.
    """
    key = (mean, std, device)
    found = _normal.get(key)
    if found is not None:
        return found
    both = torch.empty(2, len(mean), dtype=torch.float32, device=device)
    # Filled by kernels, which a CUDA graph may record, unlike copies from the host.
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        both[0, c].fill_(1 / (255 * s))
        both[1, c].fill_(m / s)
    gain, offset = both.unbind()
    if device.type == "cuda":
        if is_capturing(device):
            return gain, offset  # true only where the graph that is recorded is replayed
        # Other streams will read them.
        torch.cuda.current_stream(device).synchronize()
    with _lock:
        return _normal.setdefault(key, (gain, offset))


def _check_pixels(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if x.dtype != torch.uint8:
        if x.dtype not in operands.DTYPES:
            raise ValueError(
                f"patch_embed: x must be uint8, float32, float16 or bfloat16, got {x.dtype}"
            )
        if mean is not None or std is not None:
            raise ValueError("patch_embed: mean and std are for uint8 images")
        return
    if mean is None or std is None:
        raise ValueError("patch_embed: uint8 images need mean and std")
    for name, v in (("mean", mean), ("std", std)):
        if len(v) != x.shape[1]:
            raise ValueError(
                f"patch_embed: {name} must have a number for each of {x.shape[1]} channels, "
                f"got {len(v)}"
            )
