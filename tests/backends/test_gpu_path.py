"""What the operators and modules do around a GPU kernel: layouts, packed taps, gradients, fakes.

The kernels are fakes that call PyTorch (`fakes.triton`), so that the tests run anywhere.
"""

from __future__ import annotations

import copy

import pytest
import torch
from fakes.cuda import FakeCuda
from fakes.triton import installed
from operator_cases import LAYOUTS, OPS, check, make_input, make_operands
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from convmixer_fast import (
    BackendError,
    ConvMixer,
    MixerStack,
    PointwiseMix,
    available_backends,
    explain,
    optimize,
    refresh,
    use_backend,
)
from convmixer_fast.backends import tuning_cache
from convmixer_fast.backends.cuda import native as native_cuda
from convmixer_fast.backends.triton import support
from convmixer_fast.modules.fusible import (
    DEPTHWISE,
    POINTWISE,
    compiled_kernels_run,
    reason_not_fusible,
)
from convmixer_fast.ops import dispatch, pointwise, recording
from convmixer_fast.reference import reference_block
from convmixer_fast.testing import assert_numerics, trained_like_

IMAGES = (2, 3, 23, 21)


@pytest.fixture
def double():
    with installed() as kernels:
        yield kernels


@pytest.fixture
def model() -> ConvMixer:
    return trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), IMAGES)


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["depthwise", "pointwise"])
def test_every_layout_and_dtype(double, op, layout, dtype):
    check(op, make_input(layout, (2, 19, 11, 13), dtype), make_operands(op, 19, 5, dtype), "gelu")
    assert double.calls[f"{op}_mix"] == 2  # the check before the first use, and the call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stem_comes_out_channels_last_whatever_the_image_is(double, layout):
    x, operands = make_input(layout, (2, 3, 11, 13)), make_operands("patches", 3, 4)
    out = OPS["patches"](x, *operands, "gelu")
    assert is_channels_last(out)
    with use_backend("reference"):
        want = OPS["patches"](x, *operands, "gelu")
    # The same strides from PyTorch: a traced graph must not depend on who computes.
    assert want.stride() == out.stride()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5, 6, 7), (1, 1, 4, 5), (3, 5, 1, 1), (1, 1, 1, 1)])
def test_layouts_that_are_both(double, op, shape):
    k = 1 if op == "patches" else 3
    x, operands = torch.randn(shape), make_operands(op, shape[1], k)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        out = OPS[op](x, *operands, "relu")
        with use_backend("reference"):
            want = OPS[op](x, *operands, "relu")
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        with FakeTensorMode() as fake:
            given = [fake.from_tensor(t) for t in (x, *operands)]
            assert out.stride() == OPS[op](*given, "relu").stride()


def test_lazily_negated_views(double):
    x = torch.view_as_complex(torch.randn(2, 4, 6, 6, 2)).conj().imag
    assert x.is_neg()
    check("depthwise", x, make_operands("depthwise", 4, 3), "gelu")
    check("pointwise", x, make_operands("pointwise", 4, 3), "gelu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(double, op, layout):
    x, operands = make_input(layout, (2, 8, 9, 11)), make_operands(op, 8, 4, grad=True)
    if layout != "expanded":
        x = x.requires_grad_()
    opcheck(OPS[op].default, (x, *operands, "gelu"))
    assert double.calls


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_pytorch(double, op):
    x = make_input("channels_last", (2, 8, 9, 9)).requires_grad_()
    operands = make_operands(op, 8, 3, grad=True)
    leaves = [x, *operands]
    ours = torch.autograd.grad(OPS[op](*leaves, "gelu").square().sum(), leaves)
    assert double.calls
    with use_backend("reference"):
        theirs = torch.autograd.grad(OPS[op](*leaves, "gelu").square().sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_a_whole_model_converts_once(double, model, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(IMAGES).contiguous(memory_format=layout)
    seen = []
    for module in (model.stem, *model.blocks):
        module.register_forward_hook(lambda m, a, out: seen.append(is_channels_last(out)))
    out = model(x)
    assert seen == [True] * 4
    with use_backend("reference"):
        assert_numerics(out, model(x), copy.deepcopy(model).double()(x.double()))
    rows = explain(model, x)
    assert [r.op for r in rows] == ["pointwise_mix", *["depthwise_mix", "pointwise_mix"] * 3]
    assert {r.backend for r in rows} == {"triton"}
    assert {r.reason for r in rows} == {
        "asked for by name: one Triton kernel, checked against PyTorch"
    }


@torch.no_grad()
def test_blocks_in_somebody_elses_model_convert_their_input(double):
    blocks = [trained_like_(reference_block(8, 3, nn.GELU), (2, 8, 9, 9), seed=i) for i in (1, 2)]
    for net in (optimize(nn.Sequential(*copy.deepcopy(blocks))), nn.Sequential(*blocks)):
        if not isinstance(net, MixerStack):
            # A flat Sequential, as the original repository has it: no stack, and no conversion
            # between the blocks.
            optimize(net.append(nn.Identity()))
        x = torch.randn(2, 8, 9, 9)
        assert is_channels_last(net(x))
        before = double.calls.copy()
        net(x)
        assert double.calls - before == {"depthwise_mix": 2, "pointwise_mix": 2}


def test_training_is_left_alone(double, model):
    out = model.train()(torch.randn(IMAGES))
    out.sum().backward()
    assert not double.calls
    assert model.stem[0].weight.grad is not None


def test_frozen_statistics_with_gradients(double, model):
    x = torch.randn(IMAGES)
    model.eval()(x).square().sum().backward()
    assert double.calls["depthwise_mix"] > 3
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with use_backend("reference"):
        model(x).square().sum().backward()
    for mine, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_taps_are_packed_once_for_a_version_of_the_weight(double, model):
    x = torch.randn(IMAGES)
    model(x), model(x)
    packed = double.calls["pack_taps"]
    before = model(x)
    assert double.calls["pack_taps"] == packed
    model.blocks[1][0].fn[0].weight.mul_(2)
    after = model(x)
    assert double.calls["pack_taps"] == packed + 1
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    refresh(model)
    assert torch.equal(model(x), after)
    assert double.calls["pack_taps"] == packed + 4


def test_what_a_user_passes_is_never_kept(double):
    x, operands = torch.randn(1, 4, 6, 6), make_operands("depthwise", 4, 3)
    first = OPS["depthwise"](x, *operands, "relu")
    operands[0].data.mul_(3.0)  # leaves no trace but the values
    assert not torch.equal(OPS["depthwise"](x, *operands, "relu"), first)


@torch.no_grad()
def test_autocast(double, model):
    x = torch.randn(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        stem, *rows = explain(model, x)
    assert out.dtype == torch.bfloat16
    assert stem.backend == "reference"
    assert {row.backend for row in rows} == {"triton"}
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.3)


@torch.no_grad()
def test_compile_and_export_see_the_operators(double, model):
    x = torch.randn(IMAGES)
    want = model(x)
    for run in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
    ):
        before = double.calls.copy()
        torch.testing.assert_close(run(x), want, rtol=1e-5, atol=1e-5)
        extra = double.calls - before
        assert extra["depthwise_mix"] == extra["pointwise_mix"] == 3
        assert extra["patch_embed"] == 1


def on_a_fake_gpu(monkeypatch, name: str = "") -> None:
    monkeypatch.setattr(support, "_why_no_triton", lambda: "")
    monkeypatch.setattr(support, "_why_not_gpu", lambda index: name)
    monkeypatch.setattr(support, "_capable", set())
    # With the copy engine and tcgen05, where Triton's kernel comes first.
    monkeypatch.setattr(support, "architecture", lambda device: 100)
    monkeypatch.setattr(tuning_cache, "lookup", lambda case, shape: None)


def fake_model_rows(dtype: torch.dtype) -> list[tuple]:
    """Operator, backend, reason, and whether the map before the head is channels-last."""
    model = ConvMixer(16, 2, 5, 4, num_classes=6).eval()
    held = model.to(dtype).state_dict()
    with FakeTensorMode():
        state = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in held.items()
        }
        images = torch.empty(IMAGES, device="cuda", dtype=dtype)
        maps = []
        handle = model.blocks.register_forward_hook(lambda m, a, out: maps.append(out))
        with recording.recording(modes=1) as rows:
            torch.func.functional_call(model, state, (images,))
        handle.remove()
    assert maps[0].device.type == "cuda"
    channels_last = is_channels_last(maps[0])
    return [(r.op, r.choice.backend, r.choice.reason, channels_last) for r in rows]


KERNEL = ("triton", "one Triton kernel, to be checked at its first use", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_kernels_on_a_gpu(monkeypatch, dtype):
    on_a_fake_gpu(monkeypatch)
    monkeypatch.setattr(pointwise, "dot_precision", lambda dtype: "tf32")
    rows = fake_model_rows(dtype)
    assert {row[1:] for row in rows[:2]} == {KERNEL}
    # The reason why this kernel and no other goes on.
    assert all(row[1] == "triton" and row[2].startswith(KERNEL[1]) and row[3] for row in rows)
    assert available_backends()["triton"] == ""


def test_auto_leaves_exact_float32_products_to_pytorch(monkeypatch):
    on_a_fake_gpu(monkeypatch)
    stem, *rows = fake_model_rows(torch.float32)
    assert stem[1:] == KERNEL
    assert {row[1:] for row in rows if row[0] == "depthwise_mix"} == {KERNEL}
    products = {row[1:] for row in rows if row[0] == "pointwise_mix"}
    assert len(products) == 1
    ((backend, reason, channels_last),) = products
    assert backend == "triton"
    assert reason.startswith("PyTorch's product and one Triton kernel for the rest, to be checked")
    assert "expected to be faster: float32 without TF32" in reason
    assert channels_last
    with use_backend("triton"):
        assert {row[1] for row in fake_model_rows(torch.float32)} == {"triton"}


def test_a_compiler_gets_plain_operators_for_exact_float32_products(monkeypatch):
    on_a_fake_gpu(monkeypatch)
    runs = {
        (op, dtype): compiled_kernels_run(torch.device("cuda"), dtype, op)
        for op in ("depthwise_mix", "pointwise_mix", "patch_embed")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert [call for call, runs_here in runs.items() if not runs_here] == [
        ("pointwise_mix", torch.float32)
    ]


def needs_fake_convolutions() -> None:
    try:
        with FakeTensorMode():
            conv = nn.Conv2d(8, 8, 3, padding="same", groups=8, device="cuda")
            conv(torch.empty(2, 8, 5, 5, device="cuda"))
    except RuntimeError as error:
        pytest.skip(f"this torch asks a driver about convolutions that never run: {error}")


def test_auto_falls_through_on_a_gpu_and_says_why(monkeypatch):
    needs_fake_convolutions()
    on_a_fake_gpu(monkeypatch)
    stem, *rows = fake_model_rows(torch.float64)
    not_float64 = "triton: the Triton kernels compute float32, bfloat16 and float16, not float64"
    assert {row[1:3] for row in (stem, *rows) if row[1] == "reference"} == {
        ("reference", not_float64)
    }
    # Of float64 PyTorch's products alone have a kernel, the one that ends them.
    assert stem[1] == "reference"
    assert {row[:3] for row in rows if row[1] != "reference"} == {
        (
            "pointwise_mix",
            "triton",
            "PyTorch's product and one Triton kernel for the rest, to be checked at its first use; "
            "float64 is multiplied by no kernel of ours",
        )
    }
    on_a_fake_gpu(monkeypatch, "the card is in the post")
    assert {row[1:3] for row in fake_model_rows(torch.float32)} == {
        ("reference", "triton: the card is in the post"),
        ("reference", "triton product: the card is in the post"),
    }
    with use_backend("triton"), pytest.raises(BackendError, match="the card is in the post"):
        fake_model_rows(torch.float32)
    with use_backend("cpu"), pytest.raises(BackendError, match="the tensors are on cuda"):
        fake_model_rows(torch.float32)


def test_without_triton_auto_takes_the_cuda_extension_on_a_gpu(monkeypatch):
    needs_fake_convolutions()
    on_a_fake_gpu(monkeypatch)
    monkeypatch.setattr(support, "_why_no_triton", lambda: "Triton is not installed")
    module = FakeCuda(89, ("mma.sync",)).module()
    monkeypatch.setattr(native_cuda, "_find", lambda: (module, ""))
    native_cuda.refusal.cache_clear()
    native_cuda._numbers.cache_clear()
    try:
        for architecture, backend in ((89, "cuda"), (100, "reference")):
            monkeypatch.setattr(support, "architecture", lambda device, a=architecture: a)
            rows = fake_model_rows(torch.bfloat16)
            products = {row[1] for row in rows[1:] if row[0] == "pointwise_mix"}
            assert products == {backend}
            assert {row[1] for row in rows if row[0] == "depthwise_mix"} == {"reference"}
            others = (row[2] for row in rows if row[1] == "reference")
            assert all("Triton is not installed" in reason for reason in others)
        # The compiler's own products, with what stands around them.
        on = (torch.device("cuda"), torch.bfloat16, "pointwise_mix")
        assert not compiled_kernels_run(*on)
    finally:
        native_cuda.refusal.cache_clear()
        native_cuda._numbers.cache_clear()


def test_a_compiler_on_a_gpu_gets_the_operators_only_where_kernels_run(monkeypatch):
    needs_fake_convolutions()
    for why in ("", "the card is in the post"):
        on_a_fake_gpu(monkeypatch, why)
        with FakeTensorMode(), monkeypatch.context() as patch:
            half = PointwiseMix(8, device="cuda").eval()
            x = torch.empty(2, 8, 4, 4, device="cuda")
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            reason = reason_not_fusible(DEPTHWISE._replace(fits=POINTWISE.fits), *half, x)
        assert reason == (
            why and "no fused kernel for this device: the compiler gets plain operators"
        )


def test_reasons_why_kernels_cannot_run(monkeypatch):
    gpu0 = torch.device("cuda", 0)
    monkeypatch.setattr(support, "_capable", set())
    monkeypatch.setattr(support, "_why_no_triton", lambda: "Triton is not installed")
    assert support.why_not(gpu0) == "Triton is not installed"
    monkeypatch.setattr(support, "_why_no_triton", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in support.why_not(gpu0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert support.why_not(gpu0) == "Old GPU has compute capability 7.5, the kernels need 8.0"
    assert support.why_not(torch.device("cuda", 1)) == "torch sees no device cuda:1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 9))
    assert support.why_not(gpu0) == ""
    monkeypatch.setenv("CONVMIXER_FAST_DISABLE_TRITON", "1")
    assert support.why_not(gpu0) == ""  # asked once: this is the path of every call
    monkeypatch.setattr(support, "_capable", set())
    assert "CONVMIXER_FAST_DISABLE_TRITON" in support.why_not(gpu0)
    monkeypatch.delenv("CONVMIXER_FAST_DISABLE_TRITON")
    assert support.why_not(torch.device("cpu")) == "the tensors are on cpu"
    assert support.why_not(torch.device("mps")) == "the tensors are on mps"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert support.why_not(torch.device("cpu")) == ""


def test_a_triton_that_is_too_old(monkeypatch):
    support._why_no_triton.cache_clear()
    monkeypatch.setattr(support, "find_spec", lambda name: object())
    monkeypatch.setattr(support, "triton_version", lambda: "3.1.0")
    try:
        assert support._why_no_triton() == "Triton 3.1.0 is too old: the kernels need 3.4"
    finally:
        support._why_no_triton.cache_clear()


def test_under_auto_emulation_leaves_cpu_tensors_to_the_cpu(model):
    with installed("auto") as double, torch.no_grad():
        model(torch.randn(IMAGES))
        assert not double.calls


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_steady_call_looks_nothing_up_and_notices_what_changes(double, model, monkeypatch):
    x = torch.randn(IMAGES)
    model(x)  # finds the kernels right, which is news to every half before the last kind
    want = model(x)
    with monkeypatch.context() as patch:
        # Who serves it, what was tuned and what was found out are not asked again.
        patch.setattr(dispatch, "implementations", lambda *args: pytest.fail("looked up"))
        before = double.calls.copy()
        assert torch.equal(model(x), want)
        assert sum((double.calls - before).values()) == 7
    assert torch.equal(copy.deepcopy(model)(x), want)
    spatial, _conv, _act, norm = model.blocks[1]

    def differs(how: str) -> None:
        got = model(x)
        assert not torch.equal(got, want), how
        with use_backend("reference"):
            torch.testing.assert_close(got, model(x), rtol=1e-3, atol=1e-3)

    norm.bias.add_(1.0)
    differs("a parameter")
    norm.bias.sub_(1.0)
    norm.eps = 10.0
    differs("epsilon")
    norm.eps = 1e-5
    spatial.fn[1] = nn.ReLU()
    differs("an activation")
    spatial.fn[1] = nn.GELU(approximate="tanh")
    differs("an activation that has no kernel")
    spatial.fn[1] = nn.GELU()
    handle = norm.register_forward_hook(lambda m, a, out: out + 1.0)
    differs("a hook")
    handle.remove()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    with Watching() as watching:
        model(x)
    # Who watches operators sees those of the plain modules.
    assert "aten::convolution" in watching.seen
    assert not any("convmixer_fast" in name for name in watching.seen)
    before = double.calls.copy()
    model(x[:, :, :-4]), model(x[:1].contiguous(memory_format=torch.channels_last))
    assert double.calls["depthwise_mix"] > before["depthwise_mix"]
    monkeypatch.setenv("CONVMIXER_FAST_BACKEND", "reference")
    before = double.calls.copy()
    model(x)
    assert double.calls == before


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the kernel for")
def test_a_steady_call_whose_launch_fails(double, model, monkeypatch):
    monkeypatch.setattr(dispatch, "requested_backend", lambda: "auto")
    monkeypatch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
    monkeypatch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "")
    x = torch.randn(IMAGES)
    want = model(x)
    assert torch.equal(model(x), want)
    double.error["depthwise_mix"] = RuntimeError("too many resources requested")
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)
    before = double.calls.copy()
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)
    assert double.calls["depthwise_mix"] == before["depthwise_mix"]
