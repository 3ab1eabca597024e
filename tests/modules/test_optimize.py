"""`optimize` fuses what is proven to be a block and changes nothing else; `restore` undoes it."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import convmixer_fast
from convmixer_fast import (
    ConvMixer,
    DepthwiseMix,
    MixerBlock,
    PointwiseMix,
    explain,
    optimize,
    restore,
    to_reference,
)
from convmixer_fast.arch import Arch
from convmixer_fast.modules.optimize import optimization_report
from convmixer_fast.reference import DropPath, ReferenceConvMixer, Residual
from convmixer_fast.testing import assert_numerics, trained_like_

ARCH = Arch(16, 2, kernel_size=5, patch_size=4, num_classes=7)
SHAPE = (3, 3, 17, 18)
FUSED = (DepthwiseMix, PointwiseMix, MixerBlock)


def without_stacks(rows):
    """The rows of blocks and halves: a Sequential of nothing but blocks has one of its own."""
    return [row for row in rows if "MixerStack" not in row.now + row.reason]


def timm_model(arch: Arch = ARCH) -> nn.Module:
    convmixer = pytest.importorskip("timm.models.convmixer", reason="timm is not installed")
    return convmixer.ConvMixer(
        arch.dim, arch.depth, arch.kernel_size, arch.patch_size, num_classes=arch.num_classes
    )


def one_act(arch: Arch = ARCH) -> nn.Module:
    """A Sequential in which every layer holds the same activation object."""
    model = peers.locuslab(arch)
    act = nn.GELU()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, act)
    return model


PEERS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_model,
    "locuslab": lambda: peers.locuslab(ARCH),
    "tweet": lambda: peers.tweet(ARCH),
    "mmpretrain-backbone": lambda: peers.mmpretrain_backbone(ARCH),
    "mmpretrain-classifier": lambda: peers.mmpretrain_classifier(ARCH),
    "shared-activation": one_act,
    "even-kernel": lambda: peers.locuslab(Arch(9, 2, kernel_size=8, patch_size=3, num_classes=4)),
    "reference": lambda: ReferenceConvMixer(ARCH),
    "nested": lambda: nn.ModuleDict({"a": nn.ModuleList([peers.locuslab(ARCH)])}),
}


def inner(model: nn.Module) -> nn.Module:
    """The part of a fixture that can be called."""
    return model["a"][0] if isinstance(model, nn.ModuleDict) else model


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = inner(model)(x)
    return out[-1] if isinstance(out, tuple) else out


def fused_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FUSED)]


@pytest.fixture(params=PEERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = PEERS[request.param]()
    trained_like_(inner(made), SHAPE)
    return made.eval()


def block(act: nn.Module | None = None, k: int = 3, **conv: object) -> nn.Sequential:
    """One block whose depthwise convolution takes the given arguments."""
    settings = {"out_channels": 8, "groups": 8, "padding": "same"} | conv
    return nn.Sequential(
        Residual(
            nn.Sequential(
                nn.Conv2d(8, kernel_size=k, **settings), act or nn.GELU(), nn.BatchNorm2d(8)
            )
        ),
        nn.Conv2d(8, 8, 1),
        nn.GELU(),
        nn.BatchNorm2d(8),
    )


def reasons(model: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimize(model)
    return str(optimization_report(model))


@torch.no_grad()
def test_same_result(model):
    x = torch.randn(SHAPE)
    oracle = run(copy.deepcopy(model).double(), x.double())
    before = run(model, x)
    assert optimize(model) is model
    assert fused_modules(model)
    assert_numerics(run(model, x), before, oracle)


def test_same_keys_tensors_names_modes_and_leaves(model):
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    first.train()
    for p in list(model.parameters())[:9]:
        p.requires_grad_(False)

    def look() -> tuple[object, ...]:
        return (
            [(key, id(tensor)) for key, tensor in model.state_dict(keep_vars=True).items()],
            [(name, p.requires_grad) for name, p in model.named_parameters()],
            [(name, m.training) for name, m in model.named_modules()],
            [id(m) for m in model.modules() if not list(m.children())],
        )

    before = look()
    originals = list(model.modules())
    optimize(model)
    assert look() == before
    assert list(map(id, model.modules())) != list(map(id, originals))
    restore(model)
    assert look() == before
    assert all(a is b for a, b in zip(model.modules(), originals, strict=True))


@torch.no_grad()
def test_every_block_runs_fused(model):
    x = torch.randn(SHAPE)
    optimize(model)
    rows = explain(inner(model), x)
    engine = explain(MixerBlock(8, 3).eval(), torch.randn(1, 8, 4, 4))[0].op == "mixer_stack"
    whole, halves = ["mixer_stack"] * 2, ["depthwise_mix", "pointwise_mix"] * 2
    blocks = [m for m in model.modules() if isinstance(m, MixerBlock)]
    assert [row.op for row in rows] == (whole if engine and blocks else halves)
    assert not any("child" in row.reason or "no fused form" in row.reason for row in rows)


def test_training_equals_the_original(model):
    plain, x = copy.deepcopy(model).train(), torch.randn(SHAPE)
    optimize(model).train()
    for m in (plain, model):
        run(m, x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), c in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)


def test_gradients_of_an_eval_model_equal_the_original(model):
    plain = copy.deepcopy(model).double()
    model = optimize(model.double())
    x = torch.randn(SHAPE, dtype=torch.float64)
    for m in (plain, model):
        run(m, x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_later_changes_of_weights_take_effect(model):
    model = inner(model)
    other = trained_like_(copy.deepcopy(model), SHAPE, seed=5)
    plain, x = copy.deepcopy(model), torch.randn(SHAPE)
    optimize(model)

    def agree() -> torch.Tensor:
        with torch.no_grad():
            ours, theirs = (run(m, x.to(next(m.parameters()))) for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
        return ours

    seen = [agree()]
    for m in (model, plain):
        m.load_state_dict(other.state_dict())
    seen.append(agree())
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        run(m, x).square().mean().backward()
        optimizer.step()
    seen.append(agree())
    for m in (model, plain):
        for p in m.parameters():
            p.data.mul_(0.9)
    seen.append(agree())
    for m in (model, plain):
        conv = next(c for c in m.modules() if isinstance(c, nn.Conv2d) and c.groups > 1)
        conv.weight = nn.Parameter(conv.weight.detach() * 2)
    seen.append(agree())
    for before, after in itertools.pairwise(seen):
        assert (before - after).abs().max() > 1e-3
    for m in (model, plain):
        m.to(torch.float64)
    assert agree().dtype == torch.float64


def test_twice_changes_nothing_and_says_so(model):
    optimize(model)
    modules, report = list(model.modules()), optimization_report(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert optimization_report(model) == report
    assert len(without_stacks(report.replaced)) == 4
    assert not report.kept


def test_report_before_is_a_dry_run(model):
    before = optimization_report(model)
    assert not fused_modules(model)
    assert len(without_stacks(before.kept)) == 4
    assert all("optimize makes it" in row.reason for row in before)
    optimize(model)
    after = optimization_report(model)
    assert [row.module for row in after] == [row.module for row in before]
    assert [row.was for row in after] == [row.was for row in before]
    assert " -> " in str(after)


@torch.no_grad()
def test_not_in_place_leaves_the_model_alone(model):
    x, modules = torch.randn(SHAPE), list(model.modules())
    fast = optimize(model, inplace=False)
    assert fast is not model
    assert fused_modules(fast)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    next(fast.parameters()).zero_()
    assert next(model.parameters()).abs().max() > 0
    assert run(model, x).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_work_and_can_be_restored(model, how):
    x = torch.randn(SHAPE)
    optimize(model)
    expected = run(model, x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(run(twin, x), expected)
    theirs = {id(t) for t in twin.state_dict(keep_vars=True).values()}
    assert not theirs & {id(t) for t in model.state_dict(keep_vars=True).values()}
    restore(twin)
    assert not fused_modules(twin)
    assert {id(t) for t in twin.state_dict(keep_vars=True).values()} == theirs
    torch.testing.assert_close(run(twin, x), expected, rtol=2e-4, atol=2e-4)
    assert fused_modules(model)


@torch.no_grad()
def test_restore_gives_the_original_bits(model):
    x = torch.randn(SHAPE)
    expected, text = run(model, x), repr(model)
    restore(optimize(model))
    assert repr(model) == text
    assert torch.equal(run(model, x), expected)
    optimize(model)
    assert fused_modules(model)


def test_surgery_on_the_optimised_model_survives_restore():
    model = optimize(trained_like_(peers.locuslab(ARCH), SHAPE))
    conv, act = nn.Conv2d(16, 16, 3, groups=16, padding="same"), nn.SiLU()
    model[3][0].fn[0] = conv
    model[4][2] = act
    expected = model(torch.ones(SHAPE))
    restore(model)
    assert model[3][0].fn[0] is conv
    assert model[4][2] is act
    torch.testing.assert_close(model(torch.ones(SHAPE)), expected, rtol=2e-4, atol=2e-4)


def test_hooks_on_containers_move_with_their_handles():
    model = trained_like_(peers.locuslab(ARCH), SHAPE)
    x = torch.randn(SHAPE)
    seen: list[str] = []
    res, block = model[3][0], model[3]
    handles = [
        block.register_forward_hook(lambda m, a, out: seen.append("forward")),
        res.register_forward_hook(
            lambda m, a, kw, out: seen.append("kwargs"), with_kwargs=True, always_call=True
        ),
        res.register_forward_pre_hook(lambda m, a, kw: seen.append("pre"), with_kwargs=True),
        block.register_full_backward_hook(lambda m, i, o: seen.append("backward")),
        block.register_full_backward_pre_hook(lambda m, o: seen.append("backward pre")),
        block.register_state_dict_post_hook(lambda m, sd, prefix, meta: seen.append("save")),
        block.register_load_state_dict_pre_hook(
            lambda m, *rest: seen.append(f"load into {type(m).__name__}")
        ),
        block.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded")),
    ]

    def exercise() -> list[str]:
        seen.clear()
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    before = exercise()
    assert len(before) == 8
    optimize(model)
    during = exercise()
    assert "load into MixerBlock" in during
    assert [s.replace("MixerBlock", "Sequential") for s in during] == before
    late = model[3].register_forward_hook(lambda m, a, out: seen.append("late"))
    restore(model)
    assert exercise().count("late") == 1
    optimize(model)
    for handle in [*handles, late]:
        handle.remove()
    assert exercise() == []


@torch.no_grad()
@pytest.mark.parametrize("where", ["conv", "branch", "act"])
def test_hooks_on_children_still_fire(where):
    model = trained_like_(peers.locuslab(ARCH), SHAPE)
    x, seen = torch.randn(SHAPE), []
    part = {"conv": model[3][0].fn[0], "branch": model[3][0].fn, "act": model[3][2]}[where]
    part.register_forward_hook(lambda m, a, out: seen.append(out) or out * 1.5)
    expected = model(x)
    seen.clear()
    torch.testing.assert_close(optimize(model)(x), expected, rtol=2e-4, atol=2e-4)
    assert len(seen) == 1


def test_attributes_of_containers_are_kept_and_noted():
    model = peers.locuslab(ARCH)
    model[3][0].layer_id, model[3].tag = 3, {"lr": 0.1}
    optimize(model)
    assert model[3][0].layer_id == 3
    assert model[3].tag == {"lr": 0.1}
    assert "took over the attributes layer_id" in str(optimization_report(model))
    model[3].tag = "new"
    assert restore(model)[3].tag == "new"


@torch.no_grad()
def test_a_block_that_stands_twice_is_replaced_once():
    shared = block()
    model = nn.Sequential(shared, nn.Identity(), nn.ModuleDict({"again": shared})["again"])
    trained_like_(model, (2, 8, 9, 9))
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    optimize(model)
    assert model[0] is model[2]
    assert type(model[0]) is MixerBlock
    torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)


def test_a_model_that_is_a_block_comes_back_as_the_new_module():
    root = block()
    fast = optimize(root)
    assert type(fast) is MixerBlock
    assert restore(fast) is root
    assert type(optimize(Residual(block()[0].fn))) is DepthwiseMix


def test_short_form_stays_indexable():
    model = optimize(peers.tweet(ARCH))
    assert isinstance(model[1][0], nn.Sequential)
    assert isinstance(model[1][0], DepthwiseMix)
    assert len(model[1][0]) == 1
    assert model[1][0][0] is next(iter(model[1][0]))
    assert type(model[1][1]) is PointwiseMix
    assert optimization_report(peers.tweet(ARCH))[0].was == "SkipFirst"


@torch.no_grad()
def test_names_of_children_may_be_any():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spatial = block()[0]
            self.mix, self.act, self.norm = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.act(self.mix(self.spatial(x))))

    model = trained_like_(nn.Sequential(Block()), (2, 8, 9, 9))
    keys, x = list(model.state_dict()), torch.randn(2, 8, 9, 9)
    expected = model(x)
    optimize(model)
    assert type(model[0]) is MixerBlock
    assert isinstance(model[0].norm, nn.BatchNorm2d)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["x + fn(x)", "torch.add", "method", "in place on the branch"])
def test_every_way_to_write_the_sum_is_found(form):
    class Skip(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x):
            if form == "x + fn(x)":
                return x + self.body(x)
            if form == "torch.add":
                return torch.add(self.body(x), x)
            if form == "method":
                return x.add(self.body(x))
            out = self.body(x)
            out += x
            return out

    model = trained_like_(nn.Sequential(Skip(block()[0].fn)), (2, 8, 9, 9))
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert type(optimize(model)[0]) is DepthwiseMix
    torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)


class Written(nn.Module):
    """A residual module whose forward is given as a function of itself and x."""

    default = 1

    def __init__(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = block()[0].fn
        self.calls = 0
        self.on = True
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def in_place(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x += module.fn(x)
    return x


def counting(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    module.calls += 1
    return module.fn(x) + x if module.calls < 9 else x


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.fn(x) - x, "also computes sub"),
        (lambda m, x: m.fn(x) + 2 * x, "also computes mul"),
        (lambda m, x: m.fn(x), "its forward computes fn(x)"),
        (lambda m, x: m.fn(m.fn(x)) + x, "fn(fn(x)) + x"),
        (lambda m, x: m.fn(x) + x + x, "computes fn(x) + x + x"),
        (lambda m, x: m.fn(x) + 1, "also uses 1"),
        (lambda m, x: m.fn[0](x) + x, "fn.0(x) + x"),
        (lambda m, x: F.relu(m.fn(x) + x), "also computes relu"),
        (lambda m, x: torch.add(m.fn(x), x, alpha=2), "also computes add"),
        (lambda m, x: m.fn(x) + x if m.training else x, "another one in training"),
        (lambda m, x: m.fn(x) + x if x.sum() > 0 else x, "cannot be traced"),
        (lambda m, x: (m.fn(x) + x, x)[0:1], "also uses"),
        (in_place, "changes its input in place"),
        (lambda m, x: None, "also uses None"),
        (lambda m, x: (m.fn(x), m.fn(x) + x)[1], "drops the result of fn"),
        (lambda m, x: m.fn(x) + x if m.on else x, "depends on the attribute on"),
        (lambda m, x: m.fn(x) + x if m.default == 1 else x, "depends on the attribute default"),
    ],
)
def test_other_formulas_are_refused_with_the_reason(forward, reason):
    model = nn.Sequential(Written(forward))
    assert reason in reasons(model)
    assert not fused_modules(model)


def test_tracing_leaves_no_trace_on_the_module():
    model = nn.Sequential(Written(counting))
    optimize(model)
    assert restore(model)[0].calls == 0


def depthwise(**conv: object) -> nn.Sequential:
    return nn.Sequential(block(**conv))


def changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = block()
        change(made)
        return nn.Sequential(made)

    return build


class OwnState(Residual):
    def _load_from_state_dict(self, *args, **kwargs):
        return super()._load_from_state_dict(*args, **kwargs)


def own_state(made: nn.Sequential) -> None:
    made[0] = OwnState(made[0].fn)


def gamma(made: nn.Sequential) -> None:
    made[0].gamma = nn.Parameter(torch.ones(()))


def own_forward(made: nn.Sequential) -> None:
    made[0].forward = lambda x: x


def conv_forward(made: nn.Sequential) -> None:
    made[0].fn[0].forward = lambda x: x


def idle_child(made: nn.Sequential) -> None:
    made[0].spare = nn.Identity()


def training_branch(made: nn.Sequential) -> None:
    fn = made[0].fn
    del made[0].fn
    made[0]._modules["training"] = fn


class Gated(Residual):
    def forward(self, x, gate=None):
        return self.fn(x) + x


def two_arguments(made: nn.Sequential) -> None:
    made[0] = Gated(made[0].fn)


class Tagged(nn.Parameter):
    pass


def tensor_subclass(made: nn.Sequential) -> None:
    made[0].fn[0].weight = Tagged(made[0].fn[0].weight.detach())


def subclass(made: nn.Sequential) -> None:
    class Body(nn.Sequential):
        pass

    made[0].fn = Body(*made[0].fn)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: depthwise(k=8, padding=4), 'padding (4, 4) of a 8 x 8 kernel is not "same"'),
        (lambda: depthwise(stride=1, dilation=2), "dilation (2, 2)"),
        (lambda: depthwise(padding_mode="reflect"), "pads with 'reflect'"),
        (lambda: depthwise(k=(3, 5)), "not square"),
        (lambda: depthwise(stride=2, padding=1), "stride (2, 2)"),
        (lambda: depthwise(out_channels=16), "maps 8 channels to 16"),
        (lambda: depthwise(k=33), "larger than 31"),
        (lambda: depthwise(act=nn.GELU(approximate="tanh")), "GELU(approximate='tanh')"),
        (lambda: depthwise(act=nn.Mish()), "no fused form of its activation Mish()"),
        (changed(lambda b: b[0].fn.__setitem__(2, nn.GroupNorm(2, 8))), "GroupNorm, not a Batch"),
        (
            changed(lambda b: b[0].fn.__setitem__(2, nn.BatchNorm2d(8, track_running_stats=False))),
            "no running statistics",
        ),
        (changed(lambda b: b[0].fn.append(nn.Identity())), "its branch holds 4 modules"),
        (changed(lambda b: parametrizations.weight_norm(b[0].fn[0])), "parametrized"),
        (changed(lambda b: prune.l1_unstructured(b[0].fn[0], "weight", 0.5)), "pruning"),
        (changed(lambda b: nn.utils.spectral_norm(b[0].fn[0])), "spectral_norm"),
        (changed(lambda b: b[0].compile(backend="eager")), "compiled in place"),
        (changed(own_state), "has its own _load_from_state_dict"),
        (changed(gamma), "parameters of its own: gamma"),
        (changed(own_forward), "it has a forward of its own"),
        (changed(conv_forward), "its convolution has a forward of its own"),
        (changed(subclass), "its branch is a Body"),
        (changed(idle_child), "child that its forward does not use: spare"),
        (changed(training_branch), "its branch has the name training"),
        (changed(two_arguments), "takes more than one argument"),
        (changed(tensor_subclass), "the weight of its convolution is a Tagged"),
    ],
)
def test_what_is_not_a_plain_half_stays_with_the_reason(build, reason):
    model = build()
    assert reason in reasons(model)
    assert not [m for m in model.modules() if isinstance(m, DepthwiseMix | MixerBlock)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: prune.l1_unstructured(b[1], "bias", 0.5), "the bias of its convolution"),
        (lambda b: b.__setitem__(2, nn.Tanh()), "no fused form of its activation Tanh()"),
        (lambda b: b.__setitem__(1, nn.Conv2d(8, 8, 1, stride=2)), "not a dense one of stride 1"),
        (lambda b: b.__setitem__(3, nn.InstanceNorm2d(8)), "InstanceNorm2d, not a BatchNorm2d"),
    ],
)
def test_a_channel_half_that_cannot_be_fused_leaves_the_spatial_one_fused(change, reason):
    made = block()
    change(made)
    model = nn.Sequential(made)
    assert reason in reasons(model)
    assert type(model[0]) is nn.Sequential
    assert type(model[0][0]) is DepthwiseMix


@torch.no_grad()
def test_flat_blocks_keep_their_keys_and_say_why_half_is_left():
    model = trained_like_(nn.Sequential(*block(), *block()), (2, 8, 9, 9))
    keys, x = list(model.state_dict()), torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert "would rename its keys" in reasons(model)
    assert [type(model[i]) for i in (0, 4)] == [DepthwiseMix] * 2
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.Sequential):
    """A subclass that computes what a Sequential computes."""

    def describe(self) -> str:
        return "a block"


def test_subclasses_of_sequential_are_judged_by_what_they_compute():
    assert "also computes mul" in reasons(nn.Sequential(Doubled(*block())))
    model = nn.Sequential(Renamed(*block()), Renamed(*list(block())[1:]))
    optimize(model)
    assert [type(m) for m in model] == [MixerBlock, PointwiseMix]
    assert "without the methods describe" in str(optimization_report(model))
    assert restore(model)[0].describe() == "a block"


@torch.no_grad()
def test_a_forward_set_on_a_child_later_is_called():
    model = optimize(trained_like_(peers.locuslab(ARCH), SHAPE))
    x = torch.randn(SHAPE)
    conv, before = model[3][0].fn[0], model(x)
    usual = conv.forward
    conv.forward = lambda t: 3 * usual(t)
    changed_result = model(x)
    assert (changed_result - before).abs().max() > 1e-2
    torch.testing.assert_close(restore(model)(x), changed_result, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("steady", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("of", ["half", "block"])
def test_a_forward_patched_on_a_replaced_class_is_called(monkeypatch, of, steady):
    class Half(Residual):
        pass

    class Whole(nn.Sequential):
        pass

    def network() -> nn.Sequential:
        made = block()
        made[0] = Half(made[0].fn)
        return nn.Sequential(Whole(*made))

    model, x, fired = network().eval(), torch.randn(2, 8, 9, 7), []
    plain = copy.deepcopy(model)
    before = optimize(model)(x)
    for module in (model[0], model[0][0]):
        module.register_forward_hook(lambda *call: fired.append(call))
    if steady:
        model(x)
        model(x)
    cls = {"half": Half, "block": Whole}[of]
    usual = cls.forward
    monkeypatch.setattr(cls, "forward", lambda module, x: 2 * usual(module, x))
    assert (model(x) - before).abs().max() > 1e-2
    torch.testing.assert_close(model(x), plain(x), rtol=2e-4, atol=2e-4)
    fired.clear()
    copy.deepcopy(model)(x)
    model(x)
    assert len(fired) == 4
    monkeypatch.undo()
    torch.testing.assert_close(model(x), before, rtol=2e-4, atol=2e-4)


def test_unnested_residual_is_named():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dw, self.act, self.bn = block()[0].fn

        def forward(self, x):
            return x + self.bn(self.act(self.dw(x)))

    assert "not in one nn.Sequential" in reasons(nn.Sequential(Flat()))

    class Other(Flat):
        def forward(self, x):
            return x * self.bn(self.act(self.dw(x)))

    assert reasons(nn.Sequential(Other())) == "no ConvMixer blocks"


class Dropped(nn.Module):
    """The residual with stochastic depth on its branch, as OpenMixup writes it."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.fn = block()[0].fn
        self.drop_path = drop_path

    def forward(self, x):
        return self.drop_path(self.fn(x)) + x


@pytest.mark.parametrize("drop", [nn.Identity, lambda: DropPath(0.5), "timm"])
def test_stochastic_depth_is_kept(drop):
    if drop == "timm":
        layers = pytest.importorskip("timm.layers", reason="timm is not installed")
        drop = lambda: layers.DropPath(0.5)  # noqa: E731
    model = trained_like_(nn.Sequential(Dropped(drop())), (8, 8, 9, 9))
    plain, x, path = copy.deepcopy(model), torch.randn(8, 8, 9, 9), model[0].drop_path
    optimize(model)
    assert type(model[0]) is DepthwiseMix
    assert model[0].drop_path is path
    torch.testing.assert_close(model(x), plain(x), rtol=2e-4, atol=2e-4)
    results = []
    for m in (model.train(), plain.train()):
        torch.manual_seed(3)
        results.append(m(x))
    torch.testing.assert_close(*results)
    assert type(restore(model)[0]) is Dropped


def test_stochastic_depth_that_acts_in_eval_mode_is_refused():
    class Half(nn.Module):
        def forward(self, x):
            return x * 0.5

    assert "Half does something in eval mode" in reasons(nn.Sequential(Dropped(Half())))


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [nn.DataParallel, "ddp", "compile", "ema"])
def test_wrapped_models_are_optimised_inside(wrapper, tmp_path):
    plain = trained_like_(peers.locuslab(ARCH), SHAPE)
    x = torch.randn(SHAPE)
    expected = plain(x)
    if wrapper == "ddp":
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            model = nn.parallel.DistributedDataParallel(plain)
            assert optimize(model) is model
            torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)
            assert type(to_reference(model)) is nn.Sequential
        finally:
            torch.distributed.destroy_process_group()
    elif wrapper == "compile":
        model = torch.compile(plain, backend="eager")
        torch.testing.assert_close(model(x), expected)
        assert optimize(model) is model
        torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)
        assert type(to_reference(model)) is nn.Sequential
    else:
        model = wrapper(plain) if wrapper != "ema" else torch.optim.swa_utils.AveragedModel(plain)
        optimize(model)
        torch.testing.assert_close(model(x), expected, rtol=2e-4, atol=2e-4)
        plain = model.module
    assert len([m for m in fused_modules(plain) if type(m) is MixerBlock]) == 2


def test_a_compiled_block_is_refused_for_its_forward_is_taken():
    model = torch.compile(block(), backend="eager")
    assert "optimize first, then compile" in reasons(model)


@torch.no_grad()
def test_optimised_models_compile_and_export_without_graph_breaks():
    model = optimize(trained_like_(peers.tweet(ARCH), SHAPE))
    x = torch.randn(SHAPE)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=2e-4, atol=2e-4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_optimised_models_trace_with_fx_as_before():
    model = optimize(trained_like_(peers.locuslab(ARCH), SHAPE))
    x = torch.randn(SHAPE)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(2, 2)), depthwise(act=nn.Mish())], ids=["mlp", "mish"]
)
def test_nothing_found_is_a_warning_that_says_why(model):
    modules = list(model.modules())
    with pytest.warns(UserWarning, match="no ConvMixer block found in Sequential") as caught:
        assert optimize(model) is model
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_not_a_module_is_one_line():
    with pytest.raises(TypeError, match="got dict: pass the model itself"):
        optimize({})


@torch.no_grad()
def test_our_own_model_is_left_and_can_be_made_plain():
    model = trained_like_(
        ConvMixer(16, 2, 4, 4, num_classes=7, drop_path_rate=0.2, act_layer="silu"), SHAPE
    )
    x, modules = torch.randn(SHAPE), list(model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(row.reason == "built fused" for row in optimization_report(model))
    oracle = to_reference(model).double()(x.double())
    plain = to_reference(model)
    assert not fused_modules(plain)
    assert type(plain.blocks[0][0]) is Residual
    assert list(plain.state_dict()) == list(model.state_dict())
    assert_numerics(model(x), plain(x), oracle)
    names = [str(node.target) for node in torch.export.export(plain, (x,)).graph.nodes]
    assert not [name for name in names if "convmixer_fast" in name]
    ours = torch.export.export(model, (x,)).graph.nodes
    assert [n for n in ours if "convmixer_fast" in str(n.target)]
    restored = restore(copy.deepcopy(model))
    assert torch.equal(restored(x), plain(x))
    assert fused_modules(optimize(restored))


def test_stochastic_depth_of_our_own_model_survives_restore():
    model = trained_like_(ConvMixer(8, 2, 3, 2, num_classes=3, drop_path_rate=0.5), (4, 3, 8, 8))
    plain, x = to_reference(model), torch.randn(4, 3, 8, 8)
    results = []
    for m in (model.train(), plain.train()):
        torch.manual_seed(1)
        results.append(m(x))
    torch.testing.assert_close(*results)
    assert "MixerBlock" in str(optimization_report(optimize(plain)))


@torch.no_grad()
@pytest.mark.parametrize("build", [timm_model, lambda: ConvMixer(16, 2, 5, 4, num_classes=7)])
def test_reference_goes_through_torchscript_tracing(build):
    model = optimize(trained_like_(build(), SHAPE))
    x = torch.randn(SHAPE)
    plain = to_reference(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(plain, x)
    assert "convmixer_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm", "locuslab"])
def test_reference_goes_through_torchscript_compilation(name):
    model = optimize(trained_like_(PEERS[name](), SHAPE))
    plain, x = to_reference(model), torch.randn(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(plain)
    torch.testing.assert_close(scripted(x), plain(x))


@torch.no_grad()
def test_reference_exports_to_onnx():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, x = trained_like_(ConvMixer(16, 2, 5, 4, num_classes=7), SHAPE), torch.randn(SHAPE)
    program = torch.onnx.export(to_reference(model), (x,), dynamo=True).model_proto
    operators = {node.op_type for node in program.graph.node}
    assert "Conv" in operators
    assert not [op for op in operators if "mix" in op]
    evaluate = pytest.importorskip("onnx.reference").ReferenceEvaluator(program).run
    (logits,) = evaluate(None, {program.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


class TestTimm:
    """timm's own functions on an optimised timm model."""

    @torch.no_grad()
    def test_methods(self):
        plain = trained_like_(timm_model(), SHAPE)
        model, x = optimize(plain, inplace=False), torch.randn(SHAPE)
        assert model.group_matcher() == plain.group_matcher()
        for a, b in zip(
            model.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
            plain.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
        model.reset_classifier(3)
        assert model(x).shape == (3, 3)
        assert model.prune_intermediate_layers([0]) == [0]
        assert len(model.blocks) == 1
        assert type(model.blocks[0]) is MixerBlock

    def test_grad_checkpointing_gives_the_same_gradients(self):
        model = optimize(trained_like_(timm_model(), SHAPE)).train()
        twin, x = copy.deepcopy(model), torch.randn(SHAPE)
        twin.set_grad_checkpointing()
        for m in (model, twin):
            m(x).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)

    @torch.no_grad()
    def test_features_only(self):
        features = pytest.importorskip("timm.models._features", reason="timm is not installed")
        arch = Arch(16, 4, kernel_size=3, patch_size=7)
        net = trained_like_(features.FeatureGetterNet(timm_model(arch), (0, 2)), (2, 3, 28, 28))
        x = torch.randn(2, 3, 28, 28)
        expected = net(x)
        optimize(net)
        assert len(without_stacks(optimization_report(net).replaced)) == 6
        for a, b in zip(net(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)

    def test_optimizer_with_layer_decay_steps(self):
        optim = pytest.importorskip("timm.optim", reason="timm is not installed")
        plain = trained_like_(timm_model(), SHAPE)
        model, x = optimize(plain, inplace=False), torch.randn(SHAPE)
        for m in (plain, model):
            optimizer = optim.create_optimizer_v2(
                m, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7
            )
            m.train()(x).square().mean().backward()
            optimizer.step()
            m.eval()
        assert len(optimizer.param_groups) > 3
        torch.testing.assert_close(model(x), plain(x), rtol=2e-4, atol=2e-4)


def test_public_names():
    assert convmixer_fast.optimize is optimize
    assert {"optimize", "restore", "to_reference"} <= set(convmixer_fast.__all__)
