"""Dtype settings under which a model runs on a CPU: the suite never_slower covers each.

Ours and stock PyTorch get the same setting: the model's and the images' dtype, and the context that
a call runs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """One dtype setting.

    Attributes:
        about: the description in tables.
        dtype: of parameters and images.
        context: context manager that calls run in.
        unavailable_reason: empty where stock PyTorch has the setting on this machine.
    """

    about: str
    dtype: torch.dtype = torch.float32
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    unavailable_reason: Callable[[], str] = str


def _no_float16_reason() -> str:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device="cpu")
    try:
        torch.nn.functional.conv2d(x, x)
    except RuntimeError as error:
        return f"stock PyTorch has no float16 convolution on this CPU: {error}"
    return ""


def _no_reduced_reason() -> str:
    # Without bfloat16 instructions oneDNN ignores the switch.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, bool)() for name in names):
        return ""
    return "this CPU has no bfloat16 instructions (AVX512-BF16, AMX): the setting changes nothing"


@contextmanager
def reduced_float32() -> Iterator[None]:
    """Allow oneDNN to compute float32 convolutions and GEMMs in bfloat16."""
    onednn = torch.backends.mkldnn
    switches = [getattr(onednn, name, None) for name in ("conv", "matmul")]
    switches = [switch for switch in switches if hasattr(switch, "fp32_precision")]
    if not switches:  # before torch 2.9 only GEMMs had one
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "bf16"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


#: Name in rows and in ``--cell-settings`` -> setting.
SETTINGS = {
    "float32": Setting("a float32 model"),
    "bfloat16": Setting("a model and images in bfloat16", torch.bfloat16),
    "autocast": Setting(
        "a float32 model under torch.autocast('cpu', torch.bfloat16)",
        context=lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "float16": Setting(
        "a model and images in float16", torch.float16, unavailable_reason=_no_float16_reason
    ),
    "reduced": Setting(
        "a float32 model where torch.backends.mkldnn's fp32_precision is 'bf16'",
        context=reduced_float32,
        unavailable_reason=_no_reduced_reason,
    ),
}
