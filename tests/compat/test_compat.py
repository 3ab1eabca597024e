"""One import line or one word of a config changes, and everything else stays as it was."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import fresh_python
import peers
import pytest
import torch
from torch import nn

import convmixer_fast
from convmixer_fast import CheckpointError, MixerBlock, load_checkpoint, save_checkpoint
from convmixer_fast.arch import Arch
from convmixer_fast.compat import locuslab, locuslab_cifar10
from convmixer_fast.compat import mmpretrain as mm
from convmixer_fast.compat import timm as compat_timm
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import assert_numerics, trained_like_

ARCH = Arch(16, 3, kernel_size=5, patch_size=4, num_classes=7)
MM_ARCH = {"embed_dims": 16, "depth": 3, "patch_size": 4, "kernel_size": 5}
SHAPE = (3, 3, 17, 18)


def test_importing_compat_imports_no_other_library():
    code = (
        "import sys, convmixer_fast.compat.locuslab, convmixer_fast.compat.timm;"
        "print([m for m in ('timm', 'mmpretrain', 'mmengine') if m in sys.modules])"
    )
    done = fresh_python.run("-c", code, check=True)
    assert done.stdout.strip() == "[]"


class TestLocuslab:
    @torch.no_grad()
    @pytest.mark.parametrize("k", [5, 8])
    def test_same_keys_start_and_result_as_the_original(self, k):
        arch = Arch(9, 2, kernel_size=k, patch_size=3, num_classes=4)
        original = peers.locuslab(arch)
        torch.manual_seed(11)
        in_order = ReferenceConvMixer(arch).state_dict().values()
        torch.manual_seed(11)
        ours = locuslab.ConvMixer(9, 2, k, 3, 4)
        assert type(ours) is nn.Sequential
        assert list(ours.state_dict()) == list(original.state_dict())
        for (key, tensor), start in zip(ours.state_dict().items(), in_order, strict=True):
            assert torch.equal(tensor, start), key
        trained_like_(original, SHAPE)
        ours.load_state_dict(original.state_dict())
        x = torch.randn(SHAPE)
        oracle = copy.deepcopy(original).double()(x.double())
        assert_numerics(ours.eval()(x), original(x), oracle)
        assert type(ours[3]) is MixerBlock

    def test_signatures_and_defaults_are_the_originals(self):
        def defaults(function: Any) -> list[tuple[str, Any]]:
            return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

        empty = inspect.Parameter.empty
        assert defaults(locuslab.ConvMixer) == [
            ("dim", empty),
            ("depth", empty),
            ("kernel_size", 9),
            ("patch_size", 7),
            ("n_classes", 1000),
        ]
        assert [d for _, d in defaults(locuslab_cifar10.ConvMixer)[2:]] == [5, 2, 10]
        model = locuslab_cifar10.ConvMixer(8, 1)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        assert (model[0].kernel_size, model[3][0].fn[0].kernel_size) == ((2, 2), (5, 5))

    def test_checkpoints_of_the_original_load(self, tmp_path):
        original = trained_like_(peers.locuslab(ARCH), SHAPE)
        torch.save({"state_dict": original.state_dict()}, tmp_path / "m.pth.tar")
        ours = locuslab.ConvMixer(16, 3, 5, 4, 7).eval()
        load_checkpoint(ours, tmp_path / "m.pth.tar")
        x = torch.randn(SHAPE)
        torch.testing.assert_close(ours(x), original(x), rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize("bad", [{"n_classes": 0}, {"dim": 0}, {"kernel_size": 0}])
    def test_bad_arguments_are_named(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            locuslab.ConvMixer(**({"dim": 8, "depth": 1} | bad))


class TestMMPretrain:
    @torch.no_grad()
    def test_same_keys_and_maps_as_the_original(self):
        original = trained_like_(peers.mmpretrain_backbone(ARCH, out_indices=(0, -1)), SHAPE)
        ours = mm.ConvMixer(MM_ARCH, out_indices=(0, -1))
        assert list(ours.state_dict()) == list(original.state_dict())
        ours.load_state_dict(original.state_dict())
        ours.eval()
        x = torch.randn(SHAPE)
        oracle = copy.deepcopy(original).double()(x.double())
        maps = ours(x)
        assert type(maps) is tuple
        for a, b, exact in zip(maps, original(x), oracle, strict=True):
            assert_numerics(a, b, exact)
        assert len({id(m) for m in ours.modules() if isinstance(m, nn.GELU)}) == 1

    def test_arguments_and_attributes_are_the_originals(self):
        names = list(inspect.signature(mm.ConvMixer).parameters)
        assert names == [
            "arch",
            "in_channels",
            "norm_cfg",
            "act_cfg",
            "out_indices",
            "frozen_stages",
            "init_cfg",
        ]
        model = mm.ConvMixer(MM_ARCH, in_channels=1)
        found = (model.embed_dims, model.depth, model.patch_size, model.kernel_size)
        assert found == (16, 3, 4, 5)
        assert (model.out_indices, model.frozen_stages) == ([2], 0)
        assert model(torch.randn(1, 1, 8, 8))[0].shape == (1, 16, 2, 2)

    @pytest.mark.parametrize(
        ("arch", "numbers"),
        [
            ("768/32", (768, 32, 7, 7)),
            ("1024/20", (1024, 20, 14, 9)),
            ("1536/20", (1536, 20, 7, 9)),
        ],
    )
    def test_named_architectures(self, arch, numbers):
        with torch.device("meta"):
            model = mm.ConvMixer(arch)
        found = (model.embed_dims, model.depth, model.patch_size, model.kernel_size)
        assert found == numbers
        assert len(model.stages) == numbers[1]

    @pytest.mark.parametrize(
        ("indices", "expected"), [(1, [1]), (-1, [2]), ([0, 2], [0, 2]), ((-3, -1), [0, 2])]
    )
    def test_out_indices(self, indices, expected):
        given = copy.copy(indices)
        model = mm.ConvMixer(MM_ARCH, out_indices=indices).eval()
        assert model.out_indices == expected
        assert indices == given
        assert len(model(torch.randn(SHAPE))) == len(expected)

    def test_frozen_stages_stay_frozen(self):
        model = mm.ConvMixer(MM_ARCH, frozen_stages=2)
        for _ in range(2):
            assert model.train() is model
            assert [stage.training for stage in model.stages] == [False, False, True]
            assert not any(m.training for m in model.stages[1].modules() if m is not model.act)
            assert model.stem.training
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in model.named_parameters() if n.startswith("stages.0.")} | {
            n for n, _ in model.named_parameters() if n.startswith("stages.1.")
        }
        before = model.stages[0][3].running_mean.clone()
        model(torch.randn(SHAPE))[0].sum().backward()
        assert torch.equal(model.stages[0][3].running_mean, before)
        assert model.stem[0].weight.grad is not None
        assert model.eval() is model

    @pytest.mark.parametrize(
        ("cfg", "cls"),
        [
            ({"type": "GELU"}, nn.GELU),
            ({"type": "ReLU", "inplace": True}, nn.ReLU),
            ({"type": "SiLU"}, nn.SiLU),
            ({"type": "Swish"}, nn.SiLU),
            ({"type": "HSwish"}, nn.Hardswish),
            ({"type": "Identity"}, nn.Identity),
        ],
    )
    def test_activations(self, cfg, cls):
        given = dict(cfg)
        model = mm.ConvMixer(MM_ARCH, act_cfg=cfg)
        assert type(model.stages[1][2]) is type(model.stem[1]) is cls
        assert cfg == given

    def test_norms(self):
        cfg = {"type": "BN", "eps": 1e-3, "momentum": 0.2, "requires_grad": False}
        model = mm.ConvMixer(MM_ARCH, norm_cfg=cfg)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 7
        assert {(n.eps, n.momentum) for n in norms} == {(1e-3, 0.2)}
        assert not any(p.requires_grad for n in norms for p in n.parameters())
        assert model.stem[0].weight.requires_grad
        synced = mm.ConvMixer(MM_ARCH, norm_cfg={"type": "SyncBN"})
        assert type(synced.stages[0][0].fn[2]) is nn.SyncBatchNorm
        assert list(synced.state_dict()) == list(model.state_dict())

    @torch.no_grad()
    def test_eps_of_the_norm_counts(self):
        x = torch.randn(SHAPE)
        wide = trained_like_(mm.ConvMixer(MM_ARCH, norm_cfg={"type": "BN", "eps": 0.5}), SHAPE)
        narrow = mm.ConvMixer(MM_ARCH).eval()
        narrow.load_state_dict(wide.state_dict())
        assert (wide(x)[0] - narrow(x)[0]).abs().max() > 1e-2

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"arch": "9/9"}, "unknown model '9/9'"),
            ({"arch": {"embed_dims": 8, "depth": 1}}, "arch lacks patch_size, kernel_size"),
            ({"act_cfg": {"type": "Mish"}}, "unknown activation 'Mish' in act_cfg: one of GELU"),
            ({"act_cfg": {}}, "unknown activation None"),
            ({"norm_cfg": {"type": "GN"}}, "unknown norm 'GN' in norm_cfg: one of BN"),
            ({"out_indices": 3}, "out_indices has 3, but the architecture has 3"),
            ({"out_indices": [-4]}, "out_indices has -4"),
            ({"frozen_stages": 4}, "frozen_stages=4, but the architecture has 3"),
            ({"init_cfg": {"checkpoint": "x"}}, "with a 'type'"),
            ({"init_cfg": {"type": "Pretrained"}}, "needs a 'checkpoint'"),
        ],
    )
    def test_bad_arguments_are_one_line(self, bad, message):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            mm.ConvMixer(**({"arch": MM_ARCH} | bad))
        assert "\n" not in str(caught.value)

    @torch.no_grad()
    def test_classifier_checkpoints_load_through_a_parent_and_through_load_checkpoint(self):
        source = trained_like_(peers.mmpretrain_classifier(ARCH), SHAPE)
        parent = peers.mmpretrain_classifier(ARCH)
        parent.backbone = mm.ConvMixer(MM_ARCH)
        parent.load_state_dict(source.state_dict())
        x = torch.randn(SHAPE)
        torch.testing.assert_close(parent.eval()(x), source(x), rtol=2e-4, atol=2e-4)
        alone = mm.ConvMixer(MM_ARCH).eval()
        load_checkpoint(alone, source.state_dict())
        torch.testing.assert_close(alone(x), source.backbone(x), rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize("prefix", [{}, {"prefix": "backbone."}])
    @pytest.mark.parametrize("form", ["mmpretrain", "timm", "locuslab"])
    def test_init_weights_takes_any_published_file(self, tmp_path, form, prefix):
        source = trained_like_(peers.mmpretrain_classifier(ARCH), SHAPE)
        save_checkpoint(source, tmp_path / "w.pth", format=form)
        cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "w.pth"), **prefix}
        model = mm.ConvMixer(MM_ARCH, init_cfg=cfg)
        assert not torch.equal(model.stem[0].weight, source.backbone.stem[0].weight)
        model.init_weights()
        for key, tensor in source.backbone.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key

    def test_init_weights_refuses_another_architecture_and_writes_nothing(self, tmp_path):
        save_checkpoint(peers.mmpretrain_classifier(ARCH), tmp_path / "w.pth", format="mmpretrain")
        cfg = {"type": "Pretrained", "checkpoint": tmp_path / "w.pth"}
        model = mm.ConvMixer({**MM_ARCH, "kernel_size": 3}, init_cfg=cfg)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"stages\.0\.0\.fn\.0\.weight is \(16, 1, 5, 5\) in"):
            model.init_weights()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        model.init_cfg = {"type": "Pretrained", "checkpoint": tmp_path / "absent.pth"}
        with pytest.raises(CheckpointError, match=r"absent\.pth"):
            model.init_weights()
        model.init_cfg = None
        model.init_weights()

    def test_initializers_of_mmengine_are_mmengines(self, monkeypatch):
        cfg = {"type": "Constant", "layer": "Conv2d", "val": 0.5}
        monkeypatch.setitem(sys.modules, "mmengine", None)
        monkeypatch.setitem(sys.modules, "mmengine.model", None)
        with pytest.raises(ImportError, match="pip install mmengine"):
            mm.ConvMixer(MM_ARCH, init_cfg=cfg)
        with pytest.raises(ImportError, match="pip install mmengine"):
            mm.ConvMixer(
                MM_ARCH, init_cfg={"type": "Pretrained", "checkpoint": "https://host/w.pth"}
            )
        calls = []
        fake = types.ModuleType("mmengine.model")
        fake.initialize = lambda module, cfg: calls.append((module, cfg))
        monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        monkeypatch.setitem(sys.modules, "mmengine.model", fake)
        model = mm.ConvMixer(MM_ARCH, init_cfg=[cfg])
        model.init_weights()
        assert calls == [(model, cfg)]

    def test_copies_and_pickles(self, tmp_path):
        model = trained_like_(mm.ConvMixer(MM_ARCH, frozen_stages=1), SHAPE)
        torch.save(model, tmp_path / "m.pt")
        x = torch.randn(SHAPE)
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "m.pt", weights_only=False)):
            assert torch.equal(twin(x)[0], model(x)[0])
            assert len({id(m) for m in twin.modules() if isinstance(m, nn.GELU)}) == 1


class FakeRegistry:
    """The part of mmengine's Registry that registration uses."""

    def __init__(self) -> None:
        self.module_dict: dict[str, type] = {}

    def register_module(self, name: str, module: type, force: bool = False) -> None:
        if name in self.module_dict and not force:
            raise KeyError(f"{name} is already registered")
        self.module_dict[name] = module

    def build(self, cfg: dict[str, Any]) -> nn.Module:
        arguments = dict(cfg)
        built: nn.Module = self.module_dict[arguments.pop("type")](**arguments)
        return built


class TestRegistration:
    @pytest.fixture
    def registry(self, monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
        registry = FakeRegistry()
        package = types.ModuleType("mmpretrain")
        module = types.ModuleType("mmpretrain.registry")
        package.registry, module.MODELS = module, registry
        monkeypatch.setitem(sys.modules, "mmpretrain", package)
        monkeypatch.setitem(sys.modules, "mmpretrain.registry", module)
        return registry

    @pytest.fixture
    def reimport(self) -> Iterator[Any]:
        """Import the module again, as a config's custom_imports does in a fresh process."""
        name = mm.__name__

        def again() -> types.ModuleType:
            sys.modules.pop(name, None)
            return importlib.import_module(name)

        yield again
        sys.modules[name] = mm
        convmixer_fast.compat.mmpretrain = mm

    def test_importing_registers(self, registry, reimport):
        fresh = reimport()
        assert registry.module_dict == {"ConvMixerFast": fresh.ConvMixer}
        model = registry.build({"type": "ConvMixerFast", "arch": MM_ARCH, "out_indices": (0, -1)})
        assert len(model(torch.randn(SHAPE))) == 2

    def test_twice_is_harmless(self, registry):
        assert mm.register() is True
        assert mm.register() is False
        assert registry.module_dict == {"ConvMixerFast": mm.ConvMixer}

    def test_absence_is_quiet_and_named_when_asked(self, monkeypatch, reimport):
        monkeypatch.delitem(sys.modules, "mmpretrain", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh = reimport()
        monkeypatch.setitem(sys.modules, "mmpretrain", None)
        monkeypatch.setitem(sys.modules, "mmpretrain.registry", None)
        with pytest.raises(ImportError, match="pip install mmpretrain") as caught:
            fresh.register()
        assert "\n" not in str(caught.value)

    def test_a_broken_mmpretrain_is_a_warning(self, monkeypatch, reimport):
        broken = types.ModuleType("mmpretrain.registry")

        def fail(name: str) -> None:
            raise AssertionError("MMCV==2.9 is used but incompatible.\nPlease install another.")

        broken.__getattr__ = fail
        monkeypatch.setitem(sys.modules, "mmpretrain", types.ModuleType("mmpretrain"))
        monkeypatch.setitem(sys.modules, "mmpretrain.registry", broken)
        with pytest.warns(UserWarning, match="MMCV==2.9 is used but incompatible"):
            fresh = reimport()
        assert len(fresh.ConvMixer(MM_ARCH)(torch.randn(SHAPE))) == 1

    def test_real_mmpretrain(self):
        models = pytest.importorskip("mmpretrain.models", reason="mmpretrain is not installed")
        mm.register()
        cfg = {"type": "ConvMixer", "arch": MM_ARCH, "out_indices": [0, -1], "frozen_stages": 1}
        theirs = models.build_backbone(cfg)
        ours = models.build_backbone(cfg | {"type": "ConvMixerFast"})
        assert type(ours) is mm.ConvMixer
        trained_like_(theirs, SHAPE)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        ours.eval()
        x = torch.randn(SHAPE)
        expected = theirs(x)
        convmixer_fast.optimize(theirs)
        assert type(theirs.stages[0]) is MixerBlock
        for a, b, c in zip(ours(x), theirs(x), expected, strict=True):
            torch.testing.assert_close(a, c, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(b, c, rtol=2e-4, atol=2e-4)

    def test_real_mmpretrain_classifier(self):
        models = pytest.importorskip("mmpretrain.models", reason="mmpretrain is not installed")
        mm.register()

        def build(backbone: str, **kwargs: Any) -> nn.Module:
            head = {"type": "LinearClsHead", "num_classes": 7, "in_channels": 16}
            return models.build_classifier(
                {
                    "type": "ImageClassifier",
                    "backbone": {"type": backbone, "arch": MM_ARCH, **kwargs},
                    "neck": {"type": "GlobalAveragePooling"},
                    "head": head,
                }
            )

        theirs = trained_like_(build("ConvMixer"), SHAPE)
        ours = build("ConvMixerFast", init_cfg={"type": "Constant", "layer": "Conv2d", "val": 0.5})
        ours.init_weights()
        assert ours.backbone.stem[0].weight.unique().tolist() == [0.5]
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(SHAPE)
        expected = theirs(x)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=2e-4, atol=2e-4)
        fast = convmixer_fast.optimize(theirs)
        assert fast is theirs
        torch.testing.assert_close(fast(x), expected, rtol=2e-4, atol=2e-4)


class TestTimm:
    @pytest.fixture(autouse=True)
    def _registered(self) -> None:
        self.timm = pytest.importorskip("timm", reason="timm is not installed")
        self.names = compat_timm.register()

    def create(self, name: str = "convmixer_fast_768_32", **kwargs: Any) -> nn.Module:
        small = {"dim": 16, "depth": 3, "kernel_size": 5, "patch_size": 4}
        return self.timm.create_model(name, **(small | kwargs))

    def test_the_published_variants_are_listed(self):
        expected = {
            "convmixer_fast_1536_20",
            "convmixer_fast_768_32",
            "convmixer_fast_1024_20_ks9_p14",
        }
        assert set(self.names) == expected
        assert set(self.timm.list_models("convmixer_fast*")) == expected
        tagged = self.timm.list_models("convmixer_fast*", pretrained=True)
        assert {f"{name}.in1k" for name in expected} == set(tagged)

    def test_registering_again_is_harmless(self):
        before = self.timm.list_models()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compat_timm.register() == self.names
        assert self.timm.list_models() == before

    @pytest.mark.parametrize(
        "name", ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]
    )
    def test_variants_are_timms(self, name):
        ours_name = name.replace("convmixer_", "convmixer_fast_")
        ours = self.timm.create_model(ours_name, device="meta")
        theirs = self.timm.create_model(name, device="meta")
        assert isinstance(ours, convmixer_fast.ConvMixer)
        shapes = [
            {key: tensor.shape for key, tensor in m.state_dict().items()} for m in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]
        assert list(shapes[0]) == list(shapes[1])
        assert type(ours.stem[1]) is type(theirs.stem[1])
        same = (
            "hf_hub_id",
            "tag",
            "input_size",
            "crop_pct",
            "interpolation",
            "mean",
            "std",
            "num_classes",
            "first_conv",
            "classifier",
        )
        for key in same:
            assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key], key
        assert ours.pretrained_cfg["architecture"] == ours_name
        assert ours.default_cfg == ours.pretrained_cfg

    def test_arguments_of_create_model(self):
        model = self.create(num_classes=10, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
        assert model(torch.randn(2, 1, 17, 18)).shape == (2, 10)
        assert model.head_drop.p == 0.1
        assert model.blocks[2][0].drop_path.p == pytest.approx(0.2)
        assert type(self.create(act_layer="silu").stem[1]) is nn.SiLU
        with pytest.raises(TypeError, match="no_such_argument"):
            self.create(no_such_argument=1)

    @torch.no_grad()
    def test_checkpoint_path_takes_timms_files(self, tmp_path):
        convmixer = importlib.import_module("timm.models.convmixer")
        source = trained_like_(
            convmixer.ConvMixer(16, 3, 5, 4, num_classes=7, act_layer=nn.ReLU), SHAPE
        )
        torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth.tar")
        model = self.create(num_classes=7, checkpoint_path=str(tmp_path / "w.pth.tar")).eval()
        x = torch.randn(SHAPE)
        oracle = copy.deepcopy(source).double()(x.double())
        assert_numerics(model(x), source(x), oracle)

    def test_pretrained_goes_through_timms_loader(self):
        source = trained_like_(self.create(num_classes=1000), SHAPE)
        model = self.create(
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": source.state_dict()},
            num_classes=5,
            in_chans=1,
        )
        grey = source.stem[0].weight.sum(1, keepdim=True)
        torch.testing.assert_close(model.stem[0].weight, grey)
        assert torch.equal(model.blocks[0][1].weight, source.blocks[0][1].weight)
        assert model.head.weight.shape == (5, 16)

    @torch.no_grad()
    def test_features_only(self):
        net = self.create(features_only=True, out_indices=(0, -2))
        maps = net(torch.randn(2, 3, 16, 16))
        assert [m.shape for m in maps] == [(2, 16, 4, 4)] * 2
        assert net.feature_info.channels() == [16, 16]
        assert net.feature_info.reduction() == [4, 4]
        assert len(net.model.blocks) == 2
        assert len(self.create(features_only=True)(torch.randn(1, 3, 16, 16))) == 3

    def test_data_config(self):
        data = importlib.import_module("timm.data")
        config = data.resolve_model_data_config(self.create())
        assert config["input_size"] == (3, 224, 224)
        assert (config["crop_pct"], config["interpolation"]) == (0.96, "bicubic")
        transform = data.create_transform(**config)
        assert transform is not None

    def test_optimizer_ema_and_a_training_step(self):
        optim = importlib.import_module("timm.optim")
        utils = importlib.import_module("timm.utils")
        model = self.create(num_classes=7).train()
        optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.7)
        ema = utils.ModelEmaV3(model, decay=0.5)
        x, target = torch.randn(8, 3, 16, 16), torch.randint(7, (8,))
        losses = []
        for step in range(6):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=step)
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        ema.module.eval()
        with torch.no_grad():
            before = ema.module(x)
            for _ in range(3):
                ema.update(model)
            after = ema.module(x)
            model.eval()
        assert not torch.equal(before, after)
        assert (after - model(x)).abs().mean() < (before - model(x)).abs().mean()

    def test_copies_and_pickles(self, tmp_path):
        model = trained_like_(self.create(), SHAPE)
        torch.save(model, tmp_path / "m.pt")
        x = torch.randn(SHAPE)
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "m.pt", weights_only=False)):
            assert torch.equal(twin(x), model(x))


def test_timm_absent_is_one_line(monkeypatch):
    for name in [n for n in sys.modules if n == "timm" or n.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm") as caught:
        compat_timm.register()
    assert "\n" not in str(caught.value)
