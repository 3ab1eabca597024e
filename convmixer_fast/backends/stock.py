"""CPUs on which PyTorch's own operators are faster than the engine, by dtype and channels.

The engine computes in float32. A CPU with bfloat16 instructions multiplies bfloat16 models and
autocast faster in oneDNN:

* AMX: at 768 channels and 224 px 26 images a second and core, the engine 9.4. PyTorch computes
  every bfloat16 call there, and float32 calls that may be rounded to bfloat16.
* AVX512-BF16 alone, which has twice the float32 rate. On Zen 4 the engine takes 0.6-1.08 of
  PyTorch's time at 256 channels, 0.8-1.2 at 384 and 512 and 1.0-1.5 from 768 on; on Zen 5 0.89-0.96
  at 256 and 1.07-1.45 from 384 on. PyTorch computes bfloat16 from 384 channels on. float32 calls
  that may be rounded stay with the engine: PyTorch's maps are float32 too, and on Zen 4 the engine
  takes 0.7-1.03 of its time for 1024/20 from 4 x 4 maps on.

``auto`` leaves such calls to PyTorch in the layout that is faster there (`fastest_layout`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Channels from which PyTorch is faster at bfloat16 where AVX512-BF16 is all there is.
_AVX512_CHANNELS = 384
#: On such CPUs contiguous maps are faster from so many channels on, within these numbers of pixels:
#: 1.04-1.45x at 1024 and 1536 channels. Elsewhere channels-last is, by up to 1.5x.
_CONTIGUOUS_CHANNELS, _CONTIGUOUS_PIXELS = 1024, range(16, 1024)


def reason_stock_is_faster(dtype: torch.dtype, channels: int) -> str:
    """Why PyTorch is expected to be faster than the engine on this CPU; ``""`` where it is not.

    Args:
        dtype: that is computed in, autocast's where that is on.
        channels: of the result.
    """
    if dtype == torch.bfloat16:
        units = _bfloat16_units()
        if units == "AMX" or (units and channels >= _AVX512_CHANNELS):
            return f"PyTorch multiplies bfloat16 with this CPU's {units}, the engine in float32"
    if dtype == torch.float16 and _multiplies_float16():
        return "PyTorch multiplies float16 with this CPU's AMX, the engine in float32"
    if dtype == torch.float32 and _bfloat16_units() == "AMX" and allows_bfloat16():
        return (
            "torch.backends.mkldnn.conv.fp32_precision allows PyTorch to multiply in bfloat16, "
            "for which this CPU has AMX; the engine multiplies in float32"
        )
    return ""


def fastest_layout(x: Tensor) -> torch.memory_format:
    """The layout in which PyTorch's operators are fastest on maps like ``x`` (N, C, H, W).

    Asked only where `reason_stock_is_faster` gives a reason.
    """
    pixels = x.shape[2] * x.shape[3]
    if (
        _bfloat16_units() != "AMX"
        and x.shape[1] >= _CONTIGUOUS_CHANNELS
        and pixels in _CONTIGUOUS_PIXELS
    ):
        return torch.contiguous_format
    return torch.channels_last


@cache
def _bfloat16_units() -> str:
    """The instructions that multiply bfloat16: ``AMX``, ``AVX512-BF16`` or ``""``."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "AMX"
    # Torch 2.8 and later tell of AVX512-BF16.
    return "AVX512-BF16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else ""


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
