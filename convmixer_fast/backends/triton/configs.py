"""The tiles of the kernels: a table for each kernel, with the reason in each row.

The rows come from arithmetic, from the registers and instruction mixes of compiled kernels and from
counts of a simulator; none was timed. Nothing is tuned at first use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        "All the taps of a row would not fit with the accumulators. Six at a time, eight columns "
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


#: Architectures that share rows. Their tensor cores, shared memory and copies are programmed alike:
#: 80 A100; 86 the rest of Ampere and Ada (99 KiB of shared memory); 90 Hopper (wgmma, TMA);
#: 100 data-centre Blackwell (tcgen05, TMA); 120 consumer Blackwell (mma.sync as on 86); 0 ROCm.
FAMILIES = (0, 80, 86, 90, 100, 120)


def family(architecture: int) -> int:
    """The member of `FAMILIES` for a compute capability such as 89; newer ones like the last."""
    return max(f for f in FAMILIES if f <= architecture)


@dataclass(frozen=True)
class PointwiseConfig:
    """The tile of one program of a matrix product.

    block_m, block_n: outputs, pixels x channels; block_k: terms of the sum in a step;
    group_m: rows of tiles that run side by side (see `epilogue.tile_of`);
    num_warps, num_stages: Triton's; num_stages - 1 steps are on their way at once;
    descriptors: tiles are moved by the copy engine, where shapes and alignment allow;
    halves: the tile ends in two halves, for fewer registers (only with descriptors).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = False
    halves: bool = False


@dataclass(frozen=True)
class PointwiseRow:
    """One row: where it holds (all conditions together), the tile, and why."""

    families: tuple[int, ...]
    config: PointwiseConfig
    reason: str
    #: Which arithmetic: half (fp16, bf16), tf32, ieee.
    arithmetic: tuple[str, ...] = ("half",)
    #: At most this many outputs, and this many columns (channels out).
    outputs: int | None = None
    columns: int | None = None
    #: Neighbours that can be moved at once are fewer bytes than this.
    narrower_than: int | None = None


@dataclass(frozen=True)
class CudaConfig:
    """A kernel of the CUDA extension, by its family's name: ``mma.sync`` or ``wgmma``."""

    family: str

    def __str__(self) -> str:
        return f"cuda {self.family}"


@dataclass(frozen=True)
class ProductConfig:
    """PyTorch's own product, then one Triton kernel for the rest of the block's half."""

    def __str__(self) -> str:
        return "product"


_ALL = (0, 80, 86, 90, 100, 120)
#: 128 tiles of 128 x 128: with fewer, a GPU of 108 to 148 multiprocessors stands partly idle.
_ONE_WAVE = 128 * 128 * 128

#: The first row that holds is taken.
POINTWISE = (
    PointwiseRow(
        _ALL,
        PointwiseConfig(64, 64, 32),
        "odd channel counts: elements pass through registers one by one, and larger tiles spill",
        arithmetic=("half", "tf32", "ieee"),
        narrower_than=8,
    ),
    PointwiseRow(
        (86, 120),
        PointwiseConfig(64, 64, 64),
        "few outputs: four times the tiles of 128 x 128; 32 KiB, three programs a multiprocessor",
        outputs=_ONE_WAVE,
    ),
    PointwiseRow(
        (0, 80, 90, 100),
        PointwiseConfig(64, 64, 64, num_stages=4),
        "few outputs: four times the tiles of 128 x 128; deeper, to cover the latency of few warps",
        outputs=_ONE_WAVE,
    ),
    PointwiseRow(
        _ALL,
        PointwiseConfig(128, 64, 32),
        "few channels out: a tile of 128 columns would be half empty",
        columns=64,
    ),
    PointwiseRow(
        (80,),
        PointwiseConfig(128, 128, 32, num_stages=4),
        "64 x 64 a warp, 4 mma a load from shared memory; 238 registers and 48 KiB let two "
        "programs share a multiprocessor: one ends its tile while the other multiplies; 32 bytes "
        "a clock from L2, 68 % of what A100's gives each multiprocessor",
    ),
    PointwiseRow(
        (86, 120),
        PointwiseConfig(128, 128, 32),
        "as on 80; 32 KiB, since the tensor cores are slower against memory and need less ahead",
    ),
    PointwiseRow(
        (90,),
        PointwiseConfig(128, 256, 64, num_warps=8, num_stages=4, descriptors=True),
        "64 x 256 a warp group: 48 bytes a clock from L2, where 128 x 128 asks for 64 and L2 gives "
        "about 32; 192 KiB, one program a multiprocessor",
    ),
    PointwiseRow(
        (100,),
        PointwiseConfig(128, 256, 64, num_warps=8, num_stages=4, descriptors=True, halves=True),
        "the widest tile of one tcgen05 instruction; ending whole it takes 255 registers and "
        "spills, in halves 110",
    ),
    PointwiseRow(
        (0,),
        PointwiseConfig(128, 128, 32, num_stages=2),
        "64 KiB of shared memory on CDNA 3, and one step ahead is what its pipeline does",
    ),
    PointwiseRow(
        (80, 86, 90, 100, 120),
        PointwiseConfig(64, 64, 32),
        "as for half precision with few outputs; half as deep, since elements are twice as wide",
        arithmetic=("tf32",),
        outputs=_ONE_WAVE,
    ),
    PointwiseRow(
        (80, 86, 120),
        PointwiseConfig(128, 128, 16, num_stages=4),
        "the bytes of 128 x 128 x 32 in half precision: 48 KiB, two programs a multiprocessor",
        arithmetic=("tf32",),
    ),
    PointwiseRow(
        (90,),
        PointwiseConfig(128, 128, 32),
        "225 registers and 96 KiB: two programs a multiprocessor",
        arithmetic=("tf32",),
    ),
    PointwiseRow(
        (100,),
        PointwiseConfig(128, 128, 32, num_warps=8),
        "four warps would spill 24 registers of the tile's end",
        arithmetic=("tf32",),
    ),
    PointwiseRow(
        _ALL,
        PointwiseConfig(64, 128, 16),
        "true float32 on the FMA units, 8 x 8 sums a thread: 0.75 shared-memory wavefronts a "
        "warp's FMA (8 x 4: 1.25), so at most 66 % of A100's rate, 33 % of 4090's and H100's",
        arithmetic=("ieee",),
    ),
    PointwiseRow(
        (0,),
        PointwiseConfig(64, 128, 16, num_stages=2),
        "CDNA 3 multiplies TF32 by its matrix cores; the room of the float32 tile",
        arithmetic=("tf32",),
    ),
)

#: Where the row wants descriptors and the tensors do not allow them.
_WITHOUT_DESCRIPTORS = {
    90: PointwiseConfig(128, 256, 64, num_warps=8, num_stages=4),
    # 128 x 256 spills: there is no end in halves by pointers.
    100: PointwiseConfig(128, 128, 64, num_warps=8),
}


def without_descriptors(config: PointwiseConfig, architecture: int) -> PointwiseConfig:
    """The tile that takes the place of ``config`` where the copy engine is not to be used."""
    if not config.descriptors:
        return config
    plain = replace(config, descriptors=False, halves=False)
    return _WITHOUT_DESCRIPTORS.get(family(architecture), plain)


def arithmetic_of(dtype: torch.dtype, tf32: bool) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"


def lookup_pointwise(
    architecture: int,
    dtype: torch.dtype,
    *,
    rows: int,
    columns: int,
    vector_bytes: int = 16,
    tf32: bool = False,
    descriptors: bool = True,
) -> PointwiseConfig:
    """The tile for a product of ``rows`` pixels x ``columns`` channels out.

    Args:
        architecture: compute capability such as 89, 0 for ROCm.
        dtype: of the operands.
        vector_bytes: how many bytes of neighbours can be moved at once, by divisibility.
        tf32: whether float32 may be multiplied as TF32.
        descriptors: whether shapes and alignment allow the copy engine.
    """
    kind, group = arithmetic_of(dtype, tf32), family(architecture)
    for row in POINTWISE:
        if (
            group in row.families
            and kind in row.arithmetic
            and (row.outputs is None or rows * columns <= row.outputs)
            and (row.columns is None or columns <= row.columns)
            and (row.narrower_than is None or vector_bytes < row.narrower_than)
        ):
            return row.config if descriptors else without_descriptors(row.config, architecture)
    raise LookupError(f"no tile for sm_{architecture}, {dtype}")


TRITON = "triton"


@dataclass(frozen=True)
class OrderRow:
    """One row: the architectures, the kernels in their order, and why.

    A kernel is `TRITON` or a family of the CUDA extension.
    """

    families: tuple[int, ...]
    kernels: tuple[str, ...]
    reason: str


#: Who multiplies half precision and TF32: of an architecture's row, the first kernel that can run.
#: The shares of cuBLAS's rate are estimates from instruction mixes: nothing was timed, and
#: `convmixer_fast.tune` decides by measuring.
ORDER = (
    OrderRow(
        (80, 86, 120),
        ("mma.sync", TRITON),
        "mma.sync is all the tensor cores have, and the hand-ordered loop is expected at 85-95 % "
        "of cuBLAS, Triton's at 80-95 %",
    ),
    OrderRow(
        (90,),
        ("wgmma", TRITON),
        "wgmma alone has the full rate: CUTLASS's loop is expected at 90-100 % of cuBLAS, Triton's "
        "with the copy engine at 75-90 %, mma.sync at 55-65 %, under what pays for fusion",
    ),
    OrderRow(
        (100,),
        (TRITON,),
        "tcgen05 alone has the full rate: Triton's loop is expected at 65-85 % of cuBLAS, mma.sync "
        "at 20-35 %",
    ),
    OrderRow((0,), (TRITON,), "the CUDA extension is not for ROCm"),
)


def lookup_order(architecture: int) -> OrderRow:
    """Who computes products in half precision or TF32 on a compute capability such as 89."""
    return next(row for row in ORDER if family(architecture) in row.families)


def why_slower(dtype: torch.dtype, tf32: bool = False) -> str:
    """Why PyTorch's own product and one more pass are expected to be faster; ``""`` where ours is.

    Fusion saves one pass over the output, which pays from about 70 to 80 % of the library's speed
    (K = 768 and 1536).
    """
    if arithmetic_of(dtype, tf32) == "ieee":
        return "float32 without TF32: the fused product reaches at most two thirds of the FMA rate"
    return ""


def pointwise_candidates(
    architecture: int, dtype: torch.dtype, tf32: bool = False
) -> tuple[PointwiseConfig, ...]:
    """Every tile shipped for an architecture and arithmetic: what is worth measuring there."""
    kind, group = arithmetic_of(dtype, tf32), family(architecture)
    found = [r.config for r in POINTWISE if group in r.families and kind in r.arithmetic]
    if kind == "half" and group in _WITHOUT_DESCRIPTORS:
        found.append(_WITHOUT_DESCRIPTORS[group])
    return tuple(dict.fromkeys(found))


#: The stem multiplies 0.5 to 2.6 % of the network's terms (C p p = 147 or 588 for an RGB image):
#: one tile everywhere. Its left operand is gathered through registers, an address and an element
#: each, and 64 x 16 of those over 128 threads fit with 64 sums in 168 registers: three programs a
#: multiprocessor hide what no asynchronous copy does here.
STEM = PointwiseConfig(64, 128, 16)
#: float32: the operands take twice the room.
STEM_FLOAT32 = PointwiseConfig(64, 128, 16)


def lookup_stem(dtype: torch.dtype) -> PointwiseConfig:
    """The tile for a patch embedding with weights of ``dtype``."""
    return STEM_FLOAT32 if dtype == torch.float32 else STEM
