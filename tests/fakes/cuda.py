"""Fake of the CUDA extension: PyTorch on CPU tensors, as strict about arguments.

It tests what the operators do around the kernels without a GPU and without nvcc. The fake GPU has a
`capability` and both families; `refused` gives the reason why a family refuses.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.triton import functions, support
from fakes.triton import FakeTriton, installed

SERVED = {"mma.sync": range(80, 1000), "wgmma": range(90, 91)}


class FakeCuda(FakeTriton):
    """Calls are counted as ``mma.sync`` and ``wgmma``; `wrong` and `error` may hold these names."""

    def __init__(self, capability: int, families: tuple[str, ...]) -> None:
        super().__init__()
        self.capability = capability
        self.families = families
        self.refused: dict[str, str] = {}
        #: Address of each call's bias, 0 without one.
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
        assert native_cuda.type_of(x.dtype)
        h = torch.nn.functional.conv2d(x.float(), weight.float(), bias)
        assert weight.is_contiguous()
        self.biases.append(0 if bias is None else bias.data_ptr())
        return self._finish(family, x, self._affine(h, scale, shift, act), out, family)


@contextmanager
def cuda_installed(
    backend: str = "auto",
    capability: int = 80,
    families: tuple[str, ...] = ("mma.sync", "wgmma"),
) -> Iterator[FakeCuda]:
    """Replace the CUDA and Triton kernels by fakes inside the block."""
    fake = FakeCuda(capability, families)
    with pytest.MonkeyPatch.context() as patch, installed(backend, fake):
        patch.setattr(native_cuda, "_find", lambda: (fake.module(), ""))
        patch.setattr(native_cuda, "why_not", _why_not)
        patch.setattr(native_cuda, "pointwise_mix", fake.cuda)
        patch.setattr(support, "architecture", lambda device: fake.capability)
        _forget()
        try:
            yield fake
        finally:
            _forget()


@contextmanager
def without_triton() -> Iterator[None]:
    """Inside `cuda_installed`: a machine without Triton; a request for its kernels fails."""
    why = "Triton is not installed: pip install triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "_why_no_triton", lambda: why)
        patch.setattr(functions, "kernels", lambda: pytest.fail("Triton's kernels were requested"))
        yield


def _why_not(device: torch.device) -> str:
    if native_cuda.load() is None:
        return native_cuda.why_unavailable()
    return native_cuda.why_not_gpu(support.architecture(device))


def _forget() -> None:
    native_cuda.refusal.cache_clear()
    native_cuda._numbers.cache_clear()
