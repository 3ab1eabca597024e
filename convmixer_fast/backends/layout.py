"""The layout of activations: what kernels for GPUs read and write, and what callers get back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernel_key import is_aligned
from .operands import memory_format_of
from .triton import support

#: N, H, W of activations.
Shape = tuple[int, int, int]


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


def aligned(t: Tensor) -> Tensor:
    """A parameter without gaps that begins at a multiple of 16 bytes: itself, or a copy.

    One that does not, such as a part of a flat buffer, would compile another form of a kernel, with
    narrower loads, which was never checked.
    """
    t = t.detach().contiguous()
    return t if is_aligned(t) else t.clone()


def vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else aligned(v) for v in vectors]


def into(out: Tensor, launch: Callable[[Tensor], Any]) -> Tensor:
    """``out``, filled by a kernel that writes channels-last, whatever layout ``out`` has."""
    if out.is_contiguous(memory_format=torch.channels_last):
        launch(as_channels_last(out))
        return out
    dense = torch.empty_like(out, memory_format=torch.channels_last)
    launch(dense)
    return out.copy_(dense)


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
