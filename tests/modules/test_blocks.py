"""The drop-in blocks: same result as their children run one by one, fused only where that is so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from convmixer_fast import DepthwiseMix, MixerBlock, PointwiseMix, explain, use_backend
from convmixer_fast.modules.fusible import is_depthwise, is_pointwise
from convmixer_fast.reference import DropPath, reference_block
from convmixer_fast.testing import assert_numerics, trained_like_

SHAPE = (2, 12, 9, 10)


def make(kind: str, act=nn.GELU) -> nn.Module:
    return {
        "depthwise": lambda: DepthwiseMix(12, 5, act),
        "pointwise": lambda: PointwiseMix(12, 7, act),
        "block": lambda: MixerBlock(12, 4, act),
    }[kind]()


def composed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The children one by one: hooks on every leaf forbid fusing."""
    plain = copy.deepcopy(module)
    for m in plain.modules():
        if not list(m.children()):
            m.register_forward_hook(lambda *_: None)
    return plain(x)


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, "silu", nn.Hardswish, nn.Identity, nn.Mish])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "block"])
def test_fused_equals_children(kind, act):
    module = trained_like_(make(kind, act), SHAPE)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        oracle = composed(copy.deepcopy(module).double(), x.double())
        assert_numerics(module(x), composed(module, x), oracle)
        backends = {row.backend for row in explain(module, x)}
    assert backends == ({"reference"} if act is nn.Mish else {"cpu"})


def test_keys_are_timms():
    assert set(MixerBlock(4, 3).state_dict()) == set(reference_block(4, 3, nn.GELU).state_dict())


def test_children_hooks_fire_and_see_their_tensors():
    block, seen = trained_like_(make("block"), SHAPE), []
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = block(x)
        handle = block[0].fn[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))
        block[3].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
        torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)
        assert seen == [torch.Size(SHAPE)] * 2
        handle.remove()
        reasons = [row.reason for row in explain(block, x)]
    assert "hooks" not in reasons[0]
    assert "a child module has hooks" in reasons[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.train(), "batch statistics"),
        (lambda b: b[0].fn.register_forward_hook(lambda *_: None), "hooks"),
        (lambda b: b[0].fn.__setitem__(2, nn.GroupNorm(3, 12)), "GroupNorm"),
        (lambda b: b[0].fn.__setitem__(1, nn.GELU(approximate="tanh")), "tanh"),
        (lambda b: b[0].fn.__setitem__(0, nn.Conv2d(12, 12, 3, padding=1)), "depthwise"),
        (lambda b: b[0].fn.append(nn.Identity()), "Sequential"),
        (lambda b: nn.utils.parametrizations.weight_norm(b[0].fn[0]), "depthwise"),
    ],
)
def test_what_cannot_be_fused_runs_composed_and_says_why(change, reason):
    block = trained_like_(make("block"), SHAPE)
    change(block)
    x = torch.randn(SHAPE)
    row = explain(block, x)[0]
    assert row.backend == "reference"
    assert reason in row.reason
    torch.testing.assert_close(block(x), composed(block, x))


def test_hooks_on_all_modules_see_every_child():
    block, seen = trained_like_(make("block"), SHAPE), []
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = block(x)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(type(module).__name__)
        )
        try:
            torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)
        finally:
            handle.remove()
        assert [name for name in seen if name in ("Conv2d", "GELU", "BatchNorm2d")] == [
            "Conv2d", "GELU", "BatchNorm2d", "Conv2d", "GELU", "BatchNorm2d",
        ]  # fmt: skip
        seen.clear()
        block(x)
        assert seen == []


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "block"])
def test_forward_mode_gradients_pass_through(kind, grad):
    module = trained_like_(make(kind), SHAPE)
    x, direction = torch.randn(SHAPE), torch.randn(SHAPE)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        expected = forward_ad.unpack_dual(composed(module, dual)).tangent
        tangent = forward_ad.unpack_dual(module(dual)).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


def test_other_layers_in_the_place_of_the_pointwise_convolution_still_run():
    block = trained_like_(make("block"), SHAPE)
    block[1] = nn.Conv2d(12, 12, 3, padding=1)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(block(x), composed(block, x))
    assert "1x1" in explain(block, x)[1].reason


def test_longer_and_shorter_blocks_run_as_the_sequentials_they_are():
    block = trained_like_(make("block"), SHAPE)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(block[:3](x), block[2](block[1](block[0](x))))
        assert type(block[:3]) is nn.Sequential
        whole = block(x)
        block.append(nn.ReLU())
        torch.testing.assert_close(block(x), whole.relu(), rtol=1e-5, atol=1e-5)
        pointwise = trained_like_(make("pointwise"), SHAPE)
        out = pointwise(x)
        pointwise.append(nn.ReLU())
        torch.testing.assert_close(pointwise(x), out.relu(), rtol=1e-5, atol=1e-5)


def test_wrong_inputs_get_pytorchs_own_errors():
    block = trained_like_(make("block"), SHAPE)
    for x in (
        torch.randn(2, 11, 9, 9),
        torch.randn(SHAPE, dtype=torch.float64),
        torch.ones(SHAPE).long(),
    ):
        with pytest.raises(RuntimeError):
            block(x)


def test_unbatched_maps_run_as_pytorch_runs_them():
    block = trained_like_(make("depthwise"), SHAPE)
    assert block.fn[0](torch.randn(12, 9, 10)).shape == (12, 9, 10)
    with pytest.raises(ValueError, match="4D"):  # the convolution takes a lone map, BatchNorm2d not
        block(torch.randn(12, 9, 10))


def test_batch_norm_without_statistics_or_affine():
    x = torch.randn(SHAPE)
    block = trained_like_(make("block"), SHAPE)
    block[0].fn[2] = nn.BatchNorm2d(12, affine=False).eval()
    block[3] = nn.BatchNorm2d(12, track_running_stats=False).eval()
    rows = explain(block, x)
    assert rows[0].backend == "cpu"
    assert "batch statistics" in rows[1].reason
    torch.testing.assert_close(block(x), composed(block, x), rtol=1e-5, atol=1e-5)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    x = torch.ones(4000, 2, 1, 1)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (y[:, 0] == y[:, 1]).all()
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match="drop_path"):
        DropPath(1.0)


def test_drop_path_acts_on_the_residual_branch_only_in_training():
    block = trained_like_(DepthwiseMix(12, 3, drop_path=0.999999), SHAPE)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert not torch.allclose(block(x), x)
        block.fn.eval()
        block.training = True
        block.drop_path.train()
        assert torch.equal(block(x), x)
        assert "drop_path" in explain(block, x)[0].reason


def test_from_parts_keeps_the_objects_and_refuses_others():
    plain = reference_block(6, 3, nn.ReLU)
    spatial = DepthwiseMix.from_parts(plain[0].fn, name="0")
    block = MixerBlock.from_parts(spatial, plain[1], plain[2], plain[3])
    half = PointwiseMix.from_parts(plain[1], plain[2], plain[3])
    assert spatial.get_submodule("0") is plain[0].fn
    assert block[1] is half[0] is plain[1]
    with pytest.raises(ValueError, match="depthwise"):
        DepthwiseMix.from_parts(nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)))
    for build in (
        lambda: PointwiseMix.from_parts(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
        lambda: MixerBlock.from_parts(spatial, nn.Conv2d(6, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
    ):
        with pytest.raises(ValueError, match="1x1"):
            build()


@pytest.mark.parametrize(
    ("conv", "depthwise", "pointwise"),
    [
        (nn.Conv2d(6, 6, 4, groups=6, padding="same"), True, False),
        (nn.Conv2d(6, 6, 5, groups=6, padding=2), True, False),
        (nn.Conv2d(6, 6, 4, groups=6, padding=2), False, False),
        (nn.Conv2d(6, 6, 5, groups=6, padding=1), False, False),
        (nn.Conv2d(6, 6, 5, groups=6, padding=2, stride=2), False, False),
        (nn.Conv2d(6, 6, 5, groups=6, padding=4, dilation=2), False, False),
        (nn.Conv2d(6, 6, 5, groups=6, padding=2, padding_mode="reflect"), False, False),
        (nn.Conv2d(6, 6, (3, 5), groups=6, padding="same"), False, False),
        (nn.Conv2d(6, 12, 5, groups=6, padding=2), False, False),
        (nn.Conv2d(6, 6, 33, groups=6, padding=16), False, False),
        (nn.Conv2d(6, 6, 1, groups=6), True, False),
        (nn.Conv2d(6, 8, 1), False, True),
        (nn.Conv2d(6, 8, 1, stride=2), False, False),
        (nn.Conv2d(6, 8, 1, padding=1), False, False),
        (nn.Conv2d(6, 8, 1, padding="same", bias=False), False, True),
        (nn.Linear(6, 6), False, False),
    ],
)
def test_which_convolutions_are_recognised(conv, depthwise, pointwise):
    assert is_depthwise(conv) is depthwise
    assert is_pointwise(conv) is pointwise


def test_a_block_of_one_by_one_depthwise():
    block = trained_like_(MixerBlock(6, 1), (2, 6, 5, 5))
    block[0].fn[0].padding = (0, 0)
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), composed(block, x), rtol=1e-5, atol=1e-5)


def test_reference_backend_is_bitwise_the_children():
    block = trained_like_(make("block"), SHAPE)
    x = torch.randn(SHAPE)
    with torch.no_grad(), use_backend("reference"):
        assert torch.equal(block(x), composed(block, x))
