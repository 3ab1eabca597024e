"""The judge judged: the numerics rule lets PyTorch's own error pass and nothing much larger."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convmixer_fast.diagnostics.timing import interleaved_times, spread
from convmixer_fast.testing import ERROR_RATIO, assert_numerics, error_report, trained_like_


def make(factor: float, dtype=torch.float32):
    oracle = torch.randn(4096, dtype=torch.float64)
    same = oracle.to(dtype) * (1 + 8 * torch.finfo(dtype).eps * torch.randn(4096)).to(dtype)
    ours = (oracle + factor * (same.double() - oracle)).to(dtype)
    return ours, same, oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_a_factor_of_pytorchs_error(dtype):
    assert error_report(*make(1.0, dtype)).ok
    assert error_report(*make(1.8, dtype)).ok
    assert not error_report(*make(1.5 * ERROR_RATIO, dtype)).ok
    with pytest.raises(AssertionError, match=r"outside the numerics rule: max error .* rms error"):
        assert_numerics(*make(3.0, dtype))


def test_one_wrong_value_zeros_and_nan_fail():
    ours, same, oracle = make(1.0)
    for spoil in (
        lambda t: t[7].add_(1e-3),
        lambda t: t[7].fill_(float("nan")),
        torch.Tensor.zero_,
    ):
        wrong = ours.clone()
        spoil(wrong)
        assert not error_report(wrong, same, oracle).ok


def test_nothing_to_compare_is_no_error():
    empty = torch.empty(0)
    assert error_report(empty, empty, empty.double()).ok


def test_operands_that_do_not_go_together_are_refused():
    ours, same, oracle = make(1.0)
    with pytest.raises(ValueError, match="shapes differ"):
        error_report(ours[:5], same, oracle)
    with pytest.raises(ValueError, match="dtypes differ"):
        error_report(ours, same.half(), oracle)
    with pytest.raises(ValueError, match="oracle must be float64"):
        error_report(ours, same, oracle.float())


def test_trained_like_statistics_fit_the_data_and_are_not_the_datas():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten())
    net.append(nn.BatchNorm1d(8 * 36, affine=False))
    net.append(nn.BatchNorm1d(8 * 36, track_running_stats=False))
    trained_like_(net, (64, 3, 8, 8))
    norm = net[1]
    assert not net.training
    assert norm.momentum == 0.1
    assert norm.weight.min() > 0.4
    assert norm.weight.max() > 2
    assert norm.running_var.min() > 0
    with torch.no_grad():
        out = (net[:2](torch.randn(64, 3, 8, 8)) - norm.bias.view(1, -1, 1, 1)).std((0, 2, 3))
    assert (out / norm.weight).sub(1).abs().max() < 0.5
    again = trained_like_(nn.Conv2d(3, 8, 3), (1, 3, 8, 8), seed=4).weight
    assert torch.equal(trained_like_(nn.Conv2d(3, 8, 3), (1, 3, 8, 8), seed=4).weight, again)


def test_calls_take_turns_and_warm_up_does_not_count():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved_times(runs, rounds=3, warmup=1)
    assert "".join(order) == "abababab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert spread([3.0, 1.0, 2.0, 9.0, 4.0]) == {"median": 3.0, "p20": 2.0, "p80": 4.0}


def test_short_calls_are_repeated_within_a_turn_after_one_that_does_not_count(monkeypatch):
    order: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) * 3.0)
    monkeypatch.setattr("time.sleep", lambda seconds: order.append(f"({seconds})"))
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved_times(runs, rounds=2, warmup=0, repeats={"b": 3}, pause=0.5)
    assert "".join(order) == "(0.5)a(0.5)bbbb" * 2
    assert times == {"a": [3.0, 3.0], "b": [1.0, 1.0]}
