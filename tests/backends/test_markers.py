"""A kernel that took a process or its GPU context with it is not tried again by the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
import warnings
from pathlib import Path

import fresh_python
import pytest
import torch
from fakes.triton import installed

from convmixer_fast import ConvMixer, explain
from convmixer_fast.backends import markers, self_check, tuning_cache
from convmixer_fast.backends.kernel_key import KernelKey
from convmixer_fast.backends.triton import support
from convmixer_fast.diagnostics import doctor
from convmixer_fast.ops import available_backends, dispatch, pointwise
from convmixer_fast.testing import trained_like_

pytest.importorskip("fcntl", reason="there are no locks here")

CASE = KernelKey("depthwise_mix", "cpu", torch.float32, 8, 8, 3, "gelu", True, 16)
GPU = CASE._replace(device="cuda:1")

PROGRAM = """
    import os, signal, sys, torch
    from convmixer_fast.backends import self_check
    from convmixer_fast.backends.kernel_key import KernelKey
    case = KernelKey("depthwise_mix", "cpu", torch.float32, 8, 8, 3, "gelu", True, 16)
    def check(tile):
        {}
        return ""
    print(self_check.ready(case, check))
"""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
WAITS = 'print("checking", flush=True); sys.stdin.readline()'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(tuning_cache.ENVIRONMENT, str(tmp_path / "cache"))
    self_check.forget()
    yield tmp_path / "cache"
    self_check.forget()


def start(body: str) -> subprocess.Popen:
    code = textwrap.dedent(PROGRAM).format(body)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return fresh_python.start("-c", code, **pipes)


def never(tile) -> str:
    pytest.fail("the kernel ran")


def test_what_killed_one_process_is_skipped_by_the_next(folder):
    first = start(DIES)
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    (mark,) = folder.iterdir()
    with pytest.warns(RuntimeWarning, match="a process died, or was killed") as seen:
        assert not self_check.ready(CASE, never)
    assert len(seen) == 1
    assert f"delete {mark} to try it again" in str(seen[0].message)
    assert str(mark) in self_check.results()[CASE]
    assert self_check.ready(CASE._replace(act="relu"), lambda tile: "")  # another kernel
    mark.unlink()
    self_check.forget()
    assert self_check.ready(CASE, lambda tile: "")
    assert list(folder.iterdir()) == []


def test_a_check_of_a_process_that_lives_is_no_verdict(folder):
    other = start(WAITS)
    assert other.stdout.readline() == "checking\n"
    assert len(list(folder.iterdir())) == 1
    assert self_check.result(CASE) is None
    assert self_check.ready(CASE, lambda tile: "")
    self_check.forget()
    out, err = other.communicate("\n", timeout=120)
    assert out == "True\n", err
    assert list(folder.iterdir()) == []
    # Now one that is killed meanwhile.
    other = start(WAITS)
    assert other.stdout.readline() == "checking\n"
    assert self_check.result(CASE) is None
    other.kill()
    other.communicate(timeout=120)
    with pytest.warns(RuntimeWarning):
        assert "died" in self_check.result(CASE)


def test_several_processes_at_once(folder):
    several = [start("") for _ in range(3)]
    for each in several:
        out, err = each.communicate(timeout=240)
        assert out == "True\n", err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("end", ["right", "wrong", ValueError, torch.OutOfMemoryError, SystemExit])
@pytest.mark.filterwarnings("ignore:the kernel for")
def test_a_check_that_ends_leaves_nothing(folder, end):
    def check(tile) -> str:
        (mark,) = folder.iterdir()
        assert json.loads(mark.read_text())["kernel"] == str(CASE)
        if isinstance(end, str):
            return end.removeprefix("right")
        raise end

    if end is SystemExit:
        with pytest.raises(SystemExit):
            self_check.ready(CASE, check)
    else:
        assert self_check.ready(CASE, check) == (end == "right")
    assert list(folder.iterdir()) == []


def test_of_another_machine_or_version_nothing_counts(folder, monkeypatch):
    with markers.marked(CASE) as mark:
        mark.keep(CASE, "it was bad")
    assert "it was bad" in markers.left(CASE)
    for what in ("gpu", "driver", "torch", "triton", "convmixer_fast"):
        now = tuning_cache.machine(torch.device("cpu")) | {what: "another"}
        monkeypatch.setattr(tuning_cache, "machine", lambda device, now=now: now)
        assert markers.left(CASE) == ""
        assert self_check.ready(CASE, lambda tile: "")
        self_check.forget()
        monkeypatch.undo()
        monkeypatch.setenv(tuning_cache.ENVIRONMENT, str(folder))
    assert markers.left(CASE)
    markers.clear(CASE)
    assert markers.left(CASE) == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kernel": 3}'])
def test_a_mark_that_was_cut_short_counts(folder, text):
    with markers.marked(CASE) as mark:
        mark.keep(CASE, "it was bad")
    (path,) = folder.iterdir()
    path.write_text(text)
    assert str(path) in markers.left(CASE)


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder, monkeypatch):
    folder.write_text("a file")
    assert self_check.ready(CASE, lambda tile: "")
    self_check.forget()
    folder.unlink()

    def no_locks(*args) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(markers.fcntl, "flock", no_locks)
    assert self_check.ready(CASE, lambda tile: "")
    assert list(folder.iterdir()) == []


@torch.no_grad()
def test_explain_says_it_before_the_first_call(monkeypatch):
    with installed() as double:
        monkeypatch.setattr(dispatch, "requested_backend", lambda: "auto")
        monkeypatch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
        monkeypatch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "")
        model = trained_like_(ConvMixer(8, 2, 3, 4, num_classes=3), (2, 3, 16, 16))
        x = torch.randn(2, 3, 16, 16)
        model(x)
        bad = next(case for case in self_check.results() if case.op == "depthwise_mix")
        self_check.forget()
        with markers.marked(bad) as mark:
            mark.keep(bad, "the GPU went up in smoke")
        with pytest.warns(RuntimeWarning, match="went up in smoke") as seen:
            rows = explain(model, x)
        assert len(seen) == 1
        by = {(r.op, r.backend) for r in rows}
        assert by == {("depthwise_mix", "reference"), ("pointwise_mix", "triton")}
        assert all("to try it again" in r.reason for r in rows if r.op == "depthwise_mix")
        before = double.calls["depthwise_mix"]
        model(x)
        assert double.calls["depthwise_mix"] == before
        # The doctor knows of it without a call.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        key = tuning_cache.machine_key(torch.device("cpu"))
        monkeypatch.setattr(tuning_cache, "machine_key", lambda device: key)
        left = doctor._left_behind()
    assert [*left] == [str(bad)]
    assert "went up in smoke" in left[str(bad)]


class Gpu:
    """`torch.cuda` of a GPU whose context an error may lose."""

    def __init__(self, monkeypatch) -> None:
        self.lost, self.waits, self.capturing = "", [], False
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(self_check, "is_capturing", lambda device: self.capturing)
        monkeypatch.setattr(tuning_cache, "machine_key", lambda device: "some-gpu")

    def synchronize(self, device) -> None:
        self.waits.append(device)
        if self.lost:
            raise RuntimeError(f"CUDA error: {self.lost}\nCUDA kernel errors might be reported")

    def fault(self, tile=None) -> str:
        self.lost = "an illegal memory access was encountered"
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


LOST = (
    r"^the GPU context of cuda:1 is lost after .*: RuntimeError: .*illegal memory access[^\n]*"
    r"start it again, with CONVMIXER_FAST_BACKEND=reference to go on without kernels$"
)


def test_a_check_that_loses_the_context_says_so_and_later_processes_skip_it(gpu, folder):
    with pytest.raises(RuntimeError, match=LOST) as raised:
        self_check.ready(GPU, gpu.fault)
    assert "Triton Error" in str(raised.value.__cause__)
    assert gpu.waits == [torch.device("cuda:1")] * 2
    assert self_check.results() == {}
    gpu.lost = ""  # another process
    self_check.forget()
    with pytest.warns(RuntimeWarning, match=r"context was lost in its check: .*delete .* to try"):
        assert not self_check.ready(GPU, never)


@pytest.mark.filterwarnings("ignore:the kernel for")
def test_an_error_that_loses_nothing_is_a_finding(gpu, folder):
    def fails(tile) -> str:
        raise RuntimeError("out of resource: shared memory")

    assert not self_check.ready(GPU, fails)
    assert len(gpu.waits) == 2
    assert list(folder.iterdir()) == []
    assert self_check.results()[GPU] == "RuntimeError: out of resource: shared memory"


def test_a_context_that_was_lost_before_is_no_fault_of_the_kernel(gpu, folder):
    gpu.lost = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=r"lost after what ran before the check of depthwise"):
        self_check.ready(GPU, never)
    assert markers.left(GPU) == ""
    assert self_check.results() == {}


def test_a_launch_that_loses_the_context_says_so(gpu):
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    gpu.lost = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=LOST):
        self_check.fail(GPU, error)
    gpu.capturing = True  # when waiting would end the capture
    waits = len(gpu.waits)
    with pytest.warns(RuntimeWarning, match="is not used: RuntimeError"):
        self_check.fail(GPU, error)
    assert len(gpu.waits) == waits


def test_a_wait_that_another_threads_capture_forbids_means_nothing(gpu):
    gpu.lost = "operation not permitted when stream is capturing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_check.raise_if_lost(torch.device("cuda:1"), "a test")
    assert len(gpu.waits) == 1


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH with the named programs alone, an empty cache of Triton, and no variables."""
    names = ("CC", "CPATH", "C_INCLUDE_PATH", "TRITON_CACHE_MANAGER", "TRITON_HOME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def install(*names: str) -> Path:
        place = tmp_path / "-".join(("bin", *names))
        place.mkdir(exist_ok=True)
        for name in names:
            (place / name).write_text("#!/bin/sh\n")
            (place / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(place))
        return place

    return install


@pytest.mark.parametrize("cc", [None, "clang", "nothing"])
@pytest.mark.parametrize("names", [(), ("gcc",), ("clang",), ("gcc", "clang"), ("cc",)])
def test_the_compiler_is_the_one_that_triton_finds(programs, monkeypatch, names, cc):
    build = pytest.importorskip("triton.runtime.build", reason="Triton is not installed")
    find = getattr(build, "_find_compiler", None)
    if find is None:
        pytest.skip("this Triton has no function that finds its compiler")
    place = programs(*names)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    find.cache_clear()
    try:
        theirs = find("c")
    except RuntimeError:
        theirs = None
    finally:
        find.cache_clear()
    # Triton takes CC at its word.
    theirs = theirs if cc is None else str(place / cc) if cc in names else None
    assert support.compiler() == theirs


@pytest.mark.skipif(os.name != "posix", reason="Triton brings a compiler along")
def test_a_missing_compiler_is_told_beforehand_and_only_where_it_is_certain(
    programs, monkeypatch, tmp_path
):
    programs("gcc")
    assert support.why_no_compiler() == ""
    programs()
    assert "finds no C compiler: install gcc or clang" in support.why_no_compiler()
    place = programs("cc")
    assert support.why_no_compiler().endswith(f"finds neither gcc nor clang: set CC={place / 'cc'}")
    monkeypatch.setenv("CC", "mycc")
    assert "CC names 'mycc', which is no program" in support.why_no_compiler()
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "my.cache:Manager")
    assert support.why_no_compiler() == ""
    monkeypatch.delenv("TRITON_CACHE_MANAGER")
    assert support.why_no_compiler()
    # A launcher that was compiled before, perhaps elsewhere.
    suffix = support.sysconfig.get_config_var("EXT_SUFFIX")
    cached = tmp_path / "cache2" / "ABC" / f"cuda_utils{suffix}"
    cached.parent.mkdir(parents=True)
    cached.touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache2"))
    assert support.why_no_compiler() == ""


@pytest.mark.skipif(os.name != "posix", reason="Triton brings a compiler along")
def test_missing_headers_are_told(programs, monkeypatch, tmp_path):
    programs("gcc")
    monkeypatch.setattr(support.sysconfig, "get_path", lambda *args: str(tmp_path / "include"))
    assert "Python.h is missing: install Python's headers" in support.lacks_for_compiling()
    monkeypatch.setenv("CPATH", "/elsewhere")
    assert support.lacks_for_compiling() == ""


def test_the_reason_reaches_the_backends_and_the_doctor(programs, monkeypatch):
    monkeypatch.setattr(support, "_why_no_triton", lambda: "")
    monkeypatch.setattr(support, "_why_not_gpu", lambda index: "")
    monkeypatch.setattr(support, "_capable", set())
    programs()
    assert "install gcc or clang" in available_backends()["triton"]
    report = doctor.examine()
    assert report["backends"]["triton"].startswith("Triton compiles its launcher at run time and")
    if report["triton"]:
        assert "C compiler" in doctor.render(report)
        assert "Triton needs one at run time and finds no C compiler" in doctor.render(report)
    place = programs("gcc")
    assert available_backends()["triton"] == ""
    assert doctor.examine()["compiler"] == {"path": str(place / "gcc"), "lacks": ""}
