"""The kernels execute as many instructions as the stored counts say, within 3 %.

The comparison is skipped without valgrind, without Triton, and under a compiler without stored
counts. `python tools/counts.py --update` stores new ones.
"""

from __future__ import annotations

import json
import platform

import counts
import pytest
from triton_modes import compiler, triton_simulator

UPDATE = "\n".join(["", "if the change is intended: python tools/counts.py --update"])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="counts are of AVX2")
def test_the_cpu_engine_executes_what_is_stored():
    try:
        key = counts.cpu_key()
        if key not in counts.load("cpu"):
            counts.compared("cpu", key, {})  # before a minute of valgrind
        lines = counts.compared("cpu", key, counts.count_cpu())
    except counts.Unavailable as why:
        pytest.skip(str(why))
    assert not lines, "\n".join(lines) + UPDATE


@compiler
@pytest.mark.slow
def test_the_gpu_kernels_execute_what_is_stored():
    triton_simulator()
    try:
        key = counts.gpu_key()
        if key not in counts.load("gpu"):
            counts.compared("gpu", key, {})
        lines = counts.compared("gpu", key, counts.count_gpu())
    except counts.Unavailable as why:
        pytest.skip(str(why))
    assert not lines, "\n".join(lines) + UPDATE


def test_a_change_past_three_percent_is_reported_with_its_numbers():
    stored = {"same": 1000, "near": 1000, "more": 1000, "fewer": 1000, "gone": 5}
    now = {"same": 1000, "near": 1030, "more": 1031, "fewer": 969, "new": 7}
    assert counts.differences(stored, now) == [
        "more: 1,000 -> 1,031 (+3.1 %)",
        "fewer: 1,000 -> 969 (-3.1 %)",
        "gone: no longer counted",
        "new: not stored",
    ]
    assert counts.differences(stored, stored) == []


@pytest.fixture
def stored(tmp_path, monkeypatch):
    paths = {kind: tmp_path / "counts" / f"{kind}.json" for kind in ("cpu", "gpu")}
    monkeypatch.setattr(counts, "STORED", paths)
    return paths


def test_counts_of_another_compiler_are_not_compared_with(stored):
    with pytest.raises(counts.Unavailable, match="no counts are stored of gcc 13, only of: none"):
        counts.compared("cpu", "gcc 13", {"a": 1})
    counts.update("cpu", "gcc 12", {"a": 1})
    with pytest.raises(counts.Unavailable, match="of gcc 13, only of: gcc 12"):
        counts.compared("cpu", "gcc 13", {"a": 1})
    assert counts.compared("cpu", "gcc 12", {"a": 2}) == ["a: 1 -> 2 (+100.0 %)"]


def test_an_update_reports_changes_and_keeps_other_compilers(stored):
    assert counts.update("cpu", "gcc 12", {"a": 100, "b": 3}) == [
        "a: stored as 100",
        "b: stored as 3",
    ]
    counts.update("cpu", "gcc 13", {"a": 90})
    assert counts.update("cpu", "gcc 12", {"a": 101, "b": 3, "c": 4}) == [
        "a: 100 -> 101",
        "c: none -> 4",
    ]
    assert json.loads(stored["cpu"].read_text()) == {
        "gcc 12": {"a": 101, "b": 3, "c": 4},
        "gcc 13": {"a": 90},
    }
    assert not stored["gpu"].exists()


def test_the_command_compares_fails_and_stores(stored, monkeypatch, capsys):
    monkeypatch.setattr(counts, "cpu_key", lambda: "gcc 12")
    monkeypatch.setattr(counts, "count_cpu", lambda: {"a": 100})
    assert counts.main(["--only", "cpu"]) == 0
    assert "cpu: skipped: no counts are stored of gcc 12" in capsys.readouterr().out
    assert counts.main(["--only", "cpu", "--update"]) == 0
    assert "a: stored as 100" in capsys.readouterr().out
    assert counts.main(["--only", "cpu"]) == 0
    monkeypatch.setattr(counts, "count_cpu", lambda: {"a": 120})
    assert counts.main(["--only", "cpu"]) == 1
    assert "a: 100 -> 120 (+20.0 %)" in capsys.readouterr().out
    assert json.loads(stored["cpu"].read_text()) == {"gcc 12": {"a": 100}}


PROFILE = """\
fn=(1) convmixer_fast::pointwise(convmixer_fast::Pointwise const&, int)
0 400
cfn=(2) convmixer_fast::parallel_for<convmixer_fast::pointwise(int)>
calls=1 0
0 4000
fn=(3) wrapper
0 10
cfn=(1)
calls=1 0
0 4400
"""


def test_a_count_is_that_of_one_call_with_all_it_calls():
    function = "convmixer_fast::pointwise(convmixer_fast::Pointwise const&, int)"
    assert counts.inclusive(PROFILE, function) == 4400
    with pytest.raises(ValueError, match="not one"):
        counts.inclusive(PROFILE + "cfn=(1)\ncalls=1 0\n0 4400\n", function)
    with pytest.raises(ValueError, match="not one"):
        counts.inclusive(PROFILE, "convmixer_fast::mixer_stack(int)")


def test_stored_counts_are_of_the_cases_that_are_counted():
    for found in counts.load("cpu").values():
        assert list(found) == list(counts.CPU_CASES)
        assert min(found.values()) > 10_000
    for found in counts.load("gpu").values():
        assert min(found.values()) > 1_000
