"""What did nvcc make of the CUDA 1x1 convolution? Writes JSON and Markdown.

    python benchmarks/cuda_static.py [--ptxsim FOLDER] [--out FOLDER] [--architectures 80 89]

Needs nvcc, Triton's disassembler and ptxsim, no GPU: machine code of every kernel for every
architecture, and simulated runs of one activation's. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_pointwise
from cuda_pointwise import ARCHITECTURES, KERNELS

OUT = Path(__file__).resolve().parent / "results" / "gpu-static"


def static_rows(ptxsim: ModuleType, architectures: list[int]) -> list[dict[str, Any]]:
    rows = []
    for architecture in architectures:
        for kernel, report in cuda_pointwise.build(ptxsim, architecture).items():
            facts = cuda_pointwise.facts(report, kernel)
            rows.append({**facts, "broken_bars": cuda_pointwise.broken_bars(report, kernel)})
        print(f"sm_{architecture}: {len(rows)} rows", file=sys.stderr)
    return rows


def traffic_rows(ptxsim: ModuleType) -> list[dict[str, Any]]:
    kernels = [kernel for kernel in KERNELS if kernel.act == "gelu"]
    module = cuda_pointwise.ptx(ptxsim, kernels)
    return [
        {"kernel": str(kernel), **cuda_pointwise.traffic(ptxsim, module, kernel)}
        for kernel in kernels
    ]


def nvcc_version(ptxsim: ModuleType) -> str:
    tool = ptxsim.cuda.nvcc()
    if tool is None:
        raise SystemExit("nvcc not found: put it on PATH or name it in PTXSIM_NVCC")
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+), V([\d.]+)", text)
    return found.group(2) if found else text


def markdown(result: dict[str, Any]) -> str:
    out = ["# The CUDA 1x1 convolution before it runs", ""]
    out += ["**Nothing here was timed: no GPU has run these kernels.**", ""]
    broken = sum(bool(r["broken_bars"]) for r in result["static"])
    out += [f"## Machine code, by nvcc {result['nvcc']}", ""]
    out += [
        f"{len(result['static'])} kernels, {broken} of them with a bar that is not met.",
        "",
        "`large` and `small`: tiles of 128 x 128 and 64 x 64; `by_4`, `by_2`: 64 x 64, for rows",
        "that begin at multiples of 4 bytes or of an element only. `blocks`: how many share a",
        "multiprocessor, by registers and shared memory. Of the loop, which is one step of 64",
        "bytes along the sum: instructions, of them mma (`HMMA`), fragment loads (`LDSM`) and",
        "copies (`LDGSTS`); `a mma` is instructions over mma. Ideal are mma, loads and copies",
        "alone: 1.38 in large tiles, 1.75 in small ones. The rest are addresses, the buffer's",
        "number, the group's end, the barrier and the branch, in TF32 two a loaded word for",
        "rounding; for sm_120 nvcc puts an instruction that does nothing between two mma.",
        "`special`: special-function instructions an output in the epilogue.",
        "",
        "At least 3 mma a load and at most 3 instructions a mma are bars of large tiles of 16-bit",
        "types. The others have wider ones, and do not meet these: TF32 in large tiles 5",
        "instructions; small tiles 2 mma a load and 4 instructions, 8 in TF32; narrow copies 2 mma",
        "a load and any number of instructions.",
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
    out += ["", "## Bytes asked of global memory in the simulator, one tile, 256 channels in", ""]
    out += [
        "The ideal: the tile's rows of both operands, bias, scale, shift and the outputs, once.",
        "What is above it in `large` and `small` are bias, scale and shift, which every warp asks",
        "for anew. Narrow copies ask for each sector of 32 bytes again with every word; the L1",
        "cache answers all but the first.",
        "",
        "| kernel | bytes | ideal | ratio |",
        "|---|---|---|---|",
    ]
    for r in result["traffic"]:
        out.append(
            f"| {r['kernel']} | {r['bytes']} | {r['ideal_bytes']} | {r['bytes_over_ideal']:.3f} |"
        )
    return "\n".join(out) + "\n"


def as_json(result: dict[str, Any]) -> str:
    """Each row of a table on a line of its own."""
    parts = []
    for name, value in result.items():
        rows = isinstance(value, list)
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ptxsim", type=Path, help="the folder that holds the package ptxsim")
    parser.add_argument("--out", type=Path, default=OUT, help="where cuda_static.{json,md} go")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    if options.ptxsim:
        sys.path.insert(0, str(options.ptxsim))
    import ptxsim

    result: dict[str, Any] = {
        "measured": False,
        "nvcc": nvcc_version(ptxsim),
        "static": static_rows(ptxsim, options.architectures),
        "traffic": traffic_rows(ptxsim),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda_static.json").write_text(as_json(result))
    (options.out / "cuda_static.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
