"""A saved model keeps its preprocessing and labels, and what is assumed is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer_fast import ConvMixer, Predictor, cli, create_model, load_checkpoint, save_checkpoint
from convmixer_fast.checkpoint import CheckpointError, read_checkpoint
from convmixer_fast.inference import NativeSize, Preprocessing, preprocessing_for
from convmixer_fast.inference.evaluate import evaluate, labelled_images
from convmixer_fast.testing import trained_like_

RECIPE = Preprocessing((1, 20, 24), crop_pct=0.8, interpolation="bilinear", mean=(0.2,), std=(0.4,))
LABELS = ["zebra", "ant", "cat"]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (6, 7)) * (0.3 + 0.7 * rng.random()) for _ in range(27)]
    return [
        Image.fromarray(pixels.astype(np.uint8)).resize((40 + i, 50), Image.Resampling.BILINEAR)
        for i, pixels in enumerate(small)
    ]


def network(in_chans: int = 1, classes: int = 3, **kwargs: Any) -> ConvMixer:
    """A network that tells the pictures apart, if they are prepared as `RECIPE` says."""
    torch.manual_seed(0)
    net = ConvMixer(
        16, 2, kernel_size=3, patch_size=4, in_chans=in_chans, num_classes=classes, **kwargs
    )
    trained_like_(net, (4, in_chans, 32, 32))
    if in_chans == 1:
        with torch.no_grad():
            logits = net(torch.stack([RECIPE(picture) for picture in pictures()]))
            net.head.bias.sub_(logits.mean(0)).div_(logits.std(0))
            net.head.weight.div_(logits.std(0)[:, None])
    return net


@pytest.fixture(autouse=True)
def no_surprising_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in the folders of their classes, whose natural order is not that of the labels."""
    for name in LABELS:
        (tmp_path / "images" / name).mkdir(parents=True)
    predictor = Predictor(network(), preprocessing=RECIPE, labels=LABELS)
    for i, picture in enumerate(pictures()):
        (label, *_) = predictor(picture).labels
        picture.save(tmp_path / "images" / (LABELS[0] if i % 9 == 0 else label) / f"{i}.png")
    return tmp_path / "images"


def in_python(folder: Path, predictor: Predictor) -> float:
    paths, targets, names = labelled_images(folder, 3, LABELS)
    return evaluate(predictor, paths, targets, names).metrics()["top1"]


def top1(capsys: Any, *arguments: object) -> tuple[float, str]:
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.removeprefix("--result\n"))["top1"], err


@pytest.mark.parametrize(
    "how", ["argument", "mapping", "pretrained_cfg", "predictor", "converted", "config.json"]
)
@pytest.mark.parametrize("form", ["timm", "locuslab", "mmpretrain", "tweet"])
def test_evaluate_finds_what_python_found(
    how: str, form: str, tmp_path: Path, folder: Path, capsys: Any
) -> None:
    model, path = network(), tmp_path / "w.safetensors"
    cfg = {
        "input_size": (1, 20, 24),
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": (0.2,),
        "std": (0.4,),
    }
    if how == "argument":
        save_checkpoint(model, path, form, preprocessing=RECIPE, labels=LABELS)
    elif how == "mapping":
        save_checkpoint(model, path, form, preprocessing=cfg, labels=LABELS)
    elif how == "pretrained_cfg":
        model.pretrained_cfg = {**cfg, "label_names": LABELS}
        save_checkpoint(model, path, form)
    elif how == "predictor":
        save_checkpoint(Predictor(model, preprocessing=RECIPE, labels=LABELS), path, form)
    elif how == "converted":
        save_checkpoint(model, tmp_path / "first.safetensors", preprocessing=RECIPE, labels=LABELS)
        assert (
            cli.main(["convert", str(tmp_path / "first.safetensors"), str(path), "--format", form])
            == 0
        )
    else:
        save_checkpoint(model, path, form)
        held = {"architecture": "convmixer_16_2", "num_classes": 3, "pretrained_cfg": cfg}
        (tmp_path / "config.json").write_text(json.dumps({**held, "label_names": LABELS}))
    capsys.readouterr()
    expected = in_python(folder, Predictor(network(), preprocessing=RECIPE, labels=LABELS))
    found, err = top1(capsys, folder, "--checkpoint", path)
    assert found == expected
    assert "assumed" not in err
    assert "1x20x24, crop 0.8, bilinear, mean 0.2, std 0.4" in err
    again = Predictor(path)
    assert again.preprocessing == RECIPE
    assert again.labels == LABELS
    assert in_python(folder, again) == expected
    loaded = network()
    load_checkpoint(loaded, path)
    assert preprocessing_for(loaded) == RECIPE


def test_the_recipe_matters_here(tmp_path: Path, folder: Path, capsys: Any) -> None:
    # Else the test above would pass without reading anything.
    warnings.simplefilter("default", UserWarning)
    save_checkpoint(network(), tmp_path / "w.safetensors")
    right = in_python(folder, Predictor(network(), preprocessing=RECIPE, labels=LABELS))
    found, err = top1(capsys, folder, "--checkpoint", tmp_path / "w.safetensors")
    assert 85 < right < 100
    assert found < right - 10
    assert (
        err.count("assumed: mean (0.449,), std (0.226,), input_size 1x224x224, crop_pct 0.96") == 1
    )


def test_flags_win_over_the_file(tmp_path: Path, folder: Path, capsys: Any) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(network(), path, preprocessing=RECIPE, labels=LABELS)
    _, err = top1(
        capsys, folder, "--checkpoint", path, "--img-size", 28, "--mean", 0.5, "--crop-pct", 1
    )
    assert "1x28x28, crop 1, bilinear, mean 0.5, std 0.4" in err
    (tmp_path / "map.txt").write_text("ant\ncat\nzebra\n")
    flagged, _ = top1(capsys, folder, "--checkpoint", path, "--class-map", tmp_path / "map.txt")
    with warnings.catch_warnings():
        paths, targets, names = labelled_images(folder, 3, ["ant", "cat", "zebra"])
    predictor = Predictor(network(), preprocessing=RECIPE)
    assert flagged == evaluate(predictor, paths, targets, names).metrics()["top1"]


def test_predict_and_stream_use_the_labels_and_the_mean(
    tmp_path: Path, folder: Path, capsys: Any
) -> None:
    path, image = tmp_path / "w.safetensors", next(folder.rglob("*.png"))
    save_checkpoint(network(), path, preprocessing=RECIPE, labels=LABELS)
    for command in ("predict", "stream"):
        assert cli.main([command, str(image), "--checkpoint", str(path)]) == 0
        out, err = capsys.readouterr()
        assert all(name in out for name in LABELS)
        assert "assumed" not in err
    warnings.simplefilter("default", UserWarning)
    save_checkpoint(network(), path)
    for command in ("predict", "stream"):
        assert cli.main([command, str(image), "--checkpoint", str(path)]) == 0
        assert capsys.readouterr().err.count("assumed: mean (0.449,), std (0.226,)") == 1


def test_what_is_assumed_is_told_in_python_and_published_shapes_are_known(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"assumed: mean .*, std .*, input_size 1x224x224, crop_pct"
    ):
        Predictor(network())
    with pytest.warns(UserWarning, match="assumed: std") as told:
        preprocessing_for(network(), mean=(0.5,), img_size=32)
    assert "mean (" not in str(told[0].message)
    assert "input_size" not in str(told[0].message)
    Predictor(network(), preprocessing=RECIPE)
    preprocessing_for(
        network(), mean=(0.5,), std=(0.5,), img_size=32, crop_pct=1.0, interpolation="nearest"
    )
    preprocessing_for(create_model("256/8"))
    preprocessing_for(ConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10))


def test_native_size_and_uint8_normalisation_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    native = NativeSize(1, (0.3,), (0.5,))
    save_checkpoint(network(), path, preprocessing=native)
    assert Predictor(path).preprocessing == native
    model = ConvMixer.from_checkpoint(path)
    given = {"img_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}
    assert preprocessing_for(model, **given) == Preprocessing(
        (1, 32, 32), 1.0, mean=(0.3,), std=(0.5,)
    )

    normalize = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = network(3, normalize=normalize).eval()
    save_checkpoint(model, path)
    again = ConvMixer.from_checkpoint(path)
    assert again.stem.normalize == normalize
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    assert (again.pretrained_cfg["mean"], again.pretrained_cfg["std"]) == normalize


def test_a_file_without_room_for_it_says_so(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "w.pth"
    for given in ({"preprocessing": RECIPE}, {"labels": LABELS}):
        with pytest.raises(
            CheckpointError, match=r"w\.pth has no place .*name a \.safetensors file"
        ):
            save_checkpoint(model, path, **given)
    assert not path.exists()
    model.pretrained_cfg = {"mean": (0.2,), "std": (0.4,)}
    with pytest.warns(UserWarning, match="has no place for preprocessing"):
        save_checkpoint(model, path)
    save_checkpoint(create_model("256/8"), path)  # the published recipe is known by the shape


def test_what_cannot_be_kept_or_read_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="2 labels for a model of 3 classes"):
        save_checkpoint(network(), path, labels=["a", "b"])
    with pytest.raises(CheckpointError, match="a function cannot be kept in a file"):
        save_checkpoint(network(), path, preprocessing=lambda image: image)
    save_checkpoint(network(), path)
    for text in ("{", '{"pretrained_cfg": {"mean": "grey"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
    for other in (
        {"architecture": "resnet18", "mean": [0.1]},
        {"num_classes": 1000, "mean": [0.1]},
        {"input_size": [3, 224, 224], "mean": [0.1]},
        {"hidden_size": 768},
        [1],
    ):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert read_checkpoint(path).pretrained_cfg == {}, other


@pytest.mark.parametrize("key", ["label_names", "id2label"])
def test_labels_of_config_json_are_read(key: str, tmp_path: Path) -> None:
    save_checkpoint(network(), tmp_path / "w.safetensors")
    names: Any = LABELS if key == "label_names" else dict(enumerate(LABELS))
    cfg = {"mean": [0.1], "std": [0.2], "input_size": [1, 8, 8]}
    (tmp_path / "config.json").write_text(json.dumps({**cfg, key: names}))
    assert Predictor(tmp_path / "w.safetensors").labels == LABELS


def test_another_classifier_does_not_inherit_labels(tmp_path: Path) -> None:
    save_checkpoint(network(), tmp_path / "w.safetensors", preprocessing=RECIPE, labels=LABELS)
    other = network(classes=5)
    load_checkpoint(other, tmp_path / "w.safetensors", strict=False)
    assert "label_names" not in other.pretrained_cfg
    assert preprocessing_for(other) == RECIPE
