"""The fused path is taken only where the plain modules would compute the same, at every call."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convmixer_fast import ConvMixer, MixerBlock, explain, optimize, to_reference
from convmixer_fast.modules import fusible
from convmixer_fast.modules.halves import DepthwiseMix
from convmixer_fast.ops.recording import recording
from convmixer_fast.testing import trained_like_

SHAPE = (2, 3, 20, 24)


def image() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


def ours(**kwargs: Any) -> ConvMixer:
    torch.manual_seed(0)
    return trained_like_(ConvMixer(12, 3, 3, 4, num_classes=5, **kwargs), SHAPE).eval()


def halves() -> ConvMixer:
    """A model whose blocks run half by half: somebody looks at the depthwise halves."""
    net = ours()
    for block in net.blocks:
        block[0].register_forward_hook(lambda *_: None)
    return net


def plain(net: ConvMixer, x: Tensor) -> Tensor:
    """What the children compute, called one by one."""
    for child in net.stem.children():
        x = child(x)
    for block in net.blocks:
        spatial, *rest = block.children()
        branch = spatial.fn(x)
        x = (branch if spatial.drop_path is None else spatial.drop_path(branch)) + x
        for child in rest:
            x = child(x)
    return net.forward_head(x)


class Adapter(nn.Module):
    """LoRA's shape: the module it wraps, plus a branch of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out + 0.25 * out.roll(1, dims=1)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


Patch = pytest.MonkeyPatch


def set_on_object(name: str) -> Callable[[nn.Module, Patch], None]:
    def touch(child: nn.Module, patch: Patch) -> None:
        plainly = getattr(child, name)
        setattr(child, name, lambda *args: 0.5 * plainly(*args))

    return touch


def replaced_by(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, Patch], None]:
    def touch(child: nn.Module, patch: Patch) -> None:
        # In every container that holds it, as surgery does.
        touch.put(child, make(child))  # type: ignore[attr-defined]

    touch.surgery = True  # type: ignore[attr-defined]
    return touch


def on_class(name: str) -> Callable[[nn.Module, Patch], None]:
    def touch(child: nn.Module, patch: Patch) -> None:
        owner = next(cls for cls in type(child).__mro__ if name in vars(cls))
        plainly = vars(owner)[name]
        patch.setattr(owner, name, lambda self, *args: 0.5 * plainly(self, *args))

    return touch


def own_call_of_the_class(child: nn.Module, patch: Patch) -> None:
    plainly = nn.Module.__call__
    patch.setattr(type(child), "__call__", lambda s, *a: 0.5 * plainly(s, *a), raising=False)


def other_class(child: nn.Module, patch: Patch) -> None:
    kind = type(child)
    half = {"forward": lambda self, x: 0.5 * kind.forward(self, x)}
    child.__class__ = type("Half" + kind.__name__, (kind,), half)


def forward_hook(child: nn.Module, patch: Patch) -> None:
    child.register_forward_hook(lambda module, args, out: 0.5 * out)


def forward_pre_hook(child: nn.Module, patch: Patch) -> None:
    child.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def parametrized(child: nn.Module, patch: Patch) -> None:
    parametrize.register_parametrization(child, "weight", Halved())


def weight_normed(child: nn.Module, patch: Patch) -> None:
    parametrizations.weight_norm(child)
    child.parametrizations.weight.original0.data.mul_(0.5)


def training(child: nn.Module, patch: Patch) -> None:
    child.train()


TOUCHES: dict[str, Callable[[nn.Module, Patch], None]] = {
    "forward on the object": set_on_object("forward"),
    "_call_impl on the object": set_on_object("_call_impl"),
    "forward of the class": on_class("forward"),
    "__call__ of the class": own_call_of_the_class,
    "another class": other_class,
    "forward hook": forward_hook,
    "forward pre-hook": forward_pre_hook,
    "parametrized": parametrized,
    "weight norm": weight_normed,
    "train mode": training,
    "adapter": replaced_by(Adapter),
    "Identity": replaced_by(lambda _: nn.Identity()),
    "Sequential": replaced_by(nn.Sequential),
    "Sequential of two": replaced_by(lambda child: nn.Sequential(child, Halved())),
}
PLACES: dict[str, Callable[[ConvMixer], tuple[nn.Module, str]]] = {
    "stem conv": lambda net: (net.stem, "0"),
    "stem act": lambda net: (net.stem, "1"),
    "stem norm": lambda net: (net.stem, "2"),
    "depthwise conv": lambda net: (net.blocks[1][0].fn, "0"),
    "depthwise act": lambda net: (net.blocks[1][0].fn, "1"),
    "depthwise norm": lambda net: (net.blocks[1][0].fn, "2"),
    "branch": lambda net: (net.blocks[1][0], "fn"),
    "pointwise conv": lambda net: (net.blocks[1], "1"),
    "pointwise act": lambda net: (net.blocks[1], "2"),
    "pointwise norm": lambda net: (net.blocks[1], "3"),
}


def applies(name: str, place: str) -> bool:
    if name == "parametrized":
        return "conv" in place or "norm" in place
    if name == "weight norm":
        return "conv" in place
    # No such network; a Sequential's forward is that of the containers too.
    return (name, place) not in (
        ("Identity", "stem conv"),
        ("forward of the class", "branch"),
        ("__call__ of the class", "branch"),
    )


CASES = [(name, place) for name in TOUCHES for place in PLACES if applies(name, place)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("make", [ours, halves])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_touched_child_runs_as_it_is(name, place, warm, make, monkeypatch) -> None:
    net, x = make(), image()
    if warm:
        net(x), net(x)
    parent, key = PLACES[place](net)
    child = parent._modules[key]
    touch = TOUCHES[name]
    if hasattr(touch, "surgery"):
        touch.put = lambda old, new: parent._modules.__setitem__(key, new)  # type: ignore[attr-defined]
    touch(child, monkeypatch)
    # In train mode statistics move: both runs begin with the same ones.
    state = {key: value.clone() for key, value in net.state_dict().items()}
    want = plain(net, x)
    net.load_state_dict(state)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    net.load_state_dict(state)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(F, "conv2d"), (F, "batch_norm"), (F, "gelu"), (torch, "batch_norm")],
    ids=["F.conv2d", "F.batch_norm", "F.gelu", "torch.batch_norm"],
)
def test_a_patched_function_is_called(owner, name, warm, monkeypatch) -> None:
    net, x, calls = ours(), image(), []
    if warm:
        net(x), net(x)
    plainly = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(name) or plainly(*a, **k))
    net(x)
    assert len(calls) == 1 + 2 * len(net.blocks)
    assert "patched" in explain(net, x)[0].reason


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_conv_forward_on_the_object_or_class_runs(warm, monkeypatch) -> None:
    """Tiling patches of diffusion pipelines: circular padding in `_conv_forward`."""

    def circular(self, x, weight, bias):
        k = self.kernel_size[0]
        x = F.pad(x, ((k - 1) // 2, k // 2) * 2, mode="circular") if self.groups > 1 else x
        return F.conv2d(x, weight, bias, self.stride, 0, 1, self.groups)

    for on in ("object", "class"):
        net, x = ours(), image()
        if warm:
            net(x), net(x)
        before = net(x)
        if on == "class":
            monkeypatch.setattr(nn.Conv2d, "_conv_forward", circular)
        else:
            conv = net.blocks[0][0].fn[0]
            conv._conv_forward = circular.__get__(conv)
        assert (net(x) - before).abs().max() > 1e-3
        torch.testing.assert_close(net(x), plain(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["block", "depthwise half", "class of the block"])
def test_a_container_of_another_class_runs_its_own_forward(what, monkeypatch) -> None:
    class Scaled(MixerBlock):
        def forward(self, x):
            return 0.5 * super().forward(x)

    class ScaledHalf(DepthwiseMix):
        def forward(self, x):
            return 0.5 * super().forward(x)

    net, x, reference = ours(), image(), to_reference(ours())
    net(x), net(x)
    maps = net.blocks[:1](net.stem(x))
    if what == "block":
        net.blocks[1].__class__ = Scaled
        want = 0.5 * reference.blocks[1](maps)
    elif what == "depthwise half":
        net.blocks[1][0].__class__ = ScaledHalf
        half = 0.5 * reference.blocks[1][0](maps)
        want = nn.Sequential(*list(reference.blocks[1].children())[1:])(half)
    else:
        plainly = MixerBlock.forward
        monkeypatch.setattr(MixerBlock, "forward", lambda self, x: 0.5 * plainly(self, x))
        maps = net.blocks[:1](net.stem(x))
        want = 0.5 * reference.blocks[1](maps)
    torch.testing.assert_close(net.blocks[1](maps), want, rtol=1e-4, atol=1e-5)
    whole = net.blocks[:2](net.stem(x))
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5) * 2


class Half(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, dim, 3, groups=dim, padding="same")
        self.fn = nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(dim))
        self.drop_path = Drop()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.fn(x)) + x


def foreign() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 4, 4),
        *(
            nn.Sequential(Half(12), nn.Conv2d(12, 12, 1), nn.GELU(), nn.BatchNorm2d(12))
            for _ in range(3)
        ),
    ).eval()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "make", [lambda: ours(drop_path_rate=0.9), lambda: optimize(foreign())], ids=["ours", "foreign"]
)
def test_drop_path_alone_in_train_mode_drops(make, warm) -> None:
    """Monte-Carlo stochastic depth: the model in eval mode, its drop modules in train mode."""
    net, x = make(), image()
    if warm:
        net(x), net(x)
    for module in net.modules():
        module.training = "Drop" in type(module).__name__
    assert any(not torch.equal(net(x), net(x)) for _ in range(20))


def test_a_drop_path_that_is_not_known_to_be_idle_runs() -> None:
    for net in (ours(drop_path_rate=0.5), optimize(foreign())):
        x = image()
        net(x), net(x)
        spatial = next(m for m in reversed(list(net.modules())) if isinstance(m, DepthwiseMix))
        before = net(x)
        spatial.drop_path = Halved()
        assert not torch.allclose(net(x), before)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watch, WatchFunctions, lambda: FlopCounterMode(display=False)])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_mode_sees_the_operators_of_the_plain_model(mode, warm) -> None:
    net, x, seen = ours(), image(), []
    reference = to_reference(net)
    if warm:
        net(x), net(x)
    for model in (reference, net):
        with mode() as watch:
            model(x)
        if isinstance(watch, FlopCounterMode):
            seen.append(watch.get_total_flops())
        else:
            seen.append({k: n for k, n in watch.seen.items() if "conv" in k or "gelu" in k})
    assert seen[0]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_transforms_see_plain_operators(warm) -> None:
    net, x = ours(), image()
    want = plain(net, x)
    if warm:
        net(x), net(x)
    graph = make_fx(net)(x)
    assert not [n for n in graph.graph.nodes if "convmixer_fast" in str(n.target)]
    junk = [torch.full((n,), float("nan")) for n in range(100, 3000, 50)]
    del junk
    torch.testing.assert_close(graph(x), want, rtol=1e-4, atol=1e-5)
    mapped = torch.vmap(net)(x[:, None])[:, 0]
    torch.testing.assert_close(mapped, want, rtol=1e-4, atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert net(fake.from_tensor(x)).shape == want.shape


def test_a_model_is_built_and_runs_under_fake_tensors() -> None:
    with FakeTensorMode():
        for kwargs in ({}, {"drop_path_rate": 0.1}, {"normalize": ((0.5,) * 3, (0.25,) * 3)}):
            net = ConvMixer(12, 3, 3, 4, num_classes=5, **kwargs).eval()
            assert net(torch.randn(SHAPE)).shape == (2, 5)
            optimize(foreign())(torch.randn(SHAPE))
            assert net.train()(torch.randn(SHAPE)).shape == (2, 5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_tensor_of_another_layout_gets_what_pytorch_gives_it(warm) -> None:
    net, x = ours(), image()
    if warm:
        net(x), net(x)
    other = x.to_mkldnn()
    try:
        want = plain(net, other)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0])):
            net(other)
    else:
        got = net(other)
        assert got.layout == want.layout
        torch.testing.assert_close(got.to_dense(), want.to_dense(), rtol=1e-4, atol=1e-5)


class Tagged(torch.Tensor):
    """A subclass as datapoints of image libraries are: PyTorch's operators keep it."""


def test_a_tensor_subclass_gets_what_pytorch_gives_it() -> None:
    net, x = ours(), image()
    net(x), net(x)
    tagged = x.as_subclass(Tagged)
    got = net(tagged)
    assert type(got) is type(plain(net, tagged))
    torch.testing.assert_close(got.as_subclass(Tensor), net(x), rtol=1e-4, atol=1e-5)


def test_settings_and_dtypes_that_pytorch_treats_otherwise() -> None:
    x = image()
    net = ours()
    conv = net.blocks[1][1]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
    torch.testing.assert_close(net(x), plain(net, x), rtol=1e-4, atol=1e-5)
    for change in (
        lambda norm: norm.double(),
        lambda norm: setattr(norm.weight, "data", norm.weight.data[:1].clone()),
    ):
        net = ours()
        net(x), net(x)
        change(net.blocks[1][3])
        with pytest.raises(RuntimeError):
            plain(net, x)
        with pytest.raises(RuntimeError):
            net(x)


def test_pruned_shapes_compute_what_pytorch_computes() -> None:
    """Parameters cut to fewer channels, the modules' attributes left alone."""
    block = MixerBlock(12, 3).eval()
    block[1].weight = nn.Parameter(block[1].weight[:8].clone())
    block[1].bias = nn.Parameter(block[1].bias[:8].clone())
    norm = block[3]
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name)[:8].clone()))
    norm.running_mean, norm.running_var = norm.running_mean[:8], norm.running_var[:8]
    x = torch.randn(2, 12, 5, 6)
    want = norm(block[2](block[1](block[0].fn(x) + x)))
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_default_device_is_no_watcher() -> None:
    net, x = ours(), image()
    want = net(x)
    torch.set_default_device("meta")
    try:
        assert not fusible.is_under_mode()
        assert torch.equal(net(x), want)
        with recording() as rows:
            net(x)
    finally:
        torch.set_default_device(None)
    assert {row.choice[:2] for row in rows} == {
        (row.backend, row.reason) for row in explain(net, x)
    }


def test_what_is_patched_before_the_import_is_not_fused(tmp_path) -> None:
    from fresh_python import run

    code = (
        "import torch; from torch import nn\n"
        "plain = nn.Conv2d.forward\n"
        "nn.Conv2d.forward = lambda self, x: 2 * plain(self, x)\n"
        "import convmixer_fast as cf\n"
        "block, x = cf.MixerBlock(4, 3).eval(), torch.randn(1, 4, 5, 5)\n"
        "with torch.no_grad():\n"
        "    y = block[0].fn(x) + x\n"
        "    for child in list(block)[1:]: y = child(y)\n"
        "    assert torch.allclose(block(x), y, atol=1e-5)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
