"""Every format loads into every model exactly; a misfit leaves the model unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from checkpoint_cases import (
    ARCH,
    ARCHS,
    BUILD,
    CASES,
    assert_holds,
    assert_same_bits,
    image,
    memoryless,
    refusal,
    snapshot,
    trained,
    weights,
)
from peers import mmpretrain_backbone
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer_fast.arch import VARIANTS, Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    build_model_kwargs,
    convert_state_dict,
    load_checkpoint,
    read_checkpoint,
    reading,
    save_checkpoint,
)
from convmixer_fast.modules.model import ConvMixer
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, trained_like_

MISFITS = {
    "dim": ({"dim": 16}, ("dim is 16 in the checkpoint and 12 in the model", "dim=16")),
    "depth": ({"depth": 4}, ("depth is 4 in the checkpoint and 2 in the model", "depth=4")),
    "shallow": ({"depth": 1}, ("depth is 1",)),
    "kernel": ({"kernel_size": 7}, ("kernel_size=7",)),
    "patch": ({"patch_size": 2}, ("patch_size=2",)),
    "in_chans": ({"in_chans": 1}, ("in_chans is 1 in the checkpoint and 3 in the model",)),
    "classes": ({"num_classes": 9}, ("9 in the checkpoint and 7", "num_classes=9", "strict=False")),
    "no head": ({"num_classes": 0}, ("lacks", "strict=False")),
    "several": ({"dim": 16, "depth": 3}, ("dim=16, depth=3",)),
}


@pytest.mark.parametrize(("form", "arch"), CASES, ids=str)
def test_every_format_reproduces_the_logits_of_its_source(form: str, arch: Arch) -> None:
    theirs = trained(form, arch)
    checkpoint = read_checkpoint(theirs.state_dict())
    assert checkpoint.format == form
    assert checkpoint.arch == Arch(**{**vars(arch), "act": None})
    again = BUILD[form](arch).eval()
    load_checkpoint(again, checkpoint)
    assert_same_bits(again.state_dict(), dict(theirs.state_dict()))
    x = image(arch)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(again(x), expected)
        reference = ReferenceConvMixer(arch).eval()
        result = load_checkpoint(reference, theirs.state_dict())
        assert result == ([], [], [], form)
        assert_numerics(reference(x), expected, theirs.double()(x.double()))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("form", FORMATS)
def test_any_format_loads_into_any_model(form: str, target: str) -> None:
    theirs, ours = trained(form), BUILD[target](ARCH).eval()
    load_checkpoint(ours, theirs.state_dict())
    assert_same_bits(
        read_checkpoint(ours.state_dict()).state_dict,
        read_checkpoint(theirs.state_dict()).state_dict,
    )
    x = image(ARCH)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("form", FORMATS)
def test_from_checkpoint_builds_the_model_of_any_file(form: str, tmp_path: Path) -> None:
    for arch in ARCHS[:3]:
        theirs = trained(form, arch)
        torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
        ours = ConvMixer.from_checkpoint(tmp_path / "a.pth", act=arch.act)
        x = image(arch)
        with torch.no_grad():
            assert_numerics(ours(x), theirs(x), theirs.double()(x.double()))


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.hf_hub_id])
def test_published_models_reproduce_timms_logits(name: str, tmp_path: Path) -> None:
    size = 3 * VARIANTS[name].arch.patch_size + 2
    theirs = trained_like_(timm.create_model(name), (2, 3, size, size))
    save_checkpoint(theirs, tmp_path / "a.safetensors", format="locuslab")
    ours = ConvMixer.from_checkpoint(tmp_path / "a.safetensors")
    assert ours.arch == VARIANTS[name].arch
    assert_same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, same = ours(x), theirs(x)
        assert_numerics(got, same, theirs.double()(x.double()))


def test_a_backbone_takes_a_whole_checkpoint() -> None:
    theirs = trained("locuslab")
    backbone = mmpretrain_backbone(ARCH).eval()
    result = load_checkpoint(backbone, theirs.state_dict())
    assert result == ([], [], ["head.weight", "head.bias"], "locuslab")
    with torch.no_grad():
        expected = theirs[:-3](image(ARCH))  # type: ignore[index]
        assert torch.equal(backbone(image(ARCH))[-1], expected)


def wrapped_models(tmp_path: Path) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    for name in ("DataParallel", "compile", "compile of DataParallel", "averaged", "DDP"):
        inner = trained("locuslab", seed=3)
        if name == "DDP":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
            )
            try:
                yield name, nn.parallel.DistributedDataParallel(inner), inner
            finally:
                torch.distributed.destroy_process_group()
        elif name == "averaged":
            outer = torch.optim.swa_utils.AveragedModel(inner)
            yield name, outer, outer.module
        else:
            outer = nn.DataParallel(inner) if "DataParallel" in name else inner
            yield name, torch.compile(outer) if "compile" in name else outer, inner


def test_wrapped_models_load_and_save(tmp_path: Path) -> None:
    theirs = trained("mmpretrain")
    expected = convert_state_dict(read_checkpoint(theirs.state_dict()).state_dict, "locuslab")
    names = []
    for name, outer, inner in wrapped_models(tmp_path):
        assert load_checkpoint(outer, theirs.state_dict()) == ([], [], [], "mmpretrain"), name
        assert_same_bits(dict(inner.state_dict()), expected)
        save_checkpoint(outer, tmp_path / "a.pth", format="mmpretrain")
        saved = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
        assert_same_bits(saved, dict(theirs.state_dict()))
        names.append(name)
    assert len(names) == 5


@pytest.mark.parametrize("form", FORMATS)
def test_optimised_models_load_and_save(form: str, tmp_path: Path) -> None:
    from convmixer_fast import optimize

    theirs, ours = trained(form, seed=1), trained(form, seed=2)
    x = image(ARCH)
    with torch.no_grad():
        optimised: nn.Module = optimize(ours)
        before = optimised(x)
        assert load_checkpoint(optimised, theirs.state_dict()) == ([], [], [], form)
        assert not torch.equal(optimised(x), before)
        torch.testing.assert_close(optimised(x), theirs(x), rtol=1e-4, atol=1e-4)
    save_checkpoint(optimised, tmp_path / "a.safetensors")
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.arch.act == "gelu"
    assert_same_bits(checkpoint.state_dict, read_checkpoint(theirs.state_dict()).state_dict)


def test_compat_models_load_and_save(tmp_path: Path) -> None:
    from convmixer_fast.compat import locuslab as compat_locuslab
    from convmixer_fast.compat import mmpretrain as compat_mmpretrain

    theirs = trained("timm")
    expected = read_checkpoint(theirs.state_dict()).state_dict
    sequential = compat_locuslab.ConvMixer(12, 2, kernel_size=5, patch_size=4, n_classes=7)
    load_checkpoint(sequential, theirs.state_dict())
    save_checkpoint(sequential, tmp_path / "a.safetensors", format="tweet")
    assert read_checkpoint(tmp_path / "a.safetensors").arch == ARCH
    assert_same_bits(read_checkpoint(tmp_path / "a.safetensors").state_dict, expected)

    sizes = {"embed_dims": 12, "depth": 2, "patch_size": 4, "kernel_size": 5}
    backbone = compat_mmpretrain.ConvMixer(sizes)
    result = load_checkpoint(backbone, tmp_path / "a.safetensors")
    assert result == ([], [], ["head.weight", "head.bias"], "tweet")
    save_checkpoint(backbone, tmp_path / "b.pth", format="mmpretrain")
    headless = {k: v for k, v in expected.items() if not k.startswith("head.")}
    assert_same_bits(read_checkpoint(tmp_path / "b.pth").state_dict, headless)


def test_a_module_that_contains_the_model_loads_and_saves(tmp_path: Path) -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvMixer(4, 1, 3, 2, num_classes=3)

    trainer, state = Trainer(), weights()
    load_checkpoint(trainer, {"net_ema": state})
    assert all(torch.equal(trainer.net.state_dict()[key], state[key]) for key in state)
    save_checkpoint(trainer, tmp_path / "a.pth")
    assert_holds(tmp_path / "a.pth", state, "timm")


def test_a_catavgmax_pool_survives_the_round_trip(tmp_path: Path) -> None:
    theirs = TimmConvMixer(12, 2, 5, 4, num_classes=7, global_pool="catavgmax")
    save_checkpoint(theirs, tmp_path / "a.safetensors")
    kwargs = build_model_kwargs(read_checkpoint(tmp_path / "a.safetensors"))
    ours = TimmConvMixer(**kwargs)
    assert load_checkpoint(ours, tmp_path / "a.safetensors").skipped == []
    assert_same_bits(ours.state_dict(), dict(theirs.state_dict()))
    narrow = trained("timm")
    refusal(lambda: load_checkpoint(narrow, tmp_path / "a.safetensors"), "(7, 24)", "(7, 12)")


def test_weights_of_768_32_in_a_gelu_model_warn_and_in_relu_do_not() -> None:
    state = memoryless("convmixer_768_32")
    with torch.device("meta"):
        gelu = TimmConvMixer(768, 32, kernel_size=7, patch_size=7, act_layer=nn.GELU)
        relu = timm.create_model("convmixer_768_32")
    gelu.to_empty(device="cpu")
    with pytest.warns(UserWarning, match=r"trained with relu.*activation is gelu.*nn\.ReLU"):
        load_checkpoint(gelu, state)
    assert_same_bits(dict(gelu.state_dict()), state)
    relu.to_empty(device="cpu")
    assert load_checkpoint(relu, state).missing_keys == []
    assert_same_bits(dict(relu.state_dict()), state)


def test_timms_activation_classes_are_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "known_activation", lambda arch: "gelu")
    from timm.layers import activations

    model = TimmConvMixer(12, 2, 5, 4, num_classes=7, act_layer=activations.GELU)
    load_checkpoint(model, trained("timm").state_dict())
    model = TimmConvMixer(12, 2, 5, 4, num_classes=7, act_layer=activations.Mish)
    with pytest.warns(UserWarning, match="trained with gelu"):
        load_checkpoint(model, trained("timm").state_dict())


def test_an_unknown_activation_is_an_error_never_a_guess() -> None:
    checkpoint = read_checkpoint(trained("timm").state_dict())
    refusal(lambda: build_model_kwargs(checkpoint), "cannot be read", "act='gelu'")
    refusal(lambda: build_model_kwargs(checkpoint, "gleu"), "gleu", "hardswish")
    kwargs = build_model_kwargs(checkpoint, act="relu")
    assert kwargs == {
        "dim": 12,
        "depth": 2,
        "kernel_size": 5,
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 7,
        "act_layer": nn.ReLU,
    }
    assert build_model_kwargs(checkpoint, act=nn.Mish)["act_layer"] is nn.Mish


def test_an_activation_that_contradicts_the_variant_warns() -> None:
    checkpoint = read_checkpoint(memoryless("convmixer_768_32"))
    assert build_model_kwargs(checkpoint)["act_layer"] is nn.ReLU
    assert build_model_kwargs(checkpoint, act="relu")["act_layer"] is nn.ReLU
    assert isinstance(build_model_kwargs(checkpoint, act=lambda: nn.ReLU())["act_layer"](), nn.ReLU)
    for act in ("gelu", nn.GELU):
        with pytest.warns(UserWarning, match="trained with relu, but act is (gelu|GELU)"):
            assert build_model_kwargs(checkpoint, act=act)["act_layer"] is nn.GELU


def test_from_checkpoint_warns_of_nan_once(tmp_path: Path) -> None:
    state = trained("timm").state_dict()
    state["head.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ConvMixer.from_checkpoint(tmp_path / "nan.pth", act="gelu")
    assert len(caught) == 1


def test_warnings_point_at_the_line_of_the_caller() -> None:
    state = trained("timm").state_dict() | {"loss.weight": torch.ones(2)}
    state["head.bias"][0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_checkpoint(state)
        load_checkpoint(trained("timm"), state)
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__] * 4


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_misfit_is_explained_and_leaves_the_model_unchanged(target: str, case: str) -> None:
    change, words = MISFITS[case]
    state = trained("timm", Arch(**{**vars(ARCH), **change})).state_dict()
    model = trained(target, seed=9)
    before = snapshot(model)
    refusal(lambda: load_checkpoint(model, state), *words)
    if case in ("dim", "kernel", "patch", "in_chans", "several"):
        refusal(lambda: load_checkpoint(model, state, strict=False), *words)
    assert_same_bits(dict(model.state_dict()), before)


def test_not_strict_keeps_the_models_classifier_and_reports_it() -> None:
    theirs = trained("tweet", Arch(**{**vars(ARCH), "num_classes": 9}))
    for target in FORMATS:
        ours = trained(target, seed=4)
        before = read_checkpoint(snapshot(ours)).state_dict
        result = load_checkpoint(ours, theirs.state_dict(), strict=False)
        assert result == ([], [], ["head.weight", "head.bias"], "tweet")
        expected = read_checkpoint(theirs.state_dict()).state_dict
        expected |= {key: before[key] for key in result.skipped}
        assert_same_bits(read_checkpoint(ours.state_dict()).state_dict, expected)


def test_not_strict_skips_and_reports_missing_and_unexpected_keys() -> None:
    state = dict(trained("locuslab").state_dict())
    del state["3.1.bias"], state["7.weight"], state["7.bias"]
    state["neck.gain"] = torch.ones(2)
    ours = trained("mmpretrain", seed=4)
    before = snapshot(ours)
    result = load_checkpoint(ours, state, strict=False)
    missing = ["backbone.stages.0.1.bias", "head.fc.weight", "head.fc.bias"]
    assert result == (missing, ["neck.gain"], [], "locuslab")
    after = ours.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in missing)
    assert torch.equal(after["backbone.stages.1.1.bias"], state["4.1.bias"])

    deep = trained("timm", Arch(**{**vars(ARCH), "depth": 3}), seed=6)
    shallow = trained("timm", seed=7)
    result = load_checkpoint(shallow, deep.state_dict(), strict=False)
    assert len(result.unexpected_keys) == 14
    assert not result.missing_keys
    assert torch.equal(shallow.blocks[1][1].weight, deep.blocks[1][1].weight)
    result = load_checkpoint(deep, shallow.state_dict(), strict=False)
    assert len(result.missing_keys) == 14
    assert not result.unexpected_keys

    extended = nn.Sequential()
    extended.add_module("stem", trained("timm").stem)
    extended.add_module("extra", nn.Linear(3, 3))
    refusal(lambda: load_checkpoint(extended, deep.state_dict()), "depth is 3")
    result = load_checkpoint(extended, deep.state_dict(), strict=False)
    assert result.missing_keys == ["extra.weight", "extra.bias"]


def test_not_strict_loads_the_rest_of_a_checkpoint_without_its_first_convolution() -> None:
    state = dict(trained("timm").state_dict())
    del state["stem.0.weight"], state["blocks.0.0.fn.0.weight"]
    ours = trained("tweet", seed=3)
    result = load_checkpoint(ours, state, strict=False)
    assert result.missing_keys == ["0.0.weight", "1.0.0.0.weight"]
    state["stem.0.bias"] = torch.ones(5)
    before = snapshot(ours)
    refusal(lambda: load_checkpoint(ours, state, strict=False), "stem.0.bias", "(5,)", "(12,)")
    assert_same_bits(dict(ours.state_dict()), before)


def test_meta_tensors_are_refused_on_both_sides() -> None:
    with torch.device("meta"):
        empty = ReferenceConvMixer(ARCH)
    state = trained("timm").state_dict()
    refusal(lambda: load_checkpoint(empty, state), "stem.0.weight", "to_empty")
    model = trained("timm", seed=2)
    before = snapshot(model)
    refusal(lambda: load_checkpoint(model, empty.state_dict()), "stem.0.weight", "no values")
    assert_same_bits(dict(model.state_dict()), before)
