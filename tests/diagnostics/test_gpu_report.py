"""`doctor --gpu`: every operator checked and timed, one file, nothing of a speed that is wrong."""

from __future__ import annotations

import json
import os
import pickle
import signal

import pytest
import torch
from fakes.triton import installed

from convmixer_fast import BackendError, cli
from convmixer_fast.arch import VARIANTS
from convmixer_fast.backends.triton import configs, functions, support
from convmixer_fast.backends.triton.pointwise import TritonPointwise
from convmixer_fast.diagnostics import gpu_report
from convmixer_fast.diagnostics.gpu_report import Problem

CPU = torch.device("cpu")
SMALL = (
    Problem("tiny", "patch_embed", torch.float32, (1, 13, 9), 3, 8, 4, "gelu"),
    Problem("tiny", "patch_embed_uint8", torch.bfloat16, (1, 13, 9), 3, 8, 4, "gelu"),
    Problem("tiny", "depthwise_mix", torch.bfloat16, (1, 6, 5), 8, 8, 3, "relu"),
    Problem("tiny", "pointwise_mix", torch.float16, (1, 6, 5), 8, 8, 1, "gelu"),
)


def seconds(run) -> float:
    run()
    return 1e-3


def test_every_operator_of_every_variant_is_a_problem():
    rows = list(gpu_report.problems())
    assert len(rows) == 4 * 3 * 2 * len(VARIANTS)
    arithmetic = {(p.variant, p.op): p.macs() for p in rows if p.shape[0] == 1}
    for variant in VARIANTS.values():
        macs, depth = variant.arch.macs(variant.input_size[1:]), variant.arch.depth
        name = variant.paper_name
        assert arithmetic[name, "depthwise_mix"] * depth == macs.depthwise
        assert arithmetic[name, "pointwise_mix"] * depth == macs.pointwise
        assert arithmetic[name, "patch_embed"] == macs.stem
        assert arithmetic[name, "patch_embed_uint8"] == macs.stem


def test_bytes_are_those_of_reading_and_writing_once():
    stem, uint8_stem, depthwise, pointwise = SMALL
    assert stem.bytes() == 4 * (13 * 9 * 3 + 3 * 2 * 8 + 8 * 3 * 16)
    assert uint8_stem.bytes() == 13 * 9 * 3 + 2 * (3 * 2 * 8 + 8 * 3 * 16)
    assert depthwise.bytes() == 2 * (2 * 30 * 8 + 8 * 9)
    assert pointwise.bytes() == 2 * (2 * 30 * 8 + 64)


def test_rows_are_checked_and_timed(tmp_path):
    lines: list[str] = []
    with installed():
        report = gpu_report.report(CPU, which=SMALL, timer=seconds, progress=lines.append)
    assert gpu_report.healthy(report)
    for row in report["rows"]:
        assert row["ok"]
        assert 0 < row["max_error"] <= row["max_bar"]
        others = {"product"} if row["op"] == "pointwise_mix" else set()
        assert set(row["seconds"]) == {"triton", "channels_last", "contiguous"} | others
    assert len(lines) == 4
    for text in lines:
        assert "ok, max error" in text
        assert "GB/s" in text
    gpu_report.write(report, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_wrong_kernel_has_no_speed_and_a_broken_one_a_reason():
    with installed() as double:
        double.wrong.add("patch_embed")
        double.error["pointwise_mix"] = RuntimeError("out of resource")
        report = gpu_report.report(CPU, which=SMALL, timer=seconds)
    stem, uint8_stem, depthwise, pointwise = report["rows"]
    assert depthwise["ok"]
    assert uint8_stem["ok"]
    # Another kernel than the broken one.
    assert set(pointwise["seconds"]) == {"channels_last", "contiguous", "product"}
    assert not stem["ok"]
    assert "triton" not in stem["seconds"]
    assert stem["seconds"]["contiguous"] == 1e-3
    assert pointwise["reason"] == "RuntimeError: out of resource"
    assert not gpu_report.healthy(report)
    assert "WRONG" in gpu_report.line(stem)
    assert "FAILED: RuntimeError: out of resource" in gpu_report.line(pointwise)


@pytest.mark.parametrize("works", [True, False])
def test_a_tile_of_the_copy_engine_that_fails_is_timed_without_it(monkeypatch, works):
    plain = configs.PointwiseConfig(64, 64, 32, num_warps=4)
    monkeypatch.setattr(TritonPointwise, "plainer", lambda self, key, config: plain)
    with installed() as double:
        run = double.pointwise_mix

        def broken(*args, config=None, **kw):
            if config is None or not works:
                raise RuntimeError("no descriptors")
            return run(*args, config=config, **kw)

        table = functions.kernels()._replace(pointwise_mix=broken)
        with monkeypatch.context() as patch:  # undone before the stand-in is
            patch.setattr(functions, "kernels", lambda: table)
            report = gpu_report.report(CPU, which=SMALL[3:], timer=seconds)
    (row,) = report["rows"]
    assert not row["ok"]
    assert row["reason"] == "RuntimeError: no descriptors"
    assert row["substitute"]["tile"] == str(plain)
    assert row["substitute"]["ok"] is works
    assert ("triton without TMA" in row["seconds"]) is works
    assert "triton" not in row["seconds"]
    text = gpu_report.line(row)
    assert "FAILED: RuntimeError: no descriptors" in text
    assert ("without TMA ok; triton without TMA 1 ms" in text) is works
    assert ("TFLOP/s" in text) is works
    assert not gpu_report.healthy(report)


def in_its_own_process(problem: Problem) -> dict:
    """A row that says where it was made; a depthwise one of 8 channels takes its process along."""
    row = problem._asdict() | {"ok": True, "pid": os.getpid()}
    if problem.op == "depthwise_mix" and problem.channels == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if problem.op == "pointwise_mix" and problem.channels == 8:
        return row | {"ok": False, "reason": "the GPU context is lost"}
    return row


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_fault_of_one_operator_does_not_take_the_others():
    _, _, depthwise, pointwise = SMALL
    others = (depthwise._replace(channels=4), pointwise._replace(channels=4))
    given = (others[1], pointwise, depthwise, *others, others[1])
    rows = list(gpu_report.isolated(given, in_its_own_process))
    assert [row["op"] for row in rows] == [problem.op for problem in given]
    assert [row["ok"] for row in rows] == [True, False, False, True, True, True]
    assert rows[2]["reason"] == "its process ended by SIGKILL"
    assert "FAILED: its process ended by SIGKILL" in gpu_report.line(rows[2])
    pids = [row.get("pid") for row in rows]
    assert pids[0] == pids[1]  # one process an operator
    assert pids[4] == pids[5]
    assert len({os.getpid(), pids[0], pids[3], pids[4]}) == 4  # and another after a fault


def test_a_gpus_rows_are_made_in_other_processes_and_the_emulators_here(monkeypatch):
    seen = []
    monkeypatch.setattr(support, "why_not", lambda device: "")
    monkeypatch.setattr(gpu_report.tuning_cache, "machine", lambda device: {})
    monkeypatch.setattr(gpu_report, "_limits", lambda device: {})
    monkeypatch.setattr(gpu_report, "isolated", lambda which, run: seen.append(run) or iter(()))
    assert gpu_report.report(torch.device("cuda", 0), which=SMALL)["rows"] == []
    (run,) = seen
    pickle.loads(pickle.dumps(run))


def test_no_gpu_is_one_line_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--gpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("convmixer-fast: error: there is no GPU to report on: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BackendError):
        gpu_report.report()


def test_the_command_writes_the_file(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = gpu_report.report

    def on_cpu(progress):
        return made(CPU, which=SMALL, timer=seconds, progress=progress)

    monkeypatch.setattr(gpu_report, "report", on_cpu)
    with installed() as double:
        assert cli.main(["doctor", "--gpu"]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == len(SMALL)
        assert "wrote convmixer_fast-gpu.json" in err
        double.wrong.add("patch_embed")
        assert cli.main(["doctor", "--gpu", "--format", "json", "--output", "x.json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text())
