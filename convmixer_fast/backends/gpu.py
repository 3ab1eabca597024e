"""From an operator to a kernel launch on a GPU.

Between the operators, which take any strides, and the kernels, Triton's and CUDA's, which want
channels-last: the layout in and out, the depthwise taps in the kernel's order, the device that the
launch is for, and the check before a kernel's first result (`self_check`). Triton is imported here,
at the first call that may run one of its kernels, and nowhere above.

Every function returns None where the kernel failed its self-check: PyTorch's operators are then the
fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing import ErrorReport, error_report
from . import self_check
from .cuda import native as native_cuda
from .kernel_key import (
    BEYOND_INT32,
    MANY_OUTPUTS,
    UINT8_STEM,
    Case,
    is_aligned,
    pixels_of,
    strides_like,
)
from .operands import Packed, accumulation_dtype, memory_format_of
from .self_check import is_capturing as is_capturing
from .triton import support
from .triton.configs import (
    CudaConfig,
    PointwiseConfig,
    ProductConfig,
    lookup_pointwise,
    pointwise_candidates,
    without_descriptors,
)
from .triton.precision import dot_precision

#: A kernel with its operands bound, on packed channels-last maps x and out.
Launch = Callable[[Tensor, Tensor], Any]


class Kernels(NamedTuple):
    """The functions of `convmixer_fast.backends.triton`, as a test may replace them."""

    pack_taps: Callable[[Tensor], Tensor]
    depthwise_mix: Callable[..., Tensor]
    pointwise_mix: Callable[..., Tensor]
    patch_embed: Callable[..., Tensor]
    after_product_: Callable[..., Tensor]
    bound_by_first_call: Callable[[Launch], Launch] = lambda launch: launch


@cache
def kernels() -> Kernels:
    """The Triton kernels. Importing them imports Triton."""
    from .triton.after_product import after_product_
    from .triton.depthwise import depthwise_mix, pack_taps
    from .triton.launch import bound_by_first_call
    from .triton.pointwise import pointwise_mix
    from .triton.stem import patch_embed

    functions = (pack_taps, depthwise_mix, pointwise_mix, patch_embed, after_product_)
    return Kernels(*functions, bound_by_first_call)


#: Attributes of tensors that are private copies (see `keep_taps` and `keep_float32`).
_TAPS = "_convmixer_fast_taps"
_FLOAT32 = "_convmixer_fast_float32"


def keep_taps(weight: Tensor) -> Tensor:
    """Pack a depthwise weight (C, 1, k, k) in the kernel's order, and keep that with it.

    Only for a tensor object that its owner never writes to and that stands for one version of a
    parameter, such as a packed copy: what is kept is not checked again.
    """
    # What does not work here does not work in the operator either, which finds out and says so.
    with suppress(Exception):
        setattr(weight, _TAPS, kernels().pack_taps(weight))
    return weight


def taps_of(weight: Tensor) -> Tensor:
    kept: Tensor | None = getattr(weight, _TAPS, None)
    return kernels().pack_taps(weight.detach()) if kept is None else kept


def keep_float32(bias: Tensor | None) -> Tensor | None:
    """Keep a bias (D,) in float32 with it, as the CUDA kernels want it; only as for `keep_taps`."""
    if bias is not None and bias.dtype in (torch.bfloat16, torch.float16):
        setattr(bias, _FLOAT32, bias.float())
    return bias


def float32_of(bias: Tensor | None) -> Tensor | None:
    kept: Tensor | None = getattr(bias, _FLOAT32, None)
    return bias.detach().float() if kept is None and bias is not None else kept


def memory_of(packed: Tensor) -> list[Tensor]:
    """A packed copy and what is kept with it."""
    kept = [getattr(packed, name, None) for name in (_TAPS, _FLOAT32)]
    return [packed, *(tensor for tensor in kept if tensor is not None)]


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` with the strides of a packed (N, H, W, C): itself, a view, or a copy.

    Where an axis has one element several strides mean the same memory; kernels see this one. A
    slice that begins between two 16-byte words is copied too: kernels would fall back to narrower
    loads, and to a form that was never checked.
    """
    n, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if not is_aligned(x):
        x = x.clone(memory_format=torch.channels_last)
    if x.stride() == strides:
        return x
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided((n, c, h, w), strides)


def stem_format(x: Tensor, patch_size: int) -> torch.memory_format:
    """The layout of a stem's result: channels-last on a GPU, whatever the image's is.

    There the kernel that reads the patches writes what the blocks want to read. The rule depends on
    nothing that can change between tracing and running a graph.
    """
    if patch_size > 1 and support.is_kernel_device(x.device):
        return torch.channels_last
    return memory_format_of(x)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device's current stream: make that the tensor's device."""
    return support.on_device(x.device)


def _aligned(t: Tensor) -> Tensor:
    """A parameter without gaps that begins at a multiple of 16 bytes: itself, or a copy.

    One that does not, such as a part of a flat buffer, would compile another form of a kernel, with
    narrower loads, which was never checked.
    """
    t = t.detach().contiguous()
    return t if is_aligned(t) else t.clone()


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else _aligned(v) for v in vectors]


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    config: Any = None,
) -> Tensor:
    out = torch.empty_like(x, memory_format=memory_format_of(x))
    x = as_channels_last(x.detach().resolve_neg())
    operands = [taps_of(weight), *_vectors(bias, scale, shift), act, weight.shape[-1]]
    return _into(out, lambda out: kernels().depthwise_mix(x, *operands, out=out, config=config))


def _pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    config: Any = None,
) -> Tensor:
    if isinstance(config, ProductConfig):
        return _after_product(x, weight, bias, scale, shift, act)
    n, _, h, w = x.shape
    d, _, p, _ = weight.shape
    out = torch.empty(
        (n, d, h // p, w // p),
        dtype=weight.dtype,
        device=x.device,
        memory_format=stem_format(x, p),
    )
    x = x.detach().resolve_neg()
    if isinstance(config, CudaConfig):
        bias = float32_of(bias)
    operands = [_aligned(weight), *_vectors(bias, scale, shift), act]
    if isinstance(config, CudaConfig):
        pixels = as_channels_last(x)
        cuda: Callable[..., Tensor] = native_cuda.pointwise_mix
        return _into(out, lambda out: cuda(pixels, *operands, out=out, family=config.family))
    if p == 1 and x.dtype != torch.uint8:
        pixels = as_channels_last(x)
        run = kernels().pointwise_mix
        return _into(out, lambda out: run(pixels, *operands, out=out, config=config))
    embed, x = partial(kernels().patch_embed, mean=mean, std=std), pixels_of(x)
    return _into(out, lambda out: embed(x, *operands, out=out, config=config))


def _after_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
) -> Tensor:
    """PyTorch's GEMM as its settings have it, and one epilogue kernel over its result."""
    wanted = memory_format_of(x)
    x, weight = as_channels_last(x.detach().resolve_neg()), weight.detach()
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == torch.float64:
            # cuDNN has no channels-last convolution of float64: one would convert there and back.
            rows = x.permute(0, 2, 3, 1)
            h = F.linear(rows, weight.reshape(weight.shape[:2])).permute(0, 3, 1, 2)
        else:
            h = F.conv2d(x, weight)
    h = kernels().after_product_(as_channels_last(h), *_vectors(bias, scale, shift), act)
    if wanted == torch.channels_last:
        return h
    return torch.empty(h.shape, dtype=h.dtype, device=h.device).copy_(h)


def _into(out: Tensor, launch: Callable[[Tensor], Tensor]) -> Tensor:
    """``out``, filled by a kernel that writes channels-last, whatever layout ``out`` has."""
    if out.is_contiguous(memory_format=torch.channels_last):
        launch(as_channels_last(out))
        return out
    return out.copy_(launch(torch.empty_like(out, memory_format=torch.channels_last)))


_RUN: dict[str, Callable[..., Tensor]] = {
    "depthwise_mix": _depthwise,
    "pointwise_mix": _pointwise,
    "patch_embed": _pointwise,
    UINT8_STEM: _pointwise,
}


def serve(
    case: Case,
    config: Any,
    reference: Callable[..., Tensor],
    x: Tensor,
    *operands: Any,
) -> Tensor | None:
    """The result of an operator by its kernel, or None where PyTorch is to compute it.

    Args:
        case, config: the kernel, as `registry.choose` names it.
        reference: the operator in PyTorch's own calls, against which a kernel is checked.
        x, operands: the operator's arguments; checked, and not empty.
    """
    with on_device(x):
        if not self_check.ready(
            case,
            lambda tile: check(case, reference, config if tile is None else tile),
            lambda: plainer_tile(case, config),
        ):
            return None
    return launch(case, self_check.fallback_tile(case)[0] or config, x, *operands)


def launch(case: Case, config: Any, x: Tensor, *operands: Any) -> Tensor | None:
    """The result of a kernel that was found right, or None where it could not be launched."""
    with on_device(x):
        try:
            return _RUN[case.op](x, *operands, config=config)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a launch can fail in as many ways as a first one
            if not self_check.is_on():
                raise
            self_check.fail(case, error)
            return None


def bind(case: Case, config: Any, packed: Packed) -> Launch | None:
    """The kernel of ``case`` with packed operands bound, for maps of one shape; None for others.

    x (N, C, H, W) and out, of the operator's result, are packed channels-last.
    """
    vectors = [*_vectors(packed.bias, packed.scale, packed.shift), case.act]
    if case.op == "depthwise_mix":
        taps, k = taps_of(packed.weight), case.kernel_size
        return kernels().bound_by_first_call(
            lambda x, out: kernels().depthwise_mix(x, taps, *vectors, k, out=out, config=config)
        )
    if case.op != "pointwise_mix":
        return None
    weight = _aligned(packed.weight)
    if isinstance(config, CudaConfig):
        vectors[:1] = _vectors(float32_of(packed.bias))
        run: Callable[..., Tensor] = native_cuda.pointwise_mix
        return lambda x, out: run(x, weight, *vectors, out=out, family=config.family)
    if isinstance(config, PointwiseConfig | None):
        return kernels().bound_by_first_call(
            lambda x, out: kernels().pointwise_mix(x, weight, *vectors, out=out, config=config)
        )
    return None


def in_layout(
    memory_format: torch.memory_format | None,
    wanted: torch.memory_format,
    reference: Callable[..., Tensor],
    x: Tensor,
    *operands: Any,
) -> Tensor:
    """``reference`` on x converted to ``memory_format``, if any; its result in ``wanted``."""
    if memory_format is None:
        return reference(x, *operands)
    out = reference(x.contiguous(memory_format=memory_format), *operands)
    return out.contiguous(memory_format=wanted)


def operands_for(case: Case, shape: tuple[int, int, int]) -> list[Any]:
    """Random arguments for the operator of a case: x, weight, bias, scale, shift, act, and the mean
    and std of uint8 images. x (N, C, H, W) is channels-last; of a stem it lies as `Case.form` says.

    Statistics are those of a trained layer, and the user's random numbers stay what they would have
    been.

    Args:
        shape: N, H, W of x.
    """
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        wide = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return wide.to(dtype)

    n, h, w = shape
    k, d = case.kernel_size, case.out_channels
    inputs = 1 if case.op == "depthwise_mix" else case.channels
    wide = accumulation_dtype(case.dtype)
    x, normal = draw(n, case.channels, h, w), []
    weight = (draw(d, inputs, k, k, dtype=wide) / (inputs * k * k) ** 0.5).to(case.dtype)
    if case.op == UINT8_STEM:
        # Three in four pixels are drawn, the others are black or white.
        x = (x * 110 + 128).clamp_(0, 255).to(torch.uint8)
        normal = [[0.4 + c % 7 / 40 for c in range(case.channels)] for _ in range(2)]
        normal[1].reverse()
    if case.dtype == torch.float64:
        # There is no wider dtype to measure by. Products of few bits sum up exactly, in any order,
        # so that what is left of the kernel's and PyTorch's errors is what follows the sum.
        x, weight = (t.mul_(2**12).round_().div_(2**12) for t in (x, weight))
    return [
        _laid_out_for(case, x),
        weight,
        draw(d) if case.bias else None,
        draw(d, dtype=wide),
        draw(d, dtype=wide),
        case.act,
        *normal,
    ]


def _laid_out_for(case: Case, x: Tensor) -> Tensor:
    """A tensor equal to x whose strides and address have the classes of the case's calls."""
    if case.op not in ("patch_embed", UINT8_STEM):
        return x.contiguous(memory_format=torch.channels_last)
    strides = strides_like(case.form[:4], x.shape)
    first = int(case.form[4] == "unaligned")
    elements = first + 1 + sum(s * (n - 1) for s, n in zip(strides, x.shape, strict=True))
    room = torch.empty(elements, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, strides, first).copy_(x)


def launcher(case: Case, operands: list[Any], config: Any = None) -> Callable[[], Tensor]:
    """A call of the kernel of ``case`` on ``operands``, as an operator launches it.

    A depthwise weight is packed here, once, as a module keeps it.
    """
    x, weight, *rest = operands
    if case.op == "depthwise_mix":
        weight = keep_taps(weight.detach())
    run = _RUN[case.op]

    def launch() -> Tensor:
        with on_device(x):
            return run(x, weight, *rest, config=config)

    return launch


def plainer_tile(case: Case, config: Any = None) -> PointwiseConfig | None:
    """The tile to try where the copy engine's form of a product is not right; None for others.

    Args:
        config: the tile of the call; None: the shipped one.
    """
    if case.op != "pointwise_mix" or isinstance(config, CudaConfig | ProductConfig):
        return None
    from .triton import operands

    architecture = operands.architecture(torch.device(case.device))
    if config is None:
        rows = (1, MANY_OUTPUTS // case.out_channels + 1, BEYOND_INT32)[case.size]
        config = lookup_pointwise(
            architecture,
            case.dtype,
            rows=rows,
            columns=case.out_channels,
            tf32=dot_precision(case.dtype) == "tf32",
        )
    return without_descriptors(config, architecture) if config.descriptors else None


def pointwise_tiles(device: torch.device, dtype: torch.dtype) -> tuple[PointwiseConfig, ...]:
    """Every tile shipped for 1x1 convolutions on ``device``. Imports Triton."""
    from .triton import operands

    tf32 = dot_precision(dtype) == "tf32"
    return pointwise_candidates(operands.architecture(device), dtype, tf32)


def check(case: Case, reference: Callable[..., Tensor], config: Any = None) -> str:
    """What is wrong with the kernel of ``case`` on a small random input; ``""`` for nothing."""
    report = measure_errors(case, reference, config)
    return "" if report.ok else f"wrong numbers, {report}"


def measure_errors(case: Case, reference: Callable[..., Tensor], config: Any = None) -> ErrorReport:
    """Errors of the kernel of ``case`` on a small random input, against float64.

    As small as reaches every kind of tile that the case's own calls have: inside, at every border,
    cut off.
    """
    k = case.kernel_size
    if case.op in ("patch_embed", UINT8_STEM):
        shape = (2, 11 * k + 1, 13 * k)
    elif case.op == "depthwise_mix":
        shape = (2, 2 * k + 11, case.size)
    else:
        pixels = MANY_OUTPUTS // case.out_channels + 150 if case.size else 390
        shape = (2, -(-pixels // 26), 13)
    if case.op == "pointwise_mix" and case.size == 2:
        # So many rows are beyond the copy engine, which the few rows here are not.
        config = plainer_tile(case, config) or config
    device = torch.device(case.device)
    autocast = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast, support.on_device(device):
        operands = operands_for(case, shape)
        ours = _RUN[case.op](*operands, config=config)
        theirs = reference(*operands)
        exact = reference(*(t.double() if isinstance(t, Tensor) else t for t in operands))
        return error_report(ours, theirs, exact)
