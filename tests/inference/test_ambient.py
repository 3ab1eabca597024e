"""What is set for a process or a thread changes no result: no default of torch leaks in.

Every public call runs under every such setting, on a model and inputs that were made before, and
gives what it gives without. A walk over the source keeps factory calls from relying on a default.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import convmixer_fast as cf
from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import read_checkpoint
from convmixer_fast.inference import (
    HeatmapFolder,
    NativeSize,
    Preprocessing,
    class_activation_map,
    overlay,
)
from convmixer_fast.inference.evaluate import evaluate
from convmixer_fast.reference import DropPath, ReferenceConvMixer
from convmixer_fast.testing import error_report, trained_like_

PACKAGE = Path(cf.__file__).parent
CLASSES = 5

# Settings


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """With NaN in memory that is not written yet."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def several(*settings: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "set_default_device": lambda: default_device("meta"),
    "with torch.device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "all of them": lambda: several(
        default_device("meta"), default_dtype(torch.float16), torch.no_grad(), deterministic()
    ),
}

# Calls


class World:
    """A model and inputs, made without any setting."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = cf.ConvMixer(16, 2, 3, 4, num_classes=CLASSES, drop_path_rate=0.2)
        trained_like_(self.model, (8, 3, 32, 32))
        self.foreign = trained_like_(
            peers.locuslab(Arch(16, 2, 3, 4, num_classes=CLASSES)), (8, 3, 32, 32)
        )
        self.reference = ReferenceConvMixer(Arch(16, 2, 3, 4, num_classes=CLASSES))
        self.drop = DropPath(0.5)
        self.features = cf.create_model(
            "256/8", features_only=True, out_indices=2, depth=2, dim=16
        ).eval()
        self.x = torch.randn(2, 3, 24, 28)
        rng = np.random.default_rng(0)
        self.images = [rng.integers(0, 256, (90, 40, 3), np.uint8) for _ in range(3)]
        self.files = []
        for i, image in enumerate(self.images):
            self.files.append(folder / f"{i}.png")
            Image.fromarray(image).save(self.files[-1])
        self.checkpoint = folder / "w.safetensors"
        cf.save_checkpoint(self.model, self.checkpoint)
        self.predictor = self.predict()

    def predict(self, **options: Any) -> cf.Predictor:
        given = {"topk": None, "output_type": "logit", "device": "cpu", **options}
        return cf.Predictor(copy.deepcopy(self.model), **given)

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path


def heatmaps_of_files(w: World) -> Any:
    maps = HeatmapFolder(w.folder / "maps", target=1)
    [outcome] = w.predict(preprocessing=NativeSize(), batch_size=3).predict_files(
        w.files, heatmaps=maps
    )
    pictures = [Image.open(maps.places(str(file))[0]) for file in w.files]
    arrays = [np.load(maps.places(str(file))[1]) for file in w.files]
    return [*arrays, *map(np.asarray, pictures), *(row.values for row in outcome.rows)]


def training_step(w: World) -> Any:
    model = copy.deepcopy(w.model).train()
    model.zero_grad()
    torch.manual_seed(1)
    with torch.enable_grad():
        model(w.x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def saved_and_loaded(w: World) -> Any:
    path = w.path("again.safetensors")
    cf.save_checkpoint(w.model, path)
    model = copy.deepcopy(w.model)
    for value in model.parameters():
        value.detach().zero_()
    cf.load_checkpoint(model, path)
    return [*model.state_dict().values(), *read_checkpoint(w.checkpoint).state_dict.values()]


def made_like_trained(w: World) -> Any:
    torch.manual_seed(4)
    model = trained_like_(copy.deepcopy(w.model), (8, 3, 32, 32), seed=2)
    return list(model.state_dict().values())


def dropped(w: World) -> Any:
    torch.manual_seed(3)
    return w.drop(w.x)


#: Calls whose arguments say all: no setting changes a bit beyond rounding.
CALLS: dict[str, Callable[[World], Any]] = {
    "Predictor, made before": lambda w: w.predictor(w.images),
    "Predictor, one": lambda w: w.predict()(w.images[0]),
    "Predictor, several": lambda w: w.predict()(w.images),
    "Predictor, batch": lambda w: w.predict()(np.stack(w.images)),
    "Predictor, nothing": lambda w: w.predict()([]),
    "Predictor, dict": lambda w: w.predict(topk=2)({"image": w.images}),
    "Predictor, classes": lambda w: [row[1:] for row in w.predict(topk=2)(w.files)],
    "Predictor, embedding": lambda w: w.predict(output_type="embedding")(w.images),
    "Predictor, large": lambda w: w.predict(preprocessing="native", max_memory=60_000)(w.images),
    "Predictor, files": lambda w: [
        row.values for outcome in w.predict().predict_files(w.files) for row in outcome.rows
    ],
    "Predictor, heatmaps": heatmaps_of_files,
    "evaluate": lambda w: evaluate(
        w.predict(topk=CLASSES), w.files, [0, 1, 2], [str(i) for i in range(CLASSES)]
    ).confusion,
    "stream": lambda w: cf.stream(w.model, w.images[0], band_rows=2),
    "stream, several": lambda w: cf.stream(w.model, w.images),
    "stream, file": lambda w: cf.stream(w.model, w.files[0]),
    "stream, floats": lambda w: cf.stream(w.model, w.x, band_rows=2),
    "stream, embedding": lambda w: cf.stream(w.model, w.images[0], "embedding"),
    "stream, features": lambda w: cf.stream(w.model, w.images[0], "features", band_rows=2),
    "stream, features of an iterator": lambda w: cf.stream(w.model, iter(w.images), "features"),
    "stream, features in a file": lambda w: np.array(
        cf.stream(w.model, w.images[0], "features", out=w.path("map.npy"))
    ),
    "stream, heatmap": lambda w: cf.stream(w.model, w.images[0], "heatmap", cell=2, band_rows=2),
    "stream, strips": lambda w: cf.stream(w.model, w.images[0], strip_columns=4, band_rows=2),
    "stream, state": lambda w: cf.stream(
        w.model, w.images[0], band_rows=2, checkpoint=w.path("state"), checkpoint_rows=8
    ),
    "Preprocessing": lambda w: Preprocessing((3, 24, 24))(Image.fromarray(w.images[0])),
    "NativeSize": lambda w: NativeSize()(Image.fromarray(w.images[0])),
    "overlay": lambda w: np.asarray(
        overlay(np.arange(12, dtype=np.float32).reshape(3, 4), Image.fromarray(w.images[0]))
    ),
    "checkpoint": saved_and_loaded,
    "explain": lambda w: sorted(
        {".".join(row.module.split(".")[:2]) for row in cf.explain(w.model, w.x)}
    ),
    "error_report": lambda w: np.array(
        error_report(w.x, w.x + 1e-3, w.x.double()).torch_max_error
    ),
}  # fmt: skip
#: Calls of a model: under autocast they do what PyTorch does.
MODEL_CALLS: dict[str, Callable[[World], Any]] = {
    "class_activation_map": lambda w: class_activation_map(copy.deepcopy(w.model), w.x, 1)[:3],
    "the model": lambda w: copy.deepcopy(w.model)(w.x),
    "its parts": lambda w: w.model.forward_head(w.model.forward_features(w.x), pre_logits=True),
    "its maps": lambda w: w.model.forward_intermediates(w.x)[1],
    "features_only": lambda w: w.features(w.x),
    "optimize": lambda w: cf.optimize(w.foreign, inplace=False)(w.x),
    "restore": lambda w: cf.restore(cf.optimize(w.foreign, inplace=False))(w.x),
    "to_reference": lambda w: cf.to_reference(w.model)(w.x),
    "ReferenceConvMixer": lambda w: (
        w.reference.load_state_dict(w.model.state_dict()),
        w.reference.eval()(w.x),
    )[1],
    "DropPath": dropped,
    "trained_like_": made_like_trained,
    "training": training_step,
}


def flat(value: Any) -> list[Any]:
    """Its numbers, each a float64 array with its own dtype's name."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in flat(one)]
    if isinstance(value, Tensor):
        assert value.device.type == "cpu", f"a result is on {value.device}"
        return [(str(value.dtype), value.detach().double().numpy())]
    if isinstance(value, np.ndarray):
        numbers = value.astype(np.float64) if value.dtype.kind in "fiu" else value
        return [(str(value.dtype), numbers)]
    return [("", np.array(value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("ambient"))


@pytest.fixture(scope="module")
def plain(world: World) -> dict[str, list[Any]]:
    return {name: flat(call(world)) for name, call in {**CALLS, **MODEL_CALLS}.items()}


@pytest.mark.parametrize("name", [*CALLS, *MODEL_CALLS])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_changes_a_result(
    setting: str, name: str, world: World, plain: dict[str, list[Any]]
) -> None:
    if name == "training" and setting == "inference_mode":
        pytest.skip("inference mode has no gradients")
    autocasts = setting == "autocast" and name in MODEL_CALLS
    for module in (world.model, world.foreign, world.features):
        cf.refresh(module)
    with SETTINGS[setting]():
        found = flat({**CALLS, **MODEL_CALLS}[name](world))
    assert len(found) == len(plain[name])
    for (kind, got), (wanted_kind, wanted) in zip(found, plain[name], strict=True):
        assert autocasts or kind == wanted_kind
        assert got.shape == wanted.shape
        if wanted.dtype.kind == "f" and wanted.size:
            bound = (0.1 if autocasts else 1e-5) * np.abs(wanted).max() + 1e-6
            assert np.abs(got - wanted).max() <= bound
        else:
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize("setting", ["set_default_device", "float64", "no_grad", "deterministic"])
def test_a_predictor_made_under_a_setting_travels(setting: str, world: World) -> None:
    import pickle

    with SETTINGS[setting]():
        copied = pickle.loads(pickle.dumps(world.predict()))
        found = copied(world.images)
    assert found == pytest.approx(world.predictor(world.images), abs=1e-5)


def test_models_are_built_as_torchs_own_modules_are() -> None:
    with default_device("meta"), default_dtype(torch.float64):
        for model in (cf.create_model("256/8", depth=1), cf.ConvMixer(8, 1, 3, 4)):
            kinds = {(p.device.type, p.dtype) for p in model.parameters()}
            assert kinds == {("meta", torch.float64)}
        model = cf.ConvMixer(8, 1, 3, 4, device="cpu", dtype=torch.float32, drop_path_rate=0.1)
        kinds = {(p.device.type, p.dtype) for p in model.parameters()}
        assert kinds == {("cpu", torch.float32)}


def test_models_are_built_and_run_on_fake_tensors() -> None:
    with FakeTensorMode(), torch.no_grad():
        for model in (
            cf.create_model("256/8", depth=2, drop_path_rate=0.1),
            cf.ConvMixer(8, 2, 3, 4, num_classes=10),
            cf.optimize(peers.locuslab(Arch(8, 2, 3, 4, num_classes=10))),
        ):
            for training in (False, True):
                assert model.train(training)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_real_model_does_not_stream_into_fake_tensors(world: World) -> None:
    with (
        FakeTensorMode(),
        pytest.raises(TypeError, match="a dispatch or function mode sees its operators"),
    ):
        cf.stream(world.model, world.images[0])


# Source

FACTORIES = frozenset(
    {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
     "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
     "tensor", "tril_indices", "triu_indices", "zeros"}
)  # fmt: skip


def test_every_factory_call_names_its_device_and_dtype() -> None:
    found, calls = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) != "torch" or node.func.attr not in FACTORIES:
                continue
            calls += 1
            missing = {"device", "dtype"} - {word.arg for word in node.keywords}
            if missing:
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                found.append(f"{where} torch.{node.func.attr}: no {' and no '.join(missing)}")
    assert found == []
    assert calls > 20
