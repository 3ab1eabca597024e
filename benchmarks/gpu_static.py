"""What would the GPU kernels reach, by what is known before they run? Writes JSON and Markdown.

    python benchmarks/gpu_static.py --ptxsim FOLDER --out FOLDER [--architectures 80 89 90]

Needs Triton and ptxsim, no GPU. Three kinds of numbers, none of them a measurement:

* from the machine code of every shipped depthwise tile: registers, spills, the hot loop's mix, and
  how many programs fit a multiprocessor;
* from a simulated run on one image: instructions, sectors and bytes for each output;
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
import torch

from convmixer_fast.arch import VARIANTS as PUBLISHED
from convmixer_fast.arch import Arch
from convmixer_fast.kernels.configs import lookup_depthwise

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (3, 5, 7, 9)

#: The GPUs of the prediction: TFMA/s in float32, thread instructions issued in 1e12/s, tensor
#: TFLOP/s with float32 sums, TB/s. Vendors' figures.
GPUS = {
    "A100": (9.75, 19.5, 312.0, 2.04),
    "RTX 4090": (41.3, 41.3, 165.0, 1.01),
    "H100": (33.5, 33.5, 989.0, 3.35),
}
#: Shares of peak that good kernels reach: matrix products, DRAM, multipliers.
GEMM_SHARE, DRAM_SHARE, FMA_SHARE = 0.75, 0.85, 0.9
SIMULATED_CHANNELS = 128


def static_rows(ptxsim: ModuleType, architectures: list[int]) -> list[dict[str, Any]]:
    rows = []
    for architecture in architectures:
        for dtype in DTYPES:
            for k in SIZES:
                config = lookup_depthwise(dtype, k, 1536)
                built = gpu_depthwise.build(ptxsim, config, architecture, dtype, k)
                rows.append(
                    {
                        "op": "depthwise_mix",
                        "dtype": str(dtype).removeprefix("torch."),
                        "k": k,
                        **gpu_depthwise.facts(built, config, k),
                        "broken_bars": gpu_depthwise.broken_bars(built, config, dtype, k),
                    }
                )
                print(rows[-1], file=sys.stderr)
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


def predicted(arch: Arch, grid: int, counts: dict[str, Any]) -> dict[str, Any]:
    """img/s in bfloat16 from DRAM at large batches, each with its arithmetic; blocks alone.

    Every instruction of the simulated run counts as an issue slot, moves too, of which an assembler
    leaves few: the issue line is high.
    """
    values = arch.dim * grid * grid
    rows = {}
    for gpu, (tfma, tissue, tflops, tbs) in GPUS.items():
        # Microseconds for one block of one image. The activation's FMA are in the count.
        us = {
            "fma": counts["fma_per_output"] * values / tfma / 1e6,
            "issue": counts["warp_instructions_per_output"] * values / tissue / 1e6,
            "dram": 2 * 2 * values / tbs / 1e6,
            "tensor": 2 * values * arch.dim / tflops / 1e6,
        }
        real = us | {
            "fma": us["fma"] / FMA_SHARE,
            "dram": us["dram"] / DRAM_SHARE,
            "tensor": us["tensor"] / GEMM_SHARE,
        }
        halves = {"depthwise": ("fma", "issue", "dram"), "pointwise": ("tensor", "dram")}
        rows[gpu] = {
            "us_per_block": us,
            "bound_by": {h: max(lines, key=real.__getitem__) for h, lines in halves.items()},
            "img_per_s": _rate(arch, real, halves),
            "img_per_s_at_peak": _rate(arch, us, {**halves, "depthwise": ("fma", "dram")}),
        }
    return rows


def _rate(arch: Arch, us: dict[str, float], halves: dict[str, tuple[str, ...]]) -> float:
    return 1e6 / (arch.depth * sum(max(us[line] for line in lines) for lines in halves.values()))


def markdown(result: dict[str, Any]) -> str:
    out = ["# GPU kernels before they run", "", "Nothing here was timed.", ""]
    out += ["| arch | dtype | k | registers | stack | programs | FMA share | FMA/load | bars |"]
    out += ["|---|---|---|---|---|---|---|---|---|"]
    for r in result["static"]:
        out.append(
            f"| sm_{r['architecture']} | {r['dtype']} | {r['k']} | {r['registers']} | {r['stack']} "
            f"| {r['programs']} | {r['fma_share']:.3f} | {r['fma_per_load']:.1f} "
            f"| {'; '.join(r['broken_bars']) or 'met'} |"
        )
    out += ["", "| variant | instructions | FMA | bytes asked | bytes once | binding |"]
    out += ["|---|---|---|---|---|---|"]
    for name, r in result["simulated"].items():
        out.append(
            f"| {name} | {r['warp_instructions_per_output']:.0f} | {r['fma_per_output']:.1f} "
            f"| {r['requested_bytes_per_output']:.1f} | {r['footprint_bytes_per_output']:.2f} "
            f"| {', '.join(f'{g} {b}' for g, b in r['binding'].items())} |"
        )
    out += ["", "Each figure for one output of the depthwise half, bfloat16.", ""]
    out += [
        f"Predicted img/s of the blocks at {GEMM_SHARE:.0%} of the tensor rate, {DRAM_SHARE:.0%} "
        f"of bandwidth, {FMA_SHARE:.0%} of the multipliers and every issue slot:",
        "1e6 / (depth * (max(fma, issue, dram) + max(tensor, dram))); in brackets without the",
        "issue line, at 100 % of the others.",
        "",
    ]
    out += ["| variant | GPU | us a block: FMA / issue / DRAM a half / tensor | bound by | img/s |"]
    out += ["|---|---|---|---|---|"]
    for name, gpus in result["predicted"].items():
        for gpu, r in gpus.items():
            us = " / ".join(f"{v:.2f}" for v in r["us_per_block"].values())
            out.append(
                f"| {name} | {gpu} | {us} | {', '.join(r['bound_by'].values())} "
                f"| {r['img_per_s']:.0f} ({r['img_per_s_at_peak']:.0f}) |"
            )
    return "\n".join(out) + "\n"


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
    result: dict[str, Any] = {"static": static, "simulated": {}, "predicted": {}}
    for variant in PUBLISHED.values():
        name, arch = variant.paper_name, variant.arch
        if variant.input_size[1] != 224:
            continue
        grid = 224 // arch.patch_size
        counts = simulated(ptxsim, arch, grid)
        result["simulated"][name] = counts
        result["predicted"][name] = predicted(arch, grid, counts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_static.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "gpu_static.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
