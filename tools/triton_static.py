"""Write what is known of the Triton kernels without running them on a GPU: JSON and Markdown.

    python tools/triton_static.py [--out FOLDER] [--architectures 80 89 90]

Needs Triton, no GPU. Three kinds of numbers, none of them a measurement:

* from the machine code of every kernel with its tile for the published widths: registers, spills,
  the hot loop's mix, and how many programs fit a multiprocessor;
* from simulated runs: instructions, sectors and bytes for each output;
* from both and the vendors' peak rates: the time no run can beat, and the time at the shares of
  peak that good kernels reach.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import ptxsim
import torch
from gpu_static import depthwise, pointwise, stem
from rows import as_json

from convmixer_fast.arch import VARIANTS as PUBLISHED
from convmixer_fast.arch import Arch
from convmixer_fast.backends.triton import support
from convmixer_fast.backends.triton.configs import (
    POINTWISE,
    lookup_depthwise,
    lookup_pointwise,
    lookup_stem,
    pointwise_candidates,
)

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu-static"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (3, 5, 7, 9)
#: The tile for odd channel counts only.
ODD_CHANNELS = next(row.config for row in POINTWISE if row.narrower_than)
#: dtype, and whether float32 is multiplied as TF32.
ARITHMETICS = (*((dtype, False) for dtype in DTYPES), (torch.float32, True))

#: The GPUs of the prediction: TFMA/s in float32, thread instructions issued in 1e12/s, TB/s.
#: Vendors' figures.
GPUS = {
    "A100": (9.75, 19.5, 2.04),
    "RTX 4090": (41.3, 41.3, 1.01),
    "H100": (33.5, 33.5, 3.35),
}
#: Shares of peak that good kernels reach: DRAM, multipliers. Those of GEMMs: `pointwise`.
DRAM_SHARE, FMA_SHARE = pointwise.REACHED["dram"], 0.9
SIMULATED_CHANNELS = 128


#: A width for each of the depthwise tiles of these sizes.
WIDTHS = (1536, 32)
#: Kernel size of the depthwise tile whose compile time is measured.
TIMED_SIZE = 9


def static_rows(architectures: list[int]) -> list[dict[str, Any]]:
    """Every shipped tile for every architecture and dtype, with its missed and excused bars."""
    rows: list[dict[str, Any]] = []

    def add(
        op: str, dtype: torch.dtype, kernel: str, facts: Any, bars: Any, tf32: bool = False
    ) -> None:
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        found = {"broken_bars": bars.broken, "exceptions": bars.excused}
        rows.append({"op": op, "dtype": name, "kernel": kernel, **facts, **found})
        print(rows[-1], file=sys.stderr)

    for architecture in architectures:
        for channels, dtype, k in product(WIDTHS, DTYPES, SIZES):
            config = lookup_depthwise(dtype, k, channels)
            built = depthwise.build(config, architecture, dtype, k, channels=channels)
            kernel = f"k = {k}, {config.columns} x {config.rows} x {config.channels}"
            facts = depthwise.facts(built, config, k) | {"k": k}
            add("depthwise_mix", dtype, kernel, facts, depthwise.bars(built, config, dtype, k))
        for dtype, tf32 in ARITHMETICS:
            for tile in pointwise_candidates(architecture, dtype, tf32):
                odd = tile == ODD_CHANNELS
                of: dict[str, Any] = {"tf32": tf32, "channels": 1537 if odd else 1536}
                built = pointwise.build(tile, architecture, dtype, **of)
                kernel = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
                kernel += f", {tile.num_stages} stages" + ", copy engine" * tile.descriptors
                if odd:
                    bars = pointwise.odd_channels_bars(built)
                else:
                    bars = pointwise.bars(built, tile, dtype, tf32)
                facts = pointwise.facts(built, tile)
                op = "pointwise_mix, odd channels" if odd else "pointwise_mix"
                add(op, dtype, kernel, facts, bars, tf32)
        for uint8, (dtype, tf32) in product((False, True), ARITHMETICS):
            built = stem.build(architecture, dtype, tf32=tf32, uint8=uint8)
            facts = pointwise.facts(built, lookup_stem(dtype))
            kernel = "p = 7, from uint8" if uint8 else "p = 7"
            add("patch_embed", dtype, kernel, facts, stem.bars(built, dtype, tf32, uint8), tf32)
    return rows


def seconds_to_compile(architectures: list[int]) -> dict[str, float]:
    """Processor seconds to compile the large bfloat16 tiles, child processes included, no cache."""
    from triton import knobs

    dtype, seconds = torch.bfloat16, {}

    def spent() -> float:
        return sum(os.times()[:4])

    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        for a in architectures:
            wide = lookup_depthwise(dtype, TIMED_SIZE, 1536)
            pointwise_tile = lookup_pointwise(a, dtype, rows=2**16, columns=1536)
            builds = {
                f"depthwise_mix, k = {TIMED_SIZE}": lambda a=a, tile=wide: depthwise.build(
                    tile, a, dtype, TIMED_SIZE
                ),
                "pointwise_mix": lambda a=a, tile=pointwise_tile: pointwise.build(tile, a, dtype),
                "patch_embed": lambda a=a: stem.build(a, dtype),
            }
            for name, build in builds.items():
                before = spent()
                build()
                seconds[f"sm_{a} {name}"] = spent() - before
    return seconds


def simulated(arch: Arch, grid: int) -> dict[str, Any]:
    """Counts per output for one image of ``SIMULATED_CHANNELS`` channels; the result is checked."""
    from convmixer_fast.backends.triton.kernels.depthwise import depthwise_mix, pack_taps
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
    config = lookup_depthwise(x.dtype, k, c)
    # Bytes of one program, each counted once: its window and taps, and the outputs.
    window = 2 * (config.columns + k - 1) * (config.rows + k - 1) + 4 * k * k
    own = window / (config.columns * config.rows) + 2
    return {
        "k": k,
        "grid": grid,
        "warp_instructions_per_output": 32 * stats.warp_instructions / outputs,
        "fma_per_output": stats.thread["fma.rn.f32"] / outputs,
        "requested_bytes_per_output": 32
        * (counters["global_ld_sectors"] + counters["global_st_sectors"])
        / outputs,
        "footprint_bytes_per_output": 32
        * (counters["footprint_ld_sectors"] + counters["footprint_st_sectors"])
        / outputs,
        "footprint_over_ideal": 32
        * counters["footprint_ld_sectors"]
        / (2 * outputs + 4 * c * k * k),
        "program_bytes_per_output": own,
        "program_kib": window * config.channels / 1024,
        "binding": {name: b.limit for name, b in bounds.items()},
        "l2_over_binding": {name: b.times["l2"] / b.seconds for name, b in bounds.items()},
    }


def predicted(arch: Arch, grid: int, counts: dict[str, Any]) -> dict[str, Any]:
    """Images a second in bfloat16 at large batches without the head, with the arithmetic.

    Every instruction of the simulated run counts as an issue slot. Moves count too, of which an
    assembler keeps few: the issue line is high.
    """
    values = arch.dim * grid * grid
    rows = {}
    for gpu, (tfma, tissue, tbs) in GPUS.items():
        # Microseconds of one depthwise half of one image; the activation's FMA are counted.
        us = {
            "fma": counts["fma_per_output"] * values / tfma / 1e6,
            "issue": counts["warp_instructions_per_output"] * values / tissue / 1e6,
            "dram": 2 * 2 * values / tbs / 1e6,
        }
        real = us | {"fma": us["fma"] / FMA_SHARE, "dram": us["dram"] / DRAM_SHARE}
        half = pointwise.predict(gpu, arch.dim, grid * grid, act=arch.act or "gelu")
        patches = stem.predict(gpu, arch.dim, arch.patch_size, grid * arch.patch_size)
        depthwise_us, pointwise_us = max(real.values()), 1e6 * half["expected"]
        block = depthwise_us + pointwise_us
        at_peak = max(us["fma"], us["dram"]) + 1e6 * half["bound"]
        rows[gpu] = {
            "depthwise_us": us,
            "pointwise_us": {line: 1e6 * t for line, t in half["times"].items()},
            "pointwise_tile": half["tile"],
            "stem_us": {line: 1e6 * t for line, t in patches["times"].items()},
            "bound_by": {
                "depthwise": max(real, key=real.__getitem__),
                "pointwise": half["limit"],
                "stem": patches["limit"],
            },
            "us_per_block": block,
            "sum": f"{arch.depth} ({depthwise_us:.2f} + {pointwise_us:.2f}) "
            f"+ {1e6 * patches['expected']:.2f}",
            "img_per_s": 1e6 / (arch.depth * block + 1e6 * patches["expected"]),
            "img_per_s_at_peak": 1e6 / (arch.depth * at_peak + 1e6 * patches["bound"]),
        }
    return rows


#: Most that the L2 line may be over the binding one; it counts every request as if L1 never hit.
MOST_L2 = 1.2
#: Vendors' figures.
L1_KIB = {"A100": 192, "RTX 4090": 128, "H100": 256}
MMA_SYNC = (80, 86, 89, 120)


def _dtypes(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda r: r["dtype"] in names


def _bars(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(bar, its limit, the worst value and its kernel) for every static bar."""
    rows = result["static"]
    half, single = _dtypes("bfloat16", "float16"), _dtypes("float32")
    found: list[tuple[str, str, str]] = []

    def bar(
        text: str,
        limit: str,
        value: Callable[[dict[str, Any]], float],
        op: str,
        when: Callable[[dict[str, Any]], bool] = lambda r: True,
        least: bool = False,
        digits: int = 0,
    ) -> None:
        here = [r for r in rows if r["op"] == op and when(r)]
        if not here:
            return
        r = (min if least else max)(here, key=value)
        where = f"sm_{r['architecture']}, {r['dtype']}, {r['kernel']}"
        found.append((f"{op}: {text}", limit, f"{value(r):.{digits}f} ({where})"))

    def narrowest(key: str) -> Callable[[dict[str, Any]], float]:
        return lambda r: min(map(int, r[key]))

    dw, pw, stem = "depthwise_mix", "pointwise_mix", "patch_embed"
    bar("local loads and stores", "0", lambda r: r["spills"], dw)
    bar("bytes of stack", "0", lambda r: r["stack"], dw)
    bar("registers", "<= 128", lambda r: r["registers"], dw)
    bar("bytes of shared memory", "<= 49152", lambda r: r["shared"], dw)
    for k, least, goal in ((9, "0.70", "0.77"), (7, "0.67", "0.77")):
        bar(
            f"FMA in the hot loop, k = {k}, 16 bits",
            f">= {least} (goal {goal})",
            lambda r: r["fma_share"],
            dw,
            lambda r, k=k: r["k"] == k and half(r),
            least=True,
            digits=3,
        )
    bar(
        "FMA in the hot loop, k = 7 and 9, float32",
        ">= 0.85 (goal 0.90)",
        lambda r: r["fma_share"],
        dw,
        lambda r: r["k"] >= 7 and single(r),
        least=True,
        digits=3,
    )
    for k, reuse in ((9, "4.0"), (7, "3.5")):
        bar(
            f"FMA a loaded value, k = {k}",
            f">= {reuse}",
            lambda r: r["fma_per_load"],
            dw,
            lambda r, k=k: r["k"] == k,
            least=True,
            digits=2,
        )
    bar("conversions a loaded value", "<= 1", lambda r: r["unpack_per_load"], dw, digits=3)
    bar("16-bit accesses", "0", lambda r: r["narrow"], dw)
    bar("bits a load", ">= 64", narrowest("load_bits"), dw, least=True)
    bar("bits a store", "64 to 128", narrowest("store_bits"), dw, least=True)
    bar("predicated loads in the hot loop", "0", lambda r: r["predicated"], dw)
    bar("divisions and modulos in the hot loop", "0", lambda r: r["division"], dw)
    for op in (pw, stem):
        bar("local loads and stores", "0", lambda r: r["spills"], op)
        bar(
            "HMMA a LDSM, where wgmma and tcgen05 are not",
            ">= 3",
            lambda r: r["mma"] / max(1, r["ldsm"]),
            op,
            lambda r: r["architecture"] in MMA_SYNC and r["dtype"] != "float32",
            least=True,
            digits=2,
        )
        for limit, architectures in ((163, (80,)), (99, (86, 89, 120)), (227, (90, 100))):
            bar(
                f"KiB of shared memory, {', '.join(f'sm_{a}' for a in architectures)}",
                f"<= {limit}",
                lambda r: r["shared"] / 1024,
                op,
                lambda r, of=architectures: r["architecture"] in of,
                digits=1,
            )
        bar(
            "bits a store, without the copy engine",
            "128",
            lambda r: min(map(int, r["store_bits"]), default=128),
            op,
            least=True,
        )
        bar("special functions an output", "<= 2", lambda r: r["special_per_output"], op, digits=2)
        bar("calls in the epilogue", "0", lambda r: r["calls"], op)
    limit = "HMMA.16816.F32 (HGMMA on sm_90, UTCHMMA on sm_100), LDSM.x4, LDGSTS.128, no branch in "
    limit += "the epilogue"
    broken = [r["broken_bars"] for r in rows if r["op"] == pw]
    found.append(
        (
            "pointwise_mix: instructions",
            limit,
            f"{broken.count([])} of {len(broken)} builds",
        )
    )
    slowest = max(result["seconds_to_compile"], key=result["seconds_to_compile"].__getitem__)
    found.append(
        (
            "seconds to compile, of the large tiles in bfloat16",
            "< 30",
            f"{result['seconds_to_compile'][slowest]:.1f} ({slowest})",
        )
    )
    return found


def _exceptions(result: dict[str, Any]) -> list[str]:
    """Every bar that a shipped kernel misses, grouped by the reason."""
    by_reason: dict[str, list[str]] = {}
    for r in result["static"]:
        where = f"{r['op']} sm_{r['architecture']} {r['dtype']} {r['kernel']}"
        for text, reason in r["exceptions"]:
            by_reason.setdefault(reason, []).append(f"{where}: {text}")
    out = []
    for reason, texts in by_reason.items():
        shown = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
        out.append(f"* **{reason[0].upper()}{reason[1:]}.** {shown}.")
    why = depthwise.WHY_MASKED
    out.append(
        f"* **{why[0].upper()}{why[1:]}.** depthwise_mix, not in the table: up to "
        f"{depthwise.MOST_REGISTERS_MASKED} registers, {depthwise.MOST_REGISTERS} wanted."
    )
    for name, r in result["simulated"].items():
        for gpu, ratio in r["l2_over_binding"].items():
            if ratio > MOST_L2:
                left = ratio * r["program_bytes_per_output"] / r["requested_bytes_per_output"]
                out.append(
                    "* **The line of L2 counts every request, as if L1 never hit.** "
                    f"{name}, {gpu}: {ratio:.2f} of the binding line ({r['binding'][gpu]}), "
                    f"{MOST_L2} wanted. A program's window and taps are {r['program_kib']:.0f} "
                    f"KiB, of which those of {L1_KIB[gpu] // r['program_kib']:.0f} programs fit "
                    f"the {L1_KIB[gpu]} KiB of L1; with each byte of them from L2 once, it is "
                    f"{left:.2f}."
                )
    return out


def markdown(result: dict[str, Any]) -> str:
    out = ["# GPU kernels before they run", ""]
    out += ["**Predicted. Nothing here was timed: no GPU has run these kernels.**", ""]
    out += ["## Static bars", ""]
    out += [f"Of {len(result['static'])} builds by Triton {result['triton']}, the worst:", ""]
    out += ["| bar | limit | worst |", "|---|---|---|"]
    out += [f"| {' | '.join(row)} |" for row in _bars(result)]
    broken = sum(bool(r["broken_bars"]) for r in result["static"])
    out += ["", f"Not met and not excused: {broken} builds. Exceptions, and why:", ""]
    out += _exceptions(result)
    out += ["", f"## Machine code, by Triton {result['triton']}", ""]
    out += [
        "`programs`: how many of a kernel's programs share a multiprocessor; `loop`: the share of",
        "float32 multiply-adds among the hot loop's instructions (sm_100 does two in one), or its",
        "matrix instructions; `bars`: what is not met, (with brackets) for a reason given above.",
        "Tiles: columns x rows x channels, or pixels x channels x terms.",
        "",
    ]
    out += ["| arch | kernel | dtype | | registers | stack | shared | programs | loop | bars |"]
    out += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in result["static"]:
        loop = _matrix_instruction(r) or f"{r['fma_share']:.3f}"
        bars = [*r["broken_bars"], *(f"({text})" for text, _ in r["exceptions"])]
        out.append(
            f"| sm_{r['architecture']} | {r['op']} | {r['dtype']} | {r['kernel']} "
            f"| {r['registers']} | {r['stack']} | {r['shared']} | {r['programs']} | {loop} "
            f"| {'; '.join(bars) or 'met'} |"
        )
    out += ["", "## The depthwise half in the simulator, bfloat16, for one output", ""]
    out += [
        "Of one image and two blocks of 64 channels: all blocks of 64 are alike, so that the width",
        "changes nothing. `once`: bytes read and written if every sector moves once; `/ ideal`:",
        "what of that is read, over input and taps (at most 1.05); `L2 / binding`: the time of all",
        f"requests through L2, as if L1 never hit, over the binding line's (at most {MOST_L2}).",
        "",
    ]
    gpus = list(GPUS)
    out += [
        "| variant | k | grid | instructions | FMA | bytes requested | once | / ideal | binding |"
    ]
    out[-1] += f" L2 / binding: {', '.join(gpus)} |"
    out += ["|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in result["simulated"].items():
        ratios = ", ".join(f"{r['l2_over_binding'][g]:.2f}" for g in gpus)
        out.append(
            f"| {name} | {r['k']} | {r['grid']} x {r['grid']} "
            f"| {r['warp_instructions_per_output']:.0f} | {r['fma_per_output']:.1f} "
            f"| {r['requested_bytes_per_output']:.1f} | {r['footprint_bytes_per_output']:.2f} "
            f"| {r['footprint_over_ideal']:.3f} "
            f"| {', '.join(f'{g} {b}' for g, b in r['binding'].items())} "
            f"| {ratios} |"
        )
    shares = pointwise.REACHED
    out += ["", "## Predicted images a second, bfloat16, large batches, without the head", ""]
    out += [
        "1e6 / (depth (depthwise + pointwise) + stem), each the longest of its lines in",
        f"microseconds an image, at {shares['tensor']:.0%} of the tensor rate, {DRAM_SHARE:.0%} of "
        f"bandwidth, {FMA_SHARE:.0%} of the",
        "multipliers and every issue slot; in brackets without the depthwise half's issue line, at",
        "100 % of the others. Lines at 100 %, in microseconds:",
        "",
    ]
    out += ["| variant | GPU | depthwise: FMA / issue / DRAM | pointwise: tensor / DRAM | stem |"]
    out[-1] += " bound by | img/s |"
    out += ["|---|---|---|---|---|---|---|"]
    for name, cards in result["predicted"].items():
        for gpu, r in cards.items():
            fma_issue_dram = " / ".join(f"{v:.2f}" for v in r["depthwise_us"].values())
            tensor_dram = " / ".join(
                f"{r['pointwise_us'][line]:.2f}" for line in ("tensor", "dram")
            )
            stem_us = r["stem_us"][r["bound_by"]["stem"]]
            out.append(
                f"| {name} | {gpu} | {fma_issue_dram} | {tensor_dram} | {stem_us:.2f} "
                f"| {', '.join(r['bound_by'].values())} | 1e6 / ({r['sum']}) = "
                f"{r['img_per_s']:.0f} ({r['img_per_s_at_peak']:.0f}) |"
            )
    return "\n".join(out) + "\n"


def _matrix_instruction(row: dict[str, Any]) -> str:
    if row["op"] == "depthwise_mix":
        return ""
    return next((f for f in ("HGMMA", "UTCHMMA", "HMMA") if f in row["features"]), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of gpu_static.{json,md}")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    static = static_rows(options.architectures)
    result: dict[str, Any] = {
        "measured": False,
        "triton": support.triton_version(),
        "static": static,
        "seconds_to_compile": seconds_to_compile(options.architectures),
        "simulated": {},
        "predicted": {},
    }
    for variant in PUBLISHED.values():
        name, arch = variant.paper_name, variant.arch
        if variant.input_size[1] != 224:
            continue
        grid = 224 // arch.patch_size
        counts = simulated(arch, grid)
        result["simulated"][name] = counts
        result["predicted"][name] = predicted(arch, grid, counts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_static.json").write_text(as_json(result))
    (options.out / "gpu_static.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
