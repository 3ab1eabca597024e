"""How does an operator become a kernel launch on a GPU?

Between the operators, which take any strides, and the Triton kernels, which want channels-last:
the layout in and out, the depthwise taps in the kernel's order, the device that the launch is for,
and the check before a kernel's first result (`first_use`). Triton is imported here, at the first
call that a kernel may serve, and nowhere above.

Every function returns None where the kernel is not to be trusted with the call: PyTorch's operators
then serve it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import support
from ..testing import error_report
from . import first_use
from .cases import MANY_OUTPUTS, Case, case_of
from .common import accumulation_dtype, memory_format_of


class Kernels(NamedTuple):
    """The functions of `convmixer_fast.kernels`, as a test may replace them."""

    pack_taps: Callable[[Tensor], Tensor]
    depthwise_mix: Callable[..., Tensor]
    pointwise_mix: Callable[..., Tensor]
    patch_embed: Callable[..., Tensor]


@cache
def kernels() -> Kernels:
    """The Triton kernels. Importing them imports Triton."""
    from ..kernels.depthwise import depthwise_mix, pack_taps
    from ..kernels.pointwise import pointwise_mix
    from ..kernels.stem import patch_embed

    return Kernels(pack_taps, depthwise_mix, pointwise_mix, patch_embed)


#: An attribute of weights that are private copies (see `keep_taps`).
_TAPS = "_convmixer_fast_taps"


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


def memory_of(packed: Tensor) -> list[Tensor]:
    """A packed copy and what is kept with it."""
    kept = getattr(packed, _TAPS, None)
    return [packed] if kept is None else [packed, kept]


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` with the strides of a packed (N, H, W, C): itself, a view, or a copy.

    Where an axis has one element several strides mean the same memory; kernels see this one. A
    slice that begins between two 16-byte words is copied too: kernels would fall back to narrower
    loads, and to a form that nobody checked.
    """
    n, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.data_ptr() % 16:
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


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device's current stream: make that the tensor's device."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.detach().contiguous() for v in vectors]


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    out = torch.empty_like(x, memory_format=memory_format_of(x))
    x = as_channels_last(x.detach().resolve_neg())
    operands = [taps_of(weight), *_vectors(bias, scale, shift), act, weight.shape[-1]]
    return _into(out, lambda out: kernels().depthwise_mix(x, *operands, out=out))


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    n, _, h, w = x.shape
    d, _, p, _ = weight.shape
    out = torch.empty(
        (n, d, h // p, w // p),
        dtype=x.dtype,
        device=x.device,
        memory_format=stem_format(x, p),
    )
    x = x.detach().resolve_neg()
    operands = [weight.detach().contiguous(), *_vectors(bias, scale, shift), act]
    if p == 1:
        pixels = as_channels_last(x)
        return _into(out, lambda out: kernels().pointwise_mix(pixels, *operands, out=out))
    return _into(out, lambda out: kernels().patch_embed(x, *operands, out=out))


def _into(out: Tensor, launch: Callable[[Tensor], Tensor]) -> Tensor:
    """``out``, filled by a kernel that writes channels-last, whatever layout ``out`` has."""
    if out.is_contiguous(memory_format=torch.channels_last):
        launch(as_channels_last(out))
        return out
    return out.copy_(launch(torch.empty_like(out, memory_format=torch.channels_last)))


_RUN = {"depthwise_mix": _depthwise, "pointwise_mix": _pointwise}


def serve(
    op: str,
    reference: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
) -> Tensor | None:
    """The result of ``op`` by its kernel, or None where PyTorch is to compute it.

    Args:
        op: ``depthwise_mix`` or ``pointwise_mix``.
        reference: the operator in PyTorch's own calls, against which a kernel is checked.
        x, weight, bias, scale, shift, act: see the operator; checked, and not empty.
    """
    case = case_of(op, x, weight, bias, act)
    run = _RUN[op]
    with _on_device(x):
        if not first_use.ready(case, lambda case: check(case, run, reference)):
            return None
        try:
            return run(x, weight, bias, scale, shift, act)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a launch can fail in as many ways as a first one
            if not first_use.is_on():
                raise
            first_use.fail(case, error)
            return None


def check(case: Case, run: Callable[..., Tensor], reference: Callable[..., Tensor]) -> str:
    """What is wrong with the kernel of ``case`` on a small random input; ``""`` for nothing.

    As small as reaches every kind of tile that the case's own calls have: inside, at every border,
    cut off.
    """
    device = torch.device(case.device)
    # Its own generator: the user's random numbers stay what they would have been.
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        wide = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return wide.to(dtype)

    k, c, d = case.kernel_size, case.channels, case.out_channels
    weight_shape = (d, c, k, k)
    if case.op == "patch_embed":
        image = (2, c, 11 * k + 1, 13 * k)
    elif case.op == "depthwise_mix":
        image, weight_shape = (2, c, 2 * k + 11, case.size), (d, 1, k, k)
    else:
        pixels = MANY_OUTPUTS // d + 150 if case.size else 390
        image = (2, c, -(-pixels // 26), 13)
    fan_in = weight_shape[1] * weight_shape[2] * weight_shape[3]
    wide = accumulation_dtype(case.dtype)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        x = draw(*image).contiguous(memory_format=torch.channels_last)
        operands: list[Any] = [
            (draw(*weight_shape, dtype=wide) / fan_in**0.5).to(case.dtype),
            draw(d) if case.bias else None,
            draw(d, dtype=wide),
            draw(d, dtype=wide),
        ]
        ours = run(x, *operands, case.act)
        theirs = reference(x, *operands, case.act)
        exact = reference(
            *(t if t is None else t.to(torch.float64) for t in (x, *operands)), case.act
        )
        report = error_report(ours, theirs, exact)
    return "" if report.ok else f"wrong numbers, {report}"
