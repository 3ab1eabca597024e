"""The CUDA extension's kernels computed by PyTorch, on CPU tensors, as strict about arguments.

What the operators do around them can then be tested where there is neither GPU nor nvcc. The
machine that it plays has a `capability` and both families; `refused` says what a family refuses.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_double import Double, installed
from torch import Tensor

from convmixer_fast import _native_cuda
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.kernels import support
from convmixer_fast.ops import gpu

SERVED = {"mma.sync": range(80, 1000), "wgmma": range(90, 91)}


class CudaDouble(Double):
    """Counts calls as ``mma.sync`` and ``wgmma``, which `wrong` and `error` may name too."""

    def __init__(self, capability: int, families: tuple[str, ...]) -> None:
        super().__init__()
        self.capability = capability
        self.families = families
        self.refused: dict[str, str] = {}
        #: Where each call found its bias.
        self.biases: list[int] = []

    def module(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            families=lambda: list(self.families),
            serves=lambda family, capability: capability in SERVED[family],
            refusal=self._refusal,
            types=lambda: ["bfloat16", "float16", "tf32"],
            activations=lambda: list(ACTIVATIONS),
            architectures=lambda: "sm_80 sm_90 sm_120 compute_120",
        )

    def _refusal(self, family: str, *numbers: int) -> str:
        if numbers[-1] not in SERVED[family]:
            return f"the {family} kernels are not for sm_{numbers[-1]}"
        if family == "wgmma" and numbers[-3] == 2:
            return "wgmma kernels are compiled for bfloat16 and float16"
        return self.refused.get(family, "")

    def cuda(self, x, weight, bias, scale, shift, act, out, family="mma.sync") -> Tensor:
        assert bias is None or bias.dtype == torch.float32
        assert family in self.families
        assert _native_cuda.type_of(x.dtype)
        h = torch.nn.functional.conv2d(x.float(), weight.float(), bias)
        assert weight.is_contiguous()
        self.biases.append(0 if bias is None else bias.data_ptr())
        return self._finish(family, x, self._affine(h, scale, shift, act), out, family)


@contextmanager
def cuda_installed(
    backend: str = "auto",
    capability: int = 80,
    families: tuple[str, ...] = ("mma.sync", "wgmma"),
) -> Iterator[CudaDouble]:
    """CUDA and Triton kernels "run" on CPU tensors inside the block, and are PyTorch's."""
    double = CudaDouble(capability, families)
    with pytest.MonkeyPatch.context() as patch, installed(backend, double):
        patch.setattr(_native_cuda, "_find", lambda: (double.module(), ""))
        patch.setattr(_native_cuda, "is_emulated", lambda: True)
        patch.setattr(_native_cuda, "pointwise_mix", double.cuda)
        patch.setattr(support, "architecture", lambda device: double.capability)
        _forget()
        try:
            yield double
        finally:
            _forget()


@contextmanager
def without_triton() -> Iterator[None]:
    """Inside `cuda_installed`: a machine without Triton, where none of its kernels is asked for."""
    why = "Triton is not installed: pip install triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "_why_no_triton", lambda: why)
        patch.setattr(gpu, "kernels", lambda: pytest.fail("Triton's kernels were asked for"))
        yield


def _forget() -> None:
    _native_cuda.refusal.cache_clear()
    _native_cuda._numbers.cache_clear()
