"""The promises of `convmixer_fast.checkpoint`: every format in and out, exactly, or one line."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import locuslab, mmpretrain_backbone, mmpretrain_classifier, tweet
from safetensors import safe_open
from safetensors.torch import save, save_file
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from convmixer_fast.arch import VARIANTS, Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    Checkpoint,
    CheckpointError,
    build_model_kwargs,
    convert_state_dict,
    detect_format,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from convmixer_fast.checkpoint import reading as checkpoints
from convmixer_fast.model import ConvMixer
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, trained_like_

ARCH = Arch(dim=12, depth=2, kernel_size=5, patch_size=4, num_classes=7)
#: Even kernel, odd dim, one channel, no square input, another activation, no blocks, many blocks.
ARCHS = [
    ARCH,
    Arch(dim=99, depth=1, kernel_size=8, patch_size=7, num_classes=3),
    Arch(dim=16, depth=3, kernel_size=3, patch_size=2, in_chans=1, num_classes=1, act="relu"),
    Arch(dim=8, depth=0, patch_size=5, num_classes=4),
    Arch(dim=4, depth=12, kernel_size=1, patch_size=1, in_chans=5, num_classes=4, act="silu"),
]
BUILD: dict[str, Callable[[Arch], nn.Module]] = {
    "timm": ReferenceConvMixer,
    "locuslab": locuslab,
    "mmpretrain": mmpretrain_classifier,
    "tweet": tweet,
}
#: mmpretrain's backbone returns the maps of its blocks, so it has at least one.
CASES = [(f, arch) for f in FORMATS for arch in ARCHS if arch.depth or f != "mmpretrain"]
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module.")


def image(arch: Arch, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, arch.in_chans, 50, 47, generator=generator)


def trained(form: str, arch: Arch = ARCH, seed: int = 0) -> nn.Module:
    """A model in the format's module tree whose every tensor, counters too, is its own."""
    torch.manual_seed(seed)
    model = trained_like_(BUILD[form](arch), image(arch).shape, seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.num_batches_tracked.fill_(1000 * seed + i)  # type: ignore[union-attr]
    return model


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def refusal(call: Callable[[], Any], *words: str) -> str:
    """The one line of the CheckpointError that ``call`` must raise, holding every word."""
    with pytest.raises(CheckpointError) as caught:
        call()
    line = str(caught.value)
    assert line == " ".join(line.split()), repr(line)
    assert len(line) < 1000
    for word in words:
        assert word in line, (word, line)
    return line


@pytest.fixture(autouse=True)
def no_surprising_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        yield


# Reading and loading


@pytest.mark.parametrize(("form", "arch"), CASES, ids=str)
def test_every_format_gives_the_logits_of_the_model_it_came_from(form: str, arch: Arch) -> None:
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


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
@pytest.mark.parametrize("form", FORMATS)
def test_every_wrapper_and_prefix_is_undone(
    form: str, wrapper: str | None, prefix: str, tmp_path: Path
) -> None:
    theirs = trained(form)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    path = tmp_path / "file.pth.tar"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    ours = BUILD[form](ARCH).eval()
    assert load_checkpoint(ours, path) == ([], [], [], form)
    with torch.no_grad():
        assert torch.equal(ours(image(ARCH)), theirs(image(ARCH)))


NESTABLE = ["module.", "_orig_mod.", "model.", "_fsdp_wrapped_module."]


@settings(max_examples=40, deadline=None)
@given(
    prefixes=st.lists(st.sampled_from(NESTABLE), max_size=6),
    inner=st.sampled_from(NESTABLE),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=5),
    form=st.sampled_from(FORMATS),
    counter=st.sampled_from([None, "n_averaged", "steps"]),
)
def test_nests_of_wrappers_and_prefixes_are_undone_in_any_order(
    prefixes: list[str], inner: str, wrappers: list[str], form: str, counter: str | None
) -> None:
    theirs = BUILD[form](ARCH).state_dict()
    held: dict[str, Any] = {}
    for key, value in theirs.items():
        first, dot, rest = key.partition(".")
        held["".join(prefixes) + first + dot + inner + rest] = value
    if counter:
        held[counter] = torch.tensor(5)
    for name in wrappers:
        held = {name: held, "epoch": 1, "optimizer": {"state": {}}, "model_ema_decay": None}
    checkpoint = read_checkpoint(held)
    assert checkpoint.format == form
    assert_same_bits(convert_state_dict(checkpoint.state_dict, form), dict(theirs))


def test_averaged_weights_are_preferred_and_can_be_declined(tmp_path: Path) -> None:
    plain, averaged = trained("timm", seed=1), trained("timm", seed=2)
    for name in WRAPPERS[:3]:
        held = {"state_dict": plain.state_dict(), name: averaged.state_dict(), "epoch": 1}
        for use_ema, chosen in ((True, averaged), (False, plain)):
            ours = ReferenceConvMixer(ARCH)
            load_checkpoint(ours, held, use_ema=use_ema)
            assert_same_bits(ours.state_dict(), chosen.state_dict())
        only = {name: averaged.state_dict()}
        refusal(lambda only=only: read_checkpoint(only, use_ema=False), name, "use_ema=True")
        empty = {"state_dict": plain.state_dict(), name: None}
        assert_same_bits(read_checkpoint(empty).state_dict, dict(plain.state_dict()))


def test_two_files_of_one_name_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    name = "convmixer_1536_20_ks9_p7.pth.tar"
    for folder, form in (("v1.0", "locuslab"), ("timm-v1.0", "timm")):
        (tmp_path / folder).mkdir()
        theirs = trained(form)
        torch.save(theirs.state_dict(), tmp_path / folder / name)
        checkpoint = read_checkpoint(tmp_path / folder / name)
        assert checkpoint.format == form
        ours = trained("timm", seed=5)
        load_checkpoint(ours, tmp_path / folder / name)
        with torch.no_grad():
            torch.testing.assert_close(ours(image(ARCH)), theirs(image(ARCH)))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pth.tar", "safetensors", "weights", ""])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_are_judged_by_content_not_by_extension(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    state = trained("tweet").state_dict()
    path = tmp_path / f"weights.{suffix}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        with path.open("wb") as file:
            torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.format == "tweet"
    assert checkpoint.source == str(path)
    assert_same_bits(convert_state_dict(checkpoint.state_dict, "tweet"), dict(state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_in_files_and_cast_by_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("timm").to(dtype)
    for name in ("a.safetensors", "a.pth"):
        save_checkpoint(model, tmp_path / name, format="locuslab")
        assert_same_bits(read_checkpoint(tmp_path / name).state_dict, dict(model.state_dict()))
        single = ReferenceConvMixer(ARCH)
        load_checkpoint(single, tmp_path / name)
        assert_same_bits(single.state_dict(), dict(trained("timm").to(dtype).float().state_dict()))


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_without_classifier_is_read(form: str) -> None:
    arch = Arch(**{**vars(ARCH), "num_classes": 0})
    build = mmpretrain_backbone if form == "mmpretrain" else BUILD[form]
    checkpoint = read_checkpoint(build(arch).state_dict())
    assert checkpoint.format == form
    assert checkpoint.arch == Arch(**{**vars(arch), "act": None})
    ours = ReferenceConvMixer(arch)
    load_checkpoint(ours, checkpoint)
    assert_same_bits(ours.state_dict(), checkpoint.state_dict)


def test_a_backbone_takes_a_whole_checkpoint() -> None:
    theirs = trained("locuslab")
    backbone = mmpretrain_backbone(ARCH).eval()
    result = load_checkpoint(backbone, theirs.state_dict())
    assert result == ([], [], ["head.weight", "head.bias"], "locuslab")
    with torch.no_grad():
        expected = theirs[:-3](image(ARCH))  # type: ignore[index]
        assert torch.equal(backbone(image(ARCH))[-1], expected)


def test_paddle_names_and_its_transposed_classifier_are_understood() -> None:
    # As many classes as channels: the shape alone cannot tell a transposed matrix.
    arch = Arch(**{**vars(ARCH), "num_classes": ARCH.dim})
    theirs = trained("locuslab", arch)
    paddle: dict[str, Any] = {}
    for key, value in theirs.state_dict().items():
        name = key.replace("running_mean", "_mean").replace("running_var", "_variance")
        if not key.endswith("num_batches_tracked"):
            paddle[name] = (value.t() if value.ndim == 2 else value).numpy()
    ours = ReferenceConvMixer(arch).eval()
    load_checkpoint(ours, paddle)
    expected = read_checkpoint(theirs.state_dict()).state_dict
    for key in expected:
        if key.endswith("num_batches_tracked"):
            expected[key] = torch.tensor(0)
    assert_same_bits(ours.state_dict(), expected)


def test_counters_are_zero_where_none_is_stored_and_demanded_where_some_are() -> None:
    state = trained("timm").state_dict()
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    counters = {k: v for k, v in read_checkpoint(bare).state_dict.items() if k not in bare}
    assert len(counters) == 1 + 2 * ARCH.depth
    assert all(v.dtype == torch.int64 and v == 0 for v in counters.values())
    bare["stem.2.num_batches_tracked"] = torch.tensor(4)
    refusal(lambda: read_checkpoint(bare), "blocks.0.0.fn.2.num_batches_tracked", "and 1 more")


def memoryless(name: str) -> dict[str, Tensor]:
    """timm's state dict of a real variant, each tensor one number of its own, repeated."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    return {
        key: torch.tensor(i).to(like.dtype).expand(like.shape)
        for i, (key, like) in enumerate(state.items())
    }


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.hf_hub_id])
def test_timm_state_dicts_of_the_published_variants_convert_both_ways(name: str) -> None:
    state = memoryless(name)
    checkpoint = read_checkpoint(state)
    assert checkpoint.arch == VARIANTS[name].arch
    for form in FORMATS:
        converted = convert_state_dict(checkpoint.state_dict, form)
        with torch.device("meta"):
            peer = BUILD[form](checkpoint.arch).state_dict()
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in peer.items()}
        back = read_checkpoint(converted)
        assert back.format == form
        assert back.arch == checkpoint.arch
        assert [t.data_ptr() for t in back.state_dict.values()] == [
            t.data_ptr() for t in state.values()
        ]
        assert list(back.state_dict) == list(state)


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


# The activation


def test_the_activation_travels_in_safetensors_metadata(tmp_path: Path) -> None:
    arch = Arch(**{**vars(ARCH), "act": "silu"})
    for form in FORMATS:
        save_checkpoint(trained(form, arch), tmp_path / "a.safetensors", format=form)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["convmixer_fast.act"] == "silu"
        assert metadata["convmixer_fast.format"] == form
        checkpoint = read_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.arch == arch
        assert build_model_kwargs(checkpoint)["act_layer"] is nn.SiLU
        save_checkpoint(checkpoint, tmp_path / "b.safetensors", format="tweet")
        assert read_checkpoint(tmp_path / "b.safetensors").arch == arch
        with pytest.warns(UserWarning, match="trained with silu.*activation is gelu"):
            load_checkpoint(trained(form), tmp_path / "b.safetensors")
        with pytest.warns(UserWarning, match="trained with silu"):
            load_checkpoint(trained(form), tmp_path / "b.safetensors", strict=False)


def test_metadata_wins_over_the_published_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "known_activation", lambda arch: "relu")
    save_checkpoint(trained("timm"), tmp_path / "gelu.safetensors")
    save_checkpoint(trained("timm"), tmp_path / "silent.pth")
    assert read_checkpoint(tmp_path / "gelu.safetensors").arch.act == "gelu"
    assert read_checkpoint(tmp_path / "silent.pth").arch.act == "relu"

    tanh = trained("timm")
    for module in list(tanh.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.GELU(approximate="tanh"))
    save_checkpoint(tanh, tmp_path / "tanh.safetensors")
    nameless = read_checkpoint(tmp_path / "tanh.safetensors")
    assert nameless.arch.act is None
    save_checkpoint(nameless, tmp_path / "again.safetensors")
    assert read_checkpoint(tmp_path / "again.safetensors").arch.act is None
    with pytest.warns(UserWarning, match="activation is GELU.*tanh"):
        load_checkpoint(tanh, tmp_path / "silent.pth")
    load_checkpoint(tanh, tmp_path / "tanh.safetensors", strict=False)


def test_timms_own_activation_classes_count_as_the_function_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "known_activation", lambda arch: "gelu")
    from timm.layers import activations

    model = TimmConvMixer(12, 2, 5, 4, num_classes=7, act_layer=activations.GELU)
    load_checkpoint(model, trained("timm").state_dict())
    model = TimmConvMixer(12, 2, 5, 4, num_classes=7, act_layer=activations.Mish)
    with pytest.warns(UserWarning, match="trained with gelu"):
        load_checkpoint(model, trained("timm").state_dict())


def test_an_unknown_activation_is_asked_for_never_guessed() -> None:
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


# Our own model, wrapped and optimised models


@pytest.mark.parametrize("form", FORMATS)
def test_from_checkpoint_builds_the_model_of_any_file(form: str, tmp_path: Path) -> None:
    for arch in ARCHS[:3]:
        theirs = trained(form, arch)
        torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
        ours = ConvMixer.from_checkpoint(tmp_path / "a.pth", act=arch.act)
        x = image(arch)
        with torch.no_grad():
            assert_numerics(ours(x), theirs(x), theirs.double()(x.double()))


def test_a_model_with_the_wide_pool_is_saved_and_read(tmp_path: Path) -> None:
    theirs = TimmConvMixer(12, 2, 5, 4, num_classes=7, global_pool="catavgmax")
    save_checkpoint(theirs, tmp_path / "a.safetensors")
    kwargs = build_model_kwargs(read_checkpoint(tmp_path / "a.safetensors"))
    ours = TimmConvMixer(**kwargs)
    assert load_checkpoint(ours, tmp_path / "a.safetensors").skipped == []
    assert_same_bits(ours.state_dict(), dict(theirs.state_dict()))
    narrow = trained("timm")
    refusal(lambda: load_checkpoint(narrow, tmp_path / "a.safetensors"), "(7, 24)", "(7, 12)")


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


def test_the_compat_faces_load_and_save(tmp_path: Path) -> None:
    from convmixer_fast.compat import locuslab as face
    from convmixer_fast.compat import mmpretrain as backbone_face

    theirs = trained("timm")
    expected = read_checkpoint(theirs.state_dict()).state_dict
    sequential = face.ConvMixer(12, 2, kernel_size=5, patch_size=4, n_classes=7)
    load_checkpoint(sequential, theirs.state_dict())
    save_checkpoint(sequential, tmp_path / "a.safetensors", format="tweet")
    assert read_checkpoint(tmp_path / "a.safetensors").arch == ARCH
    assert_same_bits(read_checkpoint(tmp_path / "a.safetensors").state_dict, expected)

    sizes = {"embed_dims": 12, "depth": 2, "patch_size": 4, "kernel_size": 5}
    backbone = backbone_face.ConvMixer(sizes)
    result = load_checkpoint(backbone, tmp_path / "a.safetensors")
    assert result == ([], [], ["head.weight", "head.bias"], "tweet")
    save_checkpoint(backbone, tmp_path / "b.pth", format="mmpretrain")
    headless = {k: v for k, v in expected.items() if not k.startswith("head.")}
    assert_same_bits(read_checkpoint(tmp_path / "b.pth").state_dict, headless)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.hf_hub_id])
def test_timms_published_models_give_timms_logits_in_ours(name: str, tmp_path: Path) -> None:
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


# Writing


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_the_round_trip_through_every_format_is_bit_exact(
    arch: Arch, suffix: str, tmp_path: Path
) -> None:
    first = trained("timm", arch)
    path = tmp_path / f"0.{suffix}"
    save_checkpoint(first, path)
    for i, form in enumerate(FORMATS[1:] + FORMATS, start=1):
        checkpoint = read_checkpoint(path)
        path = tmp_path / f"{i}.{suffix}"
        save_checkpoint(checkpoint, path, format=form)
        held = read_checkpoint(path)
        assert held.format == form
        assert_same_bits(held.state_dict, dict(first.state_dict()))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(f"{i}.{suffix}" for i in range(len(FORMATS) * 2))


def test_torch_files_look_as_each_ecosystem_writes_them(tmp_path: Path) -> None:
    for form in FORMATS:
        theirs = trained(form)
        save_checkpoint(theirs, tmp_path / "a.pth", format=form)
        held = torch.load(tmp_path / "a.pth", weights_only=True)
        state = held["state_dict"] if form == "mmpretrain" else held
        BUILD[form](ARCH).load_state_dict(state, strict=True)
        assert_same_bits(state, dict(theirs.state_dict()))
    backbone = mmpretrain_backbone(ARCH)
    save_checkpoint(backbone, tmp_path / "b.pth", format="mmpretrain")
    backbone.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_shared_sliced_and_expanded_tensors_are_written_alone(suffix: str, tmp_path: Path) -> None:
    state = dict(trained("timm").to(memory_format=torch.channels_last).state_dict())
    state["blocks.0.1.weight"] = state["blocks.1.1.weight"]
    state["blocks.0.1.bias"] = torch.randn(10_000_000)[:24:2]
    state["stem.0.bias"] = torch.tensor(0.25).expand(12)
    state["head.weight"] = torch.randn(12, 7).t()
    path = tmp_path / f"a.{suffix}"
    save_checkpoint(state, path)
    assert path.stat().st_size < 100_000
    assert_same_bits(read_checkpoint(path).state_dict, state)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    save_checkpoint(trained("timm", seed=1), path)
    before = path.read_bytes()

    def full_disk(tensors: Any, file: Path, *args: Any) -> None:
        file.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    def stopped(tensors: Any, file: Path, *args: Any) -> None:
        file.write_bytes(b"half a file")
        raise KeyboardInterrupt

    for broken in (full_disk, stopped):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save_file", broken)
            patch.setattr(torch, "save", broken)
            if broken is full_disk:
                refusal(lambda: save_checkpoint(trained("timm"), path), str(path), "No space left")
            else:
                with pytest.raises(KeyboardInterrupt):
                    save_checkpoint(trained("timm"), path)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before
    save_checkpoint(trained("timm", seed=2), path)
    assert_same_bits(read_checkpoint(path).state_dict, dict(trained("timm", seed=2).state_dict()))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for name in ("a.safetensors", "a.pth"):
        save_checkpoint(trained("timm"), tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_followed_when_writing(tmp_path: Path) -> None:
    (tmp_path / "real.pth").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    save_checkpoint(trained("timm"), tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert read_checkpoint(tmp_path / "real.pth").format == "timm"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    model = trained("timm")
    for name in ("a.safetensors", "a.pth"):
        absent = tmp_path / "absent" / name
        refusal(lambda absent=absent: save_checkpoint(model, absent), str(absent), "No such file")
        (tmp_path / "file").touch()
        inside = tmp_path / "file" / name
        refusal(lambda inside=inside: save_checkpoint(model, inside), "Not a directory")
        (tmp_path / "folder" / name).mkdir(parents=True)
        folder = tmp_path / "folder" / name
        refusal(lambda folder=folder: save_checkpoint(model, folder), "it is a folder")
        assert list(folder.parent.iterdir()) == [folder]
        folder.rmdir()
    path = tmp_path / "a.pth"
    refusal(lambda: save_checkpoint(model, path, format="keras"), "keras", "locuslab")
    refusal(lambda: save_checkpoint(nn.Linear(3, 3), path), "the state dict", "weight")
    with torch.device("meta"):
        refusal(lambda: save_checkpoint(ReferenceConvMixer(ARCH), path), "stem.0.weight", "meta")
    assert not path.exists()


# Renaming keys


@pytest.mark.parametrize(("form", "arch"), CASES, ids=str)
def test_detect_format_reads_structure(form: str, arch: Arch) -> None:
    keys = list(BUILD[form](arch).state_dict())
    assert detect_format(keys) == form
    assert detect_format(reversed([f"module._orig_mod.{key}" for key in keys])) == form


def test_keys_of_no_format_are_refused() -> None:
    refusal(lambda: detect_format(["conv1.weight", "fc.bias"]), "conv1.weight", *FORMATS)
    refusal(lambda: detect_format([]), "no keys")
    refusal(lambda: detect_format(["neck.scale"] * 9), "and 6 more")


def test_part_of_a_network_converts_when_the_depth_is_given() -> None:
    head = {"head.weight": "W", "head.bias": "b"}
    assert convert_state_dict(head, "locuslab", depth=32) == {"37.weight": "W", "37.bias": "b"}
    assert convert_state_dict(head, "tweet", depth=32) == {"35.weight": "W", "35.bias": "b"}
    assert convert_state_dict(head, "mmpretrain") == {"head.fc.weight": "W", "head.fc.bias": "b"}


def test_keys_that_are_not_timms_are_not_converted() -> None:
    state = trained("locuslab").state_dict()
    refusal(lambda: convert_state_dict(state, "tweet"), "0.weight", "read_checkpoint")
    state = trained("timm").state_dict()
    refusal(lambda: convert_state_dict(state, "caffe"), "caffe", "tweet")
    refusal(lambda: convert_state_dict(state, "tweet", depth=1), "blocks.1.0.fn.0.weight", "and 11")
    state = {k: v for k, v in state.items() if not k.startswith("blocks.0.")}
    refusal(lambda: convert_state_dict(state, "tweet"), "block 0 is missing")


# What does not fit leaves the model as it was


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


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_model_that_does_not_fit_is_untouched(target: str, case: str) -> None:
    change, words = MISFITS[case]
    state = trained("timm", Arch(**{**vars(ARCH), **change})).state_dict()
    model = trained(target, seed=9)
    before = snapshot(model)
    refusal(lambda: load_checkpoint(model, state), *words)
    if case in ("dim", "kernel", "patch", "in_chans", "several"):
        refusal(lambda: load_checkpoint(model, state, strict=False), *words)
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("form", FORMATS)
def test_missing_surplus_and_misshapen_tensors_are_named_and_counted(form: str) -> None:
    model = trained("timm", seed=9)
    before = snapshot(model)
    good = dict(trained(form).state_dict())
    keys = list(good)

    def check(state: dict[str, Any], *words: str) -> None:
        refusal(lambda: read_checkpoint(state), "the state dict", *words)
        refusal(lambda: load_checkpoint(model, state), *words)
        assert_same_bits(dict(model.state_dict()), before)

    one = {k: v for k, v in good.items() if k != keys[9]}
    check(one, keys[9], "missing", "strict=False")
    four = {k: v for k, v in good.items() if k not in keys[-5:-1]}
    check(four, keys[-5], keys[-4], keys[-3], "and 1 more")
    check({**good, "neck.gain": torch.ones(3), keys[9] + "2": torch.ones(1)}, "neck.gain", "left")
    check({**good, keys[8]: torch.ones(3)}, "(3,) and should be (")
    check({**good, keys[0]: torch.ones(12, 3, 4, 5)}, "stem.0.weight", "(12, 3, 4, 5)", "square")
    check({**good, keys[8]: "text"}, keys[8], "str", "not a dense tensor")
    check({**good, keys[8]: good[keys[8]].to_sparse()}, keys[8], "sparse", "not a dense tensor")
    check({**good, keys[8]: good[keys[8]].to(torch.int8)}, keys[8], "int8")
    check({**good, "module." + keys[8]: good[keys[8]]}, "two names", "module." + keys[8])
    layout = checkpoints._LAYOUTS[form]
    block = layout.block.format(layout.first_block) + "."
    gap = {k: v for k, v in good.items() if not k.startswith(block)}
    check(gap, f"block {layout.first_block} is missing", f"up to {layout.first_block + 1}")
    far = layout.block.format(999999) + "." + layout.mixing[2] + ".weight"
    check({**good, far: torch.ones(1)}, "is missing, though blocks go up to 999999")


def test_other_networks_are_refused_by_name() -> None:
    for name in ("resnet18", "vit_tiny_patch16_224"):
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        refusal(lambda state=state: read_checkpoint(state), "ConvMixer")
        model = trained("timm")
        before = snapshot(model)
        refusal(lambda state=state, model=model: load_checkpoint(model, state))
        assert_same_bits(dict(model.state_dict()), before)
    state = trained("timm").state_dict()
    refusal(lambda: load_checkpoint(timm.create_model("resnet18"), state), "the model", "conv1")


def test_not_strict_keeps_the_models_own_classifier_and_says_so() -> None:
    theirs = trained("tweet", Arch(**{**vars(ARCH), "num_classes": 9}))
    for target in FORMATS:
        ours = trained(target, seed=4)
        before = read_checkpoint(snapshot(ours)).state_dict
        result = load_checkpoint(ours, theirs.state_dict(), strict=False)
        assert result == ([], [], ["head.weight", "head.bias"], "tweet")
        expected = read_checkpoint(theirs.state_dict()).state_dict
        expected |= {key: before[key] for key in result.skipped}
        assert_same_bits(read_checkpoint(ours.state_dict()).state_dict, expected)


def test_not_strict_skips_and_reports_missing_and_surplus_keys() -> None:
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


def test_not_strict_takes_what_is_there_of_a_checkpoint_without_its_first_convolution() -> None:
    state = dict(trained("timm").state_dict())
    del state["stem.0.weight"], state["blocks.0.0.fn.0.weight"]
    ours = trained("tweet", seed=3)
    result = load_checkpoint(ours, state, strict=False)
    assert result.missing_keys == ["0.0.weight", "1.0.0.0.weight"]
    state["stem.0.bias"] = torch.ones(5)
    before = snapshot(ours)
    refusal(lambda: load_checkpoint(ours, state, strict=False), "stem.0.bias", "(5,)", "(12,)")
    assert_same_bits(dict(ours.state_dict()), before)


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"):
        empty = ReferenceConvMixer(ARCH)
    state = trained("timm").state_dict()
    refusal(lambda: load_checkpoint(empty, state), "stem.0.weight", "to_empty")
    model = trained("timm", seed=2)
    before = snapshot(model)
    refusal(lambda: load_checkpoint(model, empty.state_dict()), "stem.0.weight", "no values")
    assert_same_bits(dict(model.state_dict()), before)


def test_weights_that_are_not_numbers_warn_and_are_named() -> None:
    state = trained("timm").state_dict()
    state["blocks.1.1.weight"][3, 4] = float("nan")
    state["head.bias"][0] = float("inf")
    for call in (
        lambda: read_checkpoint(state),
        lambda: load_checkpoint(trained("timm"), state),
        lambda: load_checkpoint(trained("timm"), state, strict=False),
    ):
        with pytest.warns(UserWarning, match=r"NaN.*blocks\.1\.1\.weight, head\.bias:"):
            call()


def test_numbers_that_are_none_are_told_once(tmp_path: Path) -> None:
    state = trained("timm").state_dict()
    state["head.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ConvMixer.from_checkpoint(tmp_path / "nan.pth", act="gelu")
    assert len(told) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_file_never_takes_the_place_of_a_device(tmp_path: Path) -> None:
    # A pipe stands for /dev/null, which root could lose.
    for name in ("pipe.pth", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
        refusal(lambda name=name: save_checkpoint(trained("timm"), tmp_path / name), "a device")
        assert (tmp_path / name).is_fifo()


# Files that are not what they say


class Bomb:
    """Unpickling this makes the folder named ``marker``: proof that a file's code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def torch_bytes(held: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw 0", "raw 2", "raw 4", "inside weights"])
def test_a_pickle_bomb_does_not_go_off(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "exploded", tmp_path / "weights.pth"
    bomb = Bomb(marker)
    pickle.loads(pickle.dumps(bomb))
    assert marker.is_dir(), "the bomb must be live for this test to mean anything"
    marker.rmdir()
    if kind == "inside weights":
        path.write_bytes(torch_bytes({**trained("timm").state_dict(), "bomb": bomb}))
    elif kind.startswith("raw"):
        path.write_bytes(pickle.dumps(bomb, protocol=int(kind[-1])))
    else:
        path.write_bytes(torch_bytes({"state_dict": bomb}, legacy=kind == "legacy"))
    model = trained("timm")
    before = snapshot(model)
    words = () if kind == "raw 0" else ("refused", "trust")
    words += ("mkdir",) if kind in ("zip", "legacy", "raw 2", "inside weights") else ()
    refusal(lambda: load_checkpoint(model, path), str(path), *words)
    assert not marker.exists()
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("legacy", [False, True])
def test_command_line_arguments_in_a_training_checkpoint_are_allowed(
    legacy: bool, tmp_path: Path
) -> None:
    args = argparse.Namespace(model="convmixer_768_32", lr=0.01, mean=[0.5], opt=None)
    state = trained("timm").state_dict()
    held = {"epoch": 3, "arch": "convmixer", "args": args, "state_dict": state, "metric": 0.5}
    (tmp_path / "last.pth.tar").write_bytes(torch_bytes(held, legacy))
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert_same_bits(checkpoint.state_dict, dict(state))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ({"model": ReferenceConvMixer(ARCH)}, "convmixer_fast.reference.ReferenceConvMixer"),
        ({"lock": threading.Thread}, "threading.Thread"),
    ],
    ids=["whole model", "class"],
)
def test_a_file_that_needs_more_than_weights_names_what_it_wants(
    held: Any, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a.pth").write_bytes(torch_bytes(held))
    refusal(
        lambda: read_checkpoint(tmp_path / "a.pth"),
        str(tmp_path / "a.pth"),
        name,
        "save_checkpoint",
    )


def test_files_without_weights_are_one_line_each(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    loop: dict[str, Any] = {"epoch": 1}
    loop["model"] = loop
    cases = [
        (tmp_path / "absent.pth", ["absent.pth", "no such file"]),
        (tmp_path, ["is a folder"]),
        (tmp_path / "a\0b", ["cannot be opened"]),
        (file("empty.pth", b""), ["empty.pth is empty"]),
        (file("text.pth", b"hello\nthere\n" * 9), ["text.pth", "not a checkpoint", "hello"]),
        (file("short.pth", b"\x80"), ["short.pth"]),
        (file("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid"), ["git lfs pull"]),
        (file("page.safetensors", b"\n<!DOCTYPE html><html>"), ["a web page"]),
        (file("archive.zip", b"PK\x03\x04" + b"x" * 99), ["truncated", "archive.zip"]),
        (file("script.pt", script.getvalue()), ["TorchScript", "torch.jit.load"]),
        (file("list.pth", torch_bytes([1, 2])), ["no state dict", "list"]),
        (file("nothing.pth", torch_bytes({})), ["no state dict", "empty"]),
        (file("epoch.pth", torch_bytes({"epoch": 3})), ["no state dict", "epoch", "model_ema"]),
        (file("hollow.pth", torch_bytes({"model": {"a": 1}})), ["no state dict"]),
        (file("tensor.pth", torch_bytes(torch.ones(3))), ["no state dict", "Tensor"]),
        (file("loop.pth", torch_bytes(loop)), ["no state dict"]),
        (file("number.pth", torch_bytes({3: torch.ones(2)})), ["3", "not a string"]),
        (file("conv.pth", torch_bytes({"conv\n1": torch.ones(2)})), ["not a ConvMixer", "conv 1"]),
        (file("head\nline.pth", b"x"), ["head line.pth"]),
    ]
    model = trained("timm")
    before = snapshot(model)
    for path, words in cases:
        refusal(lambda path=path: read_checkpoint(path), *words)
        refusal(lambda path=path: load_checkpoint(model, path, strict=False))
    refusal(lambda: read_checkpoint(3), "int")  # type: ignore[arg-type]
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_one_line_wherever_it_ends(kind: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut.pth"
    state = trained("timm").state_dict()
    if kind == "safetensors":
        save_file(state, whole)
    else:
        whole.write_bytes(torch_bytes(state, legacy=kind == "legacy"))
    data = whole.read_bytes()
    read_checkpoint(whole)
    model = trained("timm", seed=2)
    before = snapshot(model)
    for length in [1, 2, 7, 8, 9, 40, *range(100, len(data), len(data) // 23), len(data) - 1]:
        cut.write_bytes(data[:length])
        line = refusal(lambda: load_checkpoint(model, cut), str(cut))
        assert length < 64 or "truncated" in line or "damaged" in line, line
    assert_same_bits(dict(model.state_dict()), before)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=120), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
def test_any_bytes_are_refused_in_one_line(data: bytes, start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(start + data)
    refusal(lambda: read_checkpoint(tmp_path / "a.pth"), "a.pth")


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["zip", "legacy", "safetensors"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    reach=st.sampled_from([100, 3000, 10**6]),
)
def test_a_damaged_file_is_read_or_refused_never_more(
    kind: str, damage: list[tuple[float, int]], reach: int, tmp_path: Path
) -> None:
    state = ReferenceConvMixer(Arch(4, 1, 3, 2, num_classes=2)).state_dict()
    legacy = kind == "legacy"
    data = bytearray(save(state) if kind == "safetensors" else torch_bytes(state, legacy))
    for place, value in damage:
        data[int(place * (min(len(data), reach) - 1))] = value
    (tmp_path / "a.pth").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        line = ""
        try:
            read_checkpoint(tmp_path / "a.pth")
        except CheckpointError as error:
            line = str(error)
    assert line == " ".join(line.split())


def test_a_checkpoint_is_a_plain_value() -> None:
    checkpoint = read_checkpoint(trained("timm").state_dict())
    assert isinstance(checkpoint, Checkpoint)
    with pytest.raises(AttributeError):
        checkpoint.format = "tweet"  # type: ignore[misc]
    assert not any(tensor.requires_grad for tensor in checkpoint.state_dict.values())
