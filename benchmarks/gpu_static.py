"""What would the GPU kernels reach, by what is known before they run? Writes JSON and Markdown.

    python benchmarks/gpu_static.py --ptxsim FOLDER --out FOLDER [--architectures 80 89 90]

Needs Triton and ptxsim, no GPU. Three kinds of numbers, none of them a measurement:

* from the machine code of every kernel with its tile for the published widths: registers, spills,
  the hot loop's mix, and how many programs fit a multiprocessor;
* from simulated runs: instructions, sectors and bytes for each output;
* from both and the vendors' peak rates: the time no run can beat, and the time at the shares of
  peak that good kernels reach.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_depthwise
import gpu_pointwise
import gpu_stem
import torch

from convmixer_fast.arch import VARIANTS as PUBLISHED
from convmixer_fast.arch import Arch
from convmixer_fast.kernels import support
from convmixer_fast.kernels.configs import lookup_depthwise, lookup_pointwise, lookup_stem

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (3, 5, 7, 9)
#: dtype, and whether float32 is multiplied as TF32.
ARITHMETICS = (*((dtype, False) for dtype in DTYPES), (torch.float32, True))

#: The GPUs of the prediction: TFMA/s in float32, thread instructions issued in 1e12/s, TB/s.
#: Vendors' figures.
GPUS = {
    "A100": (9.75, 19.5, 2.04),
    "RTX 4090": (41.3, 41.3, 1.01),
    "H100": (33.5, 33.5, 3.35),
}
#: Shares of peak that good kernels reach: DRAM, multipliers. Those of products: `gpu_pointwise`.
DRAM_SHARE, FMA_SHARE = gpu_pointwise.REACHED["dram"], 0.9
SIMULATED_CHANNELS = 128


def static_rows(ptxsim: ModuleType, architectures: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(op: str, dtype: torch.dtype, tf32: bool = False, **rest: Any) -> None:
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        rows.append({"op": op, "dtype": name, **rest})
        print(rows[-1], file=sys.stderr)

    for architecture in architectures:
        for dtype in DTYPES:
            for k in SIZES:
                config = lookup_depthwise(dtype, k, 1536)
                built = gpu_depthwise.build(ptxsim, config, architecture, dtype, k)
                broken = gpu_depthwise.broken_bars(built, config, dtype, k)
                facts = gpu_depthwise.facts(built, config, k)
                add("depthwise_mix", dtype, kernel=f"k = {k}", **facts, broken_bars=broken)
        for dtype, tf32 in ARITHMETICS:
            tile = lookup_pointwise(architecture, dtype, rows=2**16, columns=1536, tf32=tf32)
            built = gpu_pointwise.build(ptxsim, tile, architecture, dtype, tf32=tf32)
            broken = gpu_pointwise.broken_bars(built, tile, dtype, tf32)
            kernel = f"{tile.block_m} x {tile.block_n} x {tile.block_k}, {tile.num_stages} stages"
            kernel += ", copy engine" if tile.descriptors else ""
            facts = gpu_pointwise.facts(built, tile)
            add("pointwise_mix", dtype, tf32, kernel=kernel, **facts, broken_bars=broken)
        for dtype, tf32 in ARITHMETICS:
            built = gpu_stem.build(ptxsim, architecture, dtype, tf32=tf32)
            broken = gpu_stem.broken_bars(built, dtype, tf32)
            facts = gpu_pointwise.facts(built, lookup_stem(dtype))
            add("patch_embed", dtype, tf32, kernel="p = 7", **facts, broken_bars=broken)
    return rows


def simulated(ptxsim: ModuleType, arch: Arch, grid: int) -> dict[str, Any]:
    """Counts of one image of ``SIMULATED_CHANNELS`` channels, for each output; checked first."""
    from convmixer_fast.kernels.depthwise import depthwise_mix, pack_taps
    from convmixer_fast.ops import depthwise_mix as reference
    from convmixer_fast.ops import use_backend

    torch.manual_seed(0)
    c, k = SIMULATED_CHANNELS, arch.kernel_size
    x = torch.randn(1, c, grid, grid).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(c, 1, k, k) / k).bfloat16()
    rest = (torch.randn(c).bfloat16(), torch.rand(c) + 0.5, torch.randn(c), arch.act)
    with ptxsim.triton_on_cpu(cc=80, strict=True) as log:
        ours = depthwise_mix(x, pack_taps(weight), *rest, k)
    with use_backend("reference"):
        torch.testing.assert_close(ours, reference(x, weight, *rest), rtol=0.03, atol=0.1)
    stats, outputs = log[0], x.numel()
    counters = stats.counters
    bounds = {name: ptxsim.model.bound(stats, name) for name in GPUS}
    return {
        "warp_instructions_per_output": 32 * stats.warp_instructions / outputs,
        "fma_per_output": stats.thread["fma.rn.f32"] / outputs,
        "requested_bytes_per_output": 32
        * (counters["global_ld_sectors"] + counters["global_st_sectors"])
        / outputs,
        "footprint_bytes_per_output": 32
        * (counters["footprint_ld_sectors"] + counters["footprint_st_sectors"])
        / outputs,
        "binding": {name: b.limit for name, b in bounds.items()},
        "l2_over_binding": {name: b.times["l2"] / b.seconds for name, b in bounds.items()},
    }


def predicted(ptxsim: ModuleType, arch: Arch, grid: int, counts: dict[str, Any]) -> dict[str, Any]:
    """img/s in bfloat16 from DRAM at large batches, each with its arithmetic; without the head.

    Every instruction of the simulated run counts as an issue slot, moves too, of which an assembler
    leaves few: the issue line is high.
    """
    values = arch.dim * grid * grid
    rows = {}
    for gpu, (tfma, tissue, tbs) in GPUS.items():
        # Microseconds for one depthwise half of one image. The activation's FMA are in the count.
        us = {
            "fma": counts["fma_per_output"] * values / tfma / 1e6,
            "issue": counts["warp_instructions_per_output"] * values / tissue / 1e6,
            "dram": 2 * 2 * values / tbs / 1e6,
        }
        real = us | {"fma": us["fma"] / FMA_SHARE, "dram": us["dram"] / DRAM_SHARE}
        pointwise = gpu_pointwise.predict(
            ptxsim, gpu, arch.dim, grid * grid, act=arch.act or "gelu"
        )
        stem = gpu_stem.predict(ptxsim, gpu, arch.dim, arch.patch_size, grid * arch.patch_size)
        block = max(real.values()) + 1e6 * pointwise["expected"]
        at_peak = max(us["fma"], us["dram"]) + 1e6 * pointwise["bound"]
        rows[gpu] = {
            "depthwise_us": us,
            "pointwise_us": {line: 1e6 * t for line, t in pointwise["times"].items()},
            "pointwise_tile": pointwise["tile"],
            "stem_us": {line: 1e6 * t for line, t in stem["times"].items()},
            "bound_by": {
                "depthwise": max(real, key=real.__getitem__),
                "pointwise": pointwise["limit"],
                "stem": stem["limit"],
            },
            "us_per_block": block,
            "img_per_s": 1e6 / (arch.depth * block + 1e6 * stem["expected"]),
            "img_per_s_at_peak": 1e6 / (arch.depth * at_peak + 1e6 * stem["bound"]),
        }
    return rows


def markdown(result: dict[str, Any]) -> str:
    out = ["# GPU kernels before they run", ""]
    out += ["**Predicted. Nothing here was timed: no GPU has run these kernels.**", ""]
    out += [f"## Machine code, by Triton {result['triton']}", ""]
    out += [
        "`programs`: how many of a kernel's programs share a multiprocessor; `loop`: the share of",
        "float32 multiply-adds among the hot loop's instructions (sm_100 does two in one), or its",
        "matrix instructions.",
        "",
    ]
    out += ["| arch | kernel | dtype | | registers | stack | shared | programs | loop | bars |"]
    out += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in result["static"]:
        loop = _matrix_instruction(r) or f"{r['fma_share']:.3f}"
        out.append(
            f"| sm_{r['architecture']} | {r['op']} | {r['dtype']} | {r['kernel']} "
            f"| {r['registers']} | {r['stack']} | {r['shared']} | {r['programs']} | {loop} "
            f"| {'; '.join(r['broken_bars']) or 'met'} |"
        )
    out += ["", "## The depthwise half in the simulator, bfloat16, for one output", ""]
    out += ["| variant | instructions | FMA | bytes asked | bytes once | binding |"]
    out += ["|---|---|---|---|---|---|"]
    for name, r in result["simulated"].items():
        out.append(
            f"| {name} | {r['warp_instructions_per_output']:.0f} | {r['fma_per_output']:.1f} "
            f"| {r['requested_bytes_per_output']:.1f} | {r['footprint_bytes_per_output']:.2f} "
            f"| {', '.join(f'{g} {b}' for g, b in r['binding'].items())} |"
        )
    shares = gpu_pointwise.REACHED
    out += ["", "## Predicted images a second, bfloat16, large batches, without the head", ""]
    out += [
        "1e6 / (depth * (depthwise + pointwise) + stem), each the longest of its lines in",
        f"microseconds an image, at {shares['tensor']:.0%} of the tensor rate, {DRAM_SHARE:.0%} of "
        f"bandwidth, {FMA_SHARE:.0%} of the",
        "multipliers and every issue slot; in brackets without the depthwise half's issue line, at",
        "100 % of the others.",
        "",
    ]
    out += ["| variant | GPU | depthwise: FMA / issue / DRAM | pointwise: tensor / DRAM | stem |"]
    out[-1] += " bound by | img/s |"
    out += ["|---|---|---|---|---|---|---|"]
    for name, gpus in result["predicted"].items():
        for gpu, r in gpus.items():
            depthwise = " / ".join(f"{v:.2f}" for v in r["depthwise_us"].values())
            pointwise = " / ".join(f"{r['pointwise_us'][line]:.2f}" for line in ("tensor", "dram"))
            stem = r["stem_us"][r["bound_by"]["stem"]]
            out.append(
                f"| {name} | {gpu} | {depthwise} | {pointwise} | {stem:.2f} "
                f"| {', '.join(r['bound_by'].values())} "
                f"| {r['img_per_s']:.0f} ({r['img_per_s_at_peak']:.0f}) |"
            )
    return "\n".join(out) + "\n"


def _matrix_instruction(row: dict[str, Any]) -> str:
    if row["op"] == "depthwise_mix":
        return ""
    return next((f for f in ("HGMMA", "UTCHMMA", "HMMA") if f in row["features"]), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ptxsim", type=Path, help="the folder that holds the package ptxsim")
    parser.add_argument("--out", type=Path, required=True, help="where gpu_static.{json,md} go")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    if options.ptxsim:
        sys.path.insert(0, str(options.ptxsim))
    import ptxsim

    static = static_rows(ptxsim, options.architectures)
    result: dict[str, Any] = {
        "measured": False,
        "triton": support.triton_version(),
        "static": static,
        "simulated": {},
        "predicted": {},
    }
    for variant in PUBLISHED.values():
        name, arch = variant.paper_name, variant.arch
        if variant.input_size[1] != 224:
            continue
        grid = 224 // arch.patch_size
        counts = simulated(ptxsim, arch, grid)
        result["simulated"][name] = counts
        result["predicted"][name] = predicted(ptxsim, arch, grid, counts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_static.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gpu_static.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
