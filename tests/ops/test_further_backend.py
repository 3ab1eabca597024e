"""A backend that one file adds is chosen, explained, checked, tuned and timed like our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes.backend import Plain, plain_backend
from torch import nn

import convmixer_fast as cf
from convmixer_fast import DepthwiseMix, PointwiseMix, explain, use_backend
from convmixer_fast.backends import self_check, tuning_cache
from convmixer_fast.diagnostics import gpu_report
from convmixer_fast.ops import BackendError, available_backends
from convmixer_fast.testing import trained_like_

SHAPE = (2, 8, 6, 5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tuning_cache.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(Plain, "factor", 1.0)
    Plain.calls.clear()
    with plain_backend():
        self_check.forget()
        tuning_cache.forget()
        yield
    self_check.forget()
    tuning_cache.forget()


@pytest.fixture
def model() -> nn.Module:
    return trained_like_(nn.Sequential(DepthwiseMix(8, 3), PointwiseMix(8)), SHAPE)


@torch.no_grad()
def test_it_is_chosen_and_explained_by_its_name(model: nn.Module) -> None:
    x = torch.randn(SHAPE)
    with use_backend("reference"):
        want = model(x)
    assert available_backends()["plain"] == ""
    with use_backend("plain"):
        before = {(row.backend, row.reason) for row in explain(model, x)}
        torch.testing.assert_close(model(x), want)
        after = {(row.backend, row.reason) for row in explain(model, x)}
    words = "asked for by name: PyTorch's calls, "
    assert before == {("plain", f"{words}to be checked at its first use")}
    assert after == {("plain", f"{words}checked against PyTorch")}
    # Its check, and the call.
    assert Plain.calls == {"depthwise_mix": 2, "pointwise_mix": 2}


@torch.no_grad()
def test_what_it_cannot_do_is_refused_with_its_reason(model: nn.Module) -> None:
    with use_backend("plain"), pytest.raises(BackendError, match="plain kernels compute float32"):
        model.bfloat16()(torch.randn(SHAPE).bfloat16())


@torch.no_grad()
def test_wrong_numbers_are_found_before_the_first_result(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plain, "factor", 1.01)
    with (
        use_backend("plain"),
        pytest.warns(RuntimeWarning, match="depthwise_mix of 8 -> 8 .* wrong numbers"),
        pytest.raises(BackendError, match=r"'plain' was asked for .* wrong numbers"),
    ):
        model(torch.randn(SHAPE))


@torch.no_grad()
@pytest.mark.parametrize("wins", [True, False])
def test_tune_measures_it_and_auto_takes_it_where_it_is_fastest(
    model: nn.Module, wins: bool
) -> None:
    def timer(run) -> float:
        before = Plain.calls.total()
        run()
        return 1e-3 if (Plain.calls.total() > before) == wins else 2e-3

    report = cf.tune(model, [SHAPE], timer=timer)
    assert {row.verdict.winner for row in report} == {"plain" if wins else "channels_last"}
    assert all({"plain", "channels_last", "contiguous"} == set(r.verdict.seconds) for r in report)
    tuning_cache.forget()  # as another process: from the file
    rows = explain(model, torch.randn(SHAPE))
    assert {row.backend for row in rows} == {"plain" if wins else "reference"}
    assert all("tuned: plain " in row.reason for row in rows)


def test_it_is_reported_with_errors_and_times() -> None:
    problem = gpu_report.Problem("tiny", "patch_embed", torch.float32, (1, 13, 9), 3, 8, 4, "gelu")
    report = gpu_report.report(CPU, which=[problem], timer=lambda run: run() is None or 1e-3)
    (row,) = report["rows"]
    assert row["ok"]
    assert set(row["seconds"]) == {"plain", "channels_last", "contiguous"}


def test_it_is_gone_afterwards() -> None:
    with pytest.raises(BackendError, match="unknown backend 'bare'"), use_backend("bare"):
        pass
