"""Cases of the GPU kernels: one list for the interpreter, the simulator and hardware."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convmixer_fast.ops.common import activation, affine
from convmixer_fast.testing import assert_numerics

NORMALISE = ((0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25))


@dataclass(frozen=True)
class MatrixCase:
    """A 1x1 convolution (p = 1) or patch embedding: x (n, c, h, w) -> d channels."""

    name: str
    n: int
    c: int
    h: int
    w: int
    d: int
    p: int = 1
    act: str = "gelu"
    bias: bool = True
    #: Memory layout of x: nhwc, nchw, or a slice of a larger tensor by channel, image or column.
    layout: str = "nhwc"
    pixels: str = "float"
    #: Large enough for hardware only.
    large: bool = False

    def __str__(self) -> str:
        return self.name


POINTWISE_CASES = (
    MatrixCase("block", 1, 64, 8, 8, 64),
    MatrixCase("several_tiles_and_steps", 3, 96, 9, 7, 136),
    MatrixCase("odd_channels", 2, 37, 5, 5, 19),
    MatrixCase("even_channels", 1, 38, 5, 5, 22, act="silu"),
    MatrixCase("channels_by_4", 1, 36, 6, 6, 20, act="hardswish"),
    MatrixCase("channels_by_8", 1, 72, 6, 6, 40, act="relu"),
    MatrixCase("one_pixel", 1, 32, 1, 1, 48),
    MatrixCase("one_channel", 2, 1, 5, 3, 1, act="identity"),
    MatrixCase("no_bias", 1, 32, 4, 4, 32, bias=False),
    MatrixCase("more_out_than_in", 1, 16, 3, 3, 200, act="relu"),
    MatrixCase("channel_slice", 2, 48, 4, 5, 32, layout="channel_slice"),
    MatrixCase("odd_channel_slice", 2, 40, 4, 5, 32, layout="odd_channel_slice"),
    MatrixCase("image_slice", 2, 32, 4, 5, 32, layout="image_slice"),
    MatrixCase("column_slice", 2, 32, 4, 5, 32, layout="column_slice"),
    MatrixCase("nchw", 2, 24, 4, 5, 32, layout="nchw"),
    MatrixCase("width_768", 4, 768, 32, 32, 768, act="relu", large=True),
    MatrixCase("width_1536", 2, 1536, 32, 32, 1536, large=True),
    MatrixCase("width_1024_batch_1", 1, 1024, 16, 16, 1024, large=True),
    MatrixCase("ragged_large", 5, 771, 31, 33, 1029, large=True),
)

#: Cases of the CUDA kernels: those above, more steps along the sum than there are buffers, and
#: enough tiles for the large kernels.
CUDA_CASES = (
    *POINTWISE_CASES,
    MatrixCase("many_steps", 1, 360, 10, 13, 136),
    MatrixCase("many_steps_by_2", 1, 358, 5, 13, 70, act="silu"),
    MatrixCase("many_steps_odd", 1, 357, 5, 13, 71, act="relu"),
    MatrixCase("many_tiles", 1, 24, 82, 100, 136),
)

STEM_CASES = (
    MatrixCase("patch_7", 2, 3, 29, 23, 40, p=7, layout="nchw"),
    MatrixCase("patch_14", 1, 3, 28, 30, 40, p=14, layout="nchw"),
    MatrixCase("patch_2", 2, 3, 8, 9, 64, p=2, layout="nchw"),
    MatrixCase("patch_1", 1, 3, 5, 5, 24, p=1, layout="nchw"),
    MatrixCase("patch_32", 1, 1, 64, 33, 8, p=32, layout="nchw"),
    MatrixCase("many_channels", 1, 12, 9, 12, 136, p=3, layout="nchw", act="relu"),
    MatrixCase("channels_last_image", 2, 3, 14, 21, 33, p=7, layout="nhwc", act="silu"),
    MatrixCase("column_slice_image", 2, 3, 14, 14, 32, p=7, layout="column_slice"),
    MatrixCase("no_bias", 1, 4, 8, 8, 32, p=4, layout="nchw", bias=False),
    MatrixCase("uint8", 2, 3, 22, 29, 40, p=7, layout="nchw", pixels="uint8"),
    MatrixCase("uint8_channels_last", 1, 3, 14, 14, 40, p=7, layout="nhwc", pixels="uint8"),
    MatrixCase("uint8_grey", 1, 1, 9, 9, 16, p=3, layout="nchw", pixels="uint8"),
    MatrixCase("images_224", 8, 3, 224, 224, 768, p=7, layout="nchw", large=True),
    MatrixCase("images_224_p14", 8, 3, 224, 224, 1024, p=14, pixels="uint8", large=True),
)


@dataclass
class MatrixOperands:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def pixels(self, dtype: torch.dtype) -> Tensor:
        """x as an operand of the GEMM: in ``dtype``, and normalised if it is uint8."""
        if self.mean is None or self.std is None:
            return self.x.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = (
            torch.tensor(v, dtype=wide, device=self.x.device).view(1, -1, 1, 1)
            for v in (self.mean, self.std)
        )
        return ((self.x.to(wide) / 255 - mean) / std).to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to x (N, C, H, W) with the memory layout ``layout``."""
    n, c, h, w = x.shape
    if layout == "nchw":
        return x.contiguous()
    # A slice is surrounded by NaN (or 255), which a read outside of it spreads to the result.
    fill = 255 if x.dtype == torch.uint8 else float("nan")
    extra = {"channel_slice": (0, 16, 0), "odd_channel_slice": (0, 3, 0)}
    dn, dc, dw = {"image_slice": (2, 0, 0), "column_slice": (0, 0, 3)}.get(
        layout, extra.get(layout, (0, 0, 0))
    )
    base = torch.full((n + dn, h, w + dw, c + dc), fill, dtype=x.dtype, device=x.device)
    view = base[dn // 2 : dn // 2 + n, :, dw // 2 : dw // 2 + w, dc // 2 : dc // 2 + c]
    view = view.permute(0, 3, 1, 2)
    return view.copy_(x)


def draw(
    case: MatrixCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> MatrixOperands:
    """Random operands whose statistics are those of a trained layer."""
    g = torch.Generator().manual_seed(seed)
    mean = std = None
    if case.pixels == "uint8":
        x = torch.randint(0, 256, (case.n, case.c, case.h, case.w), generator=g).to(torch.uint8)
        mean, std = (v[: case.c] for v in NORMALISE)
    else:
        x = torch.randn(case.n, case.c, case.h, case.w, generator=g).to(dtype)
    fan_in = max(1, case.c * case.p**2)
    weight = torch.randn(case.d, case.c, case.p, case.p, generator=g) / fan_in**0.5
    bias = torch.randn(case.d, generator=g).to(dtype).to(device) if case.bias else None
    scale = 0.5 + torch.rand(case.d, generator=g)
    shift = torch.randn(case.d, generator=g)
    return MatrixOperands(
        lay_out(x.to(device), case.layout),
        weight.to(dtype).to(device),
        bias,
        scale.to(device),
        shift.to(device),
        mean,
        std,
    )


def plain(o: MatrixOperands, act: str, dtype: torch.dtype) -> Tensor:
    """The reference: PyTorch's operators in ``dtype``."""
    weight = o.weight.to(dtype)
    bias = None if o.bias is None else o.bias.to(dtype)
    h = F.conv2d(o.pixels(dtype), weight, bias, stride=weight.shape[2])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return affine(activation(h, act), o.scale.to(wide), o.shift.to(wide))


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 values to the nearest with 10 bits of fraction, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def enough_draws(*shape: int) -> int:
    """Number of draws of operands that gives 256 outputs, for a randomly drawn shape.

    The rule compares errors, and PyTorch's error can be small by chance if there are few outputs.
    """
    return min(16, -(-256 // max(1, math.prod(shape))))


def guarded(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    run: Callable[..., Tensor],
) -> Tensor:
    """Run into a result of ``shape`` (N, D, H, W) and check that nothing around it is written.

    The result starts as NaN and lies between two guards inside one tensor: the simulator checks the
    bounds of tensors and does not see a write next to the result.
    """
    n, d, h, w = shape
    count, guard = n * d * h * w, 256
    room = torch.full((count + 2 * guard,), 7.0, dtype=dtype, device=device)
    out = room[guard : guard + count].view(n, h, w, d).permute(0, 3, 1, 2)
    out.fill_(float("nan"))
    if run(out=out) is not out:
        raise AssertionError("the result is not the tensor that was given for it")
    if not (room[:guard].eq(7.0).all() and room[guard + count :].eq(7.0).all()):
        raise AssertionError("written outside the result")
    return out.flatten()


def check(
    kernel: Callable[..., Tensor],
    case: MatrixCase,
    dtype: torch.dtype,
    device: str = "cpu",
    draws: int = 1,
    tf32: bool = False,
    **kw: object,
) -> None:
    """Run a kernel on a case ``draws`` times, `guarded`; check the outputs by the numerics rule.

    Args:
        tf32: the kernel multiplies float32 as TF32, and so does the reference in the rule.
    """
    shape = (case.n, case.d, case.h // case.p, case.w // case.p)
    ours, same, exact = [], [], []
    for seed in range(draws):
        o = draw(case, dtype, device, seed)
        normal = {} if o.mean is None else {"mean": o.mean, "std": o.std}
        rest = (o.x, o.weight, o.bias, o.scale, o.shift, case.act)
        run = partial(kernel, *rest, **normal, **kw)
        ours.append(guarded(shape, dtype, device, run))
        exact.append(plain(o, case.act, torch.float64).flatten())
        if tf32:
            o = replace(o, x=round_to_tf32(o.x), weight=round_to_tf32(o.weight))
        same.append(plain(o, case.act, dtype).flatten())
    assert_numerics(torch.cat(ours), torch.cat(same), torch.cat(exact))


@dataclass(frozen=True)
class DepthwiseCase:
    """A depthwise convolution: x (n, c, h, w) and k x k taps."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    act: str = "gelu"
    bias: bool = True
    #: As for `lay_out`, or row_slice: every second row of a larger tensor.
    layout: str = "nhwc"
    #: Large enough for hardware only.
    large: bool = False

    def __str__(self) -> str:
        return self.name


DEPTHWISE_CASES = (
    # Rows of tiles, eight columns wide: one tile, a first and a last, more, masks.
    DepthwiseCase("one_tile", 2, 64, 8, 8, 3),
    DepthwiseCase("two_tiles", 1, 64, 9, 16, 5, act="relu"),
    DepthwiseCase("two_tiles_that_overlap", 1, 64, 8, 13, 4),
    DepthwiseCase("three_tiles", 1, 64, 10, 24, 7),
    DepthwiseCase("middle_tiles_moved_in", 1, 64, 8, 25, 5, act="silu"),
    DepthwiseCase("even_kernel", 1, 64, 8, 17, 6),
    DepthwiseCase("narrow_image", 1, 64, 11, 5, 9),
    DepthwiseCase("kernel_wider_than_image", 1, 64, 3, 4, 12),
    DepthwiseCase("one_pixel", 2, 64, 1, 1, 9, act="hardswish"),
    DepthwiseCase("one_row", 1, 64, 1, 20, 3),
    DepthwiseCase("one_column", 1, 64, 20, 1, 3),
    DepthwiseCase("one_tap", 1, 64, 8, 8, 1, act="identity"),
    DepthwiseCase("taps_in_parts", 1, 64, 8, 8, 13),
    # Channels: overlapping blocks, odd counts, few, and a block of 32.
    DepthwiseCase("channels_beyond_a_block", 1, 100, 8, 8, 3),
    DepthwiseCase("even_channels", 1, 70, 8, 9, 3, act="relu"),
    DepthwiseCase("odd_channels", 1, 67, 8, 9, 3),
    DepthwiseCase("few_channels", 2, 32, 17, 8, 3),
    DepthwiseCase("fewer_channels", 1, 6, 5, 9, 5),
    DepthwiseCase("one_channel", 2, 1, 6, 7, 5, act="silu"),
    DepthwiseCase("no_bias", 1, 64, 8, 8, 3, bias=False),
    DepthwiseCase("image_slice", 2, 64, 8, 8, 3, layout="image_slice"),
    DepthwiseCase("row_slice", 2, 64, 8, 8, 3, layout="row_slice"),
    DepthwiseCase("column_slice", 2, 64, 8, 8, 3, layout="column_slice"),
    DepthwiseCase("channel_slice", 1, 64, 8, 8, 3, layout="channel_slice"),
    DepthwiseCase("odd_channel_slice", 1, 64, 8, 8, 3, layout="odd_channel_slice"),
    DepthwiseCase("nchw", 1, 64, 8, 8, 3, layout="nchw"),
    DepthwiseCase("width_1536", 4, 1536, 32, 32, 9, large=True),
    DepthwiseCase("width_768", 8, 768, 32, 32, 7, act="relu", large=True),
    DepthwiseCase("width_1024", 8, 1024, 16, 16, 9, large=True),
    DepthwiseCase("taps_of_31", 1, 192, 56, 56, 31, large=True),
    DepthwiseCase("ragged_large", 3, 771, 31, 37, 9, large=True),
)


@dataclass
class DepthwiseOperands:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor


def draw_depthwise(
    case: DepthwiseCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> DepthwiseOperands:
    """Random operands whose statistics are those of a trained layer."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=g).to(dtype).to(device)
    if case.layout == "row_slice":
        # The rows between are NaN, which a read of them spreads to the result.
        base = torch.full((case.n, 2 * case.h, case.w, case.c), float("nan"), dtype=dtype)
        x = base.to(device)[:, ::2].permute(0, 3, 1, 2).copy_(x)
    else:
        x = lay_out(x, case.layout)
    weight = torch.randn(case.c, 1, case.k, case.k, generator=g) / case.k
    bias = torch.randn(case.c, generator=g).to(dtype).to(device) if case.bias else None
    scale = 0.5 + torch.rand(case.c, generator=g)
    shift = torch.randn(case.c, generator=g)
    return DepthwiseOperands(
        x, weight.to(dtype).to(device), bias, scale.to(device), shift.to(device)
    )


def plain_depthwise(o: DepthwiseOperands, act: str, dtype: torch.dtype) -> Tensor:
    """The reference: PyTorch's operators in ``dtype``."""
    k, x = o.weight.shape[-1], o.x.to(dtype)
    before, after = (k - 1) // 2, k // 2
    bias = None if o.bias is None else o.bias.to(dtype)
    padded = F.pad(x, [before, after, before, after])
    h = F.conv2d(padded, o.weight.to(dtype), bias, groups=x.shape[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x + affine(activation(h, act), o.scale.to(wide), o.shift.to(wide))


def check_depthwise(
    kernel: Callable[..., Tensor],
    pack: Callable[[Tensor], Tensor],
    case: DepthwiseCase,
    dtype: torch.dtype,
    device: str = "cpu",
    draws: int = 1,
    **kw: object,
) -> None:
    """Run a depthwise kernel on a case, as `check` does."""
    shape = (case.n, case.c, case.h, case.w)
    ours, same, exact = [], [], []
    for seed in range(draws):
        o = draw_depthwise(case, dtype, device, seed)
        rest = (o.x, pack(o.weight), o.bias, o.scale, o.shift, case.act, case.k)
        ours.append(guarded(shape, dtype, device, partial(kernel, *rest, **kw)))
        same.append(plain_depthwise(o, case.act, dtype).flatten())
        exact.append(plain_depthwise(o, case.act, torch.float64).flatten())
    assert_numerics(torch.cat(ours), torch.cat(same), torch.cat(exact))
