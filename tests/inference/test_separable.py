"""Whatever is done to a model, inference gives what ``model(x)`` gives, or refuses in one line.

Each touch of a model is tried on every way to take one apart. A touch changes what the model
computes, in a way that depends on the whole map or batch, so that leaving it out shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer_fast as cf
from convmixer_fast.inference import HeatmapFolder, NativeSize, class_activation_map
from convmixer_fast.inference.evaluate import evaluate
from convmixer_fast.inference.separable import reason_not_separable
from convmixer_fast.modules.blocks import MixerBlock
from convmixer_fast.modules.model import GlobalPool
from convmixer_fast.modules.stem import PatchEmbed
from convmixer_fast.testing import trained_like_

DIM, CLASSES, PATCH = 16, 5, 4
#: A touch changes logits by more than this, and a right answer differs by less.
CLOSE = 1e-4
#: Bytes: more than the stream's own, less than the image and its maps.
LIMIT = 40_000
IMAGES = [np.random.default_rng(i).integers(0, 256, (96, 24, 3), np.uint8) for i in range(3)]
for picture in IMAGES:
    picture[:40] //= 4  # bands are not alike
PREPARE = NativeSize()
BATCH = torch.stack([PREPARE(Image.fromarray(image)) for image in IMAGES])


def build(cls: type[cf.ConvMixer] = cf.ConvMixer, **options: Any) -> cf.ConvMixer:
    model = cls(DIM, 3, kernel_size=3, patch_size=PATCH, num_classes=CLASSES, **options)
    trained_like_(model, (8, 3, 24, 24))
    return model


def shifted(out: Tensor) -> Tensor:
    """Another value at every place, that depends on all places."""
    return out * (1.5 + out.abs().mean()) + 0.3


# Touches

PLACES = (
    "",
    "stem",
    "stem.0",
    "stem.1",
    "stem.2",
    "blocks",
    "blocks.1",
    "blocks.1.0",
    "blocks.1.0.fn",
    "blocks.1.0.fn.0",
    "blocks.1.0.fn.1",
    "blocks.1.0.fn.2",
    "blocks.1.1",
    "blocks.1.2",
    "blocks.1.3",
    "global_pool",
    "head_drop",
    "head",
)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: shifted(out))


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (shifted(args[0]),))


def forward_on_the_object(module: nn.Module, name: str = "forward") -> None:
    plain = getattr(module, name)
    setattr(module, name, lambda *args, **more: shifted(plain(*args, **more)))


def class_of_its_own(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(
        f"My{cls.__name__}", (cls,), {"forward": lambda self, x: shifted(cls.forward(self, x))}
    )


class Wrapper(nn.Module):
    """What adapter libraries put in a layer's place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base = module

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.base(x))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.1).pow(3).mean((2, 3)).pow(1 / 3)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = module.eval()


def without_statistics(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean = norm.running_var = None
    norm.track_running_stats = False
    return norm


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())


def pruned(model: nn.Module, name: str) -> None:
    prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)


def overlapping_stem(model: nn.Module) -> None:
    conv = nn.Conv2d(3, DIM, 7, stride=PATCH, padding=3)
    put(model, "stem.0", conv)


REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "GroupNorm": lambda m: put(m, "blocks.1.3", nn.GroupNorm(4, DIM)),
    "GroupNorm in the stem": lambda m: put(m, "stem.2", nn.GroupNorm(4, DIM)),
    "InstanceNorm": lambda m: put(m, "blocks.0.0.fn.2", nn.InstanceNorm2d(DIM)),
    "BatchNorm of batch statistics": lambda m: without_statistics(m.blocks[2][3]),
    "BatchNorm of batch statistics in a branch": lambda m: without_statistics(m.blocks[0][0].fn[2]),
    "BatchNorm of batch statistics in the stem": lambda m: without_statistics(m.stem[2]),
    "softmax over a row": lambda m: put(m, "blocks.1.2", nn.Softmax(dim=-1)),
    "softmax over a column in the stem": lambda m: put(m, "stem.1", nn.Softmax(dim=-2)),
    "dilated depthwise": lambda m: put(
        m,
        "blocks.1.0.fn.0",
        nn.Conv2d(DIM, DIM, 3, padding="same", groups=DIM, dilation=2),
    ),
    "circular padding": lambda m: put(
        m,
        "blocks.1.0.fn.0",
        nn.Conv2d(DIM, DIM, 3, padding="same", groups=DIM, padding_mode="circular"),
    ),
    "overlapping stem": overlapping_stem,
    "no 1x1 convolution": lambda m: put(m, "blocks.1.1", nn.Identity()),
    "two 1x1 convolutions": lambda m: put(
        m, "blocks.1.1", nn.Sequential(m.blocks[1][1], nn.Conv2d(DIM, DIM, 1))
    ),
    "a 3x3 convolution for the 1x1": lambda m: put(
        m, "blocks.1.1", nn.Conv2d(DIM, DIM, 3, padding=1)
    ),
    "another block": lambda m: put(m, "blocks.1", nn.Conv2d(DIM, DIM, 3, padding=1)),
    "a block more": lambda m: m.blocks.append(nn.AvgPool2d(3, 1, 1).eval()),
    "a module more in the stem": lambda m: m.stem.append(nn.AvgPool2d(3, 1, 1).eval()),
    "another pool": lambda m: put(m, "global_pool", Mean()),
    "max pool": lambda m: put(m, "global_pool", GlobalPool("max")),
    "a pool with a class of its own": lambda m: setattr(m.global_pool, "__class__", type(
        "Pool", (GlobalPool,), {"forward": lambda self, x: x.amax((2, 3))})),
    "head_drop that scales": lambda m: put(m, "head_drop", Wrapper(nn.Identity())),
    "head_drop that normalises": lambda m: put(m, "head_drop", nn.LayerNorm(DIM)),
    "an MLP for a head": lambda m: put(
        m, "head", nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    ),
    "a head of cosines": lambda m: put(m, "head", Wrapper(nn.Linear(DIM, CLASSES, bias=False))),
    "a parametrized head": lambda m: parametrized(m, "head"),
    "a parametrized depthwise convolution": lambda m: parametrized(m, "blocks.1.0.fn.0"),
    "a parametrized stem": lambda m: parametrized(m, "stem.0"),
    "a parametrized norm": lambda m: parametrized(m, "blocks.1.3"),
    "weight_norm": lambda m: (
        parametrizations.weight_norm(m.blocks[1][0].fn[0]),
        m.blocks[1][0].fn[0].parametrizations.weight.original0.data.mul_(2),
    ),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.head),
    "a pruned stem": lambda m: pruned(m, "stem.0"),
    "a pruned head": lambda m: pruned(m, "head"),
}  # fmt: skip


def own_method(name: str) -> Callable[[Any], None]:
    """A subclass that overrides one step of the model."""

    def touch(model: nn.Module) -> None:
        cls = type(model)
        plain = getattr(cls, name)
        mine = {name: lambda self, *args, **more: shifted(plain(self, *args, **more))}
        model.__class__ = type("Mine", (cls,), mine)

    return touch


STEPS = ("forward", "forward_features", "forward_head", "_run_stem", "__call__")
TOUCHES: dict[str, Callable[[Any], Any]] = {
    **{
        f"{touch.__name__} of {place or 'the model'}": (
            lambda m, touch=touch, place=place: touch(m.get_submodule(place))
        )
        for touch in (hook, pre_hook, forward_on_the_object, class_of_its_own)
        for place in PLACES
    },
    **{
        f"a wrapper around {place}": (
            lambda m, place=place: put(m, place, Wrapper(m.get_submodule(place)))
        )
        for place in ("stem.0", "stem.2", "blocks.0", "blocks.1.0", "blocks.1.0.fn",
                      "blocks.1.0.fn.0", "blocks.1.0.fn.2", "blocks.1.1", "blocks.1.2",
                      "blocks.1.3", "global_pool", "head_drop", "head")
    },
    **{
        f"_conv_forward set on {place}": (
            lambda m, place=place: forward_on_the_object(m.get_submodule(place), "_conv_forward")
        )
        for place in ("stem.0", "blocks.1.0.fn.0", "blocks.1.1")
    },
    **REPLACEMENTS,
    **{f"a subclass's {name}": own_method(name) for name in STEPS},
    **{f"{name} set on the object": (lambda m, name=name: forward_on_the_object(m, name))
       for name in STEPS[1:4]},
}  # fmt: skip

# Comparing


def equal(got: Any, wanted: Tensor) -> bool:
    got = torch.as_tensor(np.asarray(got))
    return got.shape == wanted.shape and bool(
        (got - wanted).abs().max() <= CLOSE * wanted.abs().max()
    )


def files_of(folder: Path) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        if not path.exists():
            Image.fromarray(image).save(path)
    return paths


def check(model: nn.Module, folder: Path) -> tuple[list[str], list[str]]:
    """The ways that gave other answers than ``model(x)``, and those that refused."""
    logit: dict[str, Any] = {"preprocessing": PREPARE, "output_type": "logit", "batch_size": 3}
    with torch.no_grad():
        one, three = model(BATCH[:1]), model(BATCH)
        parts: Any = model
        features = getattr(parts, "forward_features", lambda x: None)(BATCH[:1])
    small = cf.Predictor(model, topk=None, **logit)
    large = cf.Predictor(model, topk=None, max_memory=LIMIT, **logit)
    sorted_ = cf.Predictor(model, topk=CLASSES, **logit)
    paths = files_of(folder)

    def by_files() -> Any:
        [outcome] = cf.Predictor(model, topk=None, **logit).predict_files(paths)
        return [row.values for row in outcome.rows]

    def counted() -> Any:
        found = evaluate(sorted_, paths, [0, 1, 2], [str(i) for i in range(CLASSES)])
        return found.confusion

    def drawn() -> Any:
        maps = HeatmapFolder(folder / "maps", target=2)
        [outcome] = small.predict_files(paths, heatmaps=maps)
        scores = np.stack([np.load(maps.places(str(path))[1]) for path in paths])
        assert equal(scores.mean((1, 2)), three[:, 2]), "a map's mean is not its logit"
        return [row.values for row in outcome.rows]

    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for true, likeliest in enumerate(three.argmax(1).tolist()):
        confusion[true, likeliest] += 1
    bands = {"preprocessing": PREPARE, "band_rows": 2}
    ways: dict[str, tuple[Callable[[], Any], Tensor]] = {
        "Predictor, one": (lambda: small(IMAGES[0]), one[0]),
        "Predictor, several": (lambda: small(IMAGES), three),
        "Predictor, large": (lambda: large(IMAGES[0]), one[0]),
        "Predictor, files": (by_files, three),
        "evaluate": (counted, confusion),
        "stream": (lambda: cf.stream(model, IMAGES[0], **bands), one),
        "stream's heatmap": (
            lambda: cf.stream(model, IMAGES[0], "heatmap", target=2, **bands).mean(),
            one[:, 2],
        ),
        "class_activation_map": (lambda: class_activation_map(model, BATCH, 2).mean(), three[:, 2]),
        "heatmaps of files": (drawn, three),
    }
    if features is not None:
        ways["stream's features"] = (
            lambda: cf.stream(model, IMAGES[0], "features", **bands),
            features,
        )
    other, refused = [], []
    for name, (way, wanted) in ways.items():
        try:
            got = way()
        except (TypeError, ValueError):
            refused.append(name)
            continue
        if not equal(got, wanted):
            other.append(name)
    return other, refused


NEVER_REFUSED = {
    *("Predictor, one", "Predictor, several", "Predictor, large", "Predictor, files", "evaluate"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def test_an_untouched_model_is_taken_apart_and_nothing_is_refused(folder: Path) -> None:
    for options in ({}, {"drop_path_rate": 0.2, "drop_rate": 0.3}, {"act_layer": nn.Mish}):
        assert check(build(**options), folder) == ([], [])


@pytest.mark.parametrize("name", TOUCHES)
def test_a_touched_model_gives_its_own_answer_or_is_refused(name: str, folder: Path) -> None:
    plain = build()
    model = copy.deepcopy(plain)
    TOUCHES[name](model)
    model.eval()
    with torch.no_grad():
        assert (model(BATCH) - plain(BATCH)).abs().max() > CLOSE, "the touch changes nothing"
    other, refused = check(model, folder)
    assert other == []
    assert not NEVER_REFUSED & set(refused), refused


@pytest.mark.parametrize("name", TOUCHES)
def test_a_touch_after_the_predictor_was_made_is_noticed(name: str) -> None:
    model = build()
    predictor = cf.Predictor(model, preprocessing=PREPARE, topk=None, output_type="logit")
    before = predictor(IMAGES[0])
    TOUCHES[name](model)
    model.eval()
    with torch.no_grad():
        wanted = model(BATCH[:1])[0]
    assert equal(predictor(IMAGES[0]), wanted)
    assert not equal(before, wanted)


# Embeddings have no place in model(x): a hook on the model, or its own forward, would be left out.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("touch", [hook, pre_hook, forward_on_the_object, class_of_its_own])
def test_embeddings_are_the_models_or_refused(touch: Callable[..., None], place: str) -> None:
    model = build()
    touch(model.get_submodule(place))
    predictor = cf.Predictor(model, preprocessing=PREPARE, topk=None, output_type="embedding")
    if not place:
        for ask in (lambda: predictor(IMAGES[0]), lambda: cf.stream(model, BATCH, "embedding")):
            with pytest.raises((TypeError, ValueError), match=r"the model has|forward of its own"):
                ask()
        return
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(BATCH[:1]), pre_logits=True)
    assert equal(predictor(IMAGES[0]), wanted[0])
    try:
        streamed = cf.stream(model, IMAGES[0], "embedding", preprocessing=PREPARE, band_rows=2)
    except TypeError:
        assert place not in ("head_drop", "head")
    else:
        assert equal(streamed, wanted)


# What is set for a class or a process


@contextmanager
def patched(cls: type, name: str) -> Iterator[None]:
    own, plain = name in vars(cls), getattr(cls, name)
    setattr(cls, name, lambda self, *args, **more: shifted(plain(self, *args, **more)))
    try:
        yield
    finally:
        if own:
            setattr(cls, name, plain)
        else:
            delattr(cls, name)


class Louder(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return shifted(out) if func is F.linear else out


class LouderOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        linear = (torch.ops.aten.addmm.default, torch.ops.aten.linear.default)  # the latter in
        return shifted(out) if func in linear else out  # inference mode


@contextmanager
def hook_on_all_modules() -> Iterator[None]:
    def louder(module: nn.Module, args: Any, out: Any) -> Any:
        return shifted(out) if isinstance(module, nn.Linear | cf.ConvMixer) else out

    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        yield
    finally:
        handle.remove()


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ConvMixer.forward": lambda: patched(cf.ConvMixer, "forward"),
    "ConvMixer.forward_features": lambda: patched(cf.ConvMixer, "forward_features"),
    "ConvMixer.forward_head": lambda: patched(cf.ConvMixer, "forward_head"),
    "nn.Linear.forward": lambda: patched(nn.Linear, "forward"),
    "nn.Dropout.forward": lambda: patched(nn.Dropout, "forward"),
    "GlobalPool.forward": lambda: patched(GlobalPool, "forward"),
    "MixerBlock.forward": lambda: patched(MixerBlock, "forward"),
    "PatchEmbed.forward": lambda: patched(PatchEmbed, "forward"),
    "nn.Linear.__call__": lambda: patched(nn.Linear, "__call__"),
    "a function mode": Louder,
    "a dispatch mode": LouderOperators,
    "a hook on all modules": hook_on_all_modules,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_patched_classes_and_modes_are_seen(name: str, folder: Path) -> None:
    model = build()
    with torch.no_grad():
        plain = model(BATCH)
        with SETTINGS[name]():
            assert (model(BATCH) - plain).abs().max() > CLOSE, "the setting changes nothing"
    with SETTINGS[name]():
        other, refused = check(model, folder)
    assert other == []
    assert not NEVER_REFUSED & set(refused), refused
    assert check(model, folder) == ([], [])


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.BatchNorm2d, nn.GELU, nn.Sequential])
def test_a_patched_class_of_torch_is_not_streamed(cls: type) -> None:
    model = build()
    with patched(cls, "forward"), pytest.raises(TypeError, match="was patched"):
        cf.stream(model, BATCH)
    cf.stream(model, BATCH)


def test_a_default_device_is_no_mode_that_counts() -> None:
    model = build()
    with torch.device("cpu"):
        assert reason_not_separable(model, "stem", "blocks", "global_pool", "head") == ""


# Wrappers and other people's models


def test_wrapped_models_give_their_own_answer_or_are_refused(folder: Path) -> None:
    for wrapped in (
        nn.DataParallel(build()),
        nn.Sequential(build(), nn.Softmax(1)),
        torch.compile(build(), backend="eager"),
    ):
        other, refused = check(wrapped.eval(), folder)
        assert other == []
        assert not NEVER_REFUSED & set(refused), refused


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fastavg"])
def test_timms_model_with_any_pooling(pool: str, folder: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.convmixer.ConvMixer(
        DIM, 2, 3, PATCH, num_classes=CLASSES, global_pool=pool, drop_rate=0.1
    )
    trained_like_(model, (8, 3, 24, 24))
    _, refused = check(model, folder)
    assert "stream" in refused  # its blocks are not fused
    other, refused = check(cf.optimize(model), folder)
    assert other == []
    assert "stream" not in refused
    if pool != "catavgmax":  # whose classifier takes twice the features
        model.global_pool.pool = Mean()
        assert check(model, folder)[0] == []


def test_a_subclass_that_adds_methods_is_still_a_convmixer() -> None:
    class Trained(cf.ConvMixer):
        def training_step(self, batch: Tensor) -> Tensor:
            return self(batch).sum()

    model = build(Trained)
    wanted = model(BATCH[:1])
    assert equal(cf.stream(model, BATCH[:1]).detach(), wanted.detach())


# Training mode


@pytest.mark.parametrize("place", ["", "head_drop", "stem.2", "blocks.1", "blocks.2.3"])
def test_a_model_in_training_mode_is_refused_and_left_as_it_is(place: str, folder: Path) -> None:
    model = build(drop_rate=0.5)
    predictor = cf.Predictor(model, preprocessing=PREPARE, topk=CLASSES)
    model.get_submodule(place).train()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    paths = files_of(folder)
    ways: list[Callable[[], Any]] = [
        lambda: predictor(IMAGES[0]),
        lambda: predictor(IMAGES),
        lambda: predictor({"image": IMAGES}),
        lambda: predictor.scores(BATCH),
        lambda: list(predictor.predict_files(paths)),
        lambda: evaluate(predictor, paths, [0, 1, 2], [str(i) for i in range(CLASSES)]),
        lambda: cf.stream(model, IMAGES[0]),
        lambda: class_activation_map(model, BATCH),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\) first"):
            way()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.eval()
    for way in ways:
        way()


def test_gradients_and_grad_mode_are_the_callers(folder: Path) -> None:
    model = build()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode, nullcontext):
        with context():
            assert check(model, folder) == ([], [])


def test_a_block_that_stands_twice_runs_twice() -> None:
    model = build()
    model.blocks[1] = model.blocks[0]
    torch.testing.assert_close(cf.stream(model, BATCH), model(BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pool",
    [
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(1)),
        nn.AvgPool2d(2),
    ],
)
def test_another_pool_inside_the_pool_is_not_streamed(pool: nn.Module) -> None:
    model = build()
    model.global_pool.pool = pool.eval()
    with pytest.raises(TypeError, match=r"global_pool"):
        cf.stream(model, BATCH)


def test_a_models_own_normalisation_is_what_inference_uses() -> None:
    torch.manual_seed(0)
    recipe = ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    model = cf.ConvMixer(16, 2, 3, 4, num_classes=5, normalize=recipe).eval()
    pixels = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8)
    with torch.no_grad():
        want = model(pixels)
    torch.testing.assert_close(cf.stream(model, pixels), want, rtol=1e-4, atol=1e-4)
    predictor = cf.Predictor(
        model, preprocessing="native", topk=None, output_type="logit", device="cpu"
    )
    image = pixels[0].permute(1, 2, 0).numpy()
    torch.testing.assert_close(torch.as_tensor(predictor(image)), want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predictor.scores(pixels), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        cf.Predictor(build(), topk=1, device="cpu").scores(pixels)
