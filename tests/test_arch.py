from __future__ import annotations

import pytest
from torch import nn

from convmixer_fast.arch import (
    VARIANTS,
    Arch,
    activation_layer,
    activation_name,
    find_variant,
    known_activation,
)
from convmixer_fast.reference import ReferenceConvMixer

# name, parameters, GMACs as timm and as mmpretrain print them, and true (all, pw, dw, stem)
PUBLISHED = [
    ("768/32", 21_110_248, "19.55", 19_623_051_264, ("20.68", "19.33", "1.23", "0.12")),
    ("1024/20", 24_383_464, "5.55", 5_550_112_768, ("5.95", "5.37", "0.42", "0.15")),
    ("1536/20", 51_625_960, "48.68", 48_713_170_944, ("51.10", "48.32", "2.55", "0.23")),
]


@pytest.mark.parametrize(("name", "params", "timm", "mmpretrain", "true"), PUBLISHED)
def test_published_counts_are_computed_to_the_last_digit(name, params, timm, mmpretrain, true):
    arch = find_variant(name).arch
    assert arch.params == params
    assert f"{arch.macs_timm() / 1e9:.2f}" == timm
    assert arch.macs_mmpretrain() == mmpretrain
    macs = arch.macs()
    counted = (macs.total, macs.pointwise, macs.depthwise, macs.stem)
    assert tuple(f"{m / 1e9:.2f}" for m in counted) == true


@pytest.mark.parametrize("arch", [Arch(13, 3, 4, 5, 2, 11), Arch(8, 0, num_classes=0), Arch(16, 1)])
def test_parameter_count_is_that_of_the_reference(arch):
    assert sum(p.numel() for p in ReferenceConvMixer(arch).parameters()) == arch.params


def test_macs_are_those_of_the_convolutions_that_run():
    arch, counted = Arch(12, 2, kernel_size=6, patch_size=5, in_chans=2, num_classes=3), 0
    model = ReferenceConvMixer(arch)

    def count(module, args, out):
        nonlocal counted
        taps = module.weight[0].numel()
        counted += out.numel() * taps

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(count)
    import torch

    model(torch.randn(1, 2, 33, 27))
    assert counted == arch.macs((33, 27)).total


def test_grid_drops_trailing_pixels():
    assert Arch(8, 1, patch_size=7).grid((223, 20)) == (31, 2)


@pytest.mark.parametrize(
    "alias",
    [
        "768/32",
        "convmixer_768_32",
        "convmixer_768_32.in1k",
        "timm/convmixer_768_32.in1k",
        "hf-hub:timm/convmixer_768_32.in1k",
        "hf_hub:timm/convmixer_768_32.in1k",
        "ConvMixer-768/32",
    ],
)
def test_a_variant_is_found_under_all_its_names(alias):
    assert find_variant(alias) is VARIANTS["convmixer_768_32"]


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown model 'convmixer_9'.*convmixer_768_32 \(768/32\)"
    ):
        find_variant("convmixer_9")


def test_768_32_is_the_relu_model_also_when_fine_tuned():
    assert VARIANTS["convmixer_768_32"].arch.act == "relu"
    assert known_activation(Arch(768, 32, 7, 7, in_chans=1, num_classes=10, act=None)) == "relu"
    assert known_activation(Arch(1536, 20, 9, 7, act=None)) == "gelu"
    assert known_activation(Arch(768, 32, 9, 7, act=None)) is None


def test_tanh_gelu_and_subclasses_have_no_fused_name():
    class Loud(nn.ReLU):
        pass

    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) is None
    assert activation_name(Loud()) is None
    assert activation_name("swish") == "silu"
    assert activation_name(None) is None
    assert activation_layer("ReLU") is nn.ReLU
    assert activation_layer(nn.Tanh) is nn.Tanh
    with pytest.raises(ValueError, match="unknown activation 'gelo'"):
        activation_layer("gelo")


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 0), ("kernel_size", 0), ("patch_size", -1), ("depth", -1), ("num_classes", -2)],
)
def test_impossible_numbers_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Arch(**({"dim": 8, "depth": 2} | {field: value}))


def test_reference_needs_an_activation():
    with pytest.raises(ValueError, match="activation"):
        ReferenceConvMixer(Arch(8, 1, act=None))
