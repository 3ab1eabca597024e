"""Verdicts about kernels: measured when asked, kept on disk, used for the calls measured."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from fakes.triton import FakeTriton, installed

import convmixer_fast as cf
from convmixer_fast import BackendError, ConvMixer, explain, use_backend
from convmixer_fast.backends import tuning_cache
from convmixer_fast.backends.triton import functions
from convmixer_fast.backends.triton import pointwise as triton_pointwise
from convmixer_fast.backends.triton.configs import DepthwiseConfig, PointwiseConfig
from convmixer_fast.ops import dispatch, pointwise
from convmixer_fast.testing import trained_like_

IMAGES = (2, 3, 20, 20)
TILES = (PointwiseConfig(64, 64, 32), PointwiseConfig(128, 128, 32))


@pytest.fixture
def double(monkeypatch):
    """Kernels that ``auto`` takes for CPU tensors, as it does on a GPU."""
    with installed() as kernels:
        monkeypatch.setattr(dispatch, "requested_backend", lambda: "auto")
        monkeypatch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
        monkeypatch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "")
        monkeypatch.setattr(triton_pointwise, "shipped_tiles", lambda device, dtype: TILES)
        yield kernels


@pytest.fixture
def model() -> ConvMixer:
    return trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6), IMAGES)


class Stopwatch:
    """Seconds by script: of the reference's calls, and of each kernel and tile."""

    def __init__(self, double: FakeTriton, pytorch: tuple[float, float], ours: dict) -> None:
        self.double, self.pytorch, self.ours, self.layouts = double, pytorch, ours, 0

    def __call__(self, run) -> float:
        before, done = self.double.calls.copy(), len(self.double.configs)
        run()
        called = list((self.double.calls - before).elements())
        if not called:
            self.layouts += 1
            return self.pytorch[self.layouts % 2 - 1]
        assert len(called) == 1
        return self.ours.get(self.double.configs[done], self.ours[called[0]])


KERNELS_WIN = {
    "depthwise_mix": 1e-3,
    "pointwise_mix": 1e-3,
    "patch_embed": 1e-3,
    "after_product_": 9.0,
}


@torch.no_grad()
def test_the_fastest_serves_and_the_file_remembers(double, model):
    x = torch.randn(IMAGES)
    with use_backend("reference"):
        want = model(x)
    ours = {**KERNELS_WIN, "depthwise_mix": 3e-3, TILES[1]: 0.5e-3, TILES[0]: 0.9e-3}
    report = cf.tune(model, [IMAGES], timer=Stopwatch(double, (5e-3, 2e-3), ours))
    assert [(row.case.op, row.shape) for row in report] == [
        ("patch_embed", (2, 20, 20)),
        ("depthwise_mix", (2, 5, 5)),
        ("pointwise_mix", (2, 5, 5)),
    ]
    winners = {row.case.op: (row.verdict.winner, row.verdict.config) for row in report}
    assert winners == {
        "patch_embed": ("triton", None),
        "depthwise_mix": ("contiguous", None),
        "pointwise_mix": ("triton", TILES[1]),
    }
    for _ in range(2):
        rows = {(r.op, r.backend, r.reason.split(": ")[-1]) for r in explain(model, x)}
        assert (
            "depthwise_mix",
            "reference",
            "triton 3 ms, channels_last 5 ms, contiguous 2 ms",
        ) in rows
        assert (
            "pointwise_mix",
            "triton",
            "triton 0.5 ms, product 9e+03 ms, channels_last 5 ms, contiguous 2 ms",
        ) in rows
        before, done = double.calls.copy(), len(double.configs)
        out = model(x)
        assert "depthwise_mix" not in double.calls - before
        assert set(double.configs[done:]) == {None, TILES[1]}
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        tuning_cache.forget()  # as another process: from the file
    assert "kept in" in str(report)
    assert "contiguous 2 ms" in str(report)
    # Another shape is another question.
    assert {r.backend for r in explain(model, torch.randn(3, 3, 20, 20))} == {"triton"}
    held = json.loads(Path(report.path).read_text())
    assert held["machine"]["torch"] == torch.__version__
    assert len(held["verdicts"]) == 3


@torch.no_grad()
def test_noise_does_not_displace_the_shipped_tile(double, model):
    ours = {**KERNELS_WIN, TILES[0]: 0.99e-3, TILES[1]: 0.985e-3}
    report = cf.tune(model, [IMAGES], timer=Stopwatch(double, (1e-3, 0.99e-3), ours))
    assert {(row.verdict.winner, row.verdict.config) for row in report} == {("triton", None)}


@torch.no_grad()
@pytest.mark.parametrize("seconds", [1e-3, 9e-3])
def test_of_a_float64_product_its_end_alone_is_tried(double, model, seconds):
    x = torch.randn(IMAGES).double()
    ours = {**KERNELS_WIN, "after_product_": seconds}
    report = cf.tune(model.double(), [x], timer=Stopwatch(double, (5e-3, 2e-3), ours))
    (row,) = (row for row in report if row.case.op == "pointwise_mix")
    assert set(row.verdict.seconds) == {"product", "channels_last", "contiguous"}
    assert row.skipped == {}
    assert row.verdict.winner == ("product" if seconds == 1e-3 else "contiguous")
    served = {(r.backend, r.reason) for r in explain(model, x) if r.module == "blocks.0"}
    ((backend, reason),) = served
    assert backend == ("triton" if seconds == 1e-3 else "reference")
    assert f"tuned: product {1e3 * seconds:.3g} ms" in reason


@torch.no_grad()
def test_a_measurement_counts_for_more_than_an_expectation(double, model, monkeypatch):
    monkeypatch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "it looks slow")
    x = torch.randn(IMAGES)
    halves = [r for r in explain(model, x) if r.module in ("blocks.0", "blocks.1")]
    before = {(r.backend, r.reason) for r in halves}
    assert before == {
        (
            "triton",
            "PyTorch's product and one Triton kernel for the rest, to be checked at its first use; "
            "expected to be faster: it looks slow",
        )
    }
    cf.tune(model, [IMAGES], timer=Stopwatch(double, (5e-3, 5e-3), KERNELS_WIN))
    assert not any("it looks slow" in r.reason for r in explain(model, x))


def test_a_tile_that_is_wrong_or_cannot_run_never_wins(double, model):
    good = double.pointwise_mix

    def pointwise_mix(*args, config=None, **kwargs):
        if config == TILES[0]:
            raise RuntimeError("out of resource: shared memory")
        out = good(*args, config=config, **kwargs)
        return out.add_(0.1) if config == TILES[1] else out

    table = functions.kernels()._replace(pointwise_mix=pointwise_mix)
    ours = {**KERNELS_WIN, TILES[0]: 1e-9, TILES[1]: 1e-9}
    # Its own patch: the test's is undone after the double's, and would put the double back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "kernels", lambda: table)
        report = cf.tune(model, [IMAGES], timer=Stopwatch(double, (1, 1), ours))
    row = next(row for row in report if row.case.op == "pointwise_mix")
    assert (row.verdict.winner, row.verdict.config) == ("triton", None)
    assert ["wrong numbers" in why or "out of resource" in why for why in row.skipped.values()]
    assert len(row.skipped) == 2


@torch.no_grad()
def test_where_no_kernel_of_ours_runs_pytorch_serves_in_its_best_layout(double, model):
    double.wrong |= {"depthwise_mix", "pointwise_mix", "patch_embed"}
    report = cf.tune(
        model, [torch.randn(IMAGES)], timer=Stopwatch(double, (1e-3, 2e-3), KERNELS_WIN)
    )
    assert {row.verdict.winner for row in report} == {"channels_last"}
    double.calls.clear()
    model(torch.randn(IMAGES))
    assert set(double.calls) <= {"pack_taps"}  # no kernel


def test_asked_for_by_name_the_kernel_runs_whatever_was_tuned(double, model, monkeypatch):
    cf.tune(model, [IMAGES], timer=Stopwatch(double, (1e-4, 2e-4), KERNELS_WIN))
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"reference"}
    monkeypatch.setattr(dispatch, "requested_backend", lambda: "triton")
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"triton"}


def test_not_kept_where_asked(double, model):
    report = cf.tune(
        model, [IMAGES], save=False, timer=Stopwatch(double, (1e-4, 2e-4), KERNELS_WIN)
    )
    assert report.path == ""
    assert "not kept" in str(report)
    assert os.listdir(tuning_cache.folder()) == []
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"reference"}
    tuning_cache.forget()
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"triton"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 1, "verdicts": {"a": {"winner": "me"}}}', "\x00"],
)
def test_a_corrupt_file_is_ignored_with_a_warning(double, model, text):
    path = tuning_cache.file_for(torch.device("cpu"))
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=f"{path.name} is not used") as seen:
        rows = explain(model, torch.randn(IMAGES))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(model, torch.randn(IMAGES))
    assert {r.backend for r in rows} == {"triton"}
    assert path.read_text() == text
    with pytest.warns(RuntimeWarning, match="is not used"):
        cf.tune(model, [IMAGES], timer=Stopwatch(double, (1, 1), KERNELS_WIN))
    tuning_cache.forget()
    explain(model, torch.randn(IMAGES))


def test_another_format_or_version_is_not_read(double, model, monkeypatch):
    cf.tune(model, [IMAGES], timer=Stopwatch(double, (1e-4, 2e-4), KERNELS_WIN))
    tuning_cache.forget()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"triton"}
    monkeypatch.undo()


def test_two_processes_add_to_one_file(double, model):
    cf.tune(model, [IMAGES], timer=Stopwatch(double, (1, 1), KERNELS_WIN))
    tuning_cache.forget()  # the other process has not read it
    report = cf.tune(model, [(1, 3, 20, 20)], timer=Stopwatch(double, (1, 1), KERNELS_WIN))
    assert len(json.loads(Path(report.path).read_text())["verdicts"]) == 6
    assert [p.name for p in Path(report.path).parent.iterdir()] == [Path(report.path).name]


def test_a_file_that_cannot_be_written_is_a_warning_and_leaves_nothing(double, model, monkeypatch):
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning_cache.os, "replace", full)
    with pytest.warns(RuntimeWarning, match=r"for this process only.*No space left"):
        report = cf.tune(model, [IMAGES], timer=Stopwatch(double, (1e-4, 1), KERNELS_WIN))
    assert report.path == ""
    assert os.listdir(tuning_cache.folder()) == []
    assert {r.backend for r in explain(model, torch.randn(IMAGES))} == {"reference"}


def test_where_the_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVMIXER_FAST_CACHE", str(tmp_path / "mine"))
    assert tuning_cache.folder() == tmp_path / "mine"
    monkeypatch.delenv("CONVMIXER_FAST_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for platform, place in (
        ("linux", tmp_path / ".cache"),
        ("darwin", tmp_path / "Library" / "Caches"),
        ("win32", tmp_path / "AppData" / "Local"),
    ):
        monkeypatch.setattr(tuning_cache.sys, "platform", platform)
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        assert tuning_cache.folder() == place / "convmixer_fast"


def test_without_a_gpu_it_says_why(model):
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        cf.tune(model, [IMAGES])
    with pytest.raises(TypeError, match=r"tune takes a torch\.nn\.Module, got int"):
        cf.tune(3, [IMAGES])


def test_every_config_survives_the_file(double):
    for config in (DepthwiseConfig(8, 8, 64, 11, 4), PointwiseConfig(64, 64, 32, halves=True)):
        verdict = tuning_cache.TunedEntry("triton", config, {"triton": 1e-3})
        assert tuning_cache._entry(json.loads(json.dumps(tuning_cache._row(verdict)))) == verdict


def test_training_models_have_nothing_to_tune(double, model):
    report = cf.tune(model.train(), [IMAGES], timer=lambda run: 1.0)
    assert report == []
    assert "nothing to tune" in str(report)
