"""The Triton depthwise kernel, compiled ahead of time: its machine code and the bars it meets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ptxsim
import torch

from convmixer_fast.backends.triton.configs import DepthwiseConfig, family

from . import build as aot
from .build import REGISTERS_ALL, TRITON_TYPES, WARPS_ALL, Bars

#: The least share of multiply-adds among the hot loop's instructions, by kernel size, in 16 bits
#: and in float32; there is no bar for k = 3 and 5.
LEAST_SHARE = {9: (0.70, 0.85), 7: (0.67, 0.85)}
#: Multiply-adds a loaded value.
LEAST_REUSE = {9: 4.0, 7: 3.5}
MOST_REGISTERS = 128
#: With masks, in float32: three programs a multiprocessor instead of four.
MOST_REGISTERS_MASKED = 138
#: (edges, dtype, k, architecture) of these kernels.
MASKED = {
    ("any", torch.float32, 9, 100),
    *(("any", torch.float32, 7, architecture) for architecture in (86, 89, 90)),
}
WHY_MASKED = "images narrower than a tile, in float32: masks take registers, and nothing spills"
#: Conversions a loaded value: one; up to the second number for the reason given.
MOST_UNPACK, MOST_COUNTED = 1.0, 1.06
WHY_COUNTED = "one shift of an address is among those counted as conversions"
#: Channels of the tile for few channels; the bars below are what it may miss, and why.
FEW = 32
#: Spills allowed there, and in these rows of two tiles.
MOST_SPILLS_OUTSIDE = 2
SPILLING = {("two", torch.float32, 3, 80)}
WHY_SPILLS = (
    "few channels, or rows of two tiles: a value that the end of a tile needs waits on the stack, "
    "outside every loop"
)
#: (dtype, k) -> share.
LEAST_SHARE_OF_FEW = {(torch.float32, 7): 0.845}
WHY_SHARE = "few channels: three more moves or uniform operations a kernel row"


def source(
    config: DepthwiseConfig,
    dtype: torch.dtype,
    k: int,
    channels: int = 1536,
    act: str = "gelu",
    edges: str = "many",
    pair: bool | None = None,
) -> tuple[Any, dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Kernel, signature, constants and integers divisible by 16 of one depthwise kernel."""
    import triton.language as tl

    from convmixer_fast.backends.triton.kernels.depthwise import depthwise_kernel

    kind = TRITON_TYPES[dtype]
    pair = dtype == torch.bfloat16 if pair is None else pair
    element = "*i32" if pair else f"*{kind}"
    signature = {
        **dict.fromkeys(("X", "ZEROS"), element),
        **dict.fromkeys(("Y", "BIAS"), f"*{kind}"),
        **dict.fromkeys(("TAPS", "SCALE", "SHIFT"), "*fp32"),
        **dict.fromkeys(("H", "W", "tiles_h", "tiles_w"), "i32"),
        **dict.fromkeys(("image_pixels", "row_step"), "i64"),
    }
    constants = {
        "C": channels,
        "K": k,
        "T": config.columns,
        "R": config.rows,
        "BC": config.channels,
        "CHUNK": config.taps,
        "EDGES": edges,
        "ACT": act,
        "DTYPE": getattr(tl, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[kind]),
        "PAIR": pair,
    }
    return depthwise_kernel, signature, constants, ("row_step",)


def build(
    config: DepthwiseConfig,
    architecture: int,
    dtype: torch.dtype,
    k: int,
    **of: Any,
) -> Any:
    """Compile a tile for sm_``architecture`` and disassemble it; ``of`` as for `source`."""
    kernel, signature, constants, divisible = source(config, dtype, k, **of)
    return ptxsim.sass.aot(
        kernel,
        signature,
        constants,
        architecture,
        num_warps=config.warps,
        num_stages=1,
        divisible=divisible,
    )


def build_hip(
    config: DepthwiseConfig, architecture: str, dtype: torch.dtype, k: int, **of: Any
) -> Any:
    """Compile a tile for a GPU of ROCm, such as gfx942."""
    return aot.build_hip(*source(config, dtype, k, **of), architecture, config.warps, 1)


def facts(built: Any, config: DepthwiseConfig, k: int) -> dict[str, Any]:
    """Numbers of the machine code; the hot loop is one kernel row of an inner tile.

    Where the assembler unrolled the loop, as for three rows, it is the whole kernel.
    """
    report = built.report
    hot = report.hot_loop.instructions if report.hot_loop else report.sass
    count = Counter(i.base for i in hot)
    # sm_100's FFMA2 is two multiply-adds.
    fma = count["FFMA"] + 2 * count["FFMA2"]
    threads = 32 * config.warps
    values = config.rows * config.channels // threads
    loaded = (config.columns + k - 1) * values
    packed = threads * -(-report.registers // 8) * 8
    unpack = sum(count[base] for base in ("SHF", "LOP3", "PRMT", "HADD2", "F2F"))
    return {
        "architecture": built.arch,
        "registers": report.registers,
        "stack": report.stack,
        "spills": report.spills,
        "spills_in_loops": sum(
            i.base in ("LDL", "STL") for x in report.loops for i in x.instructions
        ),
        "shared": built.shared,
        "programs": min(REGISTERS_ALL // packed, WARPS_ALL[family(built.arch)] // config.warps),
        "fma": fma,
        "hot_instructions": len(hot),
        "fma_share": fma / len(hot),
        "fma_per_load": config.columns * k * values / loaded,
        "unpack_per_load": unpack / loaded,
        "predicated": sum(bool(i.predicate) for i in hot if i.base == "LDG"),
        "division": sum(count[base] for base in ("I2F", "F2I", "MUFU")),
        "load_bits": dict(report.widths("LDG", hot)),
        "store_bits": dict(report.widths("STG")),
        "narrow": sum(i.width < 32 for i in report.sass if i.base in ("LDG", "STG")),
        "instructions": len(report.sass),
        "mix": dict(count.most_common()),
    }


def rows_of_tiles_bars(
    built: Any, config: DepthwiseConfig, dtype: torch.dtype, k: int, edges: str = "many"
) -> Bars:
    """The static bars of every row of tiles, also where images are one or two tiles wide."""
    f, found = facts(built, config, k), Bars()
    waiting = f["spills"] <= MOST_SPILLS_OUTSIDE and f["spills_in_loops"] == 0
    build = (edges, dtype, k, built.arch)
    found.bar(
        f["spills"] == 0 and f["stack"] == 0,
        f"{f['spills']} spills, {f['stack']} bytes of stack",
        WHY_SPILLS if waiting and (config.channels == FEW or build in SPILLING) else "",
    )
    masked = build in MASKED and f["registers"] <= MOST_REGISTERS_MASKED
    found.bar(
        f["registers"] <= MOST_REGISTERS,
        f"{f['registers']} registers",
        WHY_MASKED if masked else "",
    )
    found.bar(f["shared"] <= 48 * 1024, f"{f['shared']} bytes of shared memory")
    found.bar(f["narrow"] == 0, f"{f['narrow']} accesses of 16 bits")
    return found


def bars(built: Any, config: DepthwiseConfig, dtype: torch.dtype, k: int) -> Bars:
    """The static bars of a build with aligned channels."""
    f, found = facts(built, config, k), rows_of_tiles_bars(built, config, dtype, k)
    bar = found.bar
    if k in LEAST_SHARE:
        least = LEAST_SHARE[k][dtype == torch.float32]
        lower = LEAST_SHARE_OF_FEW.get((dtype, k), least)
        bar(
            f["fma_share"] >= least,
            f"FMA are {f['fma_share']:.3f} of the loop, {least} wanted",
            WHY_SHARE if config.channels == FEW and f["fma_share"] >= lower else "",
        )
    if k in LEAST_REUSE:
        bar(f["fma_per_load"] >= LEAST_REUSE[k], f"{f['fma_per_load']:.2f} FMA a loaded value")
    bar(
        f["unpack_per_load"] <= MOST_UNPACK,
        f"{f['unpack_per_load']:.3f} conversions a loaded value",
        WHY_COUNTED if f["unpack_per_load"] <= MOST_COUNTED else "",
    )
    bar(min(f["load_bits"]) >= 64, f"loads of {f['load_bits']} bits")
    bar(min(f["store_bits"]) >= 64, f"stores of {f['store_bits']} bits")
    bar(f["predicated"] == 0, f"{f['predicated']} loads under a predicate in the inner loop")
    bar(f["division"] == 0, f"{f['division']} conversions for a division in the inner loop")
    return found
