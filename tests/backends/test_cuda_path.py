"""Who computes a 1x1 convolution where CUDA kernels could: by architecture, faults and name."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from fakes.cuda import cuda_installed, without_triton
from operator_cases import make_operands

import convmixer_fast as cf
from convmixer_fast import BackendError, ConvMixer, explain, use_backend
from convmixer_fast.backends import self_check, tuning_cache
from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.triton import functions, support
from convmixer_fast.backends.triton import pointwise as triton_pointwise
from convmixer_fast.backends.triton.configs import ORDER, CudaConfig, ProductConfig, lookup_order
from convmixer_fast.modules import fused
from convmixer_fast.ops import dispatch, execution, pointwise
from convmixer_fast.ops.dispatch import call_of, choose
from convmixer_fast.ops.pointwise import POINTWISE
from convmixer_fast.ops.registry import implementation_of
from convmixer_fast.testing import assert_numerics, trained_like_

IMAGES = (2, 3, 16, 16)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """``auto`` treats CPU tensors as it treats those on a GPU."""
    monkeypatch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))


@pytest.fixture
def model() -> ConvMixer:
    return trained_like_(ConvMixer(16, 2, 3, 4, num_classes=3), IMAGES).bfloat16()


def operands_for(dtype: torch.dtype, c: int = 16, layout=torch.channels_last):
    x = torch.randn(2, c, 6, 5).to(dtype).contiguous(memory_format=layout)
    weight, bias, *rest = make_operands("pointwise", c, 1)
    return x, weight.to(dtype), bias.to(dtype), *rest


def right(x, weight, bias, scale, shift, act, got) -> None:
    given = (x, weight, bias, scale, shift)
    theirs = pointwise._reference(*given, act)
    exact = pointwise._reference(*(t.double() for t in given), act)
    assert got.stride() == theirs.stride()
    assert_numerics(got, theirs, exact)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        (80, BF16, "mma.sync"),
        (86, FP16, "mma.sync"),
        (89, BF16, "mma.sync"),
        (120, FP16, "mma.sync"),
        (121, BF16, "mma.sync"),
        (90, BF16, "wgmma"),
        (90, FP16, "wgmma"),
        (100, BF16, "pointwise_mix"),
        (80, FP32, "after_product_"),
        (90, FP32, "after_product_"),
    ],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_architecture_decides(capability, dtype, kernel, layout):
    given = operands_for(dtype, layout=layout)
    with cuda_installed(capability=capability) as double:
        got = cf.ops.pointwise_mix(*given, "gelu")
        used = {name for name, count in double.calls.items() if count}
    assert used == {kernel}
    right(*given, "gelu", got)


def test_the_table_has_one_row_for_each_architecture():
    families = [f for row in ORDER for f in row.families]
    assert sorted(families) == sorted(set(families)) == [0, 80, 86, 90, 100, 120]
    assert lookup_order(89).kernels[0] == "mma.sync"
    assert "mma.sync" not in lookup_order(90).kernels
    assert lookup_order(0).kernels == ("triton",)


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_explain_says_who_and_why(model):
    x = torch.randn(IMAGES).bfloat16()
    with cuda_installed(capability=89) as double:
        rows = explain(model, x)
        assert not double.calls
        model(x)
        after = explain(model, x)
    assert {(r.module, r.op, r.backend) for r in rows} == {
        ("stem", "pointwise_mix", "triton"),
        ("blocks.0.0", "depthwise_mix", "triton"),
        ("blocks.1.0", "depthwise_mix", "triton"),
        ("blocks.0", "pointwise_mix", "cuda"),
        ("blocks.1", "pointwise_mix", "cuda"),
    }
    (before,) = {r.reason for r in rows if r.backend == "cuda"}
    assert before.startswith("one CUDA kernel (mma.sync), to be checked at its first use; mma.sync")
    (checked,) = {r.reason for r in after if r.backend == "cuda"}
    assert "checked against PyTorch" in checked


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_missing_is_named_and_triton_serves(monkeypatch):
    given = operands_for(BF16)
    with cuda_installed(capability=90, families=("mma.sync",)) as double:
        choice = choose(call_of(POINTWISE, *given[:3], "gelu"))
        assert choice.backend == "triton"
        assert "not cuda wgmma: " in choice.reason
        double.families = ("mma.sync", "wgmma")
        native_cuda.refusal.cache_clear()
        double.refused["wgmma"] = "the moon is in the wrong house"
        choice = choose(call_of(POINTWISE, *given[:3], "gelu"))
        assert choice.backend == "triton"
        assert "not cuda wgmma: the moon is in the wrong house" in choice.reason
        cf.ops.pointwise_mix(*given, "gelu")
        assert set(double.calls) == {"pointwise_mix"}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("fault", ["wrong", "error"])
def test_a_bad_cuda_kernel_warns_once_and_triton_serves(fault):
    given = operands_for(FP16)
    with cuda_installed() as double:
        if fault == "wrong":
            double.wrong.add("mma.sync")
        else:
            double.error["mma.sync"] = RuntimeError("cudaErrorNoKernelImageForDevice")
        with pytest.warns(
            RuntimeWarning, match=r"the kernel for pointwise_mix .*\(cuda mma.sync\)"
        ) as seen:
            got = cf.ops.pointwise_mix(*given, "gelu")
        assert len(seen) == 1
        right(*given, "gelu", got)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(cf.ops.pointwise_mix(*given, "gelu"), got)
        assert double.calls["mma.sync"] == 1
        assert double.calls["pointwise_mix"] == 3
        choice = choose(call_of(POINTWISE, *given[:3], "gelu"))
    assert choice.backend == "triton"
    cause = "wrong numbers" if fault == "wrong" else "cudaErrorNoKernelImageForDevice"
    assert f"not cuda mma.sync: {'RuntimeError: ' * (fault == 'error')}{cause}" in choice.reason


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:the (CUDA|Triton) kernel")
def test_where_every_kernel_is_bad_pytorch_serves():
    given = operands_for(FP16)
    with cuda_installed() as double:
        double.wrong |= {"mma.sync", "pointwise_mix"}
        got = cf.ops.pointwise_mix(*given, "gelu")
        assert torch.equal(got, pointwise._reference(*given, "gelu"))
        assert len([why for why in self_check.results().values() if why]) == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_cuda_kernel_while_a_graph_is_captured_unchecked(monkeypatch):
    given = operands_for(BF16)
    with cuda_installed() as double:
        with monkeypatch.context() as patch:
            patch.setattr(self_check, "is_capturing", lambda device: True)
            cf.ops.pointwise_mix(*given, "gelu")
            assert not double.calls
        cf.ops.pointwise_mix(*given, "gelu")
        before = double.calls["mma.sync"]
        with monkeypatch.context() as patch:
            patch.setattr(self_check, "is_capturing", lambda device: True)
            cf.ops.pointwise_mix(*given, "gelu")
        assert double.calls["mma.sync"] == before + 1


@pytest.mark.usefixtures("as_on_a_gpu")
def test_wgmma_stays_off_where_nothing_is_checked(monkeypatch):
    monkeypatch.setenv(self_check.ENVIRONMENT, "0")
    given = operands_for(BF16)
    with cuda_installed(capability=90) as double:
        cf.ops.pointwise_mix(*given, "gelu")
        assert set(double.calls) == {"pointwise_mix"}
    with cuda_installed(capability=80) as double:
        cf.ops.pointwise_mix(*given, "gelu")
        assert set(double.calls) == {"mma.sync"}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_float32_goes_to_the_tensor_cores_only_where_torch_allows_tf32():
    given = operands_for(FP32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for capability, kernel in ((80, "mma.sync"), (90, "pointwise_mix")):
            with cuda_installed(capability=capability) as double:
                cf.ops.pointwise_mix(*given, "gelu")
                assert set(double.calls) == {kernel}
        torch.set_float32_matmul_precision("highest")
        with cuda_installed("cuda"), pytest.raises(BackendError, match=r"'cuda'.*allows TF32"):
            cf.ops.pointwise_mix(*given, "gelu")
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def test_by_name_the_other_halves_are_tritons(model):
    x = torch.randn(IMAGES).bfloat16()
    with use_backend("reference"):
        want = model(x)
    with cuda_installed("cuda", capability=90) as double:
        rows = {(r.op, r.backend, r.reason) for r in explain(model, x)}
        got = model(x)
        assert {"wgmma", "depthwise_mix", "patch_embed"} <= set(double.calls)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert {(op, backend) for op, backend, _ in rows} == {
        ("pointwise_mix", "cuda"),
        ("pointwise_mix", "triton"),
        ("depthwise_mix", "triton"),
    }
    assert all(reason.startswith("asked for by name: ") for _, _, reason in rows)
    others = {reason for _, backend, reason in rows if backend == "triton"}
    assert all("the cuda backend has no kernel for " in reason for reason in others)


def test_by_name_what_cannot_run_raises_with_the_reason(monkeypatch):
    given = operands_for(FP16)
    with (
        cuda_installed("cuda", capability=75),
        pytest.raises(
            BackendError, match="'cuda' was asked for but cannot run: no kernel for sm_75"
        ),
    ):
        cf.ops.pointwise_mix(*given, "gelu")
    with cuda_installed("cuda", capability=0), pytest.raises(BackendError, match="ROCm"):
        cf.ops.pointwise_mix(*given, "gelu")
    with cuda_installed("cuda") as double:
        double.refused["mma.sync"] = "more than 2^31 - 1 tiles"
        with pytest.raises(BackendError, match="more than 2\\^31 - 1 tiles"):
            cf.ops.pointwise_mix(*given, "gelu")
    with cuda_installed("cuda"), pytest.raises(BackendError, match="no kernel for float64"):
        cf.ops.pointwise_mix(*(t.double() for t in given), "gelu")
    with cuda_installed("cuda", capability=80) as double:
        double.wrong.add("mma.sync")
        with pytest.warns(RuntimeWarning), pytest.raises(BackendError, match="wrong numbers"):
            cf.ops.pointwise_mix(*given, "gelu")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    with pytest.raises(BackendError, match="'cuda' was asked for but cannot run"):
        cf.ops.pointwise_mix(*given, "gelu")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_tune_measures_the_cuda_kernels_and_its_verdict_holds(model, monkeypatch):
    monkeypatch.setattr(triton_pointwise, "shipped_tiles", lambda device, dtype: ())
    x = torch.randn(IMAGES).bfloat16()
    fast: dict[str, float] = {}

    with cuda_installed(capability=90) as double:

        def timer(run) -> float:
            before = double.calls.copy()
            run()
            (name, *_) = [*(double.calls - before), "pytorch"]
            return fast.get(name, 1e-3)

        for winner, kernel in (("cuda", "mma.sync"), ("product", "after_product_")):
            fast = {kernel: 1e-4}
            report = cf.tune(model, [x], timer=timer)
            row = next(row for row in report if row.case.op == "pointwise_mix")
            assert set(row.verdict.seconds) == {
                *("triton", "product", "cuda mma.sync", "cuda wgmma"),
                *("channels_last", "contiguous"),
            }
            config = CudaConfig("mma.sync") if winner == "cuda" else ProductConfig()
            assert (row.verdict.winner, row.verdict.config) == (winner, config)
            tuning_cache.forget()  # as another process: from the file
            chosen = {r.backend: r.reason for r in explain(model, x) if r.module == "blocks.1"}
            (reason,) = chosen.values()
            assert set(chosen) == {"cuda" if winner == "cuda" else "triton"}
            assert "tuned: " in reason
            before = double.calls.copy()
            with torch.no_grad():
                model(x)
            assert (double.calls - before)[kernel] >= 2
            # In a build without it the verdict is none.
            with monkeypatch.context() as patch:
                patch.setattr(native_cuda, "why_not", lambda device: "not built")
                rows = {r.module: r for r in explain(model, x)}
            assert ("tuned" in rows["blocks.1"].reason) == (winner == "product")
            assert rows["blocks.1"].backend == "triton"


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_a_steady_call_keeps_its_float32_bias(model, monkeypatch):
    x = torch.randn(IMAGES).bfloat16()
    with cuda_installed() as double:
        model(x)
        want = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "implementations", lambda *args: pytest.fail("looked up"))
            known = set(double.biases)
            before = double.calls["mma.sync"]
            assert torch.equal(model(x), want)
            assert double.calls["mma.sync"] == before + 2
            assert set(double.biases[-2:]) <= known, "a bias was converted again"
        model.blocks[0][1].bias.add_(1.0)
        assert not torch.equal(model(x), want)
        with use_backend("reference"):
            torch.testing.assert_close(model(x), model(x))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_operands_that_begin_between_words_are_copied(monkeypatch):
    x, weight, bias, scale, shift = operands_for(FP16)
    off = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (weight, scale)]
    assert all(t.data_ptr() % 16 for t in off)
    with cuda_installed() as double:
        want = cf.ops.pointwise_mix(x, weight, bias, scale, shift, "gelu")
        kernel = double.cuda

        def aligned(*given, **named):
            assert not any(t.data_ptr() % 16 for t in given if isinstance(t, torch.Tensor))
            return kernel(*given, **named)

        with monkeypatch.context() as patch:  # undone before the stand-in is
            patch.setattr(native_cuda, "pointwise_mix", aligned)
            got = cf.ops.pointwise_mix(x, off[0], bias, off[1], shift, "gelu")
        assert not any(self_check.results().values())
    assert torch.equal(got, want)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("act", list(cf.ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_pytorch_computes_is_ended_by_one_kernel(act, bias):
    x, weight, b, *rest = operands_for(FP32)
    given = (x, weight, b if bias else None, *rest)
    with cuda_installed() as double:
        got = cf.ops.pointwise_mix(*given, act)
        assert set(double.calls) == {"after_product_"}
        choice = choose(call_of(POINTWISE, *given[:3], act))
    assert choice.reason.startswith("PyTorch's product and one Triton kernel for the rest, checked")
    assert "float32 without TF32" in choice.reason
    torch.testing.assert_close(got, pointwise._reference(*given, act), rtol=1e-5, atol=1e-5)


F64 = torch.float64


def doubled(given):
    return [None if t is None else t.double() for t in given]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("act", list(cf.ACTIVATIONS))
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_float64_is_multiplied_by_pytorch_and_ended_by_one_kernel(act, capability, layout):
    given = doubled(operands_for(FP32, layout=layout))
    with cuda_installed(capability=capability) as double:
        got = cf.ops.pointwise_mix(*given, act)
        assert double.calls == {"after_product_": 2}
        choice = choose(call_of(POINTWISE, *given[:3], act))
    assert (choice.backend, choice.reason) == (
        "triton",
        "PyTorch's product and one Triton kernel for the rest, checked against PyTorch; "
        "float64 is multiplied by no kernel of ours",
    )
    want = pointwise._reference(*given, act)
    assert got.dtype == F64
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_float64_check_sees_what_float32_would_round():
    given = doubled(operands_for(FP32))
    with cuda_installed() as double:
        finish = double.after_product_

        def narrow(h, *rest):
            vectors = [t.float() if isinstance(t, torch.Tensor) else t for t in rest]
            return h.copy_(finish(h.float(), *vectors))

        table = functions.kernels()._replace(after_product_=narrow)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functions, "kernels", lambda: table)
            with pytest.warns(RuntimeWarning, match="wrong numbers"):
                got = cf.ops.pointwise_mix(*given, "gelu")
    assert torch.equal(got, pointwise._reference(*given, "gelu"))


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_the_check_of_float64_does_not_depend_on_the_order_of_a_sum():
    # PyTorch's convolution and its matrix product add 1536 terms in different orders.
    with cuda_installed():
        x, weight = torch.empty(1, 1536, 2, 2, dtype=F64), torch.empty(1536, 1536, 1, 1)
        key = call_of(POINTWISE, x, weight, None, "gelu").key
        product = implementation_of(key, ProductConfig())
        report = execution.measure_errors(product, key, ProductConfig())
    assert report.ok
    assert report.max_error <= 0.5 * report.max_bar, report


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_a_float64_model(monkeypatch):
    model = trained_like_(ConvMixer(16, 2, 3, 4, num_classes=3), IMAGES).double()
    x = torch.randn(IMAGES).double()
    with use_backend("reference"):
        want = model(x)
    with cuda_installed() as double:
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
        rows = {(r.op, r.backend) for r in explain(model, x)}
        assert set(double.calls) == {"after_product_"}
        model(x)
        with monkeypatch.context() as patch:
            # What was looked up for a pointwise half is kept, though the other half has no kernel.
            def other_half(call):
                assert call.operator is not POINTWISE
                return choose(call)

            patch.setattr(fused, "choose", other_half)
            before = double.calls["after_product_"]
            torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
            assert double.calls["after_product_"] == before + 2
    assert rows == {
        ("pointwise_mix", "reference"),  # the stem
        ("depthwise_mix", "reference"),
        ("pointwise_mix", "triton"),
    }


def chosen(given, act="gelu"):
    return choose(call_of(POINTWISE, *given[:3], act))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("capability", "dtype", "families", "kernel", "why"),
    [
        (80, BF16, ("mma.sync",), "mma.sync", "85-95 %"),
        (89, FP16, ("mma.sync",), "mma.sync", "85-95 %"),
        (121, BF16, ("mma.sync", "wgmma"), "mma.sync", "85-95 %"),
        (90, BF16, ("mma.sync", "wgmma"), "wgmma", "90-100 %"),
        # Slower than PyTorch, all of them, or nothing that computes it.
        (90, BF16, ("mma.sync",), None, "cuda wgmma: .*mma.sync at 55-65 %, under what pays"),
        (100, BF16, ("mma.sync", "wgmma"), None, "^triton: Triton is not installed[^;]*$"),
        (80, FP32, ("mma.sync",), None, "^triton product: Triton is not installed[^;]*$"),
        (80, F64, ("mma.sync",), None, "^triton product: Triton is not installed[^;]*$"),
        (75, FP16, ("mma.sync",), None, "^triton: Triton is not installed[^;]*$"),
        (0, FP16, ("mma.sync",), None, "^triton: Triton is not installed[^;]*$"),
    ],
)
def test_without_triton_the_architecture_decides(capability, dtype, families, kernel, why):
    given = operands_for(dtype if dtype != F64 else FP32)
    given = doubled(given) if dtype == F64 else given
    with cuda_installed(capability=capability, families=families) as double, without_triton():
        choice = chosen(given)
        got = cf.ops.pointwise_mix(*given, "gelu")
        assert set(double.calls) == ({kernel} if kernel else set())
        if kernel:
            assert self_check.results() == {chosen(given).key: ""}
    assert choice.backend == ("cuda" if kernel else "reference")
    start = f"one CUDA kernel ({kernel}), to be checked at its first use; "
    assert choice.reason.startswith(start if kernel else ("triton", "cuda wgmma: "))
    assert kernel or "Triton is not installed" in choice.reason
    assert re.search(why, choice.reason), choice.reason
    if dtype != F64:
        right(*given, "gelu", got)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("fault", ["wrong", "error"])
def test_without_triton_a_bad_cuda_kernel_leaves_it_to_pytorch(fault):
    given = operands_for(FP16)
    with cuda_installed() as double, without_triton():
        if fault == "wrong":
            double.wrong.add("mma.sync")
        else:
            double.error["mma.sync"] = RuntimeError("cudaErrorNoKernelImageForDevice")
        with pytest.warns(
            RuntimeWarning, match=r"the kernel for pointwise_mix .*\(cuda mma.sync\)"
        ) as seen:
            got = cf.ops.pointwise_mix(*given, "gelu")
        assert len(seen) == 1
        choice = chosen(given)
    assert torch.equal(got, pointwise._reference(*given, "gelu"))
    assert choice.backend == "reference"
    cause = "wrong numbers" if fault == "wrong" else "RuntimeError: cudaErrorNoKernelImage"
    assert f"cuda mma.sync: {cause}" in choice.reason


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_triton_and_without_the_extension_both_reasons_are_told(monkeypatch):
    given = operands_for(BF16)
    with cuda_installed() as double, without_triton():
        with monkeypatch.context() as patch:
            patch.setattr(native_cuda, "_find", lambda: (None, "no nvcc in this house"))
            choice = chosen(given)
            assert torch.equal(
                cf.ops.pointwise_mix(*given, "gelu"), pointwise._reference(*given, "gelu")
            )
        assert not double.calls
    assert (choice.backend, choice.reason) == (
        "reference",
        "cuda mma.sync: no nvcc in this house; triton: Triton is not installed: pip install triton",
    )


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_without_triton_a_models_pointwise_halves_keep_what_they_need(model):
    x = torch.randn(IMAGES).bfloat16()
    with use_backend("reference"):
        want = model(x)
    with cuda_installed() as double, without_triton():
        model(x)
        torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.1)
        rows = {(r.op, r.backend) for r in explain(model, x) if r.module != "stem"}
        assert rows == {("depthwise_mix", "reference"), ("pointwise_mix", "cuda")}
        model(x)
        biases = set(double.biases)
        before = double.calls["mma.sync"]
        model(x)
        assert double.calls["mma.sync"] == before + 2
        assert set(double.biases[-2:]) <= biases, "a bias was converted again"
    for name in ("triton", "cuda"):
        with cuda_installed(name) as double, without_triton():
            if name == "triton":
                with pytest.raises(BackendError, match="Triton is not installed"):
                    model(x)
            else:
                torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.1)
                assert set(double.calls) == {"mma.sync"}


def test_opcheck_with_a_cuda_kernel_behind_it():
    with cuda_installed("cuda"):
        for layout in (torch.channels_last, torch.contiguous_format):
            given = operands_for(BF16, layout=layout)
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(cf.ops.pointwise_mix, (*given, "relu"), test_utils=tests)


def test_the_double_leaves_nothing_behind():
    with cuda_installed():
        pass
    assert support.architecture(torch.device("cpu")) == 80
    assert cf.available_backends()["cuda"]
