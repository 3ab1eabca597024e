"""The benchmarks measure on a CPU and on a GPU alike; the GPU is a fake. Nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import competitors
import devices
import fresh_python
import inference
import measuring
import presets
import pytest
import recording
import report
import torch
import work
from fakes.torch_cuda import NAME, FakeTorchCuda

from convmixer_fast.arch import VARIANTS, Arch
from convmixer_fast.diagnostics.timing import event_clock, interleaved_times
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import trained_like_

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def gpu(dtype: torch.dtype = torch.float32, cuda: FakeTorchCuda | None = None, **sizes: int) -> Any:
    sizes = {"matrix_side": 8, "copied_bytes": 64, **sizes}
    return devices.Gpu(dtype, cuda or FakeTorchCuda(), "cpu", **sizes)


class Benchmark:
    """As much of pytest-benchmark's fixture as `measure` uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Any, args: Any = (), kwargs: Any = None, rounds: int = 1) -> Any:
        assert rounds == 1
        return run(*args, **(kwargs or {}))


# The GPU's clock


def test_events_time_the_gpu_and_not_the_launch():
    cuda = FakeTorchCuda()
    clock = event_clock(cuda)
    # The host comes back after each hundredth; the GPU waits for the first of them only.
    assert clock(lambda: cuda.launch(0.25, host_seconds=0.01), 4) == pytest.approx(1.01)
    # A GPU that waits for its host is as slow as the host is.
    assert clock(lambda: cuda.launch(0.001, host_seconds=0.5), 2) == pytest.approx(1.001)
    before = cuda.synchronized
    cuda.launch(100.0)
    assert clock(lambda: cuda.launch(0.5), 1) == pytest.approx(0.5), "it waited for others' work"
    assert cuda.synchronized == before + 2


def test_systems_take_turns_on_the_gpu():
    cuda = FakeTorchCuda()
    order: list[str] = []

    def run(name: str, seconds: float) -> Any:
        def call() -> None:
            order.append(name)
            cuda.launch(seconds)

        return call

    runs = {"a": run("a", 1.0), "b": run("b", 2.0)}
    times = interleaved_times(runs, 2, repeats={"b": 2}, clock=event_clock(cuda))
    assert times == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert "".join(order) == "ab" + "abbb" * 2


def test_a_call_is_measured_warm_beside_the_limits_and_with_its_memory():
    cuda = FakeTorchCuda(l2=64)
    device = gpu(cuda=cuda)
    calls = {"slow": 0, "quick": 0}

    def run(name: str, seconds: float, memory: int) -> Any:
        def call() -> None:
            calls[name] += 1
            # The first calls compile.
            cuda.launch(seconds if calls[name] > device.warmup else 50.0)
            cuda.allocate(memory)
            cuda.allocate(-memory)

        return call

    limits: list[str] = []

    def loops(threads: Any) -> Any:
        names = {"multiply-adds": 1.0, "matrix products": 0.5, "bandwidth": 0.25}
        runs = {
            f"limit, {n}": (lambda n=n, s=s: (limits.append(n), cuda.launch(s)))
            for n, s in names.items()
        }
        return runs, lambda times: {
            None: work.Limits(*(8 / sum(times[n]) * len(times[n]) for n in runs))
        }

    device.limits = loops
    preset = presets.preset_of("quick", "cuda")
    runs = {"slow": run("slow", 2.0, 3 << 20), "quick": run("quick", 0.03, 1 << 20)}
    measured = measuring.measure(runs, device, preset, Benchmark())
    assert {name: c["ms"] for name, c in measured.columns.items()} == pytest.approx(
        {"slow": 2000.0, "quick": 30.0}
    )
    assert [c["peak MiB"] for c in measured.columns.values()] == [3, 1]
    assert "cores" not in measured.columns["slow"], "a processor's figures stand by a GPU's"
    assert len(limits) > 3 * preset.least_rounds
    assert measured.limits[None] == work.Limits(8.0, 16.0, 32.0)
    parts = (work.Part(16, 8, matrix=False), work.Part(16, 64, matrix=True))
    row = measured.row("slow", work.Work(4, parts))
    # 16 multiply-adds at 8 a second, then 64 bytes at 32 a second, which is longer than 16 at 16.
    assert row["of limit"] == pytest.approx((2.0 + 2.0) / 2.0)
    assert (row["img/s"], row["GMAC/s"], row["GB/s"]) == pytest.approx((2.0, 16e-9, 36e-9))
    assert (row["device"], row["dtype"]) == (NAME, "float32")
    assert "of peak" not in row
    shown = {r["system"]: r for r in measured.limit_rows()}
    assert shown["limit, matrix products"]["GMAC/s"] == pytest.approx(16e-9)
    assert shown["limit, bandwidth"]["GB/s"] == pytest.approx(32e-9)


def test_the_loops_of_the_limits_do_the_work_that_they_are_counted_for():
    device = gpu(torch.bfloat16, matrix_side=16, copied_bytes=128)
    torch.set_float32_matmul_precision("high")
    try:
        runs, limits_of = device.limits([])
        for run in runs.values():
            run()
        assert torch.get_float32_matmul_precision() == "high", "the precision was not put back"
    finally:
        torch.set_float32_matmul_precision("highest")
    seconds = (2.0, 0.5, 0.25)
    times = {name: [9.0, s, s / 2] for name, s in zip(runs, seconds, strict=True)}
    assert limits_of(times)[None] == work.Limits(16**3 / 2.0, 16**3 / 0.5, 2 * 128 / 0.25)


# Inputs


def test_inputs_of_a_gpu_are_larger_than_its_cache_together_and_all_taken():
    x = torch.randn(2, 3, 4, 4)
    inputs = gpu(torch.bfloat16, FakeTorchCuda(l2=1000)).inputs(x)
    size = 2 * x.numel()
    assert (len(inputs.all) - 1) * size >= devices.PAST_L2 * 1000
    assert len({y.data_ptr() for y in inputs.all}) == len(inputs.all)
    turn = [inputs() for _ in range(len(inputs.all) + 1)]
    assert [y.data_ptr() for y in turn[:-1]] == [y.data_ptr() for y in inputs.all]
    assert turn[-1] is turn[0]
    for y in inputs.channels_last().all:
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, x.bfloat16())
    tiny = gpu(cuda=FakeTorchCuda(l2=1 << 30)).inputs(torch.zeros(1))
    assert len(tiny.all) == devices.MOST_INPUTS
    assert len(gpu(cuda=FakeTorchCuda(l2=0)).inputs(x).all) == 1
    assert devices.Cpu(2).inputs(x).all == [x]


#: TensorRT is not there to be tested, and to compile once is enough.
HERE = [n for n in competitors.SYSTEMS["cuda"] if n not in ("TensorRT", "torch.compile")]


@pytest.mark.parametrize("name", HERE)
def test_every_system_of_a_gpu_computes_the_model_on_each_input(name):
    arch = Arch(8, 2, 3, 2, num_classes=5, act="gelu")
    model = trained_like_(ReferenceConvMixer(arch), (2, 3, 8, 8))
    inputs = devices.Inputs(torch.randn(1, 3, 8, 8), 3)
    inputs.all = [(i + 1) * x for i, x in enumerate(inputs.all)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs.all]
        run = competitors.SYSTEMS["cuda"][name](model, inputs)
        for want in wanted:
            torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-4)


def test_what_is_not_here_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    model, inputs = torch.nn.Identity(), devices.Inputs(torch.zeros(64, 3, 4, 4))
    names = ("TensorRT", "ours + CUDA graph", "eager NCHW")
    runs, _, notes = competitors.build(names, "cuda", model, inputs, lambda y: None)
    assert list(runs) == ["eager NCHW"]
    assert notes["TensorRT"] == "torch_tensorrt is missing: pip install torch-tensorrt"
    assert "at most 8 images" in notes["ours + CUDA graph"]


def test_a_system_that_fails_is_told_and_not_timed():
    def broken(_: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    inputs = devices.Inputs(torch.zeros(1, 3, 4, 4))
    runs, _, notes = competitors.build(["eager NCHW"], "cuda", broken, inputs, lambda y: None)
    assert not runs
    assert notes["eager NCHW"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"


def test_cudnn_searches_only_where_its_name_says_so():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return x

    inputs = devices.Inputs(torch.zeros(1, 1, 1, 1))
    for name in ("eager NCHW", "eager NCHW + cudnn.benchmark", "eager channels-last"):
        competitors.SYSTEMS["cuda"][name](Model(), inputs)()
    assert seen == [False, True, False]


# Work


@pytest.mark.parametrize("name", VARIANTS)
def test_the_work_of_a_model_is_its_multiply_adds_and_each_map_once(name):
    variant = VARIANTS[name]
    arch, side = variant.arch, variant.input_size[1]
    rows, columns = arch.grid(side)
    one = work.of_model(arch, side, 3, size=2)
    assert one.macs == 3 * arch.macs(side).total
    values = 3 * arch.dim * rows * columns
    # The stem writes one, a half reads one and writes one, the mean reads the last.
    maps = 2 * values * (1 + 4 * arch.depth + 1)
    weights = 2 * arch.depth * arch.dim * (arch.kernel_size**2 + arch.dim)
    assert maps + weights < one.bytes < 1.2 * (maps + weights) + 4e6
    halves = work.of_model(arch, side, 3, size=4)
    assert halves.bytes == 2 * one.bytes
    fast = work.Limits(multiply_add=1e30, matrix=1e30, bandwidth=1e9)
    assert one.least_seconds(fast) == pytest.approx(one.bytes / 1e9)
    slow = work.Limits(multiply_add=1e9, matrix=1e9, bandwidth=1e30)
    assert one.least_seconds(slow) == pytest.approx(one.macs / 1e9)


def test_a_training_step_is_three_passes_without_the_images_gradient():
    arch = VARIANTS["convmixer_768_32"].arch
    macs = arch.macs(224)
    step = work.of_training_step(arch, 224, 2)
    assert step.macs == 2 * (3 * macs.total - macs.stem)


# What is kept of it


def test_extra_info_says_where_with_what_and_everything_of_each_system():
    row = {"suite": "kernels", "group": "g", "model": "m", "batch": 4, "threads": 2}
    rows = [
        row | {"part": part, "system": system, "img/s": rate, "peak MiB": 7}
        for part, system, rate in (("a", "ours", 1.0), ("b", "ours", 2.0), ("b", "eager", 3.0))
    ]
    machine, versions = {"name": "n", "cpu": "Some CPU"}, {"torch": "9.9"}
    found = recording.extra_info(machine, versions, rows)
    assert found["device"] == "Some CPU"
    assert (found["threads"], found["versions"], found["machine"]) == (2, versions, machine)
    assert {k: v["img/s"] for k, v in found["systems"].items()} == {
        "a, ours": 1.0,
        "b, ours": 2.0,
        "b, eager": 3.0,
    }
    on_gpu = [{**r, "device": NAME, "dtype": "bfloat16"} for r in rows]
    assert recording.extra_info(machine, versions, on_gpu)["device"] == NAME
    # The same system at several points: none hides another.
    points = [row | {"system": "ours", "batch": b, "threads": t} for b in (1, 4) for t in (1, 2)]
    found = recording.extra_info(machine, versions, points)
    assert len(found["systems"]) == 4
    assert "threads" not in found


def test_the_batch_pipeline_is_a_suite_too_and_loses_no_group(tmp_path, monkeypatch):
    import test_pipeline as suite

    monkeypatch.setattr(inference, "MODELS", {"small": (8, 1, 3, 32), "other": (16, 1, 3, 32)})
    monkeypatch.setattr(inference, "SHARES", {"small": 1, "other": 1})
    monkeypatch.setattr(inference, "BATCH", 2)
    benchmark = Benchmark()
    recorder = recording.Recorder(None, resume=False)
    preset = dataclasses.replace(presets.preset_of("quick", "cpu"), photographs=9)
    threads = torch.get_num_threads()
    try:
        suite.test_files_to_results(
            benchmark, preset, recording.BenchmarkRecorder(recorder, benchmark), tmp_path
        )
    finally:
        torch.set_num_threads(threads)
    systems = benchmark.extra_info["systems"]
    assert set(systems) == {"small", "other"}
    assert all(row["images"] == 9 and row["img/s"] > 0 for row in systems.values())
    assert benchmark.extra_info["versions"]["torch"]
    told = report.text(recorder.session, report.tables(recorder.session))
    assert "files to results against the model alone" in told
    assert "1.00 means equal" in told, "the table does not say how it is read"
    assert "of peak" not in told, "the summary tells of suites that were not run"


def test_every_limit_stands_in_a_preset_and_names_systems_that_there_are():
    for name in presets.PRESETS:
        for device in presets.DEVICES:
            preset = presets.preset_of(name, device)
            assert set(preset.systems) <= set(competitors.SYSTEMS[device])
            assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in preset.dtypes)
            assert preset.least_rounds >= 3
    full = {device: presets.preset_of("full", device).systems for device in presets.DEVICES}
    assert {device: set(names) for device, names in full.items()} == {
        device: set(table) for device, table in competitors.SYSTEMS.items()
    }, "a system is measured by no preset"


@pytest.mark.slow
def test_the_suites_run_on_a_gpu_where_one_is_found(tmp_path):
    """The whole of it in a process of its own: found, built, checked, timed, told."""
    pytest.importorskip("pytest_benchmark", reason='pip install ".[bench]"')
    names = ("models", "resolution", "training", "steps")
    path = (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
    done = fresh_python.run(
        *("-m", "pytest", "-p", "fakes.torch_cuda", "-p", "no:cacheprovider", "-q"),
        *(str(BENCHMARKS / f"test_{name}.py") for name in names),
        *("--devices=cuda", "--variants=256/8", "--batches=1", "--dtypes=float32"),
        *("--resolution=256/8", "--sides=16", "--resolution-batches=2"),
        *("--training-batches=2", "--step-batches=1", "--most-rounds=3", "--budget=1"),
        "--systems=eager NCHW,eager channels-last + cudnn.benchmark,TensorRT",
        *("--rows", str(tmp_path / "rows.json")),
        *("--benchmark-json", str(tmp_path / "benchmark.json")),
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join(filter(None, path))},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["machine"]["gpu"] == NAME
    assert told["machine"]["name"] == "fake-gpu-3000"
    assert {row["suite"] for row in told["rows"]} == set(names)
    for row in told["rows"]:
        assert (row["device"], row["dtype"]) == (NAME, "float32")
        if "note" not in row and "limit" not in row["system"]:
            assert row["ms"] > 0
            assert row["img/s"] > 0
            assert row["GMAC/s"] > 0
            assert ("of limit" in row) == (row["suite"] != "training")
    models = {row["system"]: row for row in told["rows"] if row["suite"] == "models"}
    assert "missing" in models["TensorRT"]["note"]
    assert {"ours", "limit, bandwidth", "eager channels-last + cudnn.benchmark"} <= set(models)
    assert "speed against the best peer" in done.stdout
    kept = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert kept
    for one in kept:
        info = one["extra_info"]
        assert info["device"] == NAME
        assert torch.__version__.startswith(info["versions"]["torch"])
        assert info["systems"]["eager NCHW"]["ms"] > 0
        assert "peak MiB" in info["systems"]["eager NCHW"]
