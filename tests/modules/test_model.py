"""timm's ConvMixer and ours side by side: constructor, keys, values, methods, errors."""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

import convmixer_fast
from convmixer_fast import ConvMixer, create_model, list_models, use_backend
from convmixer_fast.arch import VARIANTS, Arch
from convmixer_fast.modules.model import FeatureExtractor, adapt_input_weight
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, trained_like_

SMALL = {"dim": 24, "depth": 3, "kernel_size": 5, "patch_size": 4, "num_classes": 7}
SHAPE = (2, 3, 37, 42)


def pair(**kwargs) -> tuple[nn.Module, ConvMixer]:
    theirs = trained_like_(
        TimmConvMixer(**(SMALL | kwargs)), (2, kwargs.get("in_chans", 3), 37, 42)
    )
    ours = ConvMixer(**(SMALL | kwargs))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def assert_same(
    ours: nn.Module, theirs: nn.Module, x: torch.Tensor, call=lambda m, x: m(x)
) -> None:
    with torch.no_grad():
        got, same = call(ours, x), call(theirs, x)
        oracle = call(theirs.double(), x.double())
        theirs.to(x.dtype)
    assert_numerics(got, same, oracle)


def test_signature_begins_with_timms():
    timms = list(inspect.signature(TimmConvMixer.__init__).parameters.values())
    ours = list(inspect.signature(ConvMixer.__init__).parameters.values())
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in timms]


def test_methods_have_timms_signatures():
    for name in (
        "forward_features",
        "forward_head",
        "get_classifier",
        "reset_classifier",
        "set_grad_checkpointing",
        "group_matcher",
        "forward_intermediates",
        "prune_intermediate_layers",
    ):
        theirs = inspect.signature(getattr(TimmConvMixer, name)).parameters
        ours = inspect.signature(getattr(ConvMixer, name)).parameters
        assert [(p.name, p.default) for p in ours.values()] == [
            (p.name, p.default) for p in theirs.values()
        ], name


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kernel_size": 8},
        {"dim": 99},
        {"in_chans": 1},
        {"act_layer": nn.ReLU},
        {"patch_size": 7, "kernel_size": 9},
        {"global_pool": "max"},
        {"global_pool": "avgmax"},
        {"global_pool": "catavgmax"},
        {"num_classes": 0},
        {"num_classes": 0, "global_pool": ""},
        {"depth": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(37, 42), (50, 47), (8, 9)])
def test_logits_equal_timms(kwargs, size):
    theirs, ours = pair(**kwargs)
    x = torch.randn(8, kwargs.get("in_chans", 3), *size)
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x.contiguous(memory_format=torch.channels_last))


def test_state_dict_keys_and_parameter_order_are_timms():
    theirs, ours = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_attributes_are_timms():
    theirs, ours = pair(drop_rate=0.2)
    for name in (
        "num_classes",
        "in_chans",
        "num_features",
        "head_hidden_size",
        "grad_checkpointing",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.feature_info == theirs.feature_info
    assert ours.head_drop.p == theirs.head_drop.p
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.arch == Arch(24, 3, 5, 4, 3, 7, "gelu")


def test_forward_pieces_equal_timms():
    theirs, ours = pair()
    x = torch.randn(SHAPE)
    assert_same(ours, theirs, x, lambda m, x: m.forward_features(x))
    assert_same(
        ours, theirs, x, lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True)
    )


@pytest.mark.parametrize("indices", [None, 1, 2, [0, 2], [-1], (-3, 1)])
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_equal_timms(indices, stop_early):
    theirs, ours = pair()
    x = torch.randn(SHAPE)
    kwargs = {"indices": indices, "stop_early": stop_early}
    with torch.no_grad():
        got_last, got = ours.forward_intermediates(x, **kwargs)
        last, want = theirs.forward_intermediates(x, **kwargs)
        only = ours.forward_intermediates(x, **kwargs, intermediates_only=True)
    assert len(got) == len(want) == len(only)
    for g, w, o in zip(got, want, only, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        assert torch.equal(g, o)
    torch.testing.assert_close(got_last, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indices", [0, 4, [3], [-4], []])
def test_intermediates_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match=r"block.* the model has 3"):
        ConvMixer(**SMALL).forward_intermediates(torch.randn(SHAPE), indices=indices)
    with pytest.raises(ValueError, match="NCHW"):
        ConvMixer(**SMALL).forward_intermediates(torch.randn(SHAPE), output_fmt="NHWC")


def test_prune_intermediate_layers_equals_timms():
    theirs, ours = pair()
    assert (
        ours.prune_intermediate_layers([0, 1]) == theirs.prune_intermediate_layers([0, 1]) == [0, 1]
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(SHAPE))
    _, ours = pair()
    ours.prune_intermediate_layers(1, prune_head=False)
    assert isinstance(ours.head, nn.Linear)


@pytest.mark.parametrize(("classes", "pool"), [(5, None), (0, None), (0, ""), (4, "catavgmax")])
def test_reset_classifier_equals_timms(classes, pool):
    theirs, ours = pair()
    for model in (theirs, ours):
        model.reset_classifier(classes, pool)
    assert ours.num_classes == theirs.num_classes
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert type(ours.get_classifier()) is type(theirs.get_classifier())
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, torch.randn(SHAPE))


def test_reset_classifier_keeps_dtype_and_refuses_a_map():
    model = ConvMixer(**SMALL, dtype=torch.bfloat16).train()
    model.reset_classifier(9)
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.training
    with pytest.raises(ValueError, match="global_pool=''"):
        model.reset_classifier(9, "")
    assert model.num_classes == 9


@pytest.mark.parametrize("out_indices", [2, (0, 2), [-1]])
def test_features_only_equals_timms(out_indices):
    small = TimmConvMixer(16, 4, 7, 7, act_layer=nn.ReLU)
    theirs = trained_like_(FeatureGetterNet(small, out_indices), (2, 3, 28, 35))
    ours = create_model("768/32", features_only=True, out_indices=out_indices, dim=16, depth=4)
    assert isinstance(ours, FeatureExtractor)
    ours.load_state_dict(theirs.state_dict())
    for ask in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, ask)() == getattr(theirs.feature_info, ask)()
    x = torch.randn(2, 3, 28, 35)
    ours.eval()
    with torch.no_grad():
        got, want = ours(x), theirs(x)
    assert len(got) == len(want)
    assert len(ours.feature_info) == len(theirs.feature_info)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    assert ours.feature_info.channels(0) == 16
    assert ours.feature_info.get_dicts(["reduction"])[0] == {"reduction": 7}
    assert ours.feature_info[0]["module"] == "blocks.0"
    ours.set_grad_checkpointing(True)
    assert ours.model.grad_checkpointing


def test_feature_info_answers_as_timms():
    theirs = FeatureGetterNet(TimmConvMixer(16, 4, 7, 7), (0, -2)).feature_info
    ours = FeatureExtractor(ConvMixer(16, 4, 7, 7), (0, -2)).feature_info
    assert ours.out_indices == tuple(theirs.out_indices)
    for a, b in ((ours, theirs), (ours.from_other(2), theirs.from_other(2))):
        assert len(a) == len(b)
        for idx in (None, 1, [0, 2], -1):
            assert a.get("module", idx) == b.get("module", idx)
            assert a.get_dicts(["module", "index"], idx) == b.get_dicts(["module", "index"], idx)
            assert a.get_dicts(idx=idx) == b.get_dicts(idx=idx)


def test_arguments_that_are_not_known_are_errors():
    with pytest.raises(TypeError, match="img_size"):
        ConvMixer(**SMALL, img_size=224)
    with pytest.raises(TypeError, match="disagree"):
        ConvMixer(8, 1, num_classes=5, n_classes=6)
    assert ConvMixer(8, 1, n_classes=6).num_classes == 6
    assert create_model("768/32", n_classes=6, dim=8, depth=1).num_classes == 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "soft"}, "unknown global_pool 'soft'"),
        ({"global_pool": ""}, "pass num_classes=0"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"act_layer": "gelo"}, "unknown activation"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in .* got 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be in .* got -0.1"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_bad_constructor_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConvMixer(**(SMALL | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 8.5}, "dim must be a whole number, got 8.5"),
        ({"kernel_size": (3, 3)}, r"kernel_size must be a whole number, got \(3, 3\)"),
        ({"num_classes": None}, "num_classes must be a whole number, got None"),
        ({"act_layer": nn.ReLU()}, r"a module class such as torch.nn.GELU.* got ReLU\(\)"),
        ({"act_layer": None}, "a module class such as torch.nn.GELU.* got None"),
    ],
)
def test_constructor_values_of_another_type_are_named(kwargs, message):
    with pytest.raises(TypeError, match=message) as info:
        ConvMixer(**(SMALL | kwargs))
    assert "\n" not in str(info.value)


def test_meta_models_tell_shapes_in_both_modes():
    model = ConvMixer(**SMALL, device="meta")
    x = torch.empty(2, 3, 37, 42, device="meta")
    for training in (True, False):
        out = model.train(training)(x)
        assert out.is_meta
        assert out.shape == (2, model.num_classes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 37, 42), r"x\[None\]"),
        ((2, 4, 37, 42), "expected 3 channels, got 4"),
        ((2, 3, 3, 42), "smaller than one patch of 4 x 4"),
        ((2, 3, 42, 1), "smaller than one patch"),
    ],
)
def test_bad_images_get_one_line(shape, message):
    with pytest.raises(ValueError, match=message) as info:
        ConvMixer(**SMALL)(torch.randn(shape))
    assert "\n" not in str(info.value)


def test_no_images_and_single_patches():
    theirs, ours = pair()
    with torch.no_grad():
        assert ours(torch.empty(0, 3, 37, 42)).shape == (0, 7)
    # Many, for the errors of a few numbers are luck; each alone, for that is the odd shape.
    patches = torch.randn(32, 3, 4, 4)
    assert_same(ours, theirs, patches, lambda m, x: torch.cat([m(one[None]) for one in x]))


def test_nan_weights_give_nan_not_an_error():
    _, ours = pair()
    with torch.no_grad():
        ours.blocks[0][1].weight[0, 0] = float("nan")
        assert ours(torch.randn(SHAPE)).isnan().any()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_create_model_builds_each_variant(name):
    with torch.device("meta"):
        model = create_model(name)
    arch = VARIANTS[name].arch
    assert model.arch == arch
    assert sum(p.numel() for p in model.parameters()) == arch.params
    assert model.pretrained_cfg == model.default_cfg == VARIANTS[name].pretrained_cfg


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.hf_hub_id])
def test_pretrained_cfg_agrees_with_timm(name):
    theirs = timm.get_pretrained_cfg(name).to_dict()
    ours = VARIANTS[name].pretrained_cfg
    for key in (
        "input_size",
        "crop_pct",
        "interpolation",
        "mean",
        "std",
        "first_conv",
        "classifier",
        "num_classes",
        "hf_hub_id",
        "license",
        "pool_size",
    ):
        assert ours[key] == theirs[key], key


def test_create_model_under_both_names_and_with_changes():
    with torch.device("meta"):
        a = create_model("1024/20", num_classes=10, in_chans=1, drop_rate=0.1)
        b = create_model("convmixer_1024_20_ks9_p14.in1k")
    assert (a.num_classes, a.in_chans, a.head_drop.p) == (10, 1, 0.1)
    assert b.arch.patch_size == 14


def test_list_models():
    assert sorted(list_models()) == sorted(VARIANTS)
    assert list_models("*1024*") == ["convmixer_1024_20_ks9_p14"]
    assert list_models(pretrained=True) == timm.list_models("convmixer_[0-9]*")


def test_unknown_model_name():
    with pytest.raises(ValueError, match=r"unknown model 'resnet50': choose one of .*768/32"):
        create_model("resnet50")


class TestPretrained:
    """`pretrained=True` against a hub on this disk."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        source = trained_like_(
            ReferenceConvMixer(Arch(16, 2, 7, 7, num_classes=11, act="relu")), (2, 3, 28, 28)
        )
        convmixer_fast.save_checkpoint(source, tmp_path / "model.safetensors")

        def download(repo_id, filename):
            assert repo_id == "timm/convmixer_768_32.in1k"
            return str(tmp_path / filename)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return source

    def build(self, **kwargs):
        return create_model("768/32", pretrained=True, dim=16, depth=2, **kwargs).eval()

    def test_weights_arrive(self, hub):
        model, x = self.build(num_classes=11), torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(model(x), hub(x), rtol=1e-4, atol=1e-4)

    def test_other_classes_leave_the_classifier_fresh(self, hub):
        model = self.build(num_classes=4)
        assert model.head.weight.shape == (4, 16)
        assert torch.equal(model.blocks[1][1].weight, hub.blocks[1][1].weight)
        assert self.build(num_classes=0).num_classes == 0

    def test_grey_images_sum_the_stem(self, hub):
        model = self.build(num_classes=11, in_chans=1)
        grey = torch.randn(2, 1, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(
                model(grey), hub(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
            )

    def test_offline_is_one_line_with_the_way_out(self, monkeypatch):
        def download(*args):
            raise OSError("no route\nto host")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(RuntimeError, match=r"no route.*checkpoint_path=") as info:
            self.build()
        assert "\n" not in str(info.value)

    def test_without_huggingface_hub(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(RuntimeError, match=r"convmixer_fast\[hub\]"):
            self.build()

    def test_a_variant_that_no_hub_holds(self):
        with pytest.raises(RuntimeError, match="no hub holds"):
            create_model("256/8", pretrained=True)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_input_weights_are_adapted_as_timm_does(in_chans):
    from timm.models import adapt_input_conv

    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(
        adapt_input_weight(weight, in_chans), adapt_input_conv(in_chans, weight)
    )


def test_from_checkpoint_reads_everything_off_the_file(tmp_path):
    source = trained_like_(ConvMixer(**SMALL, act_layer="silu", in_chans=1), (2, 1, 20, 20))
    convmixer_fast.save_checkpoint(source, tmp_path / "m.safetensors")
    model = ConvMixer.from_checkpoint(tmp_path / "m.safetensors", act="silu")
    assert model.arch == source.arch
    assert not model.training
    x = torch.randn(2, 1, 20, 20)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def test_create_model_with_checkpoint_path(tmp_path):
    source = trained_like_(ConvMixer(16, 2, 7, 7, act_layer="relu"), (2, 3, 28, 28))
    convmixer_fast.save_checkpoint(source, tmp_path / "m.pth", format="locuslab")
    model = create_model("768/32", checkpoint_path=tmp_path / "m.pth", dim=16, depth=2).eval()
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    theirs, ours = pair()
    assert_same(ours.to(dtype), theirs.to(dtype), torch.randn(SHAPE).to(dtype))


def test_wide_model_on_trained_like_statistics_is_within_the_numerics_rule():
    theirs = trained_like_(TimmConvMixer(256, 8, 9, 7, num_classes=50), (2, 3, 112, 112))
    ours = ConvMixer(256, 8, 9, 7, num_classes=50).eval()
    ours.load_state_dict(theirs.state_dict())
    for backend in ("auto", "reference"):
        with use_backend(backend):
            assert_same(ours, theirs, torch.randn(2, 3, 112, 112))


def test_torch_fx_traces_the_plain_operators():
    _, ours = pair()
    traced = torch.fx.symbolic_trace(ours)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), ours(x), rtol=1e-4, atol=1e-4)
