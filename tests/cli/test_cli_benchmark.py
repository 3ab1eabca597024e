"""``convmixer-fast benchmark`` prints what timm's scripts read, of results that were checked."""

from __future__ import annotations

import csv
import importlib
import json
import os
from typing import Any

import pytest
import torch

from convmixer_fast import cli
from convmixer_fast.arch import find_variant
from convmixer_fast.cli.benchmark import Benchmark, smaller_batch, with_smaller_batches
from convmixer_fast.files import write_whole

#: One short measurement of the smallest model.
QUICK = ("benchmark", "-m", "256/8", "-b", "2", "--num-warm-iter", "1", "--num-bench-iter", "2")


def benchmark(capsys: Any, *arguments: object, code: int = 0) -> dict[str, Any]:
    """The result as timm's bulk_runner.py finds it: what follows the last marker, as JSON."""
    assert cli.main([*QUICK, *map(str, arguments)]) == code
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(out.split("--result")[-1])
    return found


def refused(capsys: Any, *arguments: object) -> str:
    assert cli.main([*QUICK, *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert "--result" not in out
    assert "Traceback" not in err
    return err


def test_result_has_timms_keys_and_its_units(capsys):
    result = benchmark(capsys, "--act", "relu", "--num-classes", 7)
    keys = ["samples_per_sec", "step_time", "batch_size", "img_size", "gmacs", "macts"]
    assert [k for k in result if k.startswith("infer_")][:6] == [f"infer_{k}" for k in keys]
    assert (result["model"], result["infer_batch_size"]) == ("convmixer_256_8_cifar10", 2)
    assert result["infer_img_size"] == 32
    # Milliseconds a step and images a second are two views of one sum.
    step, rate = result["infer_step_time"], result["infer_samples_per_sec"]
    assert 2e3 / step == pytest.approx(rate, rel=0.01, abs=0.01)
    arch = find_variant("256/8").arch
    fewer = arch.params - 3 * (arch.dim + 1)
    assert result["param_count"] == round(fewer / 1e6, 2)
    assert not [k for k in result if "train" in k or "eager" in k or "error" in k]


@pytest.mark.parametrize(
    ("name", "macts"), [("768/32", 25.95), ("1024/20", 5.51), ("1536/20", 33.03)]
)
def test_activations_are_those_of_timms_tables(name, macts):
    assert round(find_variant(name).arch.macts_timm() / 1e6, 2) == macts


def test_training_is_timed_in_parts_that_add_up(capsys):
    result = benchmark(capsys, "--bench", "train", "--detail", "--opt", "adamw", "--img-size", 16)
    parts = [result[f"train_{part}_time"] for part in ("fwd", "bwd", "opt")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(result["train_step_time"], abs=0.01)
    assert result["train_samples_per_sec"] == pytest.approx(2e3 / sum(parts), rel=0.01, abs=0.01)
    assert "infer_samples_per_sec" not in result


def test_comparison_is_of_two_paths_whose_outputs_were_held_together(capsys):
    result = benchmark(capsys, "--compare", "--channels-last")
    assert result["infer_speedup"] == pytest.approx(
        result["infer_eager_step_time"] / result["infer_step_time"], abs=2e-3
    )
    assert 0 < result["infer_max_error"] < 1e-4
    assert 0 < result["infer_eager_max_error"] < 1e-4


def test_no_speed_is_told_for_a_wrong_result(capsys, monkeypatch):
    module = importlib.import_module("convmixer_fast.modules.optimize")
    plain = module.to_reference

    def another_model(model):
        twin = plain(model)
        with torch.no_grad():
            twin.head.bias[0] += 1e-3
        return twin

    monkeypatch.setattr(module, "to_reference", another_model)
    assert "no speed for a wrong result" in refused(capsys, "--compare")


def test_batches_shrink_by_timms_steps():
    sizes = [64]
    while sizes[-1]:
        sizes.append(smaller_batch(sizes[-1]))
    assert sizes == [64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1, 0]
    assert [smaller_batch(n) for n in (100, 63, 47, 5)] == [96, 48, 32, 4]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_where_memory_runs_out_a_smaller_batch_is_tried(error):
    tried = []

    def measure(batch: int) -> dict[str, Any]:
        tried.append(batch)
        if batch > 12:
            raise error
        return {"batch_size": batch}

    assert with_smaller_batches(measure, 32) == {"batch_size": 12}
    assert tried == [32, 24, 16, 12]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    tried = []

    def measure(batch: int) -> dict[str, Any]:
        tried.append(batch)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with_smaller_batches(measure, 32)
    assert tried == [32]


@pytest.mark.parametrize("more", [(), ("--no-retry",)])
def test_a_model_that_never_fits_is_an_error_in_the_result(capsys, monkeypatch, more):
    tried = []

    def too_much(self, batch):
        tried.append(batch)
        raise MemoryError(f"no room for {batch}")

    monkeypatch.setattr(Benchmark, "inference", too_much)
    result = benchmark(capsys, *more, code=1)
    assert result["error"] == f"out of memory at batch {tried[-1]}: no room for {tried[-1]}"
    assert tried == ([2] if more else [2, 1])
    assert "infer_samples_per_sec" not in result


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_results_file_holds_the_printed_result(capsys, tmp_path, kind):
    path = tmp_path / f"out.{kind}"
    path.write_text("old")
    more = ("--results-file", path, "--results-format", kind)
    result = benchmark(capsys, *more)
    if kind == "json":
        assert json.loads(path.read_text()) == result
    else:
        (row,) = csv.DictReader(path.read_text().splitlines())
        assert row == {key: str(value) for key, value in result.items()}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_whole(path, "first")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            write_whole(path, "second")
    assert caught.value.filename == str(path)
    assert path.read_text() == "first"
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "nowhere" / "x.json", "text")
    assert missing.value.filename == str(tmp_path / "nowhere" / "x.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "resnet50"), "unknown model 'resnet50'"),
        (("--img-size", "1"), "smaller than a patch of 2x2: raise --img-size"),
        (("--device", "nothing"), "--device nothing"),
        (("--bench", "train", "--compare"), "--compare times inference"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)
