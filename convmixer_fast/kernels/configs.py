"""Which tile does a kernel use? One table for each kernel, the reason beside each row.

The rows come from arithmetic, from the registers and instruction mixes of compiled kernels and from
counts of a simulator; none was timed. Nothing is tuned at first use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DepthwiseConfig:
    """The tile of one program of the depthwise kernel.

    Attributes:
        columns: output columns, one accumulator each; at most `depthwise.MAX_COLUMNS`.
        rows: output rows, a power of two.
        channels: channels, a power of two; a thread holds rows * channels / (32 * warps) of them.
        taps: how many taps of a kernel row are in registers at once.
        warps: warps of 32 threads.
    """

    columns: int
    rows: int
    channels: int
    taps: int
    warps: int


@dataclass(frozen=True)
class DepthwiseRow:
    """One row of the table: where it applies, and what it says."""

    kernel_sizes: range
    channels: range
    config: DepthwiseConfig


_ANY = 1 << 31

#: The first row that fits decides. No dtype and no architecture has a row of its own yet: a thread
#: holds four channels, 8 or 16 bytes, in every dtype, and the registers fit everywhere.
DEPTHWISE: tuple[DepthwiseRow, ...] = (
    # Eight columns of four channels are 32 accumulators, 4k taps, and room for the loads in flight:
    # 85-108 registers on sm_80 to sm_120 and four programs of 4 warps on a multiprocessor. Twelve
    # columns would save a sixth of the loads and conversions, but at k = 9 the assemblers of sm_90
    # and sm_120 spill them at 128 registers; sixteen spill everywhere.
    # 64 channels are a line of 128 bytes in 16 bits; eight rows read (8 + k - 1) / 8 lines for one
    # written and a warp, two rows of 16 threads, reads its taps once for both.
    DepthwiseRow(range(1, 12), range(64, _ANY), DepthwiseConfig(8, 8, 64, 11, 4)),
    # Above 11 taps a row they would not fit beside the accumulators: eight at a time.
    DepthwiseRow(range(12, 1 << 10), range(64, _ANY), DepthwiseConfig(8, 8, 64, 8, 4)),
    # Few channels: the same threads stand on more rows. Below 32 channels masks idle the rest.
    DepthwiseRow(range(1, 12), range(0, 64), DepthwiseConfig(8, 16, 32, 11, 4)),
    DepthwiseRow(range(12, 1 << 10), range(0, 64), DepthwiseConfig(8, 16, 32, 8, 4)),
)


def lookup_depthwise(dtype: torch.dtype, kernel_size: int, channels: int) -> DepthwiseConfig:
    """The shipped tile of the depthwise kernel for activations of ``dtype``.

    Raises:
        LookupError: no row fits.
    """
    for row in DEPTHWISE:
        if kernel_size in row.kernel_sizes and channels in row.channels:
            return row.config
    raise LookupError(f"no depthwise tile for {dtype}, k = {kernel_size}, {channels} channels")
