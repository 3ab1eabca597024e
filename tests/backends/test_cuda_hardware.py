"""The CUDA extension's kernels on a GPU: every shape, streams, devices, graphs, whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import POINTWISE_CASES, MatrixCase, check, draw

from convmixer_fast import ConvMixer, explain, use_backend
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends import self_check
from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.triton.configs import CudaConfig
from convmixer_fast.ops import pointwise
from convmixer_fast.ops.dispatch import call_of
from convmixer_fast.ops.registry import implementation_of
from convmixer_fast.testing import assert_numerics, trained_like_

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

WHY_NOT = native_cuda.why_not_here()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "runs")]


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def run(family: str):
    """The operator by one family, as `gpu_cases.check` calls it; skips what the family refuses."""

    def pointwise_mix(x, weight, bias, scale, shift, act, out=None):
        call = call_of(pointwise.POINTWISE, x, weight, bias, act)
        kernel = implementation_of(call.key, CudaConfig(family))
        why = kernel.unavailable(call)
        if why:
            pytest.skip(f"{family}: {why}")
        got = kernel.run(x, weight, bias, scale, shift, act)
        return got if out is None else out.copy_(got)

    return pointwise_mix


@pytest.mark.parametrize("family", native_cuda.FAMILIES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_every_shape(case: MatrixCase, dtype: torch.dtype, family: str) -> None:
    check(run(family), case, dtype, "cuda")


@pytest.mark.parametrize("family", native_cuda.FAMILIES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, family: str) -> None:
    check(run(family), MatrixCase("act", 2, 96, 9, 7, 136, act=act), BF16, "cuda")


@pytest.mark.parametrize("family", native_cuda.FAMILIES)
def test_the_same_bits_every_time(family: str) -> None:
    o = draw(MatrixCase("bits", 1, 1024, 16, 16, 1024), BF16, "cuda")
    given = (o.x, o.weight, o.bias, o.scale, o.shift, "gelu")
    first = run(family)(*given)
    for _ in range(1000):
        assert torch.equal(run(family)(*given), first)


@torch.no_grad()
def test_on_another_stream_and_device_and_in_a_graph() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    o = draw(MatrixCase("stream", 4, 768, 32, 32, 768), BF16, str(device))
    given = [t.to(device) for t in (o.x, o.weight, o.bias, o.scale, o.shift)]
    with use_backend("cuda"):
        want = pointwise.pointwise_mix(*given, "gelu")
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # The input is made late: a kernel on another stream would read what was there before.
            torch.cuda._sleep(10_000_000)
            late = given[0] * 2
            got = pointwise.pointwise_mix(late, *given[1:], "gelu")
        stream.synchronize()
        assert torch.equal(got, pointwise.pointwise_mix(given[0] * 2, *given[1:], "gelu"))
        with torch.cuda.device(device):
            graph, held = torch.cuda.CUDAGraph(), given[0].clone()
            with torch.cuda.graph(graph):
                replayed = pointwise.pointwise_mix(held, *given[1:], "gelu")
            held.copy_(given[0])
            graph.replay()
            torch.cuda.synchronize()
    assert torch.equal(replayed, want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dim", "k", "act"), [(768, 7, "relu"), (1536, 9, "gelu"), (37, 4, "silu")]
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_whole_models(dim: int, k: int, act: str, dtype: torch.dtype) -> None:
    shape = (3, 3, 27, 45)
    model = trained_like_(ConvMixer(dim, 3, k, 4, num_classes=5, act_layer=act), shape).to(dtype)
    oracle, x = copy.deepcopy(model).double(), torch.randn(shape).to(dtype)
    want = oracle(x.double())
    model, x = model.cuda(), x.cuda()
    with use_backend("reference"):
        theirs = model(x)
    with use_backend("cuda"):
        ours = model(x)
        rows = explain(model, x)
    assert "cuda" in {row.backend for row in rows}
    assert not any(self_check.results().values())
    assert_numerics(ours, theirs, want)


@torch.no_grad()
def test_compiled() -> None:
    model = trained_like_(ConvMixer(64, 2, 5, 4, num_classes=5), (2, 3, 32, 32)).to("cuda", BF16)
    x = torch.randn(2, 3, 32, 32, device="cuda", dtype=BF16)
    with use_backend("cuda"):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
