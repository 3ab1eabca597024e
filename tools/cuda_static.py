"""Write what nvcc compiles the CUDA 1x1 convolution to: JSON and Markdown.

    python tools/cuda_static.py [--out FOLDER] [--architectures 80 89]

Needs nvcc and Triton's disassembler, no GPU: machine code of every kernel for every architecture,
and simulated runs of the GELU kernels. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ptxsim
from gpu_static import cuda_pointwise
from gpu_static.cuda_pointwise import ARCHITECTURES, KERNELS
from rows import as_json

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu-static"


def static_rows(architectures: list[int]) -> list[dict[str, Any]]:
    rows = []
    for architecture in architectures:
        for kernel, report in cuda_pointwise.build(architecture).items():
            facts = cuda_pointwise.facts(report, kernel)
            rows.append({**facts, "broken_bars": cuda_pointwise.broken_bars(report, kernel)})
        print(f"sm_{architecture}: {len(rows)} rows", file=sys.stderr)
    return rows


def traffic_rows() -> list[dict[str, Any]]:
    kernels = [kernel for kernel in KERNELS if kernel.act == "gelu"]
    module = cuda_pointwise.ptx(kernels)
    return [{"kernel": str(kernel), **cuda_pointwise.traffic(module, kernel)} for kernel in kernels]


def nvcc_version() -> str:
    tool = ptxsim.cuda.nvcc()
    if tool is None:
        raise SystemExit("nvcc not found: put it on PATH or name it in PTXSIM_NVCC")
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+), V([\d.]+)", text)
    return found.group(2) if found else text


def _what_is_reached(result: dict[str, Any]) -> list[str]:
    """One row for kernels that share their loop: the ideal of each bar, its value, the reason."""
    least, most = cuda_pointwise.LEAST_MMA_PER_LOAD, cuda_pointwise.MOST_PER_MMA
    out = [
        f"Bars: no spills; {least:g} mma a fragment load; {most:g} instructions of the loop for an",
        f"mma; {cuda_pointwise.MOST_TRAFFIC:g} times the ideal bytes of global memory. Where",
        "one is not met, brackets have the bar and what the kernels are held to instead. The ideal",
        "loop has mma, fragment loads, copies and the preparation of TF32 alone; the ideal of a",
        "fragment load is 4 mma, by 64 x 64 outputs a warp. Half: bfloat16 and float16.",
        "",
        "| kernels | mma a load | instructions an mma: ideal | sm_80 to sm_90 | sm_120 "
        "| bytes over ideal | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    shared = (
        "Addresses, the buffers' numbers, waits, barriers and the branch; on sm_120 instructions "
        "that do nothing between two mma. Bytes: bias, scale and shift, for every warp."
    )
    of = {str(kernel): kernel for kernel in KERNELS}
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for row in result["static"]:
        kernel = of[row["kernel"]]
        groups.setdefault((kernel.type != "tf32", kernel.way), []).append(row)
    for (half, way), rows in groups.items():
        kernel = of[rows[0]["kernel"]]
        traffic = max(
            r["bytes_over_ideal"]
            for r in result["traffic"]
            if (of[r["kernel"]].type != "tf32", of[r["kernel"]].way) == (half, way)
        )
        cells = []
        for late in (False, True):
            found = [r for r in rows if (r["architecture"] >= 120) == late]
            limit = cuda_pointwise.most_per_mma(kernel, 120 if late else 80)
            reached = max((r["per_mma"] for r in found), default=0.0)
            cells.append(_held(reached, limit, most) if found else "")
        cells.append(
            _held(traffic, cuda_pointwise.most_traffic(kernel), cuda_pointwise.MOST_TRAFFIC)
        )
        excepted = cuda_pointwise.exception(kernel)
        out.append(
            f"| {'half' if half else 'TF32'} {way} | {min(r['mma_per_ldsm'] for r in rows):.1f} "
            f"| {cuda_pointwise.ideal_per_mma(kernel):.2f} | {' | '.join(cells)} "
            f"| {excepted.reason if excepted else shared} |"
        )
    return out


def _held(reached: float, limit: float, bar: float) -> str:
    return f"{reached:.2f}" + (f" (not {bar:g}; {limit:g})" if reached > bar else "")


def markdown(result: dict[str, Any]) -> str:
    out = ["# The CUDA 1x1 convolution before it runs", ""]
    out += ["**Nothing here was timed: no GPU has run these kernels.**", ""]
    broken = sum(bool(r["broken_bars"]) for r in result["static"])
    out += [f"## Machine code, by nvcc {result['nvcc']}", ""]
    out += [
        f"{len(result['static'])} kernels, {broken} of them with a bar that is not met.",
        "",
        *_what_is_reached(result),
        "",
        "Every kernel:",
        "",
        "`large` and `small`: tiles of 128 x 128 and 64 x 64 outputs; `by_4`, `by_2`: 64 x 64, for",
        "rows that begin at multiples of 4 bytes or of an element only. `blocks`: how many share a",
        "multiprocessor, by registers and shared memory. Of the loop, which fills and multiplies",
        "both sets of a warp's registers: instructions, and what they are, of them mma (`HMMA`),",
        "fragment loads (`LDSM`) and copies (`LDGSTS`); `a mma` is instructions over mma.",
        "`special`: special-function instructions an output in the epilogue.",
        "",
        "| arch | kernel | registers | stack | shared | stages | blocks | loop | of it "
        "| mma a LDSM | a mma | special | store bits | bars |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["static"]:
        mix = ", ".join(f"{name} {count}" for name, count in list(r["loop_mix"].items())[:6])
        out.append(
            f"| sm_{r['architecture']} | {r['kernel']} | {r['registers']} | {r['stack']} "
            f"| {r['shared']} | {r['stages']} | {r['blocks']} | {r['loop']} | {mix} "
            f"| {r['mma_per_ldsm']:.1f} | {r['per_mma']:.2f} "
            f"| {r['special_per_output']:.0f} | {'/'.join(map(str, r['store_bits']))} "
            f"| {'; '.join(r['broken_bars']) or 'met'} |"
        )
    out += ["", "## Bytes of global memory in the simulator, one tile, 256 input channels", ""]
    out += [
        "The ideal: the tile's rows of both operands, bias, scale, shift and the outputs, once.",
        "",
        "| kernel | bytes | ideal | ratio |",
        "|---|---|---|---|",
    ]
    for r in result["traffic"]:
        out.append(
            f"| {r['kernel']} | {r['bytes']} | {r['ideal_bytes']} | {r['bytes_over_ideal']:.3f} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of cuda_static.{json,md}")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "measured": False,
        "nvcc": nvcc_version(),
        "static": static_rows(options.architectures),
        "traffic": traffic_rows(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda_static.json").write_text(as_json(result))
    (options.out / "cuda_static.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
