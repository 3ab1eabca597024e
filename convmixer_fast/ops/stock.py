"""CPUs on which PyTorch's own operators are faster than the engine, by dtype.

The engine computes in float32. Where a CPU multiplies bfloat16 itself (AVX512-BF16, AMX), oneDNN is
faster for bfloat16 models and autocast, and for float32 models whose user allowed it to round to
bfloat16: 26 against 9.4 images a second and core at 768 channels and 224 px with AMX. ``auto``
leaves such calls to PyTorch, in channels-last, the layout in which its depthwise convolutions are
fastest there.
"""

from __future__ import annotations

from functools import cache

import torch


def reason_stock_is_faster(dtype: torch.dtype) -> str:
    """Why PyTorch is expected to be faster than the engine on this CPU; ``""`` where it is not.

    Args:
        dtype: that is computed in, autocast's where that is on.
    """
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        return "PyTorch multiplies bfloat16 with this CPU's own instructions, the engine in float32"
    if dtype == torch.float16 and _multiplies_float16():
        return "PyTorch multiplies float16 with this CPU's own instructions, the engine in float32"
    if dtype == torch.float32 and _multiplies_bfloat16() and allows_bfloat16():
        return (
            "torch.backends.mkldnn.conv.fp32_precision allows PyTorch to multiply in bfloat16, "
            "for which this CPU has instructions; the engine multiplies in float32"
        )
    return ""


@cache
def _multiplies_bfloat16() -> bool:
    # Every CPU with AMX has AVX512-BF16 too.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@cache
def _multiplies_float16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return bool(supported is not None and supported())


def allows_bfloat16() -> bool:
    """Whether the user lets PyTorch's float32 convolutions round to bfloat16.

    Torch 2.8 has no such setting. `torch.set_float32_matmul_precision` concerns matrix products
    alone: PyTorch's convolutions stay as they are, and so does the engine.
    """
    conv = getattr(torch.backends.mkldnn, "conv", None)
    return getattr(conv, "fp32_precision", "none") == "bf16"
