"""The command line does the job on real files, and answers bad input in one line with code 2."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import pickle
import re
import subprocess
from pathlib import Path

import fresh_python
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convmixer_fast import ConvMixer, cli, save_checkpoint
from convmixer_fast.arch import ACTIVATIONS, VARIANTS
from convmixer_fast.checkpoint import FORMATS
from convmixer_fast.cli import common, info
from convmixer_fast.cli.predict import OUTPUT_TYPES as PREDICT_TYPES
from convmixer_fast.cli.predict import RESULT_FORMATS
from convmixer_fast.cli.stream import LAYOUTS as STREAM_LAYOUTS
from convmixer_fast.demo import plain_twin
from convmixer_fast.inference import (
    INTERPOLATIONS,
    NativeSize,
    Preprocessing,
    class_labels,
    files,
    read_labels,
    top_predictions,
)
from convmixer_fast.inference.batches import image_batches, in_one_piece, load_image
from convmixer_fast.inference.results import OUTPUT_TYPES
from convmixer_fast.inference.sources import LAYOUTS
from convmixer_fast.ops.registry import BACKENDS
from convmixer_fast.testing import trained_like_

CLASSES = 5


@pytest.fixture(scope="module")
def model() -> ConvMixer:
    net = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=CLASSES)
    return trained_like_(net, (4, 3, 32, 32))


@pytest.fixture
def checkpoint(tmp_path, model) -> Path:
    path = tmp_path / "weights.safetensors"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images in two folders, in natural order a1, a2, a10, b/x, b/y."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a10.png", "a2.jpg", "a1.png", "b/x.png", "b/y.jpeg"):
        size = tuple(rng.integers(20, 60, 2))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments: object) -> str:
    """The error of a run that must fail: code 2, the last line of stderr, and no traceback."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert err.rstrip().splitlines()[-1:] == errors, err
    assert errors[0].startswith("convmixer-fast: error: ")
    return errors[0]


def predict(capsys, images: Path, checkpoint: Path, *more: object) -> tuple[int, str, str]:
    return run(capsys, "predict", images, "--checkpoint", checkpoint, "--img-size", 32, *more)


# info

# Literal figures: these are published, and what this package computes must agree with them.
TABLE = {
    # paper name: params, grid, timm's GMACs, mmpretrain's MACs, true GMACs, (pw, dw, stem)
    "768/32": (
        "21,110,248",
        "32x32",
        "19.55 G",
        "19,623,051,264",
        "20.68 G",
        ("19.33 G", "1.23 G", "0.12 G"),
    ),
    "1024/20": (
        "24,383,464",
        "16x16",
        "5.55 G",
        "5,550,112,768",
        "5.95 G",
        ("5.37 G", "0.43 G", "0.15 G"),
    ),
    "1536/20": (
        "51,625,960",
        "32x32",
        "48.68 G",
        "48,713,170,944",
        "51.10 G",
        ("48.32 G", "2.55 G", "0.23 G"),
    ),
}
SHAPES = {
    "768/32": ("768 / 32", "7 / 7", "relu"),
    "1024/20": ("1024 / 20", "9 / 14", "gelu"),
    "1536/20": ("1536 / 20", "9 / 7", "gelu"),
    "256/8": ("256 / 8", "5 / 2", "gelu"),
}


def text_table(out: str) -> dict[str, dict[str, str]]:
    """Paper name -> {row: cell}, from the text that ``info`` prints."""
    cells = {}
    for line in out.split("\n\n")[0].splitlines():
        name, *values = re.split(r"\s{2,}", line.strip())
        cells[name] = values
    return {
        paper: {name: values[i] for name, values in cells.items()}
        for i, paper in enumerate(cells["name in the paper"])
    }


def test_info_prints_the_published_figures_to_the_last_digit(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    table = text_table(out)
    assert set(table) == {"768/32", "1024/20", "1536/20", "256/8"}
    for paper, (params, grid, timm, mmpretrain, true, parts) in TABLE.items():
        row = table[paper]
        assert row["parameters"] == params
        assert row["grid of patches"] == grid
        assert row["MACs as timm counts"] == timm
        assert row["MACs as mmpretrain counts"] == mmpretrain
        assert row["true MACs"] == true
        assert (row["pointwise"], row["depthwise"], row["stem"]) == parts
    for paper, (dims, kernel, act) in SHAPES.items():
        row = table[paper]
        assert (row["dim / depth"], row["kernel / patch"], row["activation"]) == (dims, kernel, act)
    assert table["256/8"]["parameters"] == "594,186"
    assert table["256/8"]["grid of patches"] == "16x16"


def test_info_json_has_the_figures_in_full(capsys):
    code, out, _ = run(
        capsys, "info", "768/32", "convmixer_1024_20_ks9_p14.in1k", "--format", "json"
    )
    first, second = json.loads(out)
    assert code == 0
    assert (first["model"], second["model"]) == ("convmixer_768_32", "convmixer_1024_20_ks9_p14")
    assert first["param_count"] == 21_110_248
    assert first["macs_mmpretrain"] == 19_623_051_264
    assert first["gmacs_timm"] == 19.55
    assert first["img_size"] == [224, 224]
    assert first["act"] == "relu"
    assert second["macs_depthwise"] == 20 * 16 * 16 * 1024 * 81
    assert first["macs"] == first["macs_pointwise"] + first["macs_depthwise"] + first["macs_stem"]


def test_info_at_another_size(capsys):
    _, out, _ = run(capsys, "info", "768/32", "--img-size", "448", "--format", "json")
    assert json.loads(out)[0]["grid"] == [64, 64]
    assert "smaller than its patch of 14x14" in refused(
        capsys, "info", "1024/20", "--img-size", "13"
    )


def test_rounded_parts_add_up_and_stay_within_a_unit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = [int(v) for v in rng.integers(0, 10_000, rng.integers(1, 6))]
        shown = info.rounded_parts(parts, 100)
        assert sum(shown) == round(sum(parts) / 100)
        assert all(abs(100 * s - p) < 100 for s, p in zip(shown, parts, strict=True))


# predict


def expected_rows(
    model: ConvMixer, images: Path, topk: int
) -> list[tuple[str, list[int], list[float]]]:
    """By the plain model and timm's order, one image at a time."""
    prepare = Preprocessing.from_cfg(VARIANTS["convmixer_768_32"].pretrained_cfg, img_size=32)
    plain = plain_twin(model)
    rows = []
    for name in ("a1.png", "a2.jpg", "a10.png", "b/x.png", "b/y.jpeg"):
        with Image.open(images / name) as image, torch.inference_mode():
            scores, indices = plain(prepare(image)[None]).softmax(1).topk(topk)
        rows.append((str(images / name), indices[0].tolist(), scores[0].tolist()))
    return rows


@pytest.mark.parametrize(
    "options", [(), ("-b", 2, "-j", 0), ("-b", 3, "--channels-last"), ("--backend", "reference")]
)
def test_predictions_equal_the_plain_models(capsys, tmp_path, model, checkpoint, images, options):
    results = tmp_path / "results.csv"
    code, out, err = predict(
        capsys, images, checkpoint, "--topk", 3, "--results-file", results, *options
    )
    assert code == 0
    with open(results, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"{name}_{i}" for name in ("index", "label", "prob") for i in range(3)]
    assert list(rows[0]) == ["filename", *names]
    expected = expected_rows(model, images, 3)
    assert len(rows) == len(expected) == 5
    for row, (path, indices, scores) in zip(rows, expected, strict=True):
        assert row["filename"] == path
        assert [int(row[f"index_{i}"]) for i in range(3)] == indices
        assert [row[f"label_{i}"] for i in range(3)] == [str(i) for i in indices]
        assert [float(row[f"prob_{i}"]) for i in range(3)] == pytest.approx(scores, abs=1e-5)
    # The table on the screen says the same, in the same order.
    shown = [line for line in out.splitlines() if not line.startswith(" ")]
    assert shown == [path for path, _, _ in expected]
    best = [line.split() for line in out.splitlines()[1::4]]
    assert [int(index) for _, index in best] == [indices[0] for _, indices, _ in expected]
    assert "5 images in" in err
    assert f"wrote {results}" in err


def test_one_class_a_row_has_timms_plain_columns(capsys, tmp_path, model, checkpoint, images):
    results, labels = tmp_path / "r.csv", tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat, tame\ndog\neel\n\n")
    code, out, _ = predict(
        capsys, images, checkpoint, "--topk", 1, "--output-type", "logit", "--label-file", labels,
        "--results-file", results, "--no-console-results",
    )  # fmt: skip
    assert (code, out) == (0, "")
    with open(results, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "index", "label", "logit"]
    names = ["ant", "bee", "cat, tame", "dog", "eel"]
    for row, (_, indices, _) in zip(rows, expected_rows(model, images, 1), strict=True):
        assert int(row["index"]) == indices[0]
        assert row["label"] == names[indices[0]]


def test_more_classes_asked_for_than_there_are(capsys, checkpoint, images):
    code, out, _ = predict(capsys, images / "a1.png", checkpoint, "--topk", 50)
    assert code == 0
    assert len(out.splitlines()) == 1 + CLASSES


def test_data_dir_and_amp(capsys, checkpoint, images):
    code, out, err = run(
        capsys,
        "predict",
        "--data-dir",
        images,
        "--checkpoint",
        checkpoint,
        "--img-size",
        32,
        "--amp",
    )
    assert code == 0
    assert out.count("%") == 5 * CLASSES
    assert "5 images in" in err


def test_one_channel_model_reads_greyscale(capsys, tmp_path, images):
    net = trained_like_(ConvMixer(8, 1, 3, 4, in_chans=1, num_classes=3), (4, 1, 32, 32))
    save_checkpoint(net, tmp_path / "grey.safetensors")
    code, out, err = predict(
        capsys, images, tmp_path / "grey.safetensors", "--mean", 0.4, "--std", 0.2
    )
    assert code == 0
    assert out.count("%") == 15
    assert "1x32x32" in err
    error = refused(
        capsys, "predict", images, "--checkpoint", tmp_path / "grey.safetensors",
        "--input-size", 3, 32, 32,
    )  # fmt: skip
    assert "3 channels, the model takes 1" in error


def test_bad_images_are_skipped_by_name_and_counted(capsys, tmp_path, checkpoint, images):
    (images / "text.jpg").write_text("not a picture")
    (images / "b" / "cut.png").write_bytes((images / "b" / "x.png").read_bytes()[:200])
    results = tmp_path / "r.csv"
    code, out, err = predict(capsys, images, checkpoint, "--results-file", results, "-b", 2)
    assert code == 0
    assert "skipped" in err
    assert f"{images / 'text.jpg'}: not an image" in err
    assert f"{images / 'b' / 'cut.png'}: damaged image" in err
    assert "5 images, 2 skipped" in err
    assert len(results.read_text().splitlines()) == 1 + 5
    assert "text.jpg" not in out
    assert "text.jpg" not in results.read_text()


def test_on_error_stop_keeps_what_was_done_for_a_later_run(capsys, tmp_path, checkpoint, images):
    (images / "zz.jpg").write_text("not a picture")
    results = tmp_path / "out" / "r.csv"
    results.parent.mkdir()
    arguments = ("predict", images, "--checkpoint", checkpoint, "--img-size", 32, "-b", 2,
                 "--on-error", "stop", "--results-file", results)  # fmt: skip
    assert "zz.jpg: not an image" in refused(capsys, *arguments)
    assert [p.name for p in results.parent.iterdir()] == ["r.csv.parts"]
    assert "holds an unfinished run: --resume" in refused(capsys, *arguments)
    (images / "zz.jpg").unlink()
    code, _, err = run(capsys, *arguments, "--resume")
    assert code == 0
    assert "1 image in" in err or "were there already" in err
    assert len(results.read_text().splitlines()) == 1 + 5
    assert list(results.parent.iterdir()) == [results]


def test_an_old_result_stays_until_a_new_one_is_whole(capsys, tmp_path, checkpoint, images):
    results = tmp_path / "r.csv"
    results.write_text("earlier results\n")
    arguments = ("predict", images, "--checkpoint", checkpoint, "--img-size", 32, "--on-error",
                 "stop", "--results-file", results)  # fmt: skip
    assert "r.csv exists: --resume" in refused(capsys, *arguments)
    (images / "a0.jpg").write_text("not a picture")
    refused(capsys, *arguments, "--overwrite")
    assert results.read_text() == "earlier results\n"
    (images / "a0.jpg").unlink()
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert len(results.read_text().splitlines()) == 1 + 5


def test_no_readable_image_is_an_error_and_leaves_no_result(capsys, tmp_path, checkpoint):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "text.jpg").write_text("not a picture")
    results = folder / "r.csv"
    error = refused(
        capsys, "predict", folder, "--checkpoint", checkpoint, "--img-size", 32,
        "--results-file", results,
    )  # fmt: skip
    assert "no image could be read, of 1" in error
    assert str(folder / "r.errors.csv") in error
    assert not results.exists()
    assert sorted(p.name for p in folder.iterdir()) == ["r.errors.csv", "text.jpg"]


def test_results_go_through_links_and_into_devices(capsys, tmp_path, checkpoint, images):
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    link.symlink_to(real)
    assert predict(capsys, images, checkpoint, "--results-file", link, "--overwrite")[0] == 0
    assert link.is_symlink()
    assert real.read_text().startswith("filename,")
    assert predict(capsys, images, checkpoint, "--results-file", os.devnull)[0] == 0
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_full_disk_is_one_line(capsys, checkpoint, images):
    error = refused(
        capsys, "predict", images, "--checkpoint", checkpoint, "--img-size", 32,
        "--results-file", "/dev/full",
    )  # fmt: skip
    assert "No space left on device" in error


def test_odd_file_names_stay_on_one_line_and_survive_the_csv(capsys, tmp_path, checkpoint, images):
    odd = images / 'new\nline "quoted", caf\u00e9 \x1b[31m.png'
    (images / "a1.png").rename(odd)
    results = tmp_path / "r.csv"
    code, out, _ = predict(capsys, odd, checkpoint, "--results-file", results)
    assert code == 0
    assert "\x1b" not in out
    assert len(out.splitlines()) == 1 + CLASSES
    with open(results, newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["filename"] == str(odd)


def results_of(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return [Path(row["filename"]).name for row in csv.DictReader(file)]


def test_patterns_and_lists_name_images(capsys, tmp_path, checkpoint, images, monkeypatch):
    monkeypatch.chdir(images)
    (images / "notes.txt").write_text("x")
    listed = tmp_path / "list.csv"
    listed.write_text("id,picture\n1,b/y.jpeg\n2,a1.png\n3,b/y.jpeg\n4,gone.png\n")
    lines = tmp_path / "list.txt"
    lines.write_text("a2.jpg\n\nb/x.png\n")
    column = ("--image-column", "picture")
    for arguments, names in [
        (("a*",), ["a1.png", "a2.jpg", "a10.png"]),
        (("**/*.jp*g",), ["a2.jpg", "y.jpeg"]),
        (("*",), ["a1.png", "a2.jpg", "a10.png", "x.png", "y.jpeg"]),
        (("b/?.png", "a1.png"), ["x.png", "a1.png"]),
        (("--image-list", listed, *column), ["y.jpeg", "a1.png"]),
        (("--image-list", lines, "a2.jpg", "a1.png"), ["a2.jpg", "a1.png", "x.png"]),
    ]:
        results = tmp_path / "r.csv"
        code, _, err = run(
            capsys, "predict", *arguments, "--checkpoint", checkpoint, "--img-size", 32,
            "--results-file", results, "--overwrite",
        )  # fmt: skip
        assert code == 0, err
        assert results_of(results) == names
    monkeypatch.chdir(tmp_path)
    arguments = ("predict", "--image-list", listed, "--checkpoint", checkpoint, "--img-size", 32)
    assert "which column names the images? It has id, picture" in refused(capsys, *arguments)
    assert "no column 'x'" in refused(capsys, *arguments, "--image-column", "x")
    rooted = ("--data-dir", images, "--results-file", results, "--overwrite")
    assert run(capsys, *arguments, *column, *rooted)[0] == 0
    assert results_of(results) == ["y.jpeg", "a1.png"]
    assert (tmp_path / "r.errors.csv").read_text().splitlines() == [
        "filename,error",
        f"{images / 'gone.png'},No such file or directory",
    ]


def test_parquet_lists_and_results(capsys, tmp_path, checkpoint, images):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    import pyarrow.parquet

    names = [str(images / name) for name in ("b/x.png", "a2.jpg")]
    listed = tmp_path / "list.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "path": names}), listed)
    common = ("predict", "--image-list", listed, "--checkpoint", checkpoint, "--img-size", 32,
              "--results-dir", tmp_path / "out", "--results-format", "parquet")  # fmt: skip
    assert "No such file" in refused(capsys, *common)
    (tmp_path / "out").mkdir()
    assert run(capsys, *common)[0] == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "predictions.parquet")
    assert table["filename"].to_pylist() == names
    assert str(table.schema.field("prob_0").type) == "float"
    listed.write_text("not parquet")
    assert "list.parquet: not a Parquet file" in refused(capsys, *common)


def test_embeddings_and_native_sizes(capsys, tmp_path, model, checkpoint, images):
    results = tmp_path / "r.jsonl"
    code, out, err = run(
        capsys, "predict", images, "--checkpoint", checkpoint, "--native-size", "--output-type",
        "embedding", "--results-file", results,
    )  # fmt: skip
    assert (code, out) == (0, "")
    assert "images as large as they are" in err
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    prepare = NativeSize(mean=VARIANTS["convmixer_768_32"].pretrained_cfg["mean"])
    assert len(rows) == 5
    for row in rows:
        with Image.open(row["filename"]) as image, torch.inference_mode():
            features = model.forward_features(prepare(image)[None]).mean((2, 3))[0]
        assert row["embedding"] == pytest.approx(features.tolist(), abs=1e-5)


def test_the_last_line_tells_images_failures_rate_and_waiting(capsys, tmp_path, checkpoint, images):
    (images / "text.jpg").write_text("not a picture")
    results = tmp_path / "r.csv"
    _, _, err = predict(capsys, images, checkpoint, "--results-file", results)
    summary, written = err.splitlines()[-2:]
    assert re.search(
        r"5 images, 1 skipped in [\d.]+ s \([\d.]+ img/s, \d+% of the time waiting for images, "
        r"\w+ kernels\)",
        summary,
    ), summary
    assert written.endswith(f"wrote {results} (5 images); {tmp_path / 'r.errors.csv'} names what "
                            "could not be read")  # fmt: skip
    before = results.read_bytes()
    code, _, err = predict(capsys, images, checkpoint, "--results-file", results, "--resume")
    assert code == 0
    assert "0 images in" in err
    assert "6 were there already" in err
    assert results.read_bytes() == before


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_bad_input_is_refused_in_one_line(capsys, tmp_path, monkeypatch, checkpoint, images):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:300])
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "few.txt").write_text("ant\nbee\n")
    unknown = tmp_path / "unknown.pth"
    torch.save(load_file(checkpoint), unknown)
    headless = tmp_path / "headless.safetensors"
    save_checkpoint(ConvMixer(8, 1, 3, 4, num_classes=0, act_layer="relu"), headless)
    good = ("--checkpoint", checkpoint, "--img-size", 32)
    for arguments, says in [
        ((images,), "random weights mean nothing: pass --checkpoint FILE or --pretrained"),
        ((*good,), "no images"),
        ((images, "--checkpoint", tmp_path / "none.pth"), "none.pth"),
        ((images, "--checkpoint", tmp_path / "cut.safetensors"), "cut.safetensors"),
        ((images, "--checkpoint", tmp_path / "bomb.pth"), "bomb.pth"),
        ((images, "--checkpoint", images / "a1.png"), "a1.png"),
        ((images, "--checkpoint", unknown), "pass --act gelu"),
        ((images, "--checkpoint", headless), "has no classifier"),
        ((images, "--model", "resnet50", "--pretrained"), "unknown model 'resnet50'"),
        ((images, "--model", "768/32", *good), "not convmixer_768_32: leave --model out"),
        ((images, *good, "--num-classes", 7), "the weights are for 5 classes"),
        ((tmp_path / "empty", *good), "no images in"),
        ((tmp_path / "nowhere", *good), "nowhere: no such file or folder"),
        ((images, "--checkpoint", checkpoint, "--img-size", 3), "smaller than one patch of 4x4"),
        ((images, "--checkpoint", checkpoint, "--input-size", 1, 32, 32), "the model takes 3"),
        ((images, *good, "--results-file", tmp_path / "no" / "r.csv"), "r.csv: No such file"),
        ((images, *good, "--results-file", tmp_path / "empty"), "empty: Is a directory"),
        ((images, *good, "--label-file", tmp_path / "few.txt"), "2 names for a model of 5 classes"),
        ((images, *good, "--label-file", tmp_path / "none.txt"), "none.txt: No such file"),
        ((images, *good, "--label-file", images / "a1.png"), "a1.png: a label file is"),
        ((images, *good, "--topk", 0), "--topk must be at least 1"),
        ((images / "*.bmp", *good), "no image matches"),
        ((images, *good, "--resume"), "--resume needs the --results-file"),
        ((images, *good, "--output-type", "embedding"), "embeddings are not for the screen"),
        ((images, *good, "--image-list", tmp_path / "few.txt.csv"), "No such file"),
        ((images, *good, "-b", 0), "--batch-size must be at least 1"),
        ((images, *good, "-j", -1), "--workers must not be negative"),
        ((images, *good, "--crop-pct", 0), "crop_pct"),
        ((images, *good, "--mean", 1, 2), "mean has 2 values for 3 channels"),
        ((images, *good, "--device", "abacus"), "--device abacus: torch knows no such device"),
        ((images, *good, "--device", "meta"), "--device meta: that device computes nothing"),
        ((images, *good, "--backend", "triton", "--device", "cpu"), "triton"),
    ]:
        assert says in refused(capsys, "predict", *arguments), arguments
    assert not (tmp_path / "bomb-went-off").exists()
    assert not (tmp_path / "r.csv").exists()


def test_published_weights_that_cannot_be_had_are_one_line_with_the_mend(capsys, images):
    error = refused(capsys, "predict", images, "--model", "256/8", "--pretrained")
    assert "convmixer_256_8_cifar10" in error
    assert error.endswith("--checkpoint FILE")


def test_retries_of_the_hub_are_not_told(capsys, monkeypatch, images):
    logging = pytest.importorskip("huggingface_hub.utils").logging
    before = logging.get_verbosity()

    def offline(model, variant):
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise RuntimeError("cannot fetch")

    monkeypatch.setattr("convmixer_fast.modules.model._load_published", offline)
    logging.set_verbosity_warning()
    try:
        error = refused(capsys, "predict", images, "--model", "256/8", "--pretrained")
        assert logging.get_verbosity() >= logging.ERROR
    finally:
        logging.set_verbosity(before)
    assert error == "convmixer-fast: error: cannot fetch; on the command line: --checkpoint FILE"


def test_published_weights_come_with_their_own_preprocessing(capsys, monkeypatch, images):
    fetched = []
    monkeypatch.setattr(
        "convmixer_fast.modules.model._load_published",
        lambda model, variant: fetched.append(variant.name),
    )
    code, out, err = run(
        capsys, "predict", images / "a1.png", "--model", "256/8", "--pretrained", "--topk", 2
    )
    assert code == 0
    assert fetched == ["convmixer_256_8_cifar10"]
    assert "images as 3x32x32, crop 1," in err
    assert out.count("%") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys, checkpoint, images):
    error = refused(capsys, "predict", images, "--checkpoint", checkpoint, "--device", "cuda")
    assert "no CUDA device" in error


def test_weights_that_are_not_finite_are_named(capsys, tmp_path, model, images):
    broken = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=CLASSES)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.head.bias[3] = float("nan")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        save_checkpoint(broken, tmp_path / "nan.safetensors")
    error = refused(
        capsys, "predict", images, "--checkpoint", tmp_path / "nan.safetensors", "--img-size", 32
    )
    assert "a1.png is not finite" in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frob"],
        ["info", "--img-size", "0"],
        ["predict", "--topk", "x"],
        ["predict", "x", "--checkpoint", "a", "--pretrained"],
        ["convert", "a", "b", "--format", "onnx"],
    ],
)
def test_wrong_usage_leaves_with_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# The frame


def test_lists_of_choices_are_those_of_the_package():
    assert tuple(ACTIVATIONS) == common.ACTIVATIONS
    assert tuple(INTERPOLATIONS) == common.INTERPOLATIONS
    assert ("auto", *BACKENDS) == common.BACKENDS
    assert tuple(FORMATS) == common.FORMATS
    assert tuple(files.FORMATS) == RESULT_FORMATS
    assert OUTPUT_TYPES == PREDICT_TYPES
    assert STREAM_LAYOUTS == LAYOUTS
    assert common.DEFAULT_MODEL in VARIANTS


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_a_command_takes_every_flag_of_its_parser(command):
    """A flag that is no field would have no effect, a field without a flag no value."""
    sub = argparse.ArgumentParser()
    command.add_arguments(sub)
    flags = {action.dest for action in sub._actions} - {"help"}
    assert {field.name for field in dataclasses.fields(command.arguments)} == flags
    assert len(flags) >= 2


def test_interruption_is_130_and_quiet(capsys, monkeypatch):
    def interrupted(variant, img_size):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    assert run(capsys, "info") == (130, "", "")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="resnet50"):
        cli.main(["info", "resnet50"])


def test_a_bug_is_not_hidden(monkeypatch):
    def buggy(variant, img_size):
        raise KeyError("a bug")

    monkeypatch.setattr(info, "describe", buggy)
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_from_a_shell_an_error_is_one_line_and_code_2():
    done = fresh_python.run(
        "-m", "convmixer_fast", "predict", "nowhere", "--checkpoint", "none.pth"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "convmixer-fast: error: nowhere: no such file or folder\n"


def test_from_a_shell_version_and_a_reader_that_leaves():
    done = fresh_python.run("-m", "convmixer_fast", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("convmixer-fast ")
    pipe = subprocess.PIPE
    left = fresh_python.start("-m", "convmixer_fast", "info", stdout=pipe, stderr=pipe)
    left.stdout.close()
    assert left.communicate(timeout=120)[1] == ""


# convert


def test_convert_goes_through_every_format_and_back_bit_for_bit(
    capsys, tmp_path, model, checkpoint
):
    source = checkpoint
    for i, form in enumerate(("locuslab", "mmpretrain", "tweet", "timm")):
        target = tmp_path / f"{i}.{'pth' if i % 2 else 'safetensors'}"
        if i == 3:
            target = tmp_path / "back.safetensors"
        # A .pth file cannot hold the activation.
        act = ("--act", "gelu") if source.suffix == ".pth" else ()
        code, out, _err = run(capsys, "convert", source, target, "--format", form, *act)
        assert code == 0
        assert str(target) in out
        assert f"{form} keys" in out
        assert "ConvMixer-16/2" in out
        source = target
    before, after = load_file(checkpoint), load_file(source)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert ConvMixer.from_checkpoint(source).arch == model.arch


def test_convert_says_when_the_activation_is_lost_and_refuses_a_wrong_one(
    capsys, tmp_path, checkpoint
):
    plain = tmp_path / "plain.pth"
    assert run(capsys, "convert", checkpoint, plain, "--format", "timm")[0] == 0
    code, _, err = run(capsys, "convert", plain, tmp_path / "x.safetensors", "--format", "timm")
    assert code == 0
    assert "activation is not recorded" in err
    arguments = ("convert", checkpoint, tmp_path / "y.pth", "--format", "timm", "--act", "relu")
    assert "trained with gelu" in refused(capsys, *arguments)
    assert "nowhere.pth" in refused(
        capsys, "convert", "nowhere.pth", tmp_path / "z", "--format", "timm"
    )
    error = refused(capsys, "convert", checkpoint, tmp_path / "no" / "z.pth", "--format", "timm")
    assert "z.pth" in error
    assert not (tmp_path / "y.pth").exists()


# The pieces


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", "ant\n bee \ncat\n\n", ["ant", "bee", "cat"]),
        ("a.csv", "\ufeffant\r\nbee\r\ncat", ["ant", "bee", "cat"]),
        ("a.json", '["ant", "bee", "cat"]', ["ant", "bee", "cat"]),
        ("a.json", '{"1": "bee", "0": "ant", "2": "cat"}', ["ant", "bee", "cat"]),
        ("a.json", '{"bee": 1, "cat": 2, "ant": 0}', ["ant", "bee", "cat"]),
        (
            "a",
            '{"0": ["n01", "ant"], "1": ["n02", "bee"], "2": ["n03", "cat"]}',
            ["ant", "bee", "cat"],
        ),
    ],
)
def test_label_files_of_every_kind(tmp_path, name, content, names):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labels(tmp_path / name, 3) == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('["ant", "bee"]', "2 names for a model of 3"),
        ('{"0": "ant", "2": "cat", "3": "dog"}', "class index 1 has no name"),
        ('{"ant": "bee"}', "'ant' is not a class index"),
        ('{"ant": 0, "bee": 0, "cat": 1}', "class index 0 is named twice"),
        ('["ant", ', "not valid JSON"),
        ("3", "a list of names or a mapping"),
    ],
)
def test_label_files_that_cannot_be_right(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        read_labels(tmp_path / "a.json", 3)


def test_imagenets_names_come_from_an_installed_library():
    names = class_labels(1000)
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert names[281].startswith("tabby")
    assert class_labels(3) == ["0", "1", "2"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_keep_order_and_report_every_file_once(images, workers):
    paths = [
        images / n
        for n in ("a1.png", "none.png", "a2.jpg", "a10.png", "gone.jpg", "b/x.png", "b/y.jpeg")
    ]
    prepare = Preprocessing((3, 16, 16))
    batches = list(image_batches(paths, prepare, batch_size=2, workers=workers))
    assert [len(b.paths) + len(b.failures) for b in batches] == [2, 2, 2, 1]
    assert [p for b in batches for p in b.paths] == [p for p in paths if p.exists()]
    assert [str(e).split(":")[0] for b in batches for e in b.failures] == [
        str(p) for p in paths if not p.exists()
    ]
    for batch in batches:
        for path, tensor in zip(batch.paths, batch.images, strict=True):
            with Image.open(path) as image:
                assert torch.equal(tensor, prepare(image.convert("RGB")))


def test_batches_lie_in_one_piece_and_are_not_copied_again(images):
    paths = [images / name for name in ("a1.png", "a2.jpg", "missing.png", "a10.png", "b/x.png")]
    prepare = Preprocessing((3, 32, 32))
    expected = {p: load_image(p, prepare) for p in paths if p.exists()}
    for workers in (1, 2, 3):
        first, second = image_batches(paths, prepare, 3, workers)
        for batch in (first, second):
            for path, got in zip(batch.paths, batch.images, strict=True):
                assert torch.equal(got, expected[path])
        whole = in_one_piece(second.images)
        assert torch.equal(whole, torch.stack([expected[p] for p in second.paths]))
        assert whole.data_ptr() == second.images[0].data_ptr()
    # Not one after the other: backwards, with a gap, of other storages, with other strides.
    a = torch.randn(4, 3, 5, 5)
    for some in (
        [a[1], a[0]],
        [a[0], a[2]],
        [a[0], a[1].clone()],
        [a[0].transpose(1, 2), a[1].transpose(1, 2)],
        [a[0], a[0]],
    ):
        assert torch.equal(in_one_piece(some), torch.stack(some))


def test_a_batchs_memory_is_taken_again_only_when_the_next_is_asked_for(images):
    paths = sorted(images.rglob("*.*g")) * 8
    prepare = Preprocessing((3, 32, 32))
    expected = {p: load_image(p, prepare) for p in paths}
    for reuse in (False, True):
        places, kept = set(), []
        for batch in image_batches(paths, prepare, 5, 2, reuse=reuse):
            for path, got in zip(batch.paths, batch.images, strict=True):
                assert torch.equal(got, expected[path])
            places.add(batch.images[0].data_ptr())
            kept.append(batch)
        if reuse:
            assert len(places) <= 4
            continue
        for batch in kept:
            for path, got in zip(batch.paths, batch.images, strict=True):
                assert torch.equal(got, expected[path])


def test_batches_of_several_shapes_keep_every_image(images):
    paths = sorted(images.rglob("*.*g"))
    prepare = NativeSize()
    [batch] = image_batches(paths, prepare, 8, 1)
    assert len({image.shape for image in batch.images}) > 1
    for path, got in zip(paths, batch.images, strict=True):
        assert torch.equal(got, load_image(path, prepare))


def test_batches_take_what_a_subclass_returns(images):
    class Flipped(Preprocessing):
        def __call__(self, image: Image.Image) -> torch.Tensor:
            return super().__call__(image).flip(-1)

    paths = sorted(images.rglob("*.*g"))
    [batch] = image_batches(paths, Flipped((3, 16, 16)), 8, 2)
    for path, got in zip(paths, batch.images, strict=True):
        assert torch.equal(got, load_image(path, Preprocessing((3, 16, 16))).flip(-1))
    assert in_one_piece(batch.images).data_ptr() == batch.images[0].data_ptr()


def test_batches_take_images_that_numpy_cannot_see(images):
    class Half(Preprocessing):
        def __call__(self, image: Image.Image) -> torch.Tensor:
            return super().__call__(image).bfloat16()

    paths = sorted(images.rglob("*.*g"))
    [batch] = image_batches(paths, Half((3, 16, 16)), 8, 1)
    assert not batch.failures
    for path, got in zip(paths, batch.images, strict=True):
        assert torch.equal(got, load_image(path, Preprocessing((3, 16, 16))).bfloat16())


def test_batches_refuse_what_makes_no_sense(images):
    with pytest.raises(ValueError, match="batch_size"):
        next(image_batches([images / "a1.png"], Preprocessing(), 0))
    with pytest.raises(ValueError, match="workers"):
        next(image_batches([images / "a1.png"], Preprocessing(), 1, workers=-1))


def test_top_predictions_are_softmax_in_float32_whatever_the_dtype():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    rows = top_predictions(list("abcd"), logits.bfloat16(), [f"c{i}" for i in range(7)], 2)
    values, indices = logits.bfloat16().float().softmax(1).topk(2)
    for row, value, index in zip(rows, values, indices, strict=True):
        assert row.indices == tuple(index.tolist())
        assert row.scores == tuple(value.tolist())
        assert row.labels == tuple(f"c{i}" for i in index.tolist())
