"""A remembered route notices everything that changes the result."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from fakes.triton import installed
from torch import nn
from torch.nn.utils import parametrize

from convmixer_fast import MixerStack, refresh, use_backend
from convmixer_fast.backends import self_check
from convmixer_fast.backends.cpu import native
from convmixer_fast.backends.kernel_key import KernelKey
from convmixer_fast.backends.operands import Packed
from convmixer_fast.backends.triton.depthwise import TritonDepthwise
from convmixer_fast.modules.blocks import MixerBlock
from convmixer_fast.modules.route import ModuleSnapshot, Route
from convmixer_fast.modules.stem import PatchEmbed
from convmixer_fast.ops import dispatch, pointwise, recording
from convmixer_fast.ops.registry import implementation_of
from convmixer_fast.reference import DropPath
from convmixer_fast.testing import trained_like_

SHAPE = (2, 8, 7, 9)
engine = pytest.mark.skipif(native.load() is None, reason=native.why_unavailable() or "built")


@pytest.fixture
def double():
    with installed() as kernels, torch.no_grad():
        yield kernels


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def stack(double, x) -> MixerStack:
    """Three blocks whose next call is like the last one."""
    net = trained_like_(MixerStack(*[MixerBlock(8, 3, drop_path=0.5) for _ in range(3)]), SHAPE)
    settle(net, x)
    return net


def settle(net: MixerStack, x: torch.Tensor) -> None:
    # The first call finds kernels right, which is news to halves that came before.
    net(x), net(x)
    assert isinstance(net._packed.route, Route)
    assert net._packed.route.holds(x)


def steady(net: MixerStack, x: torch.Tensor) -> bool:
    """Whether a call runs past the blocks."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "run", lambda self, x: ran.append(len(self.kernels)) or None)
        net(x)
    return 2 * len(net) in ran


def test_the_result_is_the_blocks_own(double, stack, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "holds", lambda self, x: False)
        want = stack(x)
    settle(stack, x)
    assert steady(stack, x)
    settle(stack, x)
    before, kept = double.calls.copy(), x.clone()
    got = stack(x)
    assert double.calls - before == {"depthwise_mix": 3, "pointwise_mix": 3}
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert torch.equal(x, kept)


def test_results_of_two_calls_share_no_memory(stack, x):
    first = stack(x)
    kept = first.clone()
    second = stack(-x)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layout", ["contiguous", "slice", "negated"])
def test_inputs_of_any_layout(stack, x, layout):
    given = {
        "contiguous": lambda: x.contiguous(),
        "slice": lambda: torch.cat([x, x], 1)[:, 4:12],
        "negated": lambda: torch.view_as_complex(torch.stack([x, x], -1)).conj().imag,
    }[layout]()
    assert given.shape == x.shape
    want = stack(given.clone(memory_format=torch.channels_last))
    for _ in range(3):
        torch.testing.assert_close(stack(given), want, rtol=1e-5, atol=1e-5)
    assert steady(stack, given)


def test_nothing_is_kept_for_maps_whose_strides_are_ambiguous(double):
    net = trained_like_(MixerStack(MixerBlock(8, 3)), SHAPE)
    for shape in ((2, 8, 1, 1), (0, 8, 5, 5)):
        y = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            assert net(y).stride() == torch.empty(shape).stride()
        assert net._packed.route is None


def parametrized(net: MixerStack) -> None:
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(net[1][1], "weight", Twice())


def replaced(net: MixerStack) -> None:
    net[1] = trained_like_(MixerBlock(8, 3), SHAPE, seed=7)


def assigned(net: MixerStack) -> None:
    other = {k: v + 0.1 for k, v in net.state_dict().items() if v.is_floating_point()}
    net.load_state_dict({**net.state_dict(), **other}, assign=True)


CHANGES = {
    "a parameter": lambda net: net[2][1].weight.mul_(1.5),
    "a parameter's data": lambda net: net[2][1].weight.data.mul_(1.5),
    "another memory": lambda net: setattr(net[0][1].weight, "data", net[0][1].weight * 1.5),
    "a statistic": lambda net: net[1][0].fn[2].running_mean.add_(0.5),
    "a state that is assigned": assigned,
    "a bias that is removed": lambda net: setattr(net[0][1], "bias", None),
    "an epsilon": lambda net: setattr(net[1][3], "eps", 0.5),
    "a stride of the padding": lambda net: setattr(net[1][0].fn[0], "padding_mode", "circular"),
    "an activation": lambda net: net[1].__setitem__(2, nn.ReLU()),
    "an activation's form": lambda net: setattr(net[1][2], "approximate", "tanh"),
    "a block": replaced,
    "a block less": lambda net: net.__delitem__(1),
    "a parametrization": parametrized,
    "a hook on a norm": lambda net: net[0][3].register_forward_hook(lambda m, a, o: o + 1),
    "a hook on a branch": lambda net: net[0][0].fn.register_forward_hook(lambda m, a, o: o + 1),
    "a hook on a block": lambda net: net[0].register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "a hook on a stack": lambda net: net.register_forward_hook(lambda m, a, o: o + 1),
    "a forward of its own": lambda net: setattr(net[0][2], "forward", lambda h: h * 0),
    "a module between": lambda net: net[0][0].fn.append(nn.Tanh()),
    "batch statistics": lambda net: net[1][3].train(),
}


def assert_noticed(net: MixerStack, x: torch.Tensor, change) -> None:
    before = net(x)
    change(net)
    twin = copy.deepcopy(net)  # with empty caches
    got = net(x)
    with use_backend("reference"):
        want = twin(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(stack, x, change):
    assert_noticed(stack, x, change)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_without_the_engine(stack, x, change, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    settle(stack, x)
    assert_noticed(stack, x, change)


def test_dropped_samples(stack, x):
    before = stack(x)
    stack[0][0].train()
    stack[0][0].fn.eval()
    assert isinstance(stack[0][0].drop_path, DropPath)
    assert any(not torch.equal(stack(x), before) for _ in range(8))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modes_and_watchers_are_noticed(stack, x, monkeypatch):
    assert steady(stack, x)
    settle(stack, x)
    with use_backend("reference"):
        assert not steady(stack, x)
    settle(stack, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not steady(stack, x)
    settle(stack, x)
    with torch.enable_grad():
        out = stack(x.clone().requires_grad_())
        assert out.requires_grad
    with recording.recording() as rows:
        stack(x)
    assert len(rows) == 6
    settle(stack, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    stack(x)
    handle.remove()
    assert len(seen) > 20
    settle(stack, x)
    _, tangent = torch.func.jvp(stack, (x,), (torch.ones_like(x),))
    assert tangent.any()
    settle(stack, x)
    traced = torch.jit.trace(stack, x, check_trace=False)
    assert "convolution" in str(traced.inlined_graph)


def test_another_shape_or_dtype_is_another_call(double, stack, x):
    assert stack(x[:1]).shape == (1, 8, 7, 9)
    half = copy.deepcopy(stack).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        stack(x.bfloat16())
    settle(stack, x)
    with pytest.raises(RuntimeError):
        stack(x[:, :4])


def test_a_launch_that_fails_leaves_the_call_to_pytorch(double, stack, x):
    with use_backend("reference"):
        want = stack(x)
    settle(stack, x)
    with use_backend("auto"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "automatic_backends", lambda device: ("triton", "cuda"))
        patch.setattr(pointwise, "reason_library_is_faster", lambda dtype: "")
        settle(stack, x)
        double.error["pointwise_mix"] = RuntimeError("lost")
        with pytest.warns(RuntimeWarning, match="pointwise_mix of 8 -> 8 .* lost"):
            got = stack(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert list(filter(None, self_check.results().values())) == ["RuntimeError: lost"]
        assert not steady(stack, x)


def test_memory_that_runs_out_proves_nothing(double, stack, x):
    double.error["pointwise_mix"] = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        stack(x)
    double.error.clear()
    assert steady(stack, x)


def test_copies_and_pickles_start_afresh(stack, x):
    want = stack(x)
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert twin._packed.route is None
        assert torch.equal(twin(x), want)


def test_kernels_that_are_launched_otherwise_are_left_to_the_blocks(double, x):
    case = KernelKey("patch_embed", "cpu", torch.float32, 3, 8, 4, "gelu", True)
    packed = Packed(torch.ones(8, 3, 4, 4), None, torch.ones(8), torch.ones(8))
    assert implementation_of(case, None).bind(case, None, packed) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonDepthwise, "bind", lambda *args: None)
        net = trained_like_(MixerStack(MixerBlock(8, 3)), SHAPE)
        first = net(x)
        assert torch.equal(net(x), first)
        assert net._packed.route is None


# On a CPU, where the engine serves a stack whole.


@pytest.fixture
def whole(x):
    """Three blocks whose next call is like the last one."""
    with torch.no_grad():
        net = trained_like_(MixerStack(*[MixerBlock(8, 3, drop_path=0.5) for _ in range(3)]), SHAPE)
        net(x)
        assert held(net, x)
        yield net


def held(net: MixerStack, x: torch.Tensor) -> bool:
    """Whether a call of a stack asks none of its blocks."""
    asked = []
    route = net._packed.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixerBlock, "_whole", lambda self, x: asked.append(self))
        net(x)
    net._packed.route = route
    return not asked


@engine
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_on_a_cpu(whole, x, change):
    assert_noticed(whole, x, change)


@engine
def test_refreshing_a_block_reaches_the_stack_around_it(whole, x):
    def unseen(net):
        # One element through .data: torch does not count it, the fingerprint may not sample it.
        net[1][0].fn[0].weight.data.view(-1)[1] += 50.0
        refresh(net[1])

    whole(x)
    assert whole._packed.route is not None
    assert_noticed(whole, x, unseen)


@engine
def test_other_inputs_are_the_same_call_on_a_cpu(whole, x):
    others = [x[:1], x.contiguous(), torch.cat([x, x], 1)[:, 4:12], x[:, :, :3, 2:4], x[:0]]
    for other in others:
        want = copy.deepcopy(whole)(other)
        assert held(whole, other)
        got = whole(other)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


@engine
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modes_and_watchers_are_noticed_on_a_cpu(whole, x):
    with use_backend("reference"):
        assert whole._packed.route is not None
        assert not whole._packed.route.holds(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not whole._packed.route.holds(x)
    assert not whole._packed.route.holds(x.double())
    assert not whole._packed.route.holds(x[0])
    with torch.enable_grad():
        assert not whole._packed.route.holds(x)
        assert whole(x.clone().requires_grad_()).requires_grad
    whole(x)
    with recording.recording() as rows:
        whole(x)
    assert len(rows) == 3
    whole(x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    whole(x)
    handle.remove()
    assert len(seen) > 20
    whole(x)
    _, tangent = torch.func.jvp(whole, (x,), (torch.ones_like(x),))
    assert tangent.any()
    whole(x)
    traced = torch.jit.trace(whole, x, check_trace=False)
    assert "convolution" in str(traced.inlined_graph)


@engine
def test_nothing_is_kept_of_a_stack_that_is_watched(x):
    with torch.no_grad():
        net = trained_like_(MixerStack(*[MixerBlock(8, 3) for _ in range(2)]), SHAPE)
        with recording.recording():
            net(x)
        assert net._packed.route is None
        net(x)
        assert isinstance(net._packed.route, Route)
        assert copy.deepcopy(net)._packed.route is None


IMAGES = (2, 3, 9, 13)
STEM_CHANGES = {
    "a parameter": lambda stem: stem[0].weight.mul_(1.5),
    "a parameter's data": lambda stem: stem[0].weight.data.mul_(1.5),
    "another memory": lambda stem: setattr(stem[0].weight, "data", stem[0].weight * 1.5),
    "a statistic": lambda stem: stem[2].running_var.mul_(3.0),
    "a bias that is removed": lambda stem: setattr(stem[0], "bias", None),
    "an epsilon": lambda stem: setattr(stem[2], "eps", 0.5),
    "a dilation": lambda stem: setattr(stem[0], "dilation", (2, 2)),
    "an activation": lambda stem: stem.__setitem__(1, nn.ReLU()),
    "an activation's form": lambda stem: setattr(stem[1], "approximate", "tanh"),
    "a norm": lambda stem: stem.__setitem__(2, nn.BatchNorm2d(8, affine=False).eval()),
    "a hook": lambda stem: stem[0].register_forward_hook(lambda m, a, o: o + 1),
    "a forward of its own": lambda stem: setattr(stem[1], "forward", lambda h: h * 0),
    "a module more": lambda stem: stem.append(nn.Tanh()),
    "batch statistics": lambda stem: stem[2].train(),
}


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(IMAGES)


@pytest.fixture
def stem(images):
    """A stem whose next call is like the last one."""
    with torch.no_grad():
        net = trained_like_(PatchEmbed(3, 8, 4), IMAGES)
        net(images)
        assert served_at_once(net, images)
        yield net


def served_at_once(net: PatchEmbed, images: torch.Tensor) -> bool:
    """Whether a call of a stem does not look up who serves it."""
    asked = []
    route = net._packed.route
    decide = PatchEmbed._decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchEmbed, "_decide", lambda *args: asked.append(args) or decide(*args))
        net(images)
    net._packed.route = route
    return not asked


@engine
@pytest.mark.parametrize("change", STEM_CHANGES.values(), ids=STEM_CHANGES)
def test_a_change_of_a_stem_is_noticed(stem, images, change):
    before = stem(images)
    change(stem)
    twin = copy.deepcopy(stem)
    got = stem(images)
    with use_backend("reference"):
        want = twin(images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.shape != before.shape or not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


@engine
def test_other_images_are_the_same_call_of_a_stem(stem, images):
    others = [
        images[:1],
        images[:, :, 1:, 2:],
        images.contiguous(memory_format=torch.channels_last),
        torch.view_as_complex(torch.stack([images, images], -1)).conj().imag,
        images[:0],
        images[:, :, :4, :4],
    ]
    for other in others:
        want = copy.deepcopy(stem)(other)
        assert served_at_once(stem, other)
        got = stem(other)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    with pytest.raises(ValueError, match="3 x 13 is smaller than a patch of 4 x 4"):
        stem(images[:, :, :3])
    with pytest.raises(RuntimeError, match="channels"):
        stem(images[:, :2])


@engine
def test_modes_and_watchers_of_a_stem_are_noticed(stem, images):
    route = stem._packed.route
    assert route.holds(images)
    with use_backend("reference"):
        assert not route.holds(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not route.holds(images)
    for other in (images.double(), images[0], images.to("meta"), nn.Parameter(images)):
        assert not route.holds(other)
    with torch.enable_grad():
        assert not route.holds(images)
        assert stem(images).requires_grad
    with recording.recording() as rows:
        stem(images)
    assert [row.op for row in rows] == ["pointwise_mix"]
    with installed():
        assert not route.holds(images)
    stem(images)
    assert served_at_once(stem, images)
    assert copy.deepcopy(stem)._packed.route is None


@engine
def test_a_stem_of_pixels_is_served_at_once_too(images):
    pixels = (images.abs() * 80).clamp(0, 255).byte()
    with torch.no_grad():
        net = trained_like_(PatchEmbed(3, 8, 4), IMAGES)
        net.normalize = ((0.5,) * 3, (0.25,) * 3)
        want = net(pixels)
        assert served_at_once(net, pixels)
        assert torch.equal(net(pixels), want)


@engine
def test_what_is_kept_does_not_keep_a_model_alive(whole, x):
    net = copy.deepcopy(whole)
    net(x)
    assert isinstance(net._packed.route, Route)
    seen = weakref.ref(net[0])
    del net
    gc.collect()
    assert seen() is None


def net_of_two() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GELU(), nn.BatchNorm2d(2)).eval()


STRUCTURE = {
    "a hook": lambda net: net[1].register_forward_hook(lambda m, a, o: o),
    "a hook before": lambda net: net[0].register_forward_pre_hook(lambda m, a: None),
    "a hook of gradients": lambda net: net[2].register_full_backward_hook(lambda m, i, o: None),
    "a class": lambda net: setattr(net[1], "__class__", nn.ReLU),
    "a child": lambda net: net.__setitem__(1, nn.GELU().eval()),
    "a child more": lambda net: net.append(nn.Tanh()),
    "a child less": lambda net: net.__delitem__(2),
    "children in another order": lambda net: net._modules.update({"0": net[1], "1": net[0]}),
    "a parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.data)),
    "a parameter less": lambda net: setattr(net[0], "bias", None),
    "a buffer": lambda net: setattr(net[2], "running_var", net[2].running_var.clone()),
}
SETTINGS = {
    "training": lambda net: net[2].train(),
    "a geometry": lambda net: setattr(net[0], "padding", (0, 0)),
    "an epsilon": lambda net: setattr(net[2], "eps", 1e-3),
    "a form": lambda net: setattr(net[1], "approximate", "tanh"),
    "a method": lambda net: setattr(net[0], "_conv_forward", lambda *args: args[0]),
    "an attribute in front of a parameter": lambda net: net[0].__dict__.update(
        weight=net[0].weight
    ),
    "an attribute whose comparison is no boolean": lambda net: setattr(net[0], "a", torch.ones(3)),
    "a call that is compiled": lambda net: setattr(net[0], "_compiled_call_impl", print),
}


@pytest.mark.parametrize("change", STRUCTURE.values(), ids=STRUCTURE)
def test_a_snapshot_sees_another_structure(change):
    net = net_of_two()
    known = ModuleSnapshot(net)
    assert known.is_intact()
    assert known.is_unchanged()
    change(net)
    assert not known.is_intact()
    assert not known.is_unchanged()


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_a_snapshot_sees_another_setting(change):
    net = net_of_two()
    known = ModuleSnapshot(net)
    change(net)
    assert not known.is_unchanged()


def test_a_snapshot_sees_a_class_that_is_patched(monkeypatch):
    known = ModuleSnapshot(net_of_two())
    assert known.is_unchanged()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: args[0])
    assert not known.is_unchanged()
