"""Measure streaming: memory by height, and time against the whole image and against tiles.

    python benchmarks/streaming.py                        # a quarter of an hour on a core
    python benchmarks/streaming.py --heights 2048 16384 --tiles --rounds 1          # short
    python benchmarks/streaming.py --time 1024/20@2048x2048 --tiles 1024/20 768/32  # an hour
    python benchmarks/streaming.py --resume               # what is still missing

Writes streaming.json and streaming.md into benchmarks/results/MACHINE, as cpu.py does. Every peak
is of a process of its own, which reads a memory map of generated pixels. Times by height are of one
process, in which the heights take turns of equally many rows: a short image is streamed repeatedly
until it has as many rows as the tallest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fresh_python
import numpy as np
import report
import results
from machine import this_machine
from recording import Recorder
from results import Row

HERE = Path(__file__).resolve().parent

#: Side of a tile in pixels, without its halo.
TILE = 2048

CHILD = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
import torch
import convmixer_fast as cf
from convmixer_fast.inference import StreamStats
from convmixer_fast.reference import ReferenceConvMixer

which, path, height, arch, threads, limit = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
arch = cf.Arch(**json.loads(arch))
height = int(height)
pixels = np.load(path, mmap_mode="r")[:height]

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

plain = ReferenceConvMixer(arch).eval()
if which == "stream":
    model = cf.ConvMixer(arch.dim, arch.depth, arch.kernel_size, arch.patch_size,
                         num_classes=arch.num_classes, act_layer=arch.act).eval()
    model.load_state_dict(plain.state_dict())
    # What a first call sets up is there for every height.
    cf.stream(model, pixels[: 4 * arch.patch_size])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
row = {}
if which == "stream":
    stats = StreamStats()
    start = time.perf_counter()
    logits = cf.stream(model, pixels, stats=stats)
    took = time.perf_counter() - start
    row["formula MiB"] = stats.plan.bytes / 2**20
    row["bands"] = stats.plan.rows
else:
    # What is asked for beyond this ends the process's own way, not the machine's.
    size = int(limit) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    try:
        start = time.perf_counter()
        x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float().div_(255)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1)
                     for v in (cf.arch.IMAGENET_MEAN, cf.arch.IMAGENET_STD))
        x = x.sub_(mean).div_(std)
        with torch.inference_mode():
            logits = plain(x)
        took = time.perf_counter() - start
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        print(json.dumps({"note": f"needs more than {size >> 20:,} MiB"}))
        raise SystemExit
row |= {"MiB": resident("VmHWM"), "MiB above start": resident("VmHWM") - before, "seconds": took}
row["logits"] = logits[0].tolist()
print(json.dumps(row))
"""

TIMES = """
import json, sys, time
import numpy as np
import torch
import convmixer_fast as cf

path, heights, arch, rounds, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
arch = cf.Arch(**json.loads(arch))
model = cf.ConvMixer(arch.dim, arch.depth, arch.kernel_size, arch.patch_size,
                     num_classes=arch.num_classes, act_layer=arch.act).eval()
heights = json.loads(heights)
pixels = np.load(path, mmap_mode="r")
# The first stream of a process touches all of its memory for the first time.
cf.stream(model, pixels[: min(heights)])
found = {height: [] for height in heights}
for turn in range(int(rounds)):
    # Forth and back: a machine that slows down does so to the first and the last ones.
    for height in heights if turn % 2 == 0 else heights[::-1]:
        passes = max(1, round(max(heights) / height))
        start = time.perf_counter()
        for _ in range(passes):
            cf.stream(model, pixels[:height])
        found[height].append((time.perf_counter() - start) / passes)
print(json.dumps([[height, seconds] for height, seconds in found.items()]))
"""

RATIO = """
import json, sys
import torch
import convmixer_fast as cf
from convmixer_fast.inference import StreamStats
from convmixer_fast.diagnostics.timing import interleaved_times, spread

name, height, width, tile, rounds, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = cf.create_model(name).eval()
arch = model.arch
x = torch.randn(1, 3, height, width)
stats = StreamStats()
# What one tile of that side takes with the halo that makes its middle exact.
halo = arch.depth * (arch.kernel_size // 2) * arch.patch_size
with torch.inference_mode():
    whole = model(x)
    streamed = cf.stream(model, x, stats=stats)
    off = ((streamed - whole).abs().max() / whole.abs().max()).item()
    assert off < 2e-6, off
    runs = {"whole": lambda: model(x), "stream": lambda: cf.stream(model, x)}
    rows = {s: spread(t) for s, t in interleaved_times(runs, rounds).items()}
    pixels = {"whole": height * width, "stream": height * width}
    if tile:
        with_halo = torch.randn(1, 3, tile + 2 * halo, tile + 2 * halo)
        lone = interleaved_times({"tile": lambda: model(with_halo)}, max(1, rounds // 2), 0)
        rows["tile with halo"] = spread(lone["tile"])
        pixels["tile with halo"] = tile * tile
print(json.dumps([
    {"system": s, "s": t["median"], "p20": t["p20"], "p80": t["p80"],
     "us/kpx": t["median"] / pixels[s] * 1e9, "off": off if s == "stream" else None,
     "bands": stats.plan.rows if s == "stream" else None,
     "exact": stats.plan.exact if s == "stream" else None,
     "halo px": halo if s == "tile with halo" else None,
     "work": (tile + 2 * halo) ** 2 / tile**2 if s == "tile with halo" else 1.0}
    for s, t in rows.items()
]))
"""


def child(script: str, *arguments: str, timeout: float) -> Any:
    result = fresh_python.run("-c", script, *arguments, timeout=timeout)
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    return json.loads(result.stdout)


def is_there(record: Recorder, suite: str, group: str) -> bool:
    """True if ``--resume`` is given and this build of the engine has measured the group."""
    assert record.path is not None
    there = results.groups(results.load(record.path), record.software["engine"])
    return record.resume and (suite, group) in there


def generate(path: Path, height: int, width: int) -> None:
    """Random pixels, in pieces."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(height, width, 3))
    random = np.random.default_rng(0)
    for row in range(0, height, 1024):
        rows = min(1024, height - row)
        out[row : row + rows] = random.integers(0, 256, (rows, width, 3), dtype=np.uint8)
    out.flush()


def measure_heights(options: argparse.Namespace, record: Recorder) -> None:
    arch = {
        "dim": options.dim,
        "depth": options.depth,
        "kernel_size": options.kernel_size,
        "patch_size": options.patch_size,
        "num_classes": 10,
        "act": "gelu",
    }
    model = f"{options.dim}/{options.depth} k{options.kernel_size} p{options.patch_size}"
    group = f"{model}, {options.width} px wide, {options.threads} threads"
    if not options.heights or is_there(record, "heights", group):
        return
    rows: list[Row] = []
    heights = sorted(set(options.heights))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder) / "pixels.npy"
        generate(path, heights[-1], options.width)
        times: dict[int, list[float]] = dict(
            child(
                TIMES,
                str(path),
                json.dumps(heights),
                json.dumps(arch),
                str(options.rounds),
                str(options.threads),
                timeout=options.timeout,
            )
        )
        for height in heights:
            answers = {}
            for system in ("stream", "eager"):
                row: Row = child(
                    CHILD,
                    system,
                    str(path),
                    str(height),
                    json.dumps(arch),
                    str(options.threads),
                    str(options.memory_limit),
                    timeout=options.timeout,
                )
                if "note" not in row:
                    answers[system] = np.array(row.pop("logits"))
                    if system == "stream":
                        row["seconds"] = statistics.median(times[height])
                        row["turns"] = len(times[height])
                    row["us a row"] = row["seconds"] / height * 1e6
                rows.append({"model": model, "height": height, "width": options.width})
                rows[-1] |= {"system": system, **row}
                print(f"{height} rows, {system}: {row}", flush=True)
            if len(answers) == 2:
                # The tests hold the numerics rule; here a wrong output must not be timed.
                off = abs(answers["stream"] - answers["eager"]).max() / abs(answers["eager"]).max()
                assert off < 1e-4, f"the stream's logits are {off:.1e} off"
    record("heights", group, rows)


def measure_times(options: argparse.Namespace, record: Recorder) -> None:
    for asked in options.time:
        name, _, size = asked.partition("@")
        height, width = (int(n) for n in size.split("x"))
        group = f"{asked}, {options.threads} threads"
        if is_there(record, "times", group):
            continue
        tile = TILE if name in options.tiles else 0
        found = child(
            RATIO,
            name,
            *map(str, (height, width, tile, options.rounds, options.threads)),
            timeout=options.timeout,
        )
        rows = [{"model": name, "height": height, "width": width, **row} for row in found]
        for row in rows:
            print(f"{asked}, {row['system']}: {row['s']:.3f} s", flush=True)
        record("times", group, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heights", type=int, nargs="*", default=[2048, 16384, 131072])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--kernel-size", type=int, default=9)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument(
        "--time",
        nargs="*",
        metavar="MODEL@HxW",
        default=["256/8@512x512", "1024/20@896x896", "768/32@2016x224"],
    )
    parser.add_argument(
        "--tiles",
        nargs="*",
        metavar="MODEL",
        default=["1024/20"],
        help="of --time, measured in turn with a tile and its halo (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-limit", type=int, default=4096, metavar="MiB", help="of eager")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="of one process")
    parser.add_argument("--scratch", metavar="DIR", help="for the generated pixels")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/MACHINE")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    options = parser.parse_args()
    path = (options.out or HERE / "results" / this_machine()["name"]).resolve() / "streaming.json"
    record = Recorder(path, options.resume)
    failed = 0
    for suite, run in (("heights", measure_heights), ("times", measure_times)):
        try:
            run(options, record)
        except (RuntimeError, subprocess.TimeoutExpired, AssertionError) as error:
            print(f"{suite}: {error}", file=sys.stderr)
            failed = 1
    found = results.load(path)
    if found is not None:
        print(report.text(found, report.tables(found)[:1]), path, *report.write(path), sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
