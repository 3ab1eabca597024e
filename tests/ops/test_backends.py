"""Which backend serves a call, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convmixer_fast import BackendError, ConvMixer, available_backends, explain, use_backend
from convmixer_fast.backends.cpu import native
from convmixer_fast.ops import dispatch
from convmixer_fast.ops.registry import BACKENDS
from convmixer_fast.testing import trained_like_

needs_extension = pytest.mark.skipif(not native.load(), reason=native.why_unavailable() or "built")


@pytest.fixture
def model() -> ConvMixer:
    return trained_like_(ConvMixer(8, 2, 3, 4, num_classes=3), (2, 3, 16, 16))


X = torch.randn(2, 3, 16, 16)


def test_available_backends_lists_all_with_reasons():
    available = available_backends()
    assert tuple(available) == BACKENDS
    assert available["reference"] == ""
    assert available["triton"]
    assert available["cuda"]


@needs_extension
def test_auto_takes_the_cpu_kernels_for_float32(model):
    rows = explain(model, X)
    assert [(r.module, r.op) for r in rows] == [
        ("stem", "pointwise_mix"),
        ("blocks.0.0", "depthwise_mix"),
        ("blocks.0", "pointwise_mix"),
        ("blocks.1.0", "depthwise_mix"),
        ("blocks.1", "pointwise_mix"),
    ]
    assert {r.backend for r in rows} == {"cpu"}
    text = str(rows)
    assert "blocks.0.0 ... blocks.1.0" in text
    assert len(text.splitlines()) == 2


def test_auto_falls_through_and_says_why(model):
    rows = explain(model.double(), X.double())
    assert {r.backend for r in rows} == {"reference"}
    assert all("float32, not float64" in r.reason for r in rows)


def test_without_the_extension_pytorch_serves_and_explain_says_so(model, monkeypatch):
    with torch.no_grad():
        want = model(X)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_unavailable", lambda: "the moon is in the wrong house")
    assert available_backends()["cpu"] == "the moon is in the wrong house"
    rows = explain(model, X)
    assert all(
        r == (r.module, r.op, "reference", "cpu: the moon is in the wrong house") for r in rows
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-4)
    with use_backend("cpu"), pytest.raises(BackendError, match="the moon is in the wrong house"):
        model(X)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_asked_for_by_name_that_cannot_run_raises(model, name, training):
    with use_backend(name), pytest.raises(BackendError, match=f"'{name}'.*cannot run.*auto"):
        model.train(training)(X)


@needs_extension
def test_a_backend_asked_for_by_name_that_is_here_lets_training_be(model):
    with use_backend("cpu"):
        model.train()(X).sum().backward()
    assert model.stem[0].weight.grad is not None


@needs_extension
def test_asking_by_name(model):
    with use_backend("cpu"):
        assert {r.reason.split(":")[0] for r in explain(model, X)} == {"asked for by name"}
        with pytest.raises(BackendError, match="float64"), torch.no_grad():
            model.double()(X.double())
    with use_backend("reference"):
        assert {r.backend for r in explain(model.float(), X)} == {"reference"}


@needs_extension
def test_the_environment_wins_over_the_program(model, monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "reference")
    with use_backend("cpu"):
        assert {r.backend for r in explain(model, X)} == {"reference"}
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "CPU")
    assert {r.backend for r in explain(model, X)} == {"cpu"}


def test_unknown_names_are_refused(model, monkeypatch):
    with pytest.raises(BackendError, match="unknown backend 'gpu'"), use_backend("gpu"):
        pass
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "fast")
    with pytest.raises(BackendError, match="CONVMIXER_FAST_BACKEND: unknown backend 'fast'"):
        model(X)


def test_use_backend_ends_with_its_block():
    with use_backend("reference"):
        with use_backend("cpu"):
            assert dispatch.requested_backend() == "cpu"
        assert dispatch.requested_backend() == "reference"
    assert dispatch.requested_backend() == "auto"


@pytest.mark.parametrize("training", [True, False])
def test_explain_computes_and_changes_nothing(model, training):
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = explain(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(block._packed._entry is None for block in model.blocks)
    assert {r.reason for r in rows} == (
        {"BatchNorm gathers batch statistics"}
        if training
        else {r.reason for r in rows if r.backend == "cpu"} or {rows[0].reason}
    )


def test_explain_without_fused_modules():
    rows = explain(torch.nn.Conv2d(3, 4, 3), X)
    assert rows == []
    assert "optimize" in str(rows)


@torch.no_grad()
def test_explain_looks_into_wrappers(model):
    x = torch.randn(2, 3, 16, 16)
    plain, wrapped = explain(model, x), explain(nn.DataParallel(model), x)
    assert [row._replace(module=f"module.{row.module}") for row in plain] == wrapped
    compiled = explain(torch.compile(model), x)
    # A compiler gets the halves of the blocks.
    assert {row.op for row in compiled} == {"depthwise_mix", "pointwise_mix"}
    assert [row.op for row in plain] == ["pointwise_mix", *["mixer_stack"] * len(model.blocks)]


def test_explain_names_what_it_cannot_take(model):
    for arguments in ((3, torch.randn(2, 3, 16, 16)), (model, [1])):
        with pytest.raises(
            TypeError, match=r"a torch.nn.Module and an input tensor, got (int|Con)"
        ):
            explain(*arguments)


def test_explain_under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stem, *rows = explain(model, X)
    assert stem.reason == "autocast changes the input's dtype"
    assert rows
    assert all("bfloat16" in r.reason for r in rows)
