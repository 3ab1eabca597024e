"""The Triton 1x1 convolution, compiled ahead of time: its machine code, and bounds of its time."""

from __future__ import annotations

from typing import Any

import ptxsim
import torch

from convmixer_fast.backends.triton.configs import PointwiseConfig, family, lookup_pointwise

from . import build as aot
from .build import REGISTERS_ALL, SHARED_ALL, TRITON_TYPES, WARPS_ALL, Bars

#: Shared memory of one program, bytes, by family.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: Matrix instructions.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
#: Least mma a load from shared memory; tiles that may have fewer, their limit and the reason.
LEAST_MMA_PER_LOAD = 3
FEWER_MMA_PER_LOAD = {
    (64, 64): (2, "for few outputs, where more tiles are worth more than wide ones"),
    (128, 64): (2.6, "for few channels out: there is nothing to widen the tile with"),
}


def source(
    config: PointwiseConfig,
    dtype: torch.dtype,
    channels: int = 1536,
    act: str = "gelu",
    tf32: bool = False,
    long_rows: bool = False,
) -> tuple[Any, dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Kernel, signature, constants and integers divisible by 16 of a square 1x1 convolution."""
    from convmixer_fast.backends.triton.kernels import operands, pointwise

    kind = TRITON_TYPES[dtype]
    vectors = {"bias": f"*{kind}", "scale": "*fp32", "shift": "*fp32"}
    constants: dict[str, Any] = {
        "ACT": act,
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDEN": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    if config.descriptors:
        m, n, k = config.block_m, config.block_n, config.block_k
        signature = {
            "x": f"tensordesc<{kind}[{m},{k}]>",
            "weight": f"tensordesc<{kind}[{n},{k}]>",
            "out": f"tensordesc<{kind}[{m},{n // (1 + config.halves)}]>",
            **vectors,
            **dict.fromkeys(("M", "N", "K"), "i32"),
        }
        constants["HALVES"] = config.halves
        divisible = ("N", "K") if channels % 16 == 0 else ()
        return pointwise.pointwise_descriptor_kernel, signature, constants, divisible
    signature = {
        **dict.fromkeys(("x", "weight", "out"), f"*{kind}"),
        **vectors,
        "M": "i64" if long_rows else "i32",
        **dict.fromkeys(("n_vectors", "k_vectors", "stride_vectors"), "i32"),
    }
    width = operands.vector_width(channels)
    constants |= {
        "VECTOR_N": width,
        "VECTOR_K": width,
        "EVEN_K": channels % config.block_k == 0,
    }
    return pointwise.pointwise_kernel, signature, constants, ()


def build(
    config: PointwiseConfig,
    architecture: int,
    dtype: torch.dtype,
    **of: Any,
) -> Any:
    """Compile a tile for sm_``architecture`` and disassemble it; ``of`` as for `source`."""
    kernel, signature, constants, divisible = source(config, dtype, **of)
    return ptxsim.sass.aot(
        kernel,
        signature,
        constants,
        architecture,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=divisible,
    )


def build_hip(config: PointwiseConfig, architecture: str, dtype: torch.dtype, **of: Any) -> Any:
    """Compile a tile for a GPU of ROCm, such as gfx942."""
    given = source(config, dtype, **of)
    return aot.build_hip(*given, architecture, config.num_warps, config.num_stages)


def facts(built: Any, config: PointwiseConfig) -> dict[str, Any]:
    """Numbers of the machine code."""
    report = built.report
    group = family(built.arch)
    hot = report.hot_loop.histogram if report.hot_loop else {}
    threads = 32 * config.num_warps
    outputs = config.block_m * config.block_n / threads
    registers = -(-report.registers // 8) * 8
    programs = min(
        REGISTERS_ALL // (registers * threads),
        SHARED_ALL[group] // (built.shared + 1024),
        WARPS_ALL[group] // config.num_warps,
    )
    return {
        "architecture": built.arch,
        "registers": report.registers,
        "stack": report.stack,
        "spills": report.spills,
        "shared": built.shared,
        "programs": programs,
        "features": sorted(report.features),
        "mma": hot.get("HMMA", 0),
        "ldsm": hot.get("LDSM", 0),
        "fma_share": report.hot_loop.mix()["fp32_fma"] if report.hot_loop else 0.0,
        "copy_bits": dict(report.widths("LDGSTS")),
        "load_bits": dict(report.widths("LDG")),
        "store_bits": dict(report.widths("STG")),
        # Four of a thread's divide integers, for the tile's position.
        "calls": _epilogue_calls(report),
        "special_per_output": max(0, report.histogram["MUFU"] - 4) / outputs,
        "instructions": len(report.sass),
    }


def _epilogue_calls(report: Any) -> int:
    """Calls of subroutines between the last matrix instruction and the last store.

    Subroutines are behind the last store: a "call" of an address before it is the loop's exit. The
    calls outside of this range divide integers, for the tile's position, and trap at the end.
    """
    last_matrix = max((n for n, s in enumerate(report.sass) if s.base in MATRIX), default=-1)
    stores = [n for n, s in enumerate(report.sass) if s.base in ("STG", "UTMASTG")]
    if last_matrix < 0 or not stores:
        return 0
    behind = report.sass[stores[-1]].address
    calls = [s for s in report.sass[last_matrix : stores[-1]] if s.base == "CALL"]
    return sum(int(s.operands.split()[0], 16) > behind for s in calls)


def bars(built: Any, config: PointwiseConfig, dtype: torch.dtype, tf32: bool = False) -> Bars:
    """The static bars of a build with aligned channels."""
    f, report, group, found = facts(built, config), built.report, family(built.arch), Bars()
    bar = found.bar
    bar(f["shared"] <= SHARED_LIMIT[group], f"{f['shared']} bytes of shared memory")
    bar(f["special_per_output"] <= 2, f"{f['special_per_output']:.2f} special functions an output")
    if config.descriptors:
        bar({"UTMALDG", "UTMASTG"} <= set(f["features"]), f"no copy engine in {f['features']}")
        bar(not f["store_bits"], f"stores of {f['store_bits']} bits next to the copy engine")
    else:
        bar(set(f["store_bits"]) == {128}, f"stores of {f['store_bits']} bits")
        bar(set(f["copy_bits"]) == {128}, f"copies of {f['copy_bits']} bits")
    bar(f["spills"] == 0 and f["stack"] == 0, f"{f['spills']} spills, {f['stack']} bytes of stack")
    bar(f["calls"] == 0, f"{f['calls']} calls in the epilogue")
    if dtype == torch.float32 and not tf32:
        bar(f["fma_share"] >= 0.8, f"FFMA is {f['fma_share']:.0%} of the loop")
        return found
    if group in (90, 100):
        wanted = "HGMMA" if group == 90 else "UTCHMMA"
        bar(wanted in f["features"], f"no {wanted} in {f['features']}")
    else:
        wanted = "HMMA.1688.F32.TF32" if tf32 else "HMMA.16816.F32"
        bar(report.has(wanted), f"no {wanted}")
        bar(report.has("LDSM.16.M88.4", "LDSM.16.MT88.4"), "no LDSM.x4")
        ratio = f["mma"] / max(1, f["ldsm"])
        fewer, reason = FEWER_MMA_PER_LOAD.get((config.block_m, config.block_n), (0, ""))
        bar(
            ratio >= LEAST_MMA_PER_LOAD,
            f"{ratio:.2f} HMMA a LDSM, {LEAST_MMA_PER_LOAD} wanted",
            reason if ratio >= fewer else "",
        )
        last = max(i for i, s in enumerate(report.sass) if s.base == "HMMA")
        # The loop's own branch, and a jump over the code for an empty sum.
        ends = [s for s in report.sass[last:] if s.base in ("BRA", "CALL")]
        turns = [s.opcode for s in ends if s.predicate or s.base == "CALL"]
        bar(len(turns) <= 1 and "CALL" not in f["features"], f"{turns} after the last HMMA")
    return found


def odd_channels_bars(built: Any) -> Bars:
    """The static bars of a build with odd channels, which are moved one at a time."""
    found = Bars()
    found.bar(built.report.spills == 0, f"{built.report.spills} spills")
    return found


#: GPU of `ptxsim.model` -> architecture that its kernels are compiled for.
GPUS = {"A100": 80, "RTX 3090": 86, "RTX 4090": 89, "H100": 90}
#: Shares of the peak rates that kernels like these reach; 1 for other resources.
REACHED = {"tensor": 0.75, "dram": 0.85}


def predict(
    gpu: str,
    dim: int,
    pixels: int,
    batch: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    act: str = "gelu",
) -> dict[str, Any]:
    """Seconds an image of one 1x1 convolution, ``pixels`` x dim -> dim, on a GPU of `GPUS`.

    Two tiles run in the simulator; every resource's work, scaled to an image, over its peak rate is
    a lower bound. DRAM is exact instead: input and output once, the weight once a batch. The
    simulator has no wgmma: for H100 only the tensor cores, DRAM and L2 are counted, from the tile.

    Returns:
        ``times``: seconds an image by resource; ``bound``: the longest, named by ``limit``;
        ``expected``: the longest at the shares of `REACHED`.
        ``l2`` counts as if the L1 never hit and limits nothing.
    """
    model, card = ptxsim.model, ptxsim.model.GPUS[gpu]
    size = torch.finfo(dtype).bits // 8
    config = lookup_pointwise(GPUS[gpu], dtype, rows=batch * pixels, columns=dim)
    moved = (2 * pixels * dim + dim * dim / batch) * size
    tiles = pixels * dim / (config.block_m * config.block_n)
    if family(GPUS[gpu]) in (90, 100):
        kind = "f16" if dtype == torch.float16 else "bf16"
        step = (config.block_m + config.block_n) * dim * size
        times = {
            "tensor": 2 * pixels * dim * dim / card.tensor_tflops[kind],
            "l2": tiles * step / (card.l2_bytes_per_clock * card.ghz * 1e9),
        }
    else:
        stats = _simulate(GPUS[gpu], config, dim, dtype, act)
        times = dict(model.bound(stats, card, scale=tiles / stats.ctas).times)
    times["dram"] = moved / (card.dram_gbs * 1e9)
    usable = {k: v for k, v in times.items() if k != "l2"}
    limit = max(usable, key=lambda k: usable[k])
    return {
        "gpu": gpu,
        "dim": dim,
        "tile": f"{config.block_m}x{config.block_n}x{config.block_k}",
        "times": times,
        "limit": limit,
        "bound": usable[limit],
        "expected": max(v / REACHED.get(k, 1.0) for k, v in usable.items()),
    }


def _simulate(
    architecture: int,
    config: PointwiseConfig,
    dim: int,
    dtype: torch.dtype,
    act: str,
) -> Any:
    from convmixer_fast.backends.triton.kernels.pointwise import pointwise_mix

    x = torch.randn(1, dim, 8, 2 * config.block_m // 8).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(dim, dim, 1, 1) / dim**0.5).to(dtype)
    vector = torch.ones(dim)
    settings = {"race": False, "init": False, "max_ctas": 2}
    with ptxsim.triton_on_cpu(cc=architecture, **settings) as log:
        pointwise_mix(x, weight, vector.to(dtype), vector, vector, act, config=config)
    return log[-1]
