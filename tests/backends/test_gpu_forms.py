"""A kernel is checked in the very form that Triton compiles for the call, whatever the call is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from fakes.triton import emulated
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_modes import compiler

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from convmixer_fast.backends.kernel_key import (
    BEYOND_INT32,
    KernelKey,
    pixels_of,
    stride_class,
    strides_like,
)
from convmixer_fast.backends.operands import Packed
from convmixer_fast.backends.triton import support
from convmixer_fast.backends.triton.configs import ProductConfig
from convmixer_fast.backends.triton.kernels import (
    after_product,
    depthwise,
    pointwise,
    stem,
)
from convmixer_fast.ops import execution
from convmixer_fast.ops.dispatch import call_of
from convmixer_fast.ops.registry import OPERATORS, implementation_of

pytestmark = compiler

OPS = ("depthwise_mix", "pointwise_mix", "product", "patch_embed", "patch_embed_uint8")
LAYOUTS = ("nchw", "nhwc", "offset", "rows", "columns", "channels", "images", "expanded", "windows")
KERNELS = (
    depthwise.depthwise_kernel,
    pointwise.pointwise_kernel,
    pointwise.pointwise_descriptor_kernel,
    after_product.after_product_kernel,
    stem.stem_kernel,
)


@pytest.fixture
def launches() -> Iterator[list[tuple]]:
    """What Triton would compile for each launch, by its own rules; nothing runs."""
    backend, seen = CUDABackend(GPUTarget("cuda", 90, 32)), []

    def recorder(kernel):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)

        def run(*args, grid, warmup, **kwargs):
            _, specialization, options = binder(*args, **kwargs)
            seen.append((kernel.__name__, str(specialization), str(options)))

        return run

    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, emulated():
        for kernel in KERNELS:
            patch.setattr(kernel, "run", recorder(kernel))
        patch.setattr(support, "architecture", lambda device: 90)
        yield seen
    torch.set_float32_matmul_precision(before)


def lay_out(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    n, c, h, w = shape
    if layout == "nhwc":
        return torch.zeros(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)
    if layout == "offset":
        return torch.zeros(n * c * h * w + 1, dtype=dtype)[1:].view(shape)
    if layout == "rows":
        return torch.zeros(n, c, h + 3, w, dtype=dtype)[:, :, 1 : h + 1]
    if layout == "columns":
        return torch.zeros(n, c, h, w + 5, dtype=dtype)[..., 2 : w + 2]
    if layout == "channels":
        return torch.zeros(n, h, w, c + 3, dtype=dtype).permute(0, 3, 1, 2)[:, 1 : c + 1]
    if layout == "images":
        return torch.zeros(2 * n, c, h, w, dtype=dtype)[1::2]
    if layout == "expanded":
        return torch.zeros(1, 1, h, w, dtype=dtype).expand(shape)
    if layout == "windows":
        return torch.zeros(n * c * (h + w), dtype=dtype).as_strided(shape, (c * w, w, 1, 1))
    return torch.zeros(shape, dtype=dtype)


def check(case: KernelKey, config: object = None) -> None:
    """The check of a case, beside results that take no time."""

    def reference(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        n, _, h, w = x.shape
        p = 1 if case.op == "depthwise_mix" else case.kernel_size
        return torch.zeros(n, weight.shape[0], h // p, w // p, dtype=weight.dtype)

    kernel = copy.copy(implementation_of(case, config))
    own = kernel.operator
    kernel.operator = SimpleNamespace(
        reference=reference, sample=own.sample, sample_shape=own.sample_shape
    )
    execution.check(kernel, case, config)


def call(
    op: str,
    x: Tensor,
    out_channels: int,
    kernel_size: int,
    dtype: torch.dtype,
    bias: bool = True,
    flat: bool = False,
) -> tuple[KernelKey, list[object]]:
    """The case of a call, and its arguments; ``flat``: parameters are parts of one buffer."""

    def parameter(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.zeros(count + flat, dtype=dtype)[int(flat) :].view(shape)

    c = x.shape[1]
    d = c if op == "depthwise_mix" else out_channels
    k = 1 if op in ("pointwise_mix", "product") else kernel_size
    weight = parameter(d, 1 if op == "depthwise_mix" else c, k, k)
    vectors = [parameter(d) if bias else None, *(parameter(d, dtype=torch.float32),) * 2]
    normal = [[0.5] * c, [0.25] * c] if op == "patch_embed_uint8" else []
    operator = OPERATORS["patch_embed" if op in ("product", "pointwise_mix") else op]
    found = call_of(operator, x, weight, vectors[0], "gelu", dtype)
    return found.key, [weight, *vectors, "gelu", *normal]


def assert_checked_as_called(
    launches: list[tuple], case: KernelKey, x: Tensor, arguments: list, config: object = None
) -> None:
    launches.clear()
    execution.launch(implementation_of(case, config), case, config, x, *arguments)
    (called,) = launches
    launches.clear()
    check(case, config)
    (checked,) = launches
    assert checked == called


shapes = st.tuples(
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 48, 64, 96])),
    st.integers(1, 20),
    st.one_of(st.integers(1, 20), st.integers(50, 140)),
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    op=st.sampled_from(OPS),
    shape=shapes,
    out_channels=st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 64, 96])),
    kernel_size=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    flat=st.booleans(),
    tf32=st.booleans(),
)
@example("depthwise_mix", (1, 6, 5, 70), 1, 3, torch.float32, "nhwc", True, False, False)
@example("depthwise_mix", (1, 2, 5, 90), 1, 3, torch.bfloat16, "nhwc", True, True, False)
@example("patch_embed", (2, 3, 32, 225), 8, 7, torch.bfloat16, "nchw", True, False, False)
@example("patch_embed", (2, 3, 32, 224), 8, 7, torch.bfloat16, "nchw", True, False, False)
@example("patch_embed_uint8", (2, 1, 32, 64), 8, 4, torch.float16, "nhwc", False, True, False)
@example("pointwise_mix", (1, 16, 4, 4), 16, 1, torch.float32, "nhwc", True, True, True)
def test_any_call_is_checked_in_its_own_form(
    launches, op, shape, out_channels, kernel_size, dtype, layout, bias, flat, tf32
):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    k = kernel_size
    if op in ("patch_embed", "patch_embed_uint8"):
        k += k == 1 and op == "patch_embed"
        shape = (*shape[:2], max(shape[2], k), max(shape[3], k))
    x = lay_out(layout, shape, torch.uint8 if op == "patch_embed_uint8" else dtype)
    case, arguments = call(op, x, out_channels, k, dtype, bias, flat)
    config = ProductConfig() if op == "product" else None
    assert_checked_as_called(launches, case, x, arguments, config)


def test_products_of_many_outputs_and_of_the_copy_engine(launches):
    names = set()
    for channels, out_channels, dtype in itertools.product(
        (16, 33), (1024,), (torch.bfloat16, torch.float32)
    ):
        x = torch.zeros(1, channels, 4, (1 << 21) // 4 // out_channels + 3, dtype=dtype)
        case, arguments = call("pointwise_mix", x, out_channels, 1, dtype)
        assert case.size == 1
        assert_checked_as_called(launches, case, x, arguments)
        names |= {name for name, *_ in launches}
    assert names == {"pointwise_kernel", "pointwise_descriptor_kernel"}


def test_rows_beyond_32_bits_are_checked_without_the_copy_engine(launches):
    with FakeTensorMode():
        x = torch.empty(2, 16, 1 << 15, 1 << 15, dtype=torch.bfloat16)
        weight = torch.empty(1024, 16, 1, 1, dtype=torch.bfloat16)
    case = call_of(OPERATORS["pointwise_mix"], x, weight, None, "gelu").key
    assert case.size == 2
    check(case)
    check(case._replace(size=1))
    (beyond, form, _), (below, *_) = launches
    assert (beyond, below) == ("pointwise_kernel", "pointwise_descriptor_kernel")
    # M is 64 bits wide in every call, so that it makes no other form.
    names = [parameter.name for parameter in pointwise.pointwise_kernel.params]
    assert names.index("M") == 6
    assert eval(form)[6] == ("i64", None)


def test_images_whose_strides_do_not_fit_32_bits(launches):
    try:
        room = torch.empty(BEYOND_INT32 + (1 << 16), dtype=torch.uint8)  # no page of it is touched
    except RuntimeError as error:
        pytest.skip(f"no 2 GiB of addresses: {error}")
    x = room.as_strided((2, 3, 16, 16), (BEYOND_INT32 + 7, 256, 16, 1))
    case, arguments = call("patch_embed_uint8", x, 8, 4, torch.bfloat16)
    assert case.form[0] == "anyL"
    assert_checked_as_called(launches, case, x, arguments)


@pytest.mark.parametrize("op", ["depthwise_mix", "pointwise_mix"])
@pytest.mark.parametrize("width", [7, 64, 90, 130])
@pytest.mark.parametrize("flat", [False, True])
def test_a_bound_launch_has_the_form_of_the_check(launches, op, width, flat):
    x = torch.zeros(2, 5, width, 12).permute(0, 3, 1, 2)
    case, (weight, bias, scale, shift, *_) = call(op, x, 12, 3, torch.float32, flat=flat)
    kernel = implementation_of(case, None)
    packed = kernel.pack(Packed(weight, bias, scale, shift), None)
    run = kernel.bind(case, None, packed)
    run(x, torch.empty_like(x))
    check(case)
    bound, checked = launches
    assert bound == checked


@settings(max_examples=50, deadline=None)
@given(
    classes=st.lists(st.sampled_from(["1", "16", "any"]), min_size=4, max_size=4).filter(
        lambda classes: classes.count("1") < 2
    ),
    shape=st.tuples(*[st.integers(1, 6)] * 4),
)
def test_strides_of_given_classes_keep_elements_apart(classes, shape):
    strides = strides_like(classes, shape)
    assert [*map(stride_class, strides)] == classes
    places = {
        sum(s * i for s, i in zip(strides, index, strict=True))
        for index in itertools.product(*map(range, shape))
    }
    assert len(places) == torch.Size(shape).numel()


@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (4, 3, 225, 31), (2, 2, 7, 9)])
def test_pytorchs_own_layouts_are_found_again(shape):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(shape).contiguous(memory_format=memory_format)
        assert tuple(strides_like([*map(stride_class, x.stride())], shape)) == x.stride()


def test_pixels_are_the_same_whatever_their_strides_mean():
    for layout, n, c in itertools.product(LAYOUTS, (1, 2), (1, 3)):
        x = lay_out(layout, (n, c, 6, 5), torch.float32)
        if layout not in ("expanded", "windows"):
            x.copy_(torch.randn(x.shape))
        assert torch.equal(pixels_of(x), x)
        assert pixels_of(x).stride().count(1) <= 1
