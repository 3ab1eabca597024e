"""TorchScript compiles every module, alone and inside another, and leaves it what it was.

torch.jit.script, torch.jit.trace and torch.fx followed by torch.jit.script get the plain modules:
the results are those of `to_reference`, the operators PyTorch's, the parameters the model's own.
No ``from __future__ import annotations`` here: torch.fx hands the strings on to torch.jit.script.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import fresh_python
import peers
import pytest
import torch
from torch import Tensor, nn

from convmixer_fast import ConvMixer, create_model, optimize, to_reference
from convmixer_fast.arch import ACTIVATIONS, Arch
from convmixer_fast.compat import locuslab, mmpretrain
from convmixer_fast.modules.blocks import MixerBlock
from convmixer_fast.modules.halves import DepthwiseMix, PointwiseMix
from convmixer_fast.modules.model import FeatureExtractor, GlobalPool
from convmixer_fast.modules.stack import MixerStack
from convmixer_fast.modules.stem import PatchEmbed
from convmixer_fast.reference import DropPath, ReferenceConvMixer, reference_block
from convmixer_fast.testing import trained_like_

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit",
    "ignore:.*TorchScript",
    "ignore:torch.tensor results",
    "ignore::torch.jit.TracerWarning",
)

IMAGES, MAPS = (2, 3, 19, 16), (2, 8, 7, 6)
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
ARCH = Arch(8, 2, kernel_size=4, patch_size=3, num_classes=5)


class Classifier(nn.Module):
    """A user's network with a backbone of ours inside."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.extra = nn.ModuleList([MixerBlock(5, 3), nn.Sequential(PointwiseMix(5, 4))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        x = x[:, :, None, None]
        for module in self.extra:
            x = module(x)
        return x.flatten(1)


class DropsFirst(nn.Module):
    """A spatial half of a user's, with stochastic depth registered before a branch of any name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.drop_path = DropPath(0.5)
        self.mixing = reference_block(dim, 5, nn.ReLU)[0].fn

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mixing(x)) + x


def mixer(**kwargs: Any) -> ConvMixer:
    return ConvMixer(8, 2, kernel_size=5, patch_size=3, num_classes=5, **kwargs)


def timm_model() -> nn.Module:
    convmixer = pytest.importorskip("timm.models.convmixer", reason="timm is not installed")
    return convmixer.ConvMixer(8, 2, kernel_size=5, patch_size=3, num_classes=5)


#: Modules by the shape that they take.
MEMBERS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "depthwise half": (MAPS, lambda: DepthwiseMix(8, 5)),
    "depthwise half that drops": (MAPS, lambda: DepthwiseMix(8, 4, drop_path=0.5)),
    "depthwise half from parts": (
        MAPS,
        lambda: DepthwiseMix.from_parts(reference_block(8, 3, nn.SiLU)[0].fn, "branch"),
    ),
    "depthwise half with an idle child": (MAPS, lambda: idle(DepthwiseMix(8, 5))),
    "dropping half with an idle child": (MAPS, lambda: idle(DepthwiseMix(8, 5, drop_path=0.5))),
    "pointwise half": (MAPS, lambda: PointwiseMix(8, 12)),
    "stem": (IMAGES, lambda: PatchEmbed(3, 8, 4)),
    "stem of uint8": (IMAGES, lambda: PatchEmbed(3, 8, 4, normalize=PIXELS)),
    "block": (MAPS, lambda: MixerBlock(8, 4)),
    "block that drops": (MAPS, lambda: MixerBlock(8, 5, drop_path=0.5)),
    "stack": (MAPS, lambda: MixerStack(MixerBlock(8, 3), MixerBlock(8, 3))),
    "part of a stack": (MAPS, lambda: MixerStack(*(MixerBlock(8, 3) for _ in range(3)))[1:]),
    "graphed stack": (MAPS, lambda: optimize(MixerStack(MixerBlock(8, 3)), cuda_graph=True)),
    "empty stack": (MAPS, MixerStack),
    "drop path": (MAPS, lambda: DropPath(0.5)),
    **{
        f"pool {kind}": (MAPS, lambda kind=kind: GlobalPool(kind))
        for kind in ("", "avg", "max", "avgmax", "catavgmax", "fast")
    },
    "model": (IMAGES, mixer),
    "model that drops": (IMAGES, lambda: mixer(drop_path_rate=0.5, drop_rate=0.5)),
    "model of uint8": (IMAGES, lambda: mixer(normalize=PIXELS)),
    "model of grey uint8": ((2, 1, 9, 9), lambda: mixer(in_chans=1, normalize=((0.5,), (0.2,)))),
    "model with two pools": (IMAGES, lambda: mixer(global_pool="catavgmax")),
    "model with a fresh head": (IMAGES, lambda: reset(mixer())),
    "model without a head": (IMAGES, lambda: ConvMixer(8, 1, patch_size=3, num_classes=0)),
    "model with another activation": (IMAGES, lambda: mixer(act_layer=nn.Tanh)),
    "model with checkpointing": (IMAGES, lambda: checkpointed(mixer())),
    "features": (IMAGES, lambda: FeatureExtractor(mixer(), (0, 1))),
    "features by name": (
        IMAGES,
        lambda: create_model("256/8", features_only=True, out_indices=(1,), dim=8, depth=3),
    ),
    "reference": (IMAGES, lambda: ReferenceConvMixer(ARCH)),
    "locuslab": (IMAGES, lambda: locuslab.ConvMixer(8, 2, 5, 3, n_classes=5)),
    "mmpretrain": (
        IMAGES,
        lambda: mmpretrain.ConvMixer(
            {"embed_dims": 8, "depth": 3, "patch_size": 3, "kernel_size": 5}, out_indices=(0, -1)
        ),
    ),
    "optimized timm": (IMAGES, lambda: optimize(timm_model())),
    "optimized locuslab": (IMAGES, lambda: optimize(peers.locuslab(ARCH))),
    "optimized short form": (IMAGES, lambda: optimize(peers.tweet(ARCH))),
    "optimized mmpretrain": (IMAGES, lambda: optimize(peers.mmpretrain_classifier(ARCH))),
    "optimized reference": (IMAGES, lambda: optimize(ReferenceConvMixer(ARCH))),
    "optimized drop path": (MAPS, lambda: optimize(nn.Sequential(DropsFirst(8)))),
    "nested": (IMAGES, lambda: Classifier(mixer())),
    "nested twice": (IMAGES, lambda: nn.Sequential(Classifier(optimize(timm_model())))),
}
#: Whose forward, the user's own, TorchScript cannot compile: string annotations, tuples.
TRACED_ONLY = {"optimized mmpretrain"}


def reset(model: ConvMixer) -> ConvMixer:
    model.reset_classifier(5, "max")
    return model


def idle(half: DepthwiseMix) -> DepthwiseMix:
    half.add_module("probe", nn.Conv2d(8, 8, 3))
    return half


def checkpointed(model: ConvMixer) -> ConvMixer:
    model.set_grad_checkpointing()
    return model


def reloaded(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "script": lambda model, x: torch.jit.script(model),
    "save": lambda model, x: reloaded(torch.jit.script(model)),
    "freeze": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "fx, script": lambda model, x: torch.jit.script(torch.fx.symbolic_trace(model)),
    "reference": lambda model, x: torch.jit.script(to_reference(model)),
    "copy": lambda model, x: torch.jit.script(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    shape, build = MEMBERS[name]
    model = build()
    if list(model.buffers()):
        trained_like_(model, shape)
    return model.eval(), torch.randn(shape)


def assert_same(ours: Any, theirs: Any, **tolerances: float) -> None:
    """Results that may be a list in TorchScript and a tuple elsewhere."""
    ours, theirs = ([r] if isinstance(r, Tensor) else list(r) for r in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, **tolerances)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MEMBERS)
def test_torchscript_computes_what_the_module_does(name, way):
    model, x = made(name)
    if name in TRACED_ONLY and way != "trace":
        pytest.skip("the user's own forward is not TorchScript")
    expected = model(x)
    before = [(key, id(m), type(m)) for key, m in model.named_modules()]
    compiled = WAYS[way](model, x)
    assert_same(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert_same(compiled(x), to_reference(model)(x), rtol=1e-5, atol=1e-6)
    assert "convmixer_fast::" not in str(compiled.inlined_graph)
    # The module is still fused, and none of its parts was replaced.
    assert [(key, id(m), type(m)) for key, m in model.named_modules()] == before
    assert_same(model(x), expected, rtol=0, atol=0)
    # Nothing of the example's shape is baked in.
    assert_same(compiled(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("act", "k", "dtype"),
    list(itertools.product(ACTIVATIONS, (3, 4), (torch.float32, torch.float64, torch.bfloat16))),
)
def test_every_activation_kernel_and_dtype(act, k, dtype):
    tolerances = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
    model = ConvMixer(8, 2, k, 3, num_classes=5, act_layer=act, drop_path_rate=0.2)
    model = trained_like_(model, IMAGES).to(dtype)
    images, maps = torch.randn(IMAGES, dtype=dtype), torch.randn(MAPS, dtype=dtype)
    half = PointwiseMix(8, 4, act, dtype=dtype).eval()
    parts = [(model, images), (model.stem, images), (half, maps)]
    parts += [(model.blocks, maps), (model.blocks[1], maps), (model.blocks[1][0], maps)]
    for module, x in parts:
        scripted = torch.jit.script(module)
        assert scripted(x).dtype == dtype
        assert_same(scripted(x), to_reference(module)(x))
        assert_same(scripted(x), module(x), **tolerances)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["script", "save", "reference"])
@pytest.mark.parametrize("name", ["stem of uint8", "model of uint8", "model of grey uint8"])
def test_uint8_images(name, way, dtype):
    model, x = made(name)
    model = model.to(dtype)
    pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    tolerances = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
    for images in (pixels, pixels.to(memory_format=torch.channels_last), x.to(dtype)):
        scripted = WAYS[way](model, x)
        assert_same(scripted(images), model(images), **tolerances)
        assert_same(scripted(images), to_reference(model)(images))


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_pixels_do_not_depend_on_the_default_dtype(default):
    model, x = made("model of uint8")
    pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    scripted, plain = torch.jit.script(model), to_reference(model)
    expected = [scripted(pixels), plain(pixels)]
    torch.set_default_dtype(default)
    try:
        found = [scripted(pixels), plain(pixels)]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
def test_reference_of_a_uint8_model_under_autocast():
    model, x = made("model of uint8")
    pixels = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(to_reference(model)(pixels), model(pixels), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["model", "block", "optimized timm", "nested"])
def test_training_a_scripted_module_trains_the_module(name):
    """Parameters and statistics are shared; gradients are those of the module."""
    model, x = made(name)
    twin = copy.deepcopy(model).train()
    scripted = torch.jit.script(model.train())
    for m in (scripted, twin):
        m(x).square().mean().backward()
    named = dict(model.named_parameters())
    assert {id(p) for p in scripted.parameters()} == {id(p) for p in named.values()}
    for key, p in twin.named_parameters():
        torch.testing.assert_close(named[key].grad, p.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        model.eval()
        assert_same(scripted.eval()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["depthwise half that drops", "block that drops", "drop path"])
def test_stochastic_depth_drops_in_a_scripted_module(name):
    model, _ = made(name)
    x = torch.randn(64, 8, 4, 4)
    scripted = torch.jit.script(model).train()
    torch.manual_seed(1)
    ours = scripted(x)
    torch.manual_seed(1)
    assert_same(ours, to_reference(model).train()(x))
    if isinstance(model, DepthwiseMix):
        kept = (ours == x).flatten(1).all(1).float().mean()
        assert 0.2 < kept < 0.8


@torch.no_grad()
def test_methods_of_a_scripted_model():
    model, x = made("model")
    scripted = torch.jit.script(model)
    features = scripted.forward_features(x)
    assert_same(features, model.forward_features(x))
    assert_same(
        scripted.forward_head(features, pre_logits=True),
        model.forward_head(features, pre_logits=True),
    )
    assert scripted.group_matcher() == model.group_matcher()
    assert scripted.get_classifier().weight is model.head.weight


@torch.no_grad()
def test_a_saved_program_runs_where_the_package_is_not_installed(tmp_path):
    model, x = made("nested")
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    script = (
        "import sys; sys.modules['convmixer_fast'] = None\n"
        "import torch\n"
        f"x, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"out = torch.jit.load({str(tmp_path / 'model.pt')!r})(x)\n"
        "torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)\n"
        "print('same')"
    )
    done = fresh_python.run("-W", "ignore", "-c", script)
    assert done.stdout.strip() == "same", done.stderr


@torch.no_grad()
@pytest.mark.parametrize("name", MEMBERS)
def test_a_graph_of_torch_fx_is_plain(name):
    """Its code has PyTorch's calls only, and it goes through copies and pickles."""
    model, x = made(name)
    graph = torch.fx.symbolic_trace(model)
    assert not any("convmixer_fast" in str(node.target) for node in graph.graph.nodes)
    for traced in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert_same(traced(x), to_reference(model)(x), rtol=1e-5, atol=1e-6)
