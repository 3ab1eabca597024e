"""The Triton patch embedding, compiled ahead of time: its machine code, and bounds of its time."""

from __future__ import annotations

from typing import Any

import ptxsim
import torch

from convmixer_fast.backends.triton.configs import arithmetic_of, family, lookup_stem

from .build import TRITON_TYPES, Bars
from .pointwise import GPUS, LEAST_MMA_PER_LOAD, REACHED, SHARED_LIMIT, facts

#: With that many registers three programs of four warps share a multiprocessor.
MOST_REGISTERS = 170
#: float32, with two programs: the operands are twice as wide.
MOST_REGISTERS_FLOAT32 = 255
#: Spills allowed outside the loop, by family and arithmetic, and the reason.
SPILLS_OUTSIDE_THE_LOOP = {(100, "half"): 2, (80, "tf32"): 3}
WHY_SPILLS = "values that the end of a tile needs wait on the stack while its loop runs"
#: Reason why a stem's loop has fewer mma a load from shared memory, and no asynchronous copy.
WHY_GATHERED = (
    "pixels are gathered one by one through registers, for at most 2.6 % of the network's terms"
)
#: The least share of multiply-adds in the loop of the exact float32 GEMM: from float pixels, and
#: from uint8 pixels, which are converted and normalised in the loop.
LEAST_SHARE = (0.8, 0.75)


def source(
    dtype: torch.dtype, dim: int = 1536, patch: int = 7, uint8: bool = False, tf32: bool = False
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Kernel, signature and constants of a stem on NCHW images of three channels."""
    from convmixer_fast.backends.triton.kernels import operands, stem

    config, kind = lookup_stem(dtype), TRITON_TYPES[dtype]
    integers = ("M", "patches", "patches_w", "n_vectors", "k_vectors")
    signature = {
        "x": "*u8" if uint8 else f"*{kind}",
        **dict.fromkeys(("weight", "bias", "out"), f"*{kind}"),
        **dict.fromkeys(("scale", "shift"), "*fp32"),
        **dict.fromkeys((*integers, "stride_n", "stride_c", "stride_h"), "i32"),
    }
    constants = {
        "ACT": "gelu",
        "P": patch,
        "VECTOR_N": operands.vector_width(dim),
        "VECTOR_K": operands.vector_width(3 * patch * patch),
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDEN": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        # Triton itself makes an integer 1 a constant.
        "stride_w": 1,
    }
    if uint8:
        signature |= dict.fromkeys(("gain", "offset"), "*fp32")
    else:
        constants |= dict.fromkeys(("gain", "offset"))
    return stem.stem_kernel, signature, constants


def build(architecture: int, dtype: torch.dtype, **of: Any) -> Any:
    """Compile the stem for sm_``architecture`` and disassemble it; ``of`` as for `source`."""
    config = lookup_stem(dtype)
    return ptxsim.sass.aot(
        *source(dtype, **of),
        architecture,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def bars(built: Any, dtype: torch.dtype, tf32: bool = False, uint8: bool = False) -> Bars:
    """The static bars of a build: those of a GEMM, except where gathered pixels rule them out."""
    f, report, group = facts(built, lookup_stem(dtype)), built.report, family(built.arch)
    half, found = dtype != torch.float32, Bars()
    bar = found.bar
    hot = report.hot_loop.histogram
    bar(hot["LDL"] + hot["STL"] == 0, "spills in the loop")
    allowed = SPILLS_OUTSIDE_THE_LOOP.get((group, arithmetic_of(dtype, tf32)), 0)
    bar(
        f["spills"] == 0 and f["stack"] == 0,
        f"{f['spills']} spills, {f['stack']} bytes of stack",
        WHY_SPILLS if 0 < f["spills"] <= allowed else "",
    )
    most = MOST_REGISTERS if half else MOST_REGISTERS_FLOAT32
    bar(f["registers"] <= most, f"{f['registers']} registers")
    bar(f["shared"] <= SHARED_LIMIT[group], f"{f['shared']} bytes of shared memory")
    bar(set(f["store_bits"]) == {128}, f"stores of {f['store_bits']} bits")
    bar(f["special_per_output"] <= 2, f"{f['special_per_output']:.2f} special functions an output")
    bar(f["calls"] == 0, f"{f['calls']} calls in the epilogue")
    copies = " and ".join(map(str, sorted(f["copy_bits"])))
    bar(copies == "128", f"copies of {copies} bits" if copies else "no copies", WHY_GATHERED)
    if half or tf32:
        wanted = {90: "HGMMA", 100: "UTCHMMA"}.get(group, "HMMA")
        bar(wanted in f["features"], f"no {wanted} in {f['features']}")
        if wanted == "HMMA":
            ratio = f["mma"] / max(1, f["ldsm"])
            bar(ratio >= LEAST_MMA_PER_LOAD, f"{ratio:.2f} HMMA a LDSM", WHY_GATHERED)
    else:
        bar(f["fma_share"] >= LEAST_SHARE[uint8], f"FMA are {f['fma_share']:.3f} of the loop")
    return found


def predict(
    gpu: str,
    dim: int,
    patch: int,
    image: int = 224,
    dtype: torch.dtype = torch.bfloat16,
    pixels: torch.dtype = torch.uint8,
) -> dict[str, Any]:
    """Seconds an image of the stem, 3 x image x image -> dim, as `pointwise.predict` counts."""
    from convmixer_fast.backends.triton.kernels.stem import patch_embed

    card, config = ptxsim.model.GPUS[gpu], lookup_stem(dtype)
    architecture = min(GPUS[gpu], 89)
    x = torch.randint(0, 256, (1, 3, image, image)).to(pixels)
    weight = (torch.randn(dim, 3, patch, patch) / (3 * patch * patch) ** 0.5).to(dtype)
    vector = torch.ones(dim)
    normal = {"mean": [0.5] * 3, "std": [0.25] * 3} if x.dtype == torch.uint8 else {}
    settings = {"race": False, "init": False, "max_ctas": 2}
    with ptxsim.triton_on_cpu(cc=architecture, **settings) as log:
        patch_embed(x, weight, None, vector, vector, "gelu", config=config, **normal)
    outputs = (image // patch) ** 2 * dim
    tiles = outputs / (config.block_m * config.block_n)
    times = dict(ptxsim.model.bound(log[-1], card, scale=tiles / log[-1].ctas).times)
    moved = x.numel() * x.element_size() + outputs * torch.finfo(dtype).bits // 8
    times["dram"] = moved / (card.dram_gbs * 1e9)
    usable = {k: v for k, v in times.items() if k != "l2"}
    limit = max(usable, key=lambda k: usable[k])
    expected = max(v / REACHED.get(k, 1.0) for k, v in usable.items())
    return {
        "gpu": gpu,
        "dim": dim,
        "times": times,
        "limit": limit,
        "bound": usable[limit],
        "expected": expected,
    }
