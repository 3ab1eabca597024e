"""Run the whole CPU suite: measure, and write tables and charts.

    python benchmarks/cpu.py                                # minutes
    python benchmarks/cpu.py --preset full                  # everything: hours
    python benchmarks/cpu.py --preset full --suites models --variants 768/32   # one piece of it
    python benchmarks/cpu.py --preset full --resume         # what is still missing

Writes cpu.json, cpu.md and the charts into benchmarks/results/MACHINE, where MACHINE is derived
from the processor (see `machine.machine_name`). Rows are merged into the file group by group as
soon as they are measured. Every model of every suite runs in a process of its own, so that none
inherits memory or the allocator's state. Other options go to pytest: `pytest benchmarks --help`
lists them under "convmixer_fast".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import devices
import report
import results
from machine import this_machine
from presets import PRESETS, preset_of

HERE = Path(__file__).resolve().parent
#: Suites, shortest first. True: one process a model. `gpu.py` runs those of `ON_GPU`.
SUITES = {
    "overheads": False,
    "kernels": False,
    "numerics": True,
    "memory": True,
    "steps": True,
    "training": True,
    "scaling": True,
    "resolution": True,
    "never_slower": True,
    "models": True,
}
#: Suites whose tables are printed at the end, "" for the summary; the file has all of them.
CLOSING = ("", "never_slower", "models")
ON_GPU = ("kernels", "steps", "training", "resolution", "models")


def main(device: str = "cpu", about: str = __doc__ or "") -> int:
    known = [suite for suite in SUITES if device == "cpu" or suite in ON_GPU]
    parser = argparse.ArgumentParser(
        description=about.splitlines()[0],
        epilog="Any other option goes to pytest, see `pytest benchmarks --help`.",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--suites", default=",".join(known), help="of %(default)s")
    parser.add_argument("--variants", help="models, separated by commas; default: the preset's")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; default: benchmarks/results/MACHINE"
    )
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    args, others = parser.parse_known_args()
    suites = args.suites.split(",")
    if unknown := set(suites) - set(known):
        parser.error(f"unknown suite {', '.join(sorted(unknown))}: use {', '.join(known)}")
    gpu = ""
    if device != "cpu":
        if why := devices.unavailable_reason():
            parser.error(f"{why}: python benchmarks/cpu.py measures the processor")
        gpu = devices.gpu("float32").name()
    preset = preset_of(args.preset, device)
    variants = args.variants.split(",") if args.variants else []
    folder = args.out or HERE / "results" / this_machine(gpu)["name"]
    rows = folder.resolve() / f"{'gpu' if gpu else 'cpu'}.json"

    pieces = []
    for suite in [s for s in known if s in suites]:
        own = list(preset.cell_variants) if suite == "never_slower" else list(preset.variants)
        for variant in (variants or own) if SUITES[suite] else [""]:
            chosen = [f"--variants={variant}"] if variant else []
            if suite == "never_slower":
                chosen = [f"--cell-variants={variant}"]
            if suite == "scaling":
                chosen.append(f"--large={variant if variant in preset.large else ''}")
            if suite == "resolution":
                chosen = [f"--resolution={variant}"]
                if variant not in preset.resolution:
                    continue
            pieces.append((f"{suite} {variant}".strip(), suite, chosen))
    failed = []
    # `python -m pytest` imports from the current folder first: in an empty one it finds the package
    # that this process imports, and not an unbuilt source tree.
    with tempfile.TemporaryDirectory() as nowhere:
        for i, (name, suite, chosen) in enumerate(pieces, 1):
            print(f"== {i}/{len(pieces)}: {name}", flush=True)
            command = [sys.executable, "-m", "pytest", str(HERE / f"test_{suite}.py"), "-q"]
            command += ["--benchmark-quiet", "-p", "no:cacheprovider", f"--preset={args.preset}"]
            command += [
                f"--devices={device}",
                f"--rows={rows}",
                *(["--resume"] if args.resume else []),
                *chosen,
                *others,
            ]
            start = time.monotonic()
            code = subprocess.run(command, cwd=nowhere, check=False).returncode
            print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
            # 5: no test was collected, as where a preset has no large image.
            if code not in (0, 5):
                failed.append(name)
    measured = results.load(rows)
    if measured is not None:
        closing = [t for t in report.tables(measured) if t.suite in CLOSING]
        print(report.text(measured, closing))
        print("", rows, *report.write(rows), sep="\n")
        print("figures of the README and docs: python benchmarks/report.py --readme")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
