"""Tools that go by names, classes, hooks and traced nodes find timm's model in ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, optimize
from convmixer_fast.testing import trained_like_

timm = pytest.importorskip("timm", reason="timm is not installed")
TimmConvMixer: Any = pytest.importorskip("timm.models.convmixer").ConvMixer

SHAPE = (2, 3, 19, 16)
POOLS = ("avg", "max", "avgmax", "catavgmax", "")
KWARGS = [
    {"global_pool": pool, "kernel_size": k, "act_layer": act, "num_classes": 5 if pool else 0}
    for pool, k, act in zip(POOLS, (4, 5, 3, 7, 2), (nn.GELU, nn.ReLU, nn.SiLU) * 2, strict=False)
]


@pytest.fixture(params=KWARGS, ids=lambda kwargs: kwargs["global_pool"] or "none")
def pair(request) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with its weights."""
    theirs = trained_like_(TimmConvMixer(8, 2, patch_size=3, **request.param), SHAPE).eval()
    ours = ConvMixer(8, 2, patch_size=3, **request.param).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves(model: nn.Module) -> list[tuple[str, str]]:
    return [(n, type(m).__name__) for n, m in model.named_modules() if not list(m.children())]


def multiply_adds(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """What a counter by module hooks sees: multiply-adds or elements by name, of exact classes."""
    seen: dict[str, int] = {}

    def count(name: str, module: nn.Module, out: torch.Tensor) -> None:
        if type(module) in (nn.Conv2d, nn.Linear):
            weight: Any = module.weight
            each = weight[0].numel()
        else:
            each = 1
        seen[name] = seen.get(name, 0) + out.numel() * each

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, _, out, name=name: count(name, m, out))
    model(x)
    return seen


def test_names_in_order_and_classes_of_leaves(pair):
    theirs, ours = pair
    names = [[name for name, _ in model.named_modules()] for model in pair]
    assert names[0] == names[1]
    assert leaves(ours) == leaves(theirs)
    for (name, a), (_, b) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        assert isinstance(b, nn.Sequential) == isinstance(a, nn.Sequential), name


@torch.no_grad()
def test_counters_by_hooks_agree(pair):
    x = torch.randn(SHAPE)
    counts = [multiply_adds(model, x) for model in pair]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 10_000


@torch.no_grad()
def test_feature_extraction_by_node_agrees(pair):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    x = torch.randn(SHAPE)
    theirs, ours = (extraction.get_graph_node_names(model) for model in pair)
    assert ours == theirs
    maps = [extraction.create_feature_extractor(m, return_nodes=ours[1])(x) for m in pair]
    for name in ours[1]:
        torch.testing.assert_close(maps[1][name], maps[0][name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("module", "name", "scripted"),
    [
        ("_features", "FeatureGetterNet", False),
        ("_features", "FeatureGetterNet", True),
        ("_features", "FeatureHookNet", False),
        ("_features_fx", "FeatureGraphNet", False),
        ("_features_fx", "FeatureGraphNet", True),
    ],
)
def test_timms_own_feature_extraction(module, name, scripted):
    build = getattr(pytest.importorskip(f"timm.models.{module}"), name)
    theirs = trained_like_(TimmConvMixer(8, 3, 5, 3, num_classes=5), SHAPE).eval()
    ours = ConvMixer(8, 3, 5, 3, num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(SHAPE), []
    for model in (theirs, ours):
        net = build(model, out_indices=(0, 2)).eval()
        results.append(list((torch.jit.script(net) if scripted else net)(x)))
    assert len(results[0]) == 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pool_is_kept_with_its_hooks_when_the_classifier_is_reset():
    model = ConvMixer(8, 1, 3, 3, num_classes=5, global_pool="max").eval()
    pool, seen = model.global_pool, []
    pool.register_forward_hook(lambda *_: seen.append(1))
    model.reset_classifier(2)
    assert model.global_pool is pool
    assert model(torch.randn(SHAPE)).shape == (2, 2)
    assert seen
    model.reset_classifier(2, "catavgmax")
    assert model.global_pool is not pool
    assert model(torch.randn(SHAPE)).shape == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"])
def test_timms_fast_pools(name):
    theirs = trained_like_(TimmConvMixer(8, 1, 3, 3, num_classes=5, global_pool=name), SHAPE)
    ours = ConvMixer(8, 1, 3, 3, num_classes=5, global_pool=name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPE)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_optimized_model_keeps_every_name_and_leaf():
    model = TimmConvMixer(8, 2, 5, 3, num_classes=5).eval()
    names, before = [name for name, _ in model.named_modules()], leaves(model)
    optimize(model)
    assert [name for name, _ in model.named_modules()] == names
    assert leaves(model) == before
