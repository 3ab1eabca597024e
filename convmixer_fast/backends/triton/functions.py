"""The Triton kernels as functions. Triton is imported here, at the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

#: A kernel with its operands bound, on packed channels-last maps x and out.
Launch = Callable[[Tensor, Tensor], Any]


class Kernels(NamedTuple):
    """The functions of `convmixer_fast.backends.triton.kernels`."""

    pack_taps: Callable[[Tensor], Tensor]
    depthwise_mix: Callable[..., Tensor]
    pointwise_mix: Callable[..., Tensor]
    patch_embed: Callable[..., Tensor]
    after_product_: Callable[..., Tensor]
    bound_by_first_call: Callable[[Launch], Launch] = lambda launch: launch


@cache
def kernels() -> Kernels:
    """The Triton kernels. Importing them imports Triton."""
    from .kernels.after_product import after_product_
    from .kernels.depthwise import depthwise_mix, pack_taps
    from .kernels.launch import bound_by_first_call
    from .kernels.pointwise import pointwise_mix
    from .kernels.stem import patch_embed

    functions = (pack_taps, depthwise_mix, pointwise_mix, patch_embed, after_product_)
    return Kernels(*functions, bound_by_first_call)
