"""Measure the way from files to results, and check that every image arrives.

    python benchmarks/inference.py                    # 10,000 photographs: ten minutes on 2 cores
    python benchmarks/inference.py --images 500       # short
    python benchmarks/inference.py --suites pipeline  # of pipeline, kills, ray

Photographs of mixed sizes are generated, one in a hundred broken in one of several ways. `pipeline`
times a model alone, decoding alone, and both together; `kills` ends a run by kill -9 at random
moments and continues it, five times, and counts the results; `ray` compares actors. Rows are merged
into inference.json in benchmarks/results/MACHINE, and inference.md is written next to it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import fresh_python
import photographs
import report
import results
import torch
from machine import this_machine
from recording import Recorder

from convmixer_fast import ConvMixer, Predictor, save_checkpoint
from convmixer_fast.diagnostics.doctor import usable_cores
from convmixer_fast.inference import ImageError, ResultFile, load_image
from convmixer_fast.testing import trained_like_

HERE = Path(__file__).resolve().parent

SUITES = ("pipeline", "kills", "ray")
SIZES = (150, 500)
BATCH = 32
KILLS = 5
#: Name -> dim, depth, kernel size, patch size; at 224 pixels. With the small model decoding is the
#: bottleneck. The light one takes little longer than decoding, so that every delay between the two
#: shows. The medium one hides decoding.
MODELS = {"small": (64, 2, 5, 16), "light": (192, 4, 7, 14), "medium": (384, 12, 5, 14)}
#: The slower models get one photograph in so many.
SHARES = {"small": 1, "light": 4, "medium": 10}


def build(name: str) -> ConvMixer:
    net = ConvMixer(*MODELS[name], num_classes=10)
    return trained_like_(net, (2, 3, 224, 224)).eval()


def share(paths: list[Path], model: str) -> list[Path]:
    return paths[: max(200, len(paths) // SHARES[model])]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(run: Any) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def decoding(paths: list[Path], predictor: Predictor) -> tuple[float, float]:
    def run() -> None:
        for path in paths:
            with suppress(ImageError):
                load_image(path, predictor.preprocessing)

    wall, cpu = timed(run)
    return wall / len(paths), cpu / len(paths)


def computing(predictor: Predictor, rounds: int = 5) -> tuple[float, float]:
    """Seconds an image of the model alone: the median round of a batch."""
    batch = torch.randn(BATCH, 3, 224, 224)

    def run() -> None:
        with torch.inference_mode():
            predictor.model(batch)

    run()
    found = [timed(run) for _ in range(rounds)]
    return tuple(statistics.median(f[i] for f in found) / BATCH for i in (0, 1))  # type: ignore[return-value]


def computing_while_decoding(
    predictor: Predictor, paths: list[Path], decoders: int
) -> tuple[float, float]:
    """`computing`, while other threads decode images that are not used.

    Cores share caches, memory and a power budget: this is the speed left to the model.
    """
    stop = threading.Event()

    def decode(start: int) -> None:
        for path in itertools.cycle(paths[start:] + paths[:start]):
            if stop.is_set():
                return
            with suppress(ImageError):
                load_image(path, predictor.preprocessing)

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(decoders)]
    for thread in threads:
        thread.start()
    try:
        return computing(predictor)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def pipeline(paths: list[Path], record: Recorder, scratch: Path) -> float:
    """Returns images a second with the small model."""
    cores = usable_cores()
    torch.set_num_threads(1)
    rate = 0.0
    for name, shape in MODELS.items():
        predictor = Predictor(build(name), batch_size=BATCH, topk=5)
        some = share(paths, name)
        sample = some[:: max(1, len(some) // 500)]
        decoders = max(1, cores - 1)

        def parts(
            predictor: Predictor = predictor,
            sample: list[Path] = sample,
            decoders: int = decoders,
        ) -> tuple[tuple[float, float], ...]:
            beside = (
                computing_while_decoding(predictor, sample, decoders) if cores > 1 else (0.0, 0.0)
            )
            return computing(predictor), decoding(sample, predictor), beside

        # Before and after the run: the speed of a machine drifts.
        alone = [parts()]
        count = 0
        waited = 0.0
        target = scratch / f"{name}.csv"

        def run(
            predictor: Predictor = predictor,
            some: list[Path] = some,
            target: Path = target,
            decoders: int = decoders,
        ) -> None:
            nonlocal count, waited
            with ResultFile(target, predictor.columns, overwrite=True) as out:
                for outcome in predictor.predict_files(some, workers=decoders):
                    out.write(outcome.rows, outcome.failures)
                    count += len(outcome.rows) + len(outcome.failures)
                    waited += outcome.waited

        wall, cpu = timed(run)
        assert count == len(some), (count, len(some))
        alone.append(parts())
        model_wall, model_cpu = (statistics.mean(a[0][i] for a in alone) for i in (0, 1))
        decode_wall, decode_cpu = (statistics.mean(a[1][i] for a in alone) for i in (0, 1))
        beside_wall = statistics.mean(a[2][0] for a in alone)
        row = {
            "model": name,
            "shape": "/".join(map(str, shape)),
            "images": count,
            "cores": cores,
            "model ms": 1e3 * model_wall,
            "model beside ms": 1e3 * beside_wall if cores > 1 else None,
            "decode ms": 1e3 * decode_wall,
            "whole ms": 1e3 * wall / count,
            "img/s": count / wall,
            # One core does everything in turn; more cores overlap decoding and the model.
            "of the limit": max(
                model_wall, decode_wall / decoders, (model_wall + decode_wall) / cores
            )
            * count
            / wall,
            "of the model alone": model_wall * count / wall,
            "of the model beside": beside_wall * count / wall if cores > 1 else None,
            "waiting": waited / wall,
            "CPU ms": 1e3 * cpu / count,
            "overhead ms": 1e3 * (cpu / count - model_cpu - decode_cpu),
        }
        print(row, flush=True)
        record("pipeline", name, [row])
        rate = rate or count / wall
    return rate


def kills(
    folder: Path, broken: dict[str, str], record: Recorder, scratch: Path, rate: float, seed: int
) -> None:
    everything = [str(p) for p in folder.rglob("*.jpg")]
    checkpoint = scratch / "small.safetensors"
    save_checkpoint(build("small"), checkpoint)
    for kind in ("csv", "parquet"):
        target = scratch / f"killed.{kind}"
        parts = scratch / f"killed.{kind}.parts"
        command = ["-m", "convmixer_fast", "predict", str(folder), "--checkpoint", str(checkpoint),
                   "--results-file", str(target), "--resume", "--no-console-results",
                   "--part-seconds", "1", "-j", str(max(1, usable_cores() - 1))]  # fmt: skip
        rng = random.Random(seed)
        start = time.perf_counter()
        moments = []
        for _ in range(KILLS):
            process = fresh_python.start(
                *command, env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
            )
            # Killed at work, not while Python starts; after a sixth on average.
            before = len(list(parts.glob("part-*")))
            while process.poll() is None and len(list(parts.glob("part-*"))) <= before:
                time.sleep(0.02)
            try:
                process.wait(rng.uniform(0, len(everything) / rate / KILLS))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            moments.append(process.wait())
        done = fresh_python.run(*command, env={"OMP_NUM_THREADS": "1"}, timeout=24 * 3600)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = Counter(_filenames(target))
        bad = Counter(_filenames(target.with_name("killed.errors.csv")))
        both = found + bad
        row = {
            "results": kind,
            "images": len(everything),
            "broken": len(broken),
            "kills": sum(code == -signal.SIGKILL for code in moments),
            "rows": sum(found.values()),
            "errors": sum(bad.values()),
            "missing": len(set(everything) - set(both)),
            "repeated": sum(n - 1 for n in both.values()),
            "wrongly failed": len(set(bad) - set(broken)),
            "left over": int(parts.exists()),
            "seconds": time.perf_counter() - start,
        }
        print(row, flush=True)
        record("kills", kind, [row])


def _filenames(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        names: list[str] = pyarrow.parquet.read_table(path, columns=["filename"])[0].to_pylist()
        return names
    with open(path, newline="") as file:
        return [row["filename"] for row in csv.DictReader(file)]


def ray_actors(paths: list[Path], record: Recorder) -> None:
    import ray

    from convmixer_fast.inference.ray import predict_files

    predictor = Predictor(build("medium"), batch_size=BATCH)
    some = share(paths, "medium")
    rows = []
    torch.set_num_threads(1)

    def measure(system: str, outcomes: Any) -> None:
        start = time.perf_counter()
        count = 0
        first: tuple[float, int] | None = None
        for outcome in outcomes:
            count += len(outcome.rows) + len(outcome.failures)
            first = first or (time.perf_counter(), count)
        end = time.perf_counter()
        assert count == len(some), (count, len(some))
        assert first is not None
        rows.append(
            {
                "system": system,
                "model": "medium",
                "images": count,
                "img/s": (count - first[1]) / (end - first[0]),
                "start s": first[0] - start,
                "img/s with start": count / (end - start),
            }
        )
        print(rows[-1], flush=True)

    measure("local, 1 thread, 1 decoder", predictor.predict_files(some, workers=1))
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        for actors in (1, 2):
            name = "1 actor" if actors == 1 else f"{actors} actors"
            measure(f"Ray, {name}", predict_files(predictor, some, actors=actors, workers=1))
    finally:
        ray.shutdown()
    record("ray", "actors", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, metavar="N")
    parser.add_argument("--suites", default=",".join(SUITES), help="of %(default)s")
    parser.add_argument("--folder", type=Path, help="of the photographs, kept for the next time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder to write to; default: benchmarks/results/MACHINE"
    )
    args = parser.parse_args()
    suites = args.suites.split(",")
    if unknown := set(suites) - set(SUITES):
        parser.error(f"unknown suite {', '.join(sorted(unknown))}: use {', '.join(SUITES)}")
    out = (args.out or HERE / "results" / this_machine()["name"]).resolve() / "inference.json"
    record = Recorder(out, resume=False)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch) / "photographs").resolve()
        print(f"generating {args.images} photographs", flush=True)
        broken = photographs.write_folder(folder, args.images, SIZES, args.seed)
        paths = sorted(folder.rglob("*.jpg"))
        assert len(paths) == args.images, f"{folder} holds other files"
        rate = 100.0
        if "pipeline" in suites:
            rate = pipeline(paths, record, Path(scratch))
        if "kills" in suites:
            kills(folder, broken, record, Path(scratch), rate, args.seed)
        if "ray" in suites:
            ray_actors(paths, record)
    measured = results.load(out)
    assert measured is not None
    print(report.text(measured, report.tables(measured)))
    print("", out, *report.write(out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
