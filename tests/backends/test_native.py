"""The compiled CPU engine: right for every shape, stride and instruction set, on any threads."""

from __future__ import annotations

import gc
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator

import fresh_python
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.cpu import native
from convmixer_fast.backends.cpu.fingerprint import (
    _plain_fingerprint,
    fingerprint,
    fingerprint_of,
    span_of,
)
from convmixer_fast.backends.extensions import build_info
from convmixer_fast.testing import assert_numerics

ENGINE = native.load()
needs_engine = pytest.mark.skipif(ENGINE is None, reason=native.why_unavailable() or "built")
ISAS = list(ENGINE.isas()) if ENGINE is not None else []

#: Ways to lay the same values out in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows_with_gaps": lambda x: F.pad(x, (3, 5))[..., 3 : 3 + x.shape[3]],
    "every_other_row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "every_other_pixel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels_last_slice": lambda x: F.pad(x, (1, 0)).contiguous(memory_format=torch.channels_last)[
        ..., 1:
    ],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using_isa(request.param) as name:
        yield name


class using_isa:
    """Runs a block on one instruction set."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> str:
        self.before = ENGINE.isa()
        ENGINE.set_isa(self.name)
        return self.name

    def __exit__(self, *_: object) -> None:
        ENGINE.set_isa(self.before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """The definition, in the dtype of its arguments."""
    k = weight.shape[-1]
    padded = F.pad(x, ((k - 1) // 2, k // 2, (k - 1) // 2, k // 2))
    a = ACTIVATIONS[act]()(F.conv2d(padded, weight, bias, groups=weight.shape[0]))
    return x + scale.view(1, -1, 1, 1) * a + shift.view(1, -1, 1, 1)


def operands(c: int, k: int, bias: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Weights, bias, scale and shift with the spread of a trained layer's."""
    scale = 0.5 + torch.rand(c)
    scale[:: max(1, c // 4)] *= 4
    return (
        torch.randn(c, 1, k, k) / k,
        0.2 * torch.randn(c) if bias else None,
        scale,
        0.3 * torch.randn(c),
    )


def check(x: Tensor, ops: tuple[Tensor, Tensor | None, Tensor, Tensor], act: str) -> Tensor:
    """Compute with the engine and hold the result to the numerics rule."""
    result = native.depthwise_mix(x, *ops, act)
    double = [None if t is None else t.double() for t in ops]
    assert_numerics(result, formula(x, *ops, act), formula(x.double(), *double, act))
    return result


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 31])
def test_every_kernel_size_matches_the_formula(isa: str, k: int, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 19, 21, 18))
    check(x, operands(19, k), "gelu")


@needs_engine
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("k", [5, 8])
def test_every_activation_matches_the_formula(isa: str, k: int, act: str) -> None:
    x = torch.randn(2, 17, 12, 20) * 2
    ops = operands(17, k)
    check(x, ops, act)
    check(x.contiguous(memory_format=torch.channels_last), ops, act)


@needs_engine
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    h=st.integers(1, 40),
    w=st.integers(1, 70),
    k=st.integers(1, 31),
    act=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from(list(LAYOUTS)),
    name=st.sampled_from(ISAS or ["none"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_the_formula(
    n: int, c: int, h: int, w: int, k: int, act: str, layout: str, name: str, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    with using_isa(name):
        check(LAYOUTS[layout](torch.randn(n, c, h, w)), operands(c, k, bias), act)


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 300), (1, 3, 300, 1), (2, 33, 3, 2)])
def test_planes_smaller_than_the_kernel(isa: str, shape: tuple[int, ...], layout: str) -> None:
    check(LAYOUTS[layout](torch.randn(shape)), operands(shape[1], 9), "gelu")


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_planes_larger_than_a_block(isa: str, layout: str) -> None:
    check(LAYOUTS[layout](torch.randn(1, 3, 270, 530)), operands(3, 9), "relu")


@needs_engine
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
def test_empty_tensors_give_empty_tensors(isa: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert native.depthwise_mix(x, *operands(shape[1], 5), "gelu").shape == shape


@needs_engine
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_strides_change_no_bit(isa: str, layout: str) -> None:
    x = torch.randn(3, 6, 14, 37)
    ops = operands(6, 7)
    as_contiguous = native.depthwise_mix(x, *ops, "gelu")
    view = LAYOUTS[layout](x)
    assert torch.equal(view, x)
    result = native.depthwise_mix(view, *ops, "gelu")
    if layout == "channels_last":
        assert result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, as_contiguous)
    else:
        assert result.is_contiguous()
        assert torch.equal(result, as_contiguous)


@needs_engine
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)])
def test_expanded_inputs_are_read_as_shown(isa: str, axes: tuple[int, ...]) -> None:
    shape = [2, 5, 13, 18]
    small = torch.randn([1 if axis in axes else size for axis, size in enumerate(shape)])
    ops = operands(5, 5)
    result = native.depthwise_mix(small.expand(shape), *ops, "silu")
    assert torch.equal(result, native.depthwise_mix(small.expand(shape).contiguous(), *ops, "silu"))


@needs_engine
def test_overlapping_windows_are_read_as_shown(isa: str) -> None:
    windows = torch.randn(300).as_strided((2, 3, 9, 11), (40, 7, 5, 1))
    ops = operands(3, 3)
    assert torch.equal(
        native.depthwise_mix(windows, *ops, "gelu"),
        native.depthwise_mix(windows.clone(), *ops, "gelu"),
    )


@needs_engine
def test_weights_of_any_strides(isa: str) -> None:
    x = torch.randn(1, 20, 9, 10)
    weight, *rest = operands(20, 5)
    expected = native.depthwise_mix(x, weight, *rest, "gelu")
    for view in (
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        F.pad(weight, (2, 1))[..., 2:7],
        weight.mT.contiguous().mT,
    ):
        assert torch.equal(view, weight)
        assert torch.equal(native.depthwise_mix(x, view, *rest, "gelu"), expected)


@needs_engine
def test_negated_views_are_read_as_shown(isa: str) -> None:
    x = torch.randn(1, 4, 8, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    ops = operands(4, 3)
    assert torch.equal(
        native.depthwise_mix(x, *ops, "gelu"),
        native.depthwise_mix(x.resolve_neg().contiguous(), *ops, "gelu"),
    )


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [7, 8])
def test_thread_count_changes_no_bit(
    isa: str, k: int, layout: str, threads: Callable[[int], None]
) -> None:
    x = LAYOUTS[layout](torch.randn(2, 37, 33, 35))
    ops = operands(37, k)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results += [native.depthwise_mix(x, *ops, "gelu") for _ in range(5)]
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_size_changes_no_bit(isa: str, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(5, 18, 17, 16))
    ops = operands(18, 9)
    together = native.depthwise_mix(x, *ops, "gelu")
    apart = [native.depthwise_mix(LAYOUTS[layout](image[None]), *ops, "gelu") for image in x]
    assert torch.equal(together, torch.cat(apart))


def call(x: Tensor, y: Tensor, ops: tuple[Tensor, ...], /, **changes: object) -> None:
    """The extension's own function, with any argument replaced."""
    weight, bias, scale, shift = ops
    arguments = {
        "x_ptr": x.data_ptr(),
        "x_strides": x.stride(),
        "y_ptr": y.data_ptr(),
        "y_strides": y.stride(),
        "shape": tuple(x.shape),
        "k": 3,
        "weight_ptr": weight.data_ptr(),
        "bias_ptr": bias.data_ptr(),
        "scale_ptr": scale.data_ptr(),
        "shift_ptr": shift.data_ptr(),
        "act": 0,
        "layout": 0,
        "threads": 2,
    }
    ENGINE.depthwise_mix(**{**arguments, **changes})


@needs_engine
@pytest.mark.parametrize("layout", [0, 1])
def test_writes_every_output_and_nothing_else(isa: str, layout: int) -> None:
    shape = (2, 21, 13, 19)
    x = torch.randn(shape)
    ops = operands(21, 7)
    expected = formula(x, *ops, "gelu")
    frame = torch.full((4, 27, 17, 24), float("nan"))
    if layout:
        frame = frame.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        ops = (ops[0].reshape(21, 49).t().contiguous(), *ops[1:])
    y = frame[1:3, 2:23, 2:15, 3:22]
    assert y.isnan().all()
    call(x, y, ops, k=7, layout=layout)
    torch.testing.assert_close(y, expected)
    y.fill_(float("nan"))
    assert frame.isnan().all()


@needs_engine
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinity_reach_just_their_window(
    isa: str, act: str, value: float, layout: str
) -> None:
    k = 5
    x = torch.randn(1, 3, 20, 21)
    x[0, 1, 9, 10] = value
    ops = operands(3, k)
    result = native.depthwise_mix(LAYOUTS[layout](x), *ops, act)
    expected = formula(x.double(), *[t.double() for t in ops], act)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    # relu turns the window's -inf into 0; every other activation shows the whole of it.
    touched = ~result.isfinite()[0, 1]
    assert touched[9, 10]
    touched[7:12, 8:13] = False
    assert not touched.any()
    assert result[:, [0, 2]].isfinite().all()


@needs_engine
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_at_the_ends_of_the_float_range(isa: str, act: str) -> None:
    values = torch.tensor(
        [0.0, -5.39, -5.41, -9.0, -90.0, -104.0, -1e4, -1e30, -3e38, 5.41, 9.0, 89.0, 1e4, 1e30]
    )
    result = native.epilogue_(values.clone().view(1, 1, 1, -1), torch.ones(1), torch.zeros(1), act)
    expected = ACTIVATIONS[act]()(values.double())
    torch.testing.assert_close(result.flatten().double(), expected, rtol=3e-7, atol=3e-7)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")])
    result = native.epilogue_(special.clone().view(1, 1, 1, 3), torch.ones(1), torch.zeros(1), act)
    expected = ACTIVATIONS[act]()(special.double())
    assert torch.equal(result.flatten().isnan(), expected.isnan())
    assert torch.equal(result.flatten().isinf(), expected.isinf())


@needs_engine
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_are_as_exact_as_torch(isa: str, act: str) -> None:
    x = torch.linspace(-9, 9, 200_001).view(1, 1, 1, -1)
    function = ACTIVATIONS[act]()
    ours = native.epilogue_(x.clone(), torch.ones(1), torch.zeros(1), act)
    assert_numerics(ours, function(x), function(x.double()))


@needs_engine
def test_gelu_is_as_exact_as_its_comments_say(isa: str) -> None:
    def errors(x: Tensor) -> tuple[Tensor, Tensor]:
        ours = native.epilogue_(x.view(1, 1, 1, -1).clone(), torch.ones(1), torch.zeros(1), "gelu")
        # Not F.gelu: left of -5 even its float64 has 1 + erf left.
        wide = x.double()
        exact = (
            torch.where(x > 0, wide, 0.0) - wide.abs() * torch.special.erfc(wide.abs() / 2**0.5) / 2
        )
        return ours.flatten().double() - exact, exact

    x = torch.linspace(-9, 9, 400_003)
    error, _ = errors(x)
    assert error.abs().max() <= 4.1e-7
    assert error[x < -1.5].abs().max() <= 3.9e-8
    error, _ = errors(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    assert error.mean().abs() <= 1e-9
    tiny = torch.logspace(-36, -3, 1000)
    error, exact = errors(torch.cat([tiny, -tiny]))
    assert (error / exact).abs().max() <= 2**-21


@needs_engine
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 3, 5), (1, 16, 40, 40), (1, 1, 1, 1)])
def test_epilogue_matches_the_formula(
    isa: str, shape: tuple[int, ...], layout: str, act: str
) -> None:
    h = LAYOUTS[layout](torch.randn(shape) * 3)
    _, _, scale, shift = operands(shape[1], 1)

    def whole(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ACTIVATIONS[act]()(h) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    expected, oracle = whole(h, scale, shift), whole(h.double(), scale.double(), shift.double())
    version = h._version
    result = native.epilogue_(h, scale, shift, act)
    assert result is h
    assert h._version > version
    assert_numerics(result, expected, oracle)


@needs_engine
def test_epilogue_leaves_the_neighbours_alone(isa: str) -> None:
    memory = torch.full((3, 2, 5, 7), float("nan"))
    memory[1].normal_()
    expected = F.gelu(memory[1]) * 2 + 1
    native.epilogue_(memory[1:2], torch.full((2,), 2.0), torch.ones(2), "gelu")
    torch.testing.assert_close(memory[1], expected)
    assert memory[[0, 2]].isnan().all()


@needs_engine
def test_epilogue_of_other_strides_is_refused() -> None:
    h = torch.randn(2, 3, 4, 10)[..., ::2]
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        native.epilogue_(h, torch.ones(3), torch.ones(3), "gelu")


@needs_engine
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 5, 5)}, ValueError, "x must have shape"),
        ({"x": torch.randn(1, 3, 5, 5).double()}, TypeError, "x must be float32"),
        ({"x": torch.randn(1, 3, 5, 5, device="meta")}, ValueError, "x must be a CPU tensor"),
        ({"weight": torch.randn(3, 1, 5, 3)}, ValueError, "weight must have shape"),
        ({"weight": torch.randn(4, 1, 3, 3)}, ValueError, "weight must have shape"),
        ({"weight": torch.randn(3, 1, 0, 0)}, ValueError, "weight must have shape"),
        ({"weight": torch.randn(3, 1, 3, 3).half()}, TypeError, "weight must be float32"),
        ({"bias": torch.randn(4)}, ValueError, "bias must have shape"),
        ({"scale": torch.randn(2)}, ValueError, "scale must have shape"),
        ({"shift": torch.randn(3).double()}, TypeError, "shift must be float32"),
        ({"act": "tanh"}, ValueError, "act must be one of"),
    ],
)
def test_wrong_tensors_are_named(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    weight, bias, scale, shift = operands(3, 3)
    right = {
        "x": torch.randn(1, 3, 5, 5),
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "act": "gelu",
    }
    with pytest.raises(error, match=message) as caught:
        native.depthwise_mix(**{**right, **changes})
    assert "\n" not in str(caught.value)


@needs_engine
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"shape": (1, 3, -1, 5)}, "shape"),
        ({"k": 0}, "k"),
        ({"act": 5}, "act"),
        ({"act": -1}, "act"),
        ({"layout": 2}, "layout"),
        ({"threads": 0}, "threads"),
        ({"x_strides": (75, 25, 10, 2)}, "x_strides"),
        ({"y_strides": (75, 25, 10, 2)}, "y_strides"),
        ({"y_strides": (75, 0, 5, 1)}, "y_strides"),
        ({"layout": 1}, "x_strides"),
        ({"x_ptr": 0}, "x_ptr"),
        ({"y_ptr": 0}, "y_ptr"),
        ({"weight_ptr": 0}, "weight_ptr"),
        ({"scale_ptr": 0}, "scale_ptr"),
        ({"shift_ptr": 0}, "shift_ptr"),
    ],
)
def test_wrong_raw_arguments_are_named(changes: dict[str, object], name: str) -> None:
    x = torch.randn(1, 3, 5, 5)
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(x, torch.empty_like(x), operands(3, 3), **changes)


@needs_engine
def test_working_in_place_is_refused() -> None:
    x = torch.randn(1, 3, 5, 5)
    with pytest.raises(ValueError, match=r"^y_ptr: "):
        call(x, x, operands(3, 3))


@needs_engine
def test_several_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    x = torch.randn(1, 24, 40, 40)
    ops = operands(24, 9)
    expected = native.depthwise_mix(x, *ops, "gelu")
    wrong: list[float] = []

    def work() -> None:
        for _ in range(20):
            result = native.depthwise_mix(x, *ops, "gelu")
            if not torch.equal(result, expected):
                wrong.append((result - expected).abs().max().item())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert wrong == []


def run_python(script: str, **environment: str) -> str:
    """The output of a script in a fresh interpreter that must end well within two minutes."""
    done = fresh_python.run("-c", textwrap.dedent(script), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


SET_UP = """
import os, torch
torch.manual_seed(0)
torch.set_num_threads(2)
x = torch.randn(1, 24, 40, 40)
ops = (torch.randn(24, 1, 7, 7), torch.randn(24), torch.randn(24), torch.randn(24), "gelu")

def in_child(work):
    child = os.fork()
    if child == 0:
        ok = 1
        try:
            ok = 0 if work() else 2
        finally:
            os._exit(ok)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@needs_engine
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use_neither_hangs_nor_lies() -> None:
    script = """
    from convmixer_fast.backends.cpu import native
    expected = native.depthwise_mix(x, *ops).numpy().tobytes()
    work = lambda: native.depthwise_mix(x, *ops).numpy().tobytes() == expected
    print(in_child(work), in_child(lambda: in_child(work) == 0), work())
    print(in_child(lambda: native.load().threading_backend() == "std::thread"))
    """
    output = run_python(SET_UP + textwrap.dedent(script))
    assert output.split() == ["0", "0", "True", "0"]


@needs_engine
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_self_check_in_a_fork_of_a_busy_parent_does_not_hang() -> None:
    script = """
    torch.randn(1000, 1000).relu().sum()  # torch's pool lives, the extension is not loaded
    def work():
        from convmixer_fast.backends.cpu import native
        result = native.depthwise_mix(x, *ops)
        return bool(result.numpy().std() > 0)
    print(in_child(work))
    """
    assert run_python(SET_UP + textwrap.dedent(script)) == "0"


@needs_engine
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs torch's libgomp")
def test_nested_in_a_parallel_region_is_serial_and_right() -> None:
    script = """
    import ctypes
    from convmixer_fast.backends.cpu import native
    expected = native.depthwise_mix(x, *ops)
    backend = native.load().threading_backend()
    path = next(
        (line.split()[-1] for line in open("/proc/self/maps")
         if line.rstrip().endswith(backend.removeprefix("gomp:"))), None)
    if path is None:
        print("skip"); raise SystemExit
    right = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: right.append(torch.equal(native.depthwise_mix(x, *ops), expected)))
    ctypes.CDLL(path).GOMP_parallel(region, None, 2, 0)
    print(right)
    """
    output = run_python(SET_UP + textwrap.dedent(script))
    if output == "skip":
        pytest.skip("torch runs on no OpenMP runtime here")
    assert output == "[True, True]"


@needs_engine
def test_plain_threads_serve_where_torch_brings_no_openmp() -> None:
    # The extension alone, in a process that never imports torch.
    script = f"""
    import array, importlib.util
    spec = importlib.util.spec_from_file_location("convmixer_fast._cpu", {ENGINE.__file__!r})
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    c, h, w, k = 16, 40, 40, 7
    x = array.array("f", [((i * 37) % 101) / 50 - 1 for i in range(c * h * w)])
    weight = array.array("f", [((i * 53) % 31) / 100 - 0.15 for i in range(c * k * k)])
    ones = array.array("f", [1.0] * c)
    address = lambda a: a.buffer_info()[0]
    results = []
    for threads in (1, 2, 3):
        y = array.array("f", [float("nan")] * len(x))
        strides = (c * h * w, h * w, w, 1)
        cpu.depthwise_mix(address(x), strides, address(y), strides, (1, c, h, w), k,
                          address(weight), 0, address(ones), address(ones), 0, 0, threads)
        results.append(y.tobytes())
    print(cpu.threading_backend(), len(set(results)), sum(v != v for v in y))
    """
    assert run_python(script) == "std::thread 1 0"


@needs_engine
def test_threading_backend_is_torchs_own_runtime() -> None:
    backend = ENGINE.threading_backend()
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        pytest.skip("this torch does not run on OpenMP")
    assert backend.startswith("gomp:lib") or not sys.platform.startswith("linux")


@needs_engine
@pytest.mark.parametrize("name", ISAS)
def test_environment_lowers_the_instruction_set(name: str) -> None:
    script = "from convmixer_fast.backends.cpu import native; print(native.load().isa())"
    assert run_python(script, CONVMIXER_FAST_ISA=name) == name


@needs_engine
def test_best_instruction_set_is_the_default() -> None:
    script = "from convmixer_fast.backends.cpu import native; print(native.load().isa())"
    assert run_python(script, CONVMIXER_FAST_ISA="") == ISAS[-1]


@needs_engine
def test_unknown_instruction_set_is_an_error_that_lists_the_known() -> None:
    script = (
        "from convmixer_fast.backends.cpu import native; "
        "print(native.load(), native.why_unavailable())"
    )
    output = run_python(script, CONVMIXER_FAST_ISA="avx1024")
    assert output.startswith("None ")
    assert "CONVMIXER_FAST_ISA: unknown instruction set avx1024" in output
    assert all(name in output for name in ISAS)
    with pytest.raises(ValueError, match="isa: unknown instruction set sse9"):
        ENGINE.set_isa("sse9")


def test_switched_off_by_the_environment_and_says_so() -> None:
    script = """
    import torch
    from convmixer_fast.backends.cpu import native
    from convmixer_fast.backends.cpu.fingerprint import fingerprint
    assert native.load() is None
    print(native.why_unavailable())
    a, b = torch.randn(100), torch.randn(3, 5)
    first = fingerprint([a, b])
    assert first == fingerprint([a.clone(), b])
    a.data.mul_(1.01)
    assert first != fingerprint([a, b])
    try:
        native.epilogue_(torch.randn(1, 3, 2, 2), b[0, :3], b[1, :3], "gelu")
    except RuntimeError as error:
        print(error)
    """
    output = run_python(script, CONVMIXER_FAST_DISABLE_NATIVE="1").splitlines()
    assert output[0] == "switched off by CONVMIXER_FAST_DISABLE_NATIVE"
    assert output[1] == f"the CPU engine is not available: {output[0]}"


def test_reason_of_a_failed_build_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native, "import_module", missing)
    monkeypatch.setattr(native, "build_info", lambda: {"reason": "no C++ compiler"})
    monkeypatch.delenv("CONVMIXER_FAST_DISABLE_NATIVE", raising=False)
    module, why = native._find.__wrapped__()
    assert module is None
    assert "no C++ compiler" in why
    assert "No module named 'convmixer_fast._cpu'" in why
    assert "\n" not in why


@needs_engine
def test_build_is_on_record() -> None:
    info = ENGINE.build_info()
    assert info["cxx_standard"] >= 201703
    assert set(ISAS) <= set(info["isas"])
    assert "-ffast-math" not in info["flags"]
    written = build_info()
    assert written["built"] is True
    assert written["version"] == info["version"]
    assert written["compiler"] == info["compiler"]


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    which=st.integers(0, 3),
    kind=st.sampled_from(["scale", "add", "replace", "permute"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_fingerprint_sees_every_dense_write(
    sizes: list[int], which: int, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    before = fingerprint(tensors)
    assert before == fingerprint([t.clone() for t in tensors])
    changed = tensors[which % len(tensors)]
    old = changed.clone()
    if kind == "scale":
        changed.data.mul_(0.999)
    elif kind == "add":
        changed.data.add_(1e-3)
    elif kind == "replace":
        changed.data.normal_(generator=generator)
    else:
        changed.data = changed.data.roll(1)
    assert torch.equal(old, changed) == (before == fingerprint(tensors))


def test_fingerprint_sees_every_byte_of_a_small_tensor_and_sizes() -> None:
    for t in (torch.randn(1000), torch.randn(9000), torch.randn(25, 3, 7), torch.randn(11).half()):
        before = fingerprint([t])
        for index in (0, t.numel() // 3, -1):
            kept = t.flatten()[index].item()
            t.data.view(-1)[index] += 1
            assert fingerprint([t]) != before
            t.data.view(-1)[index] = kept
        assert fingerprint([t]) == before
    zeros = [torch.zeros(n) for n in (0, 1, 2, 3, 33, 1000, 1001)]
    assert len({fingerprint([z]) for z in zeros}) == len(zeros)
    assert fingerprint(zeros) != fingerprint(zeros[::-1])


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    place=st.integers(0, 299),
    column=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_fingerprint_sees_a_write_to_one_row_or_column(rows, columns, place, column, dtype) -> None:
    t = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    before, plain = fingerprint([t]), _plain_fingerprint([span_of(t)])
    # The diagonal crosses every column of a matrix that has as many rows.
    if column and rows < columns:
        column = False
    line = t.data[:, place % columns] if column else t.data[place % rows]
    line.mul_(3).add_(0.5)
    assert fingerprint([t]) != before
    assert _plain_fingerprint([span_of(t)]) != plain


def test_fingerprint_reads_just_the_elements_of_a_view() -> None:
    base = torch.randn(64, 10)
    view = base[:, 3:5]
    before = fingerprint([view])
    base.data[:, :3] += 1
    base.data[:, 5:] += 1
    assert fingerprint([view]) == before
    base.data[:, 3:5] += 1
    assert fingerprint([view]) != before


def test_fingerprint_takes_addresses_and_channels_last() -> None:
    t = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    by_tensor = fingerprint([t])
    assert by_tensor == fingerprint_of([(t.data_ptr(), t.nbytes, t.nbytes // 2)])
    with pytest.raises(ValueError, match="CPU tensors"):
        fingerprint([torch.empty(3, device="meta")])


@needs_engine
def test_fingerprint_of_takes_spans_alone() -> None:
    t = torch.randn(3, 5)
    assert fingerprint_of([(t.data_ptr(), t.nbytes, 20)]) == fingerprint([t])
    engine = native.load()
    assert engine is not None
    for pieces, error in (
        ([t.data_ptr()], TypeError),
        ([(t.data_ptr(), t.nbytes)], TypeError),
        ([("", 4, 0)], TypeError),
        ([(-1, 4, 0)], OverflowError),
        ([(0, 4, 0)], ValueError),
    ):
        with pytest.raises(error):
            engine.fingerprint(pieces)


def _block(c: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    taps, weight = torch.randn(c, 1, k, k, generator=g), torch.randn(c, c, 1, 1, generator=g)
    vectors = [torch.rand(c, generator=g) for _ in range(6)]
    return weight, native.mixer_pack(taps, *vectors[:3], *vectors[3:])


@needs_engine
def test_prepared_stack_is_the_stack_and_keeps_its_operands() -> None:
    blocks = [_block(5, 3, seed) for seed in range(2)]
    weights, packed = [list(each) for each in zip(*blocks, strict=True)]
    x = torch.randn(2, 5, 4, 6)
    want = native.mixer_stack(x, weights, packed, 3, "silu")
    run = native.prepared_stack(weights, packed, 3, "silu")
    del blocks, weights, packed
    gc.collect()
    others = [torch.full((64,), float("nan")) for _ in range(50)]  # would take freed memory
    assert torch.equal(run(x), want)
    assert run(x[:1]).shape == (1, 5, 4, 6)
    assert len(others) == 50


@needs_engine
def test_prepared_stack_names_what_does_not_fit() -> None:
    weight, packed = _block(5, 3, 0)
    for error, match, args in (
        (ValueError, "act must be one of", ([weight], [packed], 3, "tanh")),
        (ValueError, "packed must have shape", ([weight], [packed[1:]], 3, "gelu")),
        (ValueError, "weights must have shape", ([weight[:, 1:]], [packed], 3, "gelu")),
        (TypeError, "weights must be float32", ([weight.double()], [packed], 3, "gelu")),
        (ValueError, "weights must be contiguous", ([weight.transpose(0, 1)], [packed], 3, "gelu")),
    ):
        with pytest.raises(error, match=match):
            native.prepared_stack(*args)


@needs_engine
@pytest.mark.parametrize("p", [1, 3])
def test_prepared_pointwise_is_pointwise(p: int) -> None:
    x, weight = torch.randn(2, 3, 7, 8), torch.randn(5, 3, p, p)
    bias, scale, shift = torch.randn(3, 5)
    for offset in (bias, None):
        want = native.pointwise_mix(x, weight, offset, scale, shift, "gelu")
        assert torch.equal(native.prepared_pointwise(weight, offset, scale, shift, "gelu")(x), want)


@needs_engine
def test_prepared_pointwise_names_what_does_not_fit() -> None:
    weight, vector = torch.randn(5, 3, 2, 2), torch.randn(5)
    strided = torch.randn(10)[::2]
    for error, match, args in (
        (ValueError, "act must be one of", (weight, None, vector, vector, "tanh")),
        (ValueError, "weight must have shape", (weight[..., :1], None, vector, vector, "gelu")),
        (TypeError, "weight must be float32", (weight.double(), None, vector, vector, "gelu")),
        (ValueError, "bias must have shape", (weight, vector[1:], vector, vector, "gelu")),
        (ValueError, "shift must be contiguous", (weight, None, vector, strided, "gelu")),
    ):
        with pytest.raises(error, match=match):
            native.prepared_pointwise(*args)
    run = native.prepared_pointwise(weight, None, vector, vector, "gelu")
    with pytest.raises(ValueError, match="1 x 4 is smaller than a patch of 2 x 2"):
        run(torch.randn(1, 3, 1, 4))
