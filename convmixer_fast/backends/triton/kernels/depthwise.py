"""Depthwise k x k, activation, BatchNorm and residual: the spatial half of a block in one pass.

    y = x + scale * act(dw_kxk(x) + bias) + shift

The loop nest, for one program (a tile of R rows, T columns and BC channels of one image):

    for kh in k:                            at run time
        load the k taps of the kernel row   [BC] each, float32
        for column in T + k - 1:            unrolled
            load [R, BC] activations, once
            for t in T:                     unrolled
                acc[t] += activation * tap[column - t]
    activation, affine map, residual, one rounding, store

Triton can neither index nor shift a tensor of registers, so the T output columns are T accumulators
and a loaded column meets every accumulator it belongs to: T * k multiply-adds for T + k - 1 loads.
A thread holds 4 neighbouring channels of one row: for T = 8, k = 9 that is 32 accumulators, 36 taps
and what is in flight, about 105 registers; and a kernel row is 288 multiply-adds to 16 loads of
activations, 9 of taps, 64 conversions from 16 bits and about 14 of everything else: 0.73-0.74 of
the instructions are multiply-adds, 0.87 in float32, where nothing is converted.

* bfloat16 is loaded as 32-bit words of two channels: a shift or a mask makes either a float32, one
  operation a value, where a compiler left alone takes one and a half. float16 needs no help: the
  machine converts either half of a word.
* No masks. A row above or below the image is read from a row of zeros behind the taps: one selected
  pointer a kernel row. Columns left and right of the image are known when the kernel is compiled:
  the first and the last tile of a row of tiles leave them out, in code of their own that a uniform
  branch chooses. Tiles that would stand over the edge move back inside and compute some outputs
  twice. Only images narrower than a tile (and rows of channels shorter than one) take masks.
* Sums are float32; the result is rounded once.

Source: Trockman and Kolter 2022, section 2: ``BN(sigma(ConvDepthwise(z))) + z``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....arch import ACTIVATIONS
from ..configs import DepthwiseConfig, lookup_depthwise
from ..support import cdiv
from .activation import activate
from .launch import launch

#: The widest tile there can be: so many rows of zeros stand behind the taps, and k - 1 more.
MAX_COLUMNS = 16

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _to_float(v, PAIR: tl.constexpr):
    """Loaded values as float32: [R, BC] of any dtype, or [R, BC / 2] words of two bfloat16 each."""
    if PAIR:
        even = (v << 16).to(tl.float32, bitcast=True)
        odd = (v & -65536).to(tl.float32, bitcast=True)
        return tl.interleave(even, odd)
    else:
        return v.to(tl.float32)


@triton.jit
def _row(
    acc,
    x,
    taps,
    inside,
    channels,
    ow,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    MASKED: tl.constexpr,
    PAIR: tl.constexpr,
):
    """acc + the taps K0..K1 of one kernel row, over the columns FIRST..LAST of a tile's window."""
    WORDS: tl.constexpr = C // 2 if PAIR else C
    weights = acc[:0]
    for kw in tl.static_range(K0, K1):
        if MASKED:
            weight = tl.load(taps + kw * C, mask=channels, other=0.0)
        else:
            weight = tl.load(taps + kw * C)
        weights = weights + (tl.broadcast_to(weight, acc[0].shape),)  # noqa: RUF005
    # Not min() and max(): of Triton 3.4 they make tensors of constants.
    for column in tl.static_range(
        K0 if K0 > FIRST else FIRST, K1 - 1 + T if K1 - 1 + T < LAST else LAST
    ):
        if MASKED:
            iw = ow + (column - (K - 1) // 2)
            v = tl.load(x + column * WORDS, mask=inside & (iw >= 0) & (iw < W), other=0)
        else:
            v = tl.load(x + column * WORDS)
        value = _to_float(v, PAIR)
        # The accumulators t with K0 <= column - t < K1; the others stay as they are.
        new = acc[: (column - K1 + 1 if column >= K1 else 0)]
        for t in tl.static_range(
            (column - K1 + 1 if column >= K1 else 0), (column - K0 + 1 if column - K0 < T else T)
        ):
            new = new + (tl.fma(value, weights[column - t - K0], acc[t]),)  # noqa: RUF005
        acc = new + acc[(column - K0 + 1 if column - K0 < T else T) :]
    return acc


@triton.jit
def _window(
    acc,
    x,
    zeros,
    taps,
    rows,
    words,
    channels,
    H,
    ow,
    W,
    row_step,
    C: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
    PAIR: tl.constexpr,
):
    """acc + the convolution over the columns FIRST..LAST of the window, from its first row on."""
    for kh in range(K):
        # One comparison: a negative row is a large number without a sign.
        inside = (rows + kh).to(tl.uint32, bitcast=True) < H
        if MASKED:
            row = x
            inside = inside & words
        else:
            row = tl.where(inside, x, zeros)
        # All the taps of a kernel row would not fit the registers at k = 31.
        for k0 in tl.static_range(0, K, CHUNK):
            acc = _row(
                acc, row, taps, inside, channels, ow, W, C, K, T, FIRST, LAST,
                k0, k0 + CHUNK if k0 + CHUNK < K else K, MASKED, PAIR,
            )  # fmt: skip
        x += row_step
        taps += K * C
    return acc


@triton.jit(do_not_specialize=["H", "W", "tiles_h", "tiles_w", "image_pixels"])
def depthwise_kernel(
    X,  # (N, H, W, C) of DTYPE, or of int32 words of two channels where PAIR
    Y,  # (N, H, W, C) of DTYPE, dense
    TAPS,  # (k * k, C) float32
    ZEROS,  # (>= T + k - 1, C) like X
    BIAS,  # (C,) of any floating dtype, or None
    SCALE,  # (C,) float32
    SHIFT,  # (C,) float32
    H,
    W,
    tiles_h,
    tiles_w,
    image_pixels: tl.int64,  # from an image of X to the next, in pixels
    row_step: tl.int64,  # from a row of X to the next, in elements of X
    C: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    EDGES: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIR: tl.constexpr,
):
    """One program: R rows x T columns x BC channels of one image. Grid: every such tile.

    EDGES says which tiles there are in a row of tiles: "one" (W = T), "two" (a first and a last),
    "many" (a first, a last, and between them tiles that see no edge), "any" (masks decide).
    """
    P: tl.constexpr = 2 if PAIR else 1
    WORDS: tl.constexpr = C // P
    BEFORE: tl.constexpr = (K - 1) // 2
    AFTER: tl.constexpr = K // 2
    MASKED: tl.constexpr = EDGES == "any"
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    # The largest power of two that divides every first channel, at most BC.
    ALIGN: tl.constexpr = BC if C % BC == 0 or MASKED else (C & -C)

    # Channels vary fastest: programs that run together read whole pixels.
    pid = tl.program_id(0)
    block = pid % BLOCKS
    tile = pid // BLOCKS
    tile_w = tile % tiles_w
    tile_h = (tile // tiles_w) % tiles_h
    n = (tile // tiles_w // tiles_h).to(tl.int64)

    c0 = block * BC
    ow = tile_w * T
    if not MASKED:
        if C % BC != 0:
            c0 = tl.multiple_of(tl.minimum(c0, C - BC), ALIGN)
        ow = tl.minimum(ow, W - T)
        if EDGES == "many":
            # Between the first and the last tile: not into the zeros on the right.
            ow = tl.where(tile_w < tiles_w - 1, tl.minimum(ow, W - T - AFTER), ow)
    c = c0 + tl.arange(0, BC)[None, :]
    channels = c < C
    word = c0 // P + tl.arange(0, BC // P)[None, :]
    words = word < WORDS
    oh = tile_h * R + tl.arange(0, R)[:, None]
    image = X + n * image_pixels * WORDS + ow * WORDS + word
    centre = image + oh.to(tl.int64) * row_step
    x = image + (oh.to(tl.int64) - BEFORE) * row_step - BEFORE * WORDS
    taps = TAPS + c
    zeros = ZEROS + word
    rows = oh - BEFORE

    if MASKED:
        scale = tl.load(SCALE + c, mask=channels, other=0.0)
        shift = tl.load(SHIFT + c, mask=channels, other=0.0)
    start = tl.zeros((R, BC), tl.float32)
    if BIAS is not None:
        if MASKED:
            start += tl.load(BIAS + c, mask=channels, other=0.0).to(tl.float32)
        else:
            start += tl.load(BIAS + c).to(tl.float32)
    acc = ()
    for _ in tl.static_range(T):
        acc = acc + (start,)  # type: ignore[assignment]  # noqa: RUF005

    # The window of a tile is T + K - 1 columns wide: BEFORE left of it, AFTER right of it.
    if MASKED:
        acc = _window(
            acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
            0, T + K - 1, CHUNK, True, PAIR,
        )  # fmt: skip
    elif EDGES == "one":
        acc = _window(
            acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
            BEFORE, BEFORE + T, CHUNK, False, PAIR,
        )  # fmt: skip
    else:
        if tile_w == 0:
            acc = _window(
                acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
                BEFORE, T + K - 1, CHUNK, False, PAIR,
            )  # fmt: skip
        elif EDGES == "two":
            acc = _window(
                acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
                0, BEFORE + T, CHUNK, False, PAIR,
            )  # fmt: skip
        else:
            if tile_w == tiles_w - 1:
                acc = _window(
                    acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
                    0, BEFORE + T, CHUNK, False, PAIR,
                )  # fmt: skip
            else:
                acc = _window(
                    acc, x, zeros, taps, rows, words, channels, H, ow, W, row_step, C, K, T,
                    0, T + K - 1, CHUNK, False, PAIR,
                )  # fmt: skip

    if not MASKED:
        scale = tl.load(SCALE + c)
        shift = tl.load(SHIFT + c)
    out = Y + ((n * H + oh) * W + ow) * C + c
    for t in tl.static_range(T):
        if MASKED:
            live = (oh < H) & (ow + t < W)
            v = tl.load(centre + t * WORDS, mask=live & words, other=0)
            live = live & channels
        else:
            live = oh < H
            v = tl.load(centre + t * WORDS, mask=live, other=0)
        y = activate(acc[t], ACT) * scale + (shift + _to_float(v, PAIR))
        tl.store(out + t * C, y.to(DTYPE), mask=live)


def pack_taps(weight: Tensor) -> Tensor:
    """The order the kernel reads a depthwise weight in, and the zeros it reads outside an image.

    Args:
        weight: (C, 1, k, k), any strides, float32, bfloat16 or float16.

    Returns:
        (k * k + k - 1 + MAX_COLUMNS, C) float32: k * k rows of taps, and rows of zeros behind them.

    Raises:
        ValueError: the weight has another shape.
    """
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"pack_taps: weight must be (C, 1, k, k), got {tuple(weight.shape)}")
    channels, k = weight.shape[0], weight.shape[2]
    taps = weight.new_zeros((k * k + k - 1 + MAX_COLUMNS, channels), dtype=torch.float32)
    taps[: k * k].copy_(weight.detach().reshape(channels, k * k).t())
    return taps


def _pixel_strides(x: Tensor) -> tuple[int, int] | None:
    """Pixels from an image to the next and from a row to the next; None: the kernel cannot read x.

    Rows and images may lie apart (slices of a larger tensor), pixels of a row may not.
    """
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if (c > 1 and sc != 1) or (w > 1 and sw != c):
        return None
    # Strides of axes of length one mean nothing.
    row, row_rest = divmod(sh, c) if h > 1 else (w, 0)
    image, image_rest = divmod(sn, c) if n > 1 else (h * row, 0)
    return None if row_rest or image_rest else (image, row)


def edges(width: int, kernel_size: int, columns: int) -> str:
    """Which tiles of ``columns`` columns a row of ``width`` has: the kernel's EDGES."""
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    if width == columns:
        return "one"
    if width < columns + max(before, after) or columns < max(before, after):
        return "any"
    if width <= 2 * columns:
        return "two"
    return "many" if width >= columns + before + after else "any"


def depthwise_mix(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    kernel_size: int,
    out: Tensor | None = None,
    config: DepthwiseConfig | None = None,
) -> Tensor:
    """``x + scale * act(dw(x) + bias) + shift`` with "same" padding, on the current stream.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16. Channels-last, also a slice of images or rows
            of one; what is neither is copied first.
        taps: of `pack_taps`, on x's device.
        bias: (C,) of any floating dtype, or None.
        scale, shift: (C,) float32.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        kernel_size: k; (k-1)//2 zeros stand before and k//2 after each axis.
        out: where the result goes: shape and dtype of x, channels-last and dense, sharing no memory
            with x.
        config: the tile; None: the shipped one.

    Returns:
        (N, C, H, W) of x's dtype, channels-last.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(x, taps, bias, scale, shift, act, kernel_size)
    n, c, h, w = x.shape
    k = kernel_size
    if out is None:
        out = torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
    elif (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device) or not _is_dense(out):
        raise ValueError(
            f"depthwise_mix: out must be dense channels-last {tuple(x.shape)} {x.dtype} on "
            f"{x.device}, got {tuple(out.shape)} {out.dtype} on {out.device}, "
            f"strides {out.stride()}"
        )
    if x.numel() == 0:
        return out
    strides = _pixel_strides(x)
    if strides is None:
        x = x.contiguous(memory_format=torch.channels_last)
        strides = (h * w, w)
    if config is None:
        config = lookup_depthwise(x.dtype, k, c)
    columns, block = config.columns, config.channels
    mode = edges(w, k, columns) if c >= block else "any"
    tiles_h, tiles_w = cdiv(h, config.rows), cdiv(w, columns)
    # Pairs of channels as words need every pixel to begin at a word.
    pair = x.dtype == torch.bfloat16 and c % 2 == 0 and x.data_ptr() % 4 == 0
    zeros = taps[k * k :].view(torch.int32 if pair else x.dtype)
    with torch.cuda.device_of(x):
        launch(
            depthwise_kernel,
            n * tiles_h * tiles_w * cdiv(c, block),
            _words(x) if pair else x,
            out,
            taps,
            zeros,
            None if bias is None else bias.contiguous(),
            scale.contiguous(),
            shift.contiguous(),
            h,
            w,
            tiles_h,
            tiles_w,
            strides[0],
            strides[1] * (c // 2 if pair else c),
            C=c,
            K=k,
            T=columns,
            R=config.rows,
            BC=block,
            CHUNK=config.taps,
            EDGES=mode,
            ACT=act,
            DTYPE=_TRITON_DTYPES[x.dtype],
            PAIR=pair,
            num_warps=config.warps,
            num_stages=1,
        )
    return out


def _check(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    k: int,
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"depthwise_mix: {what}")

    if act not in ACTIVATIONS:
        fail(f"unknown activation {act!r}: one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4:
        fail(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _TRITON_DTYPES:
        fail(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    c = x.shape[1]
    rows = k * k + k - 1 + MAX_COLUMNS
    if taps.shape != (rows, c) or taps.dtype != torch.float32 or not taps.is_contiguous():
        fail(
            f"taps must be pack_taps of a ({c}, 1, {k}, {k}) weight, "
            f"got {tuple(taps.shape)} {taps.dtype}"
        )
    for name, v in (("scale", scale), ("shift", shift), ("bias", bias)):
        if v is None:
            continue
        if v.shape != (c,) or not v.is_floating_point():
            fail(f"{name} must be ({c},) and floating, got {tuple(v.shape)} {v.dtype}")
        if name != "bias" and v.dtype != torch.float32:
            fail(f"{name} must be float32, got {v.dtype}")
        if v.device != x.device:
            fail(f"{name} is on {v.device} but x is on {x.device}")
    if taps.device != x.device:
        fail(f"taps is on {taps.device} but x is on {x.device}")


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def _words(x: Tensor) -> Tensor:
    """The storage of a 16-bit tensor from its first element on, as int32 words."""
    flat = x.as_strided((x.untyped_storage().nbytes() // 2 - x.storage_offset(),), (1,))
    return flat[: flat.numel() // 2 * 2].view(torch.int32)
