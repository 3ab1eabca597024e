"""Whole models through the real kernels: interpreted, simulated, and on hardware where there is."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes.triton import emulated
from torch import nn
from triton_modes import compiler, interpreter, run_in_interpreter, triton_simulator

from convmixer_fast import ConvMixer, explain, use_backend
from convmixer_fast.backends import self_check
from convmixer_fast.testing import assert_numerics, trained_like_

pytest.importorskip("triton", reason="Triton is not installed")

#: Sides that no tile and no patch divides.
IMAGES = (1, 3, 27, 45)
NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Width, kernel size and activation of the published variants.
WIDTHS = [(768, 7, "relu"), (1024, 9, "gelu"), (1536, 9, "gelu")]


def make(
    dim: int, k: int, act: str, dtype: torch.dtype, depth: int = 3
) -> tuple[nn.Module, nn.Module]:
    """A model in ``dtype``, and in float64."""
    model = ConvMixer(dim, depth, k, 4, num_classes=5, act_layer=act, normalize=NORMAL)
    model = trained_like_(model, (2, *IMAGES[1:]))
    # One rounding of the parameters, for both.
    model = model.to(dtype)
    return model, copy.deepcopy(model).double()


@torch.no_grad()
def check(
    dim: int,
    k: int,
    act: str,
    dtype: torch.dtype,
    device: str = "cpu",
    uint8: bool = False,
    depth: int = 3,
) -> None:
    model, oracle = make(dim, k, act, dtype, depth)
    x = torch.randn(IMAGES).to(dtype)
    if uint8:
        x = torch.randint(0, 256, IMAGES, dtype=torch.uint8)
    want = oracle(x if uint8 else x.double())
    model, x = model.to(device), x.to(device)
    with use_backend("reference"):
        theirs = model(x)
    with use_backend("triton"):
        ours = model(x)
        rows = explain(model, x)
    assert {row.backend for row in rows} == {"triton"}
    assert rows[0].op == ("patch_embed_uint8" if uint8 else "pointwise_mix")
    assert_numerics(ours, theirs, want)


@compiler
def test_the_interpreter_finds_a_model_right() -> None:
    assert " passed" in run_in_interpreter(__file__)


@interpreter
@pytest.mark.parametrize(("dim", "k", "act"), [(24, 3, "gelu"), (5, 4, "relu")])
def test_interpreter(dim: int, k: int, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.ENVIRONMENT, "0")
    check(dim, k, act, torch.float32)


@interpreter
def test_interpreter_uint8_images_after_a_first_use() -> None:
    self_check.forget()
    check(24, 3, "gelu", torch.float32, uint8=True, depth=1)
    assert len(self_check.results()) == 3
    assert not any(self_check.results().values())
    self_check.forget()


@compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_simulator(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = triton_simulator()
    monkeypatch.setenv(self_check.ENVIRONMENT, "0")
    with emulated(), sim.triton_on_cpu(cc=80, strict=True) as log:
        check(64, 5, "gelu", dtype)
    assert len(log) == 7
    assert not any(stats.races for stats in log)


@compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_simulator_uint8_images(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = triton_simulator()
    monkeypatch.setenv(self_check.ENVIRONMENT, "0")
    with emulated(), sim.triton_on_cpu(cc=80, strict=True) as log:
        check(64, 3, "gelu", dtype, uint8=True, depth=1)
    assert len(log) == 3


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "k", "act"),
    [WIDTHS[0], *(pytest.param(*width, marks=pytest.mark.gpu_static_full) for width in WIDTHS[1:])],
)
def test_simulator_at_published_widths(
    dim: int, k: int, act: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim = triton_simulator()
    monkeypatch.setenv(self_check.ENVIRONMENT, "0")
    # The counters of memory accesses are not needed.
    with emulated(), sim.triton_on_cpu(cc=80, strict=True, counters=False) as log:
        check(dim, k, act, dtype)
    assert not any(stats.races for stats in log)


@compiler
def test_simulator_finds_the_first_use_right() -> None:
    sim = triton_simulator()
    self_check.forget()
    with emulated(), sim.triton_on_cpu(cc=80, strict=True) as log:
        check(32, 3, "silu", torch.bfloat16)
    found = self_check.results()
    self_check.forget()
    assert len(found) == 3
    assert not any(found.values())
    assert len(log) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "k", "act"), [*WIDTHS, (37, 4, "silu")])
@pytest.mark.parametrize("uint8", [False, True])
def test_hardware(dim: int, k: int, act: str, dtype: torch.dtype, uint8: bool) -> None:
    check(dim, k, act, dtype, "cuda", uint8)
    assert not any(self_check.results().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@torch.no_grad()
def test_hardware_on_another_stream_and_device() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    model, _ = make(64, 5, "gelu", torch.bfloat16)
    model, x = model.to(device), torch.randn(IMAGES, device=device, dtype=torch.bfloat16)
    want = model(x)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        got = model(x)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@torch.no_grad()
def test_hardware_compiled_and_updated() -> None:
    model, _ = make(64, 5, "gelu", torch.float32)
    model, x = model.to("cuda"), torch.randn(IMAGES, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    for p in model.parameters():
        p.mul_(1.1)
    with use_backend("reference"):
        want = model(x)
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)
