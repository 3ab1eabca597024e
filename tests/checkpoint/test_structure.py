"""Weights are found by the structure of their keys, under any names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from checkpoint_cases import (
    ARCH,
    BUILD,
    CASES,
    PREFIXES,
    SMALL,
    WRAPPERS,
    assert_holds,
    assert_same_bits,
    image,
    refusal,
    snapshot,
    trained,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    CheckpointError,
    convert_state_dict,
    detect_format,
    load_checkpoint,
    read_checkpoint,
)
from convmixer_fast.modules.model import ConvMixer
from convmixer_fast.reference import ReferenceConvMixer

#: Names of training scripts, and those that a format has itself: the hardest to tell.
NAMES = [
    "model_state_dict", "net", "params", "generator", "encoder", "student", "weights", "module",
    "model", "_orig_mod", "state_dict", "stem", "blocks", "head", "backbone", "stages", "fc", "0",
    "1", "3", "fn", "a b", "größe",
]  # fmt: skip

name = st.one_of(
    st.sampled_from(NAMES), st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,9}", fullmatch=True)
)

UNRELATED: dict[str, dict[str, Any]] = {
    "a weight": {"criterion.weight": torch.ones(3)},
    "a network": {"loss.0.weight": torch.ones(2, 2), "loss.0.bias": torch.ones(2)},
    "numpy": {"margin": np.ones(2, np.float32)},
}

DISTRACTIONS: dict[str, Any] = {
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3, 2, 2)}},
                  "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    "epoch": 3,
    "history": [{"loss": 0.5}],
    "rng": [torch.zeros(5, dtype=torch.uint8), (1, 2)],
    "classifier": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)).state_dict(),
    "ema_decay": 0.99,
    "model_ema": None,
}  # fmt: skip

NESTABLE = ["module.", "_orig_mod.", "model.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize(("form", "arch"), CASES, ids=str)
def test_detect_format_ignores_order_and_prefixes(form: str, arch: Arch) -> None:
    keys = list(BUILD[form](arch).state_dict())
    assert detect_format(keys) == form
    assert detect_format(reversed([f"module._orig_mod.{key}" for key in keys])) == form


def test_keys_of_no_format_are_refused() -> None:
    refusal(lambda: detect_format(["conv1.weight", "fc.bias"]), "conv1.weight", *FORMATS)
    refusal(lambda: detect_format([]), "no keys")
    refusal(lambda: detect_format(["neck.scale"] * 9), "and 6 more")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
@pytest.mark.parametrize("form", FORMATS)
def test_published_wrappers_and_prefixes_are_removed(
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


@settings(max_examples=40, deadline=None)
@given(
    prefixes=st.lists(st.sampled_from(NESTABLE), max_size=6),
    inner=st.sampled_from(NESTABLE),
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=5),
    form=st.sampled_from(FORMATS),
    counter=st.sampled_from([None, "n_averaged", "steps"]),
)
def test_nested_wrappers_and_prefixes_are_removed_in_any_order(
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


@settings(max_examples=250, deadline=None)
@given(
    arch=st.sampled_from(SMALL),
    form=st.sampled_from(FORMATS),
    wrappers=st.lists(name, max_size=4),
    prefix=st.lists(name, max_size=3),
    distractions=st.sets(st.sampled_from(sorted(DISTRACTIONS))),
    unrelated=st.sets(st.sampled_from(sorted(UNRELATED))),
    nesting=st.sampled_from(["dict", "list"]),
    headless=st.booleans(),
)
def test_weights_are_found_under_any_wrapper_and_any_prefix(
    arch: Arch, form: str, wrappers: list[str], prefix: list[str], distractions: set[str],
    unrelated: set[str], nesting: str, headless: bool,
) -> None:  # fmt: skip
    expected = weights(arch, form)
    if headless:
        heads = list(expected)[-2:]
        expected = {key: value for key, value in expected.items() if key not in heads}
    held: Any = {"".join(f"{part}." for part in prefix) + k: v for k, v in expected.items()}
    left_out = []
    for kind in sorted(unrelated):
        held |= UNRELATED[kind]
        left_out += UNRELATED[kind]
    for wrapper in wrappers:
        held = {wrapper: held}
    held = {**{k: DISTRACTIONS[k] for k in sorted(distractions - set(held))}, **held}
    if nesting == "list":
        held = [{"epoch": 1}, held]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_checkpoint({"top": held})
    assert found.format == form
    back = found.state_dict
    want = read_checkpoint(expected).state_dict
    assert list(back) == list(want)
    assert all(torch.equal(back[key], want[key]) for key in want)
    lines = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(lines) == bool(left_out)
    if left_out:
        assert sorted(left_out)[0] in lines[0] or "and" in lines[0]


def test_two_files_of_one_name_differ_by_their_keys(tmp_path: Path) -> None:
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


def test_averaged_weights_are_preferred_unless_declined(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "averaged", ["ema", "params_ema", "model-ema", "swa_model", "EMA.averaged"]
)
@pytest.mark.parametrize("place", ["wrapper", "prefix"])
def test_averaged_weights_are_preferred_under_any_such_name(averaged: str, place: str) -> None:
    plain, mean = weights(seed=1), weights(seed=2)
    if place == "wrapper":
        held: dict[str, Any] = {averaged: {"deeper": mean, "decay": 0.9}, "net": plain}
    else:
        held = {f"{averaged}.{key}": value for key, value in mean.items()}
        held |= {f"net.{key}": value for key, value in plain.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_holds(held, mean, "timm")
        assert_holds(held, plain, "timm", use_ema=False)
    only = {averaged: mean}
    with pytest.raises(CheckpointError, match=r"averaged weights only .*use_ema=True"):
        read_checkpoint(only, use_ema=False)


@pytest.mark.parametrize("word", ["schema", "cinema", "demand", "remap"])
def test_words_that_contain_ema_are_not_averaged(word: str) -> None:
    assert_holds({word: weights()}, weights(), "timm", use_ema=False)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_two_networks_are_an_error_that_names_both(form: str) -> None:
    one, other = weights(form=form, seed=1), weights(form=form, seed=2)
    deep = weights(SMALL[1], form)
    for held, names in [
        ({"student": one, "teacher": other}, ["'student'", "'teacher'"]),
        ({"student": one, "teacher": deep}, ["'student'", "'teacher'"]),
        ({"state_dict": one, "model": other}, ["'state_dict'", "'model'"]),
        (prefixed("encoder_q.", one) | prefixed("encoder_k.", other), ["encoder_q", "encoder_k"]),
        ({"net": prefixed("a.", one) | prefixed("b.", deep)}, ["net.a", "net.b"]),
        ({"a_ema": one, "b_ema": other, "plain": deep}, ["a_ema", "b_ema"]),
        ([one, other], ["nets.0", "nets.1"]),
    ]:
        model = ConvMixer(4, 1, 3, 2, num_classes=3)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="holds 2 ConvMixers") as caught:
            load_checkpoint(model, held if isinstance(held, dict) else {"nets": held}, strict=False)
        assert all(name in str(caught.value) for name in names), caught.value
        assert "\n" not in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_network_under_two_names_is_one() -> None:
    state = weights()
    copy = {key: value.clone() for key, value in state.items()}
    assert_holds({"model": state, "state_dict": state}, state, "timm")
    assert_holds({"model": state, "state_dict": copy}, state, "timm")
    assert_holds({"ema": state, "net": state}, state, "timm", use_ema=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_holds(prefixed("net.", state) | prefixed("loss.net.", state), state, "timm")


def test_unexpected_keys_inside_the_network_are_an_error() -> None:
    for prefix in ("", "net."):
        for key in (
            "blocks.0.4.weight",
            "blocks.0.1.lora_A.weight",
            "stem.3.weight",
            "head.1.bias",
        ):
            held = prefixed(prefix, weights()) | {prefix + key: torch.ones(2)}
            with pytest.raises(CheckpointError, match=rf"{prefix}{key}.*left over"):
                read_checkpoint(held)


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


def test_parameters_outside_the_network_are_reported_and_counters_are_not() -> None:
    held = prefixed("net.", weights()) | {
        "criterion.weight": torch.ones(3),
        "temperature": torch.tensor(0.07),
        "n_averaged": torch.tensor(5),
        "global_step": torch.tensor([3], dtype=torch.int32),
    }
    model = ConvMixer(4, 1, 3, 2, num_classes=3)
    with pytest.warns(UserWarning, match=r"left out: criterion\.weight, temperature;") as caught:
        result = load_checkpoint(model, held)
    assert len(caught) == 1
    assert result == ([], ["criterion.weight", "temperature"], [], "timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = load_checkpoint(model, held, strict=False)
    assert result.unexpected_keys == ["criterion.weight", "temperature"]
    assert detect_format(held) == "timm"
