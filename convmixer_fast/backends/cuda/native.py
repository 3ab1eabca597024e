"""Calls of the compiled CUDA kernels with tensors.

The extension is looked for once, at first use, and every reason for its absence is kept. It imports
on a machine without a GPU or a driver. ``CONVMIXER_FAST_DISABLE_CUDA=1`` leaves it alone.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ... import environment
from ..extensions import build_info, why_absent
from ..triton import support
from ..triton.precision import dot_precision

#: Of kernels; those that only one architecture has come first.
FAMILIES = ("wgmma", "mma.sync")
#: An address as PyTorch's allocator gives them, to ask about a problem whose tensors are not there.
_ALIGNED = 1 << 9


@cache
def _find() -> tuple[ModuleType | None, str]:
    """The module, and why there is none: one of the two is empty."""
    if off := environment.why_off("DISABLE_CUDA"):
        return None, off
    try:
        return import_module("convmixer_fast._cuda"), ""
    except ImportError as error:
        return None, why_absent("_cuda", "CUDA", error, build_info().get("cuda", {}))


def load() -> ModuleType | None:
    """The extension module ``convmixer_fast._cuda``, or None; `why_unavailable` says why."""
    return _find()[0]


def why_unavailable() -> str:
    """Every known reason why `load` gives None, in one line; "" when the kernels are there."""
    return _find()[1]


def _engine() -> ModuleType:
    module, why = _find()
    if module is None:
        raise RuntimeError(f"the CUDA kernels are not available: {why}")
    return module


def why_not_here() -> str:
    """Why the kernels run on no GPU of this machine; ``""`` where they run on one."""
    if load() is None:
        return why_unavailable()
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return why_not_gpu(support.architecture(torch.device("cuda", torch.cuda.current_device())))


def why_not(device: torch.device) -> str:
    """Why the kernels run on no tensors of a device; ``""`` where they run."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    why = support.why_no_gpu(device)
    if why:
        return why
    return why_unavailable() if load() is None else why_not_gpu(support.architecture(device))


def why_not_gpu(capability: int) -> str:
    """Why no kernel runs on a GPU of that compute capability (89; 0 for ROCm), else ``""``."""
    engine = _engine()
    if capability == 0:
        return "the kernels are CUDA's, and this is a GPU of ROCm"
    built = engine.architectures()
    served = any(engine.serves(family, capability) for family in engine.families())
    if served and any(_runs_on(name, capability) for name in built.split()):
        return ""
    return f"no kernel for sm_{capability}; there are some for {built}"


def _runs_on(name: str, capability: int) -> bool:
    """Whether code for ``name``, as in sm_80 or compute_80, runs on a compute capability.

    Machine code does on later minor versions of the same major one; PTX on all that came later.
    """
    kind, _, number = name.partition("_")
    made_for = int(number)
    return made_for <= capability and (kind == "compute" or made_for // 10 == capability // 10)


def type_of(dtype: torch.dtype) -> str:
    """The kernels' name of a dtype, "" for one that they do not compute as PyTorch is set to."""
    if dtype == torch.float32:
        return "tf32" if dot_precision(dtype) == "tf32" else ""
    return {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "")


@lru_cache(maxsize=4096)
def refusal(family: str, capability: int, kind: str, m: int, n: int, k: int, act: str) -> str:
    """Why a family cannot take a product of packed, aligned operands; ``""`` where it can.

    Args:
        capability: such as 89.
        kind: what `type_of` gives.
        m, n, k: pixels, channels out, channels in.
    """
    engine = _engine()
    if family not in engine.families():
        return build_info().get("cuda", {}).get("omitted", {}).get(family, "not in this build")
    addresses = [_ALIGNED * i for i in range(1, 7)]
    numbers = (_numbers("types")[kind], _numbers("activations")[act], capability)
    return engine.refusal(family, *addresses, m, n, k, k, *numbers)


@cache
def _numbers(what: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(getattr(_engine(), what)())}


def pointwise_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    act: str,
    out: Tensor,
    family: str = "mma.sync",
) -> Tensor:
    """``scale * act(W x + bias) + shift`` in one kernel, on the current stream of x's device.

    That device must be the current one.

    Args:
        x: (N, C, H, W), channels-last without gaps; bfloat16, float16, or float32 where PyTorch's
            matrix products may use TF32.
        weight: (D, C, 1, 1), contiguous, dtype of x.
        bias: (D,) float32, or None.
        scale, shift: (D,) float32.
        act: a name in `convmixer_fast.arch.ACTIVATIONS`.
        out: (N, D, H, W), channels-last without gaps, dtype of x; not x itself.
        family: one of `FAMILIES`.

    Returns:
        ``out``. Sums are float32, rounded once at the end.

    Raises:
        ValueError: an operand's shape, dtype, device or layout does not fit, or the family refuses
            it.
        RuntimeError: the kernel could not be queued, or is not available.
    """
    engine = _engine()
    n, c, h, w = x.shape
    d = weight.shape[0]
    kind = type_of(x.dtype)
    if not kind:
        raise ValueError(f"x must be bfloat16, float16, or float32 and TF32 allowed, got {x.dtype}")
    _check("x", x, (n, c, h, w), x.dtype, x.device, channels_last=True)
    _check("weight", weight, (d, c, 1, 1), x.dtype, x.device)
    _check("out", out, (n, d, h, w), x.dtype, x.device, channels_last=True)
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            _check(name, vector, (d,), torch.float32, x.device)
    capability = support.architecture(x.device)
    operands = (
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        n * h * w,
        d,
        c,
        c,
        _numbers("types")[kind],
        _numbers("activations")[act],
        capability,
    )
    why = engine.refusal(family, *operands)
    if why:
        shape = f"{n * h * w} x {c} -> {d} {kind} {act}"
        raise ValueError(f"{family} ({shape}, sm_{capability}): {why}")
    stream = torch.cuda.current_stream(x.device).cuda_stream
    engine.pointwise_mix(family, *operands, stream)
    return out


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool = False,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device or device.type != "cuda":
        raise ValueError(f"{name} must be on x's GPU, x is on {device}, {name} on {tensor.device}")
    if not (tensor.permute(0, 2, 3, 1) if channels_last else tensor).is_contiguous():
        layout = "channels-last without gaps" if channels_last else "contiguous"
        raise ValueError(f"{name} must be {layout}, has strides {tensor.stride()}")
