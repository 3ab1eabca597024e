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
    """One row: where it holds (both conditions together), the tile, and why."""

    kernel_sizes: range
    channels: range
    config: DepthwiseConfig
    reason: str


_ANY = 1 << 31

#: The first row that fits decides. No dtype and no architecture has a row of its own: a thread
#: holds four channels, 8 or 16 bytes, in every dtype, and the registers fit everywhere.
DEPTHWISE: tuple[DepthwiseRow, ...] = (
    DepthwiseRow(
        range(1, 12),
        range(64, _ANY),
        DepthwiseConfig(columns=8, rows=8, channels=64, taps=11, warps=4),
        "Eight columns of four channels are 32 accumulators and 4k taps: 96-128 registers, no "
        "spill, and four programs on a multiprocessor. Sixteen columns would load and convert a "
        "third less (0.80 of the loop multiply-adds at k = 9, not 0.73), but take 136-168 "
        "registers, and at 128 spill 50 values a kernel row on sm_89 to sm_120; twelve still spill "
        "on sm_90 and sm_120. 64 channels are a line of 128 bytes in 16 bits; eight rows read "
        "(8 + k - 1) / 8 lines for one written, and a warp, two rows of 16 threads, reads its taps "
        "once for both.",
    ),
    DepthwiseRow(
        range(12, 1 << 10),
        range(64, _ANY),
        DepthwiseConfig(columns=8, rows=8, channels=64, taps=6, warps=4),
        "All the taps of a row would not fit beside the accumulators. Six at a time, eight columns "
        "read 13 for 48 multiply-adds a channel; with eight at a time k = 31 takes 130 registers.",
    ),
    DepthwiseRow(
        range(1, 12),
        range(0, 64),
        DepthwiseConfig(columns=8, rows=16, channels=32, taps=11, warps=4),
        "Few channels: the same threads stand on more rows. Below 32 channels masks idle the rest.",
    ),
    DepthwiseRow(
        range(12, 1 << 10),
        range(0, 64),
        DepthwiseConfig(columns=8, rows=16, channels=32, taps=6, warps=4),
        "Few channels and more taps than fit: both of the above.",
    ),
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
