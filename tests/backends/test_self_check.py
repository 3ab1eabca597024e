"""A kernel's numbers are checked before its first result, and a bad one is never used."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch
from fakes.triton import installed
from operator_cases import OPS, make_operands

from convmixer_fast import BackendError, ConvMixer, explain
from convmixer_fast.backends import self_check
from convmixer_fast.backends.kernel_key import MANY_OUTPUTS
from convmixer_fast.backends.triton import functions, support
from convmixer_fast.backends.triton.configs import lookup_pointwise
from convmixer_fast.diagnostics import doctor
from convmixer_fast.ops import depthwise, dispatch, pointwise
from convmixer_fast.ops.depthwise import WIDE
from convmixer_fast.ops.dispatch import call_of, choose
from convmixer_fast.testing import trained_like_

IMAGES = (2, 3, 16, 16)
KERNELS = {"depthwise": "depthwise_mix", "pointwise": "pointwise_mix", "patches": "patch_embed"}


@pytest.fixture
def double(monkeypatch):
    """Kernels that ``auto`` takes for CPU tensors, as it does on a GPU."""
    with installed() as kernels:
        # By name a bad kernel raises; here PyTorch is to step in.
        monkeypatch.setattr(dispatch, "requested_backend", lambda: "auto")
        monkeypatch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
        monkeypatch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "")
        yield kernels


def call(op: str, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(2, 6, 12, 12)
    return x, make_operands(op, 6, 3)


@pytest.mark.parametrize("op", OPS)
def test_checked_once_for_a_case(double, op):
    name = KERNELS[op]
    for i in range(3):
        x, operands = call(op, i)
        OPS[op](x, *operands, "gelu")
    assert double.calls[name] == 4
    (case,) = self_check.results()
    assert (case.op, case.channels, case.kernel_size) == (name, 6, 1 if op == "pointwise" else 3)
    OPS[op](x[:1, :, 1:], *operands, "gelu")  # another size is no other case
    assert double.calls[name] == 5
    OPS[op](x, *operands, "relu")  # another activation is
    x, operands = x.bfloat16(), [t.bfloat16() for t in operands[:2]] + operands[2:]
    OPS[op](x, *operands, "gelu")
    assert double.calls[name] == 9
    assert len(self_check.results()) == 3


def test_the_check_runs_the_form_that_the_call_runs(double):
    operands = make_operands("depthwise", 6, 3)
    for width in (3, 12, 70, 90, 72):
        OPS["depthwise"](torch.randn(1, 6, 5, width), *operands, "gelu")
    sizes = [shape[3] for name, shape in double.shapes if name == "depthwise_mix"]
    # Rows of 70 and 90 pixels of 6 channels are no multiples of 16 elements, of 72 they are.
    assert sizes == [3, 3, 12, 12, WIDE + 1, 70, 90, WIDE, 72]
    pointwise = make_operands("pointwise", 6, 1)
    OPS["pointwise"](torch.randn(1, 6, 1, MANY_OUTPUTS // 9 + 1), *pointwise, "gelu")
    OPS["pointwise"](torch.randn(1, 6, 1, MANY_OUTPUTS // 9), *pointwise, "gelu")
    outputs = [math.prod(s) // 6 * 9 for name, s in double.shapes if name == "pointwise_mix"]
    assert [n > MANY_OUTPUTS for n in outputs] == [True, True, False, False]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", ["wrong", "error", "nan"])
def test_a_bad_kernel_warns_once_and_pytorch_serves(double, op, fault, monkeypatch):
    name = KERNELS[op]
    if fault == "wrong":
        double.wrong.add(name)
    elif fault == "error":
        double.error[name] = RuntimeError("ptxas died\nhorribly")
    else:
        monkeypatch.setattr(double, "_affine", lambda h, *rest: torch.full_like(h, float("nan")))
    x, operands = call(op)
    with pytest.warns(RuntimeWarning, match=f"kernel for {name} of 6 -> .*doctor --gpu") as seen:
        got = OPS[op](x, *operands, "gelu")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = OPS[op](x, *operands, "gelu")
    assert torch.equal(got, again)
    assert double.calls[name] == 1
    torch.testing.assert_close(got, gpu_reference(op)(x, *operands, "gelu"))
    (why,) = self_check.results().values()
    expected = {"wrong": "wrong numbers, max error", "nan": "max error nan"}
    assert expected.get(fault, "RuntimeError: ptxas died horribly") in why


def gpu_reference(op: str):
    return depthwise._reference if op == "depthwise" else pointwise._reference


@pytest.fixture
def copy_engine(double):
    """Tells which tiles are right: `FakeTriton.pointwise_mix`, as on a GPU with a copy engine."""
    good, allowed = double.pointwise_mix, []

    def pointwise_mix(*args, config=None, **kwargs):
        out = good(*args, config=config, **kwargs)
        return out if config in allowed else out.mul_(1.5)

    table = functions.kernels()._replace(pointwise_mix=pointwise_mix)
    # Its own patch: the test's is undone after the double's, and would put the double back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "architecture", lambda device: 90)
        patch.setattr(functions, "kernels", lambda: table)
        yield allowed


def test_a_bad_form_of_the_copy_engine_is_replaced_by_a_plain_one(double, copy_engine):
    plain = lookup_pointwise(90, torch.bfloat16, rows=1 << 20, columns=1024, descriptors=False)
    assert not plain.descriptors
    copy_engine.append(plain)
    weight = torch.randn(1024, 8, 1, 1).bfloat16()
    x = torch.randn(1, 8, 1, MANY_OUTPUTS // 1024 + 1).bfloat16()
    given = (x, weight, None, torch.rand(1024) + 0.5, torch.randn(1024), "gelu")
    with pytest.warns(RuntimeWarning, match=r"copy engine's form.*not used: wrong numbers") as seen:
        got = OPS["pointwise"](*given)
    assert len(seen) == 1
    assert double.configs == [None, plain, plain]
    torch.testing.assert_close(got, pointwise._reference(*given), rtol=0.02, atol=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(OPS["pointwise"](*given), got)
    assert double.configs == [None, plain, plain, plain]
    (case,) = self_check.results()
    assert self_check.results() == {case: ""}
    assert "wrong numbers" in self_check.fallback_tiles()[case]
    choice = choose(call_of(pointwise.POINTWISE, x, weight, None, "gelu"))
    assert choice.backend == "triton"
    assert "checked against PyTorch, without the copy engine: wrong numbers" in choice.reason
    # A product of few outputs has no such form: nothing else is tried.
    few = torch.randn(1, 6, 3, 3)
    with pytest.warns(RuntimeWarning, match="is not used: wrong numbers"):
        OPS["pointwise"](few, *make_operands("pointwise", 6, 1), "gelu")
    assert double.configs[4:] == [None]
    copy_engine.append(None)  # for what the doctor runs
    assert "GPU kernels without the copy engine" in doctor.render(doctor.examine())


def test_where_neither_form_is_right_pytorch_serves(double, copy_engine):
    weight = torch.randn(1024, 8, 1, 1).bfloat16()
    x = torch.randn(1, 8, 1, MANY_OUTPUTS // 1024 + 1).bfloat16()
    given = (x, weight, None, torch.rand(1024) + 0.5, torch.randn(1024), "gelu")
    with pytest.warns(RuntimeWarning, match="is not used: wrong numbers") as seen:
        got = OPS["pointwise"](*given)
    assert len(seen) == 1
    torch.testing.assert_close(got, pointwise._reference(*given))
    assert self_check.fallback_tiles() == {}


def test_a_launch_that_fails_later(double):
    x, operands = call("depthwise")
    OPS["depthwise"](x, *operands, "gelu")
    double.error["depthwise_mix"] = RuntimeError("too many resources requested")
    with pytest.warns(RuntimeWarning, match="too many resources"):
        got = OPS["depthwise"](x, *operands, "gelu")
    torch.testing.assert_close(got, gpu_reference("depthwise")(x, *operands, "gelu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPS["depthwise"](x, *operands, "gelu")


def test_memory_that_is_short_condemns_no_kernel(double):
    x, operands = call("depthwise")
    double.error["depthwise_mix"] = torch.OutOfMemoryError("CUDA out of memory")
    OPS["depthwise"](x, *operands, "gelu")
    assert self_check.results() == {}
    double.error.clear()
    OPS["depthwise"](x, *operands, "gelu")
    assert list(self_check.results().values()) == [""]
    double.error["depthwise_mix"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        OPS["depthwise"](x, *operands, "gelu")


def test_not_while_a_graph_is_captured(double, monkeypatch):
    x, operands = call("pointwise")
    monkeypatch.setattr(self_check, "is_capturing", lambda device: True)
    OPS["pointwise"](x, *operands, "gelu")
    assert not double.calls
    monkeypatch.setattr(self_check, "is_capturing", lambda device: False)
    OPS["pointwise"](x, *operands, "gelu")
    monkeypatch.setattr(self_check, "is_capturing", lambda device: True)
    OPS["pointwise"](x, *operands, "gelu")
    assert double.calls["pointwise_mix"] == 3


def test_switched_off(double, monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_VERIFY", "0")
    x, operands = call("pointwise")
    OPS["pointwise"](x, *operands, "gelu")
    assert double.calls["pointwise_mix"] == 1
    assert self_check.results() == {}
    double.error["pointwise_mix"] = RuntimeError("launch failed")
    with pytest.raises(RuntimeError, match="launch failed"):
        OPS["pointwise"](x, *operands, "gelu")


def test_many_threads_check_once(double):
    x, operands = call("depthwise")
    results, barrier = [], threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        results.append(OPS["depthwise"](x, *operands, "gelu"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert double.calls["depthwise_mix"] == 7
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.filterwarnings("ignore:the kernel for")
def test_asked_for_by_name_a_bad_kernel_raises():
    with installed() as double:
        double.wrong.add("depthwise_mix")
        x, operands = call("depthwise")
        for _ in range(2):
            with pytest.raises(BackendError, match=r"'triton' was asked for.*wrong numbers"):
                OPS["depthwise"](x, *operands, "gelu")


@torch.no_grad()
def test_explain_says_what_became_of_each_kernel(double):
    model = trained_like_(ConvMixer(8, 2, 3, 4, num_classes=3), IMAGES)
    x = torch.randn(IMAGES)
    assert {r.reason.split(";")[0] for r in explain(model, x)} == {
        "one Triton kernel, to be checked at its first use"
    }
    assert self_check.results() == {}  # explain runs nothing
    double.wrong.add("depthwise_mix")
    with pytest.warns(RuntimeWarning) as seen:
        model(x)
    assert len(seen) == 1  # not once for each block
    rows = {(r.op, r.backend, r.reason.split(",")[0]) for r in explain(model, x)}
    assert rows == {
        ("depthwise_mix", "reference", "triton: wrong numbers"),
        ("pointwise_mix", "triton", "one Triton kernel"),
    }


def test_the_users_random_numbers_stay_what_they_are(double):
    x, operands = call("depthwise")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    OPS["depthwise"](x, *operands, "gelu")
    assert torch.equal(torch.rand(3), want)
