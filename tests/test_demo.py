"""The demonstration shows what it says: shipped weights, honest split, both paths, one verdict."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import convmixer_fast
from convmixer_fast import ConvMixer, cli, demo
from convmixer_fast.testing import trained_like_


@pytest.fixture(scope="module")
def digits_report():
    return demo.evaluate_digits()


@pytest.fixture(scope="module")
def photo_report():
    return demo.compare_on_photographs(rounds=2, name="256/8")


@pytest.fixture
def report(digits_report, photo_report):
    return {
        "cpu": "a CPU",
        "threads": 2,
        "torch": "2.9",
        "digits": dict(digits_report),
        "photographs": dict(photo_report),
    }


def shipped() -> Path:
    return Path(str(resources.files("convmixer_fast") / "data" / demo.DIGITS_FILE))


def test_shipped_weights_are_small_and_say_where_they_come_from(digits_report):
    assert shipped().stat().st_size < 500_000
    with safe_open(shipped(), "pt") as file:
        notes = file.metadata()
    assert notes["split_seed"] == str(demo.SPLIT_SEED)
    accuracy = float(notes["held_out_accuracy"])
    assert accuracy == pytest.approx(
        digits_report["right_fused"] / digits_report["images"], abs=1e-4
    )
    assert demo.digits_model().arch == demo.DIGITS_ARCH


def test_shipped_weights_know_how_scans_stored_as_images_are_prepared(digits_report):
    from sklearn.datasets import load_digits

    order = np.random.RandomState(demo.SPLIT_SEED).permutation(1797)[: demo.HELD_OUT]
    data = load_digits()
    scans = np.rint(data.images[order] * 255 / 16).astype(np.uint8)
    predictor = convmixer_fast.Predictor(shipped(), device="cpu")
    assert predictor.preprocessing == demo.PREPROCESSING
    found = [row.indices[0] for row in predictor(list(scans))]
    right = int((np.array(found) == data.target[order]).sum())
    assert abs(right - digits_report["right_fused"]) <= 2


def test_the_example_writes_to_the_current_folder(monkeypatch, tmp_path):
    import runpy

    path = Path(__file__).parents[1] / "examples" / "train_digits.py"
    before = shipped().read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), "--epochs", "1"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert shipped().read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [demo.DIGITS_FILE]
    with safe_open(tmp_path / demo.DIGITS_FILE, "pt") as file:
        assert file.metadata()["epochs"] == "1"


def test_the_split_is_whole_disjoint_and_always_the_same():
    from sklearn.datasets import load_digits

    train, held_out = demo.digits_split()
    again, _ = demo.digits_split()
    assert torch.equal(train.images, again.images)
    assert len(held_out.targets) == demo.HELD_OUT
    assert train.images.shape[1:] == (1, 8, 8)
    both = torch.cat([train.images, held_out.images]).flatten(1)
    data = load_digits()
    assert len(both) == len(data.target)
    everything = torch.tensor((data.data - demo._MEAN) / demo._STD, dtype=torch.float32)
    order = lambda t: sorted(map(tuple, t.tolist()))  # noqa: E731
    assert order(both) == order(everything)
    assert set(held_out.targets.tolist()) == set(range(10))
    assert abs(both.mean().item()) < 0.01
    assert abs(both.std().item() - 1) < 0.01


def test_held_out_accuracy_is_high_and_both_paths_agree(digits_report):
    assert digits_report["images"] == demo.HELD_OUT
    assert digits_report["top1_fused"] >= 98.5
    assert digits_report["top1_plain"] >= 98.5
    assert digits_report["same_predictions"] == demo.HELD_OUT
    assert digits_report["ok"]
    assert digits_report["relative_difference"] < 1e-4


def test_photographs_are_compared_and_timed(photo_report):
    assert photo_report["images"] == 2
    assert photo_report["ok"]
    assert photo_report["max_error"] > 0
    assert (
        len(photo_report["all_seconds"]["fused"]) == len(photo_report["all_seconds"]["plain"]) == 2
    )
    assert photo_report["seconds_fused"] > 0
    assert photo_report["speedup"] == photo_report["seconds_plain"] / photo_report["seconds_fused"]


def test_statistics_are_those_of_the_images():
    net = ConvMixer(8, 2, 3, 4, num_classes=3)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 + 5
    trained_like_(net, (2, 3, 16, 16))
    momenta = [m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    demo.measure_statistics_(net, images)
    assert not net.training
    assert momenta == [m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    a = net.stem[1](net.stem[0](images))
    assert torch.allclose(net.stem[2].running_mean, a.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.allclose(net.stem[2].running_var, a.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_text_shows_the_figures(report):
    text = demo.render(report)
    digits = report["digits"]
    assert text.count(f"{digits['right_fused']} of 450 right ({digits['top1_fused']:.2f} %)") == 2
    assert f"{report['photographs']['speedup']:.2f}" in text
    assert "a CPU, 2 threads" in text
    assert "FAILED" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_disagreement_fails_and_a_speed_of_wrong_results_is_not_shown(report):
    assert demo.agrees(report)
    report["photographs"]["ok"] = False
    assert not demo.agrees(report)
    text = demo.render(report)
    assert "TOO LARGE" in text
    assert "img/s" not in text
    assert text.endswith("do not agree.")
    report["photographs"]["ok"] = True
    report["digits"]["same_predictions"] = 449
    assert not demo.agrees(report)
    assert "FAILED" in demo.render(report)


@pytest.mark.parametrize("unfused", [True, False])
def test_text_says_whether_anything_was_fused(report, unfused):
    report["photographs"]["backends"] = ["reference"] if unfused else ["cpu"]
    text = demo.render(report)
    assert ("No fused kernel ran" in text) == unfused
    assert ("Fused operators ran on: cpu." in text) != unfused


def test_command_prints_text_or_json_and_the_verdict(capsys, monkeypatch, report):
    seen = []
    monkeypatch.setattr(demo, "run", lambda rounds: seen.append(rounds) or report)
    assert cli.main(["demo", "--rounds", "7"]) == 0
    assert capsys.readouterr().out == demo.render(report) + "\n"
    assert cli.main(["demo", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert seen == [7, 3]
    report["digits"]["ok"] = False
    assert cli.main(["demo"]) == 1
    capsys.readouterr()
    assert cli.main(["demo", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


def test_missing_scikit_learn_is_one_line_with_the_mend(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 2
    expected = (
        'convmixer-fast: error: scikit-learn is missing: pip install "convmixer_fast[demo]"\n'
    )
    assert capsys.readouterr().err == expected


def load_example():
    path = Path(__file__).parent.parent / "examples" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch):
    """The training script with a network small enough to train twice."""
    module = load_example()
    monkeypatch.setattr(module, "DIGITS_ARCH", replace(demo.DIGITS_ARCH, dim=32, depth=1))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_training_learns_and_repeats_itself(example):
    first, accuracy = example.train(epochs=4, seed=5)
    again, _ = example.train(epochs=4, seed=5)
    other, _ = example.train(epochs=1, seed=6)
    state = first.state_dict()
    assert accuracy > 0.6
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    assert not torch.equal(state["head.weight"], other.state_dict()["head.weight"])


def test_training_script_writes_a_checkpoint_with_its_notes(example, monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "digits.safetensors"
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--output", str(path), "--epochs", "1"])
    example.main()
    assert "epoch   1" in capsys.readouterr().out
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    assert notes["epochs"] == "1"
    assert 0 <= float(notes["held_out_accuracy"]) <= 1
    # The activation still stands in the file, so nobody has to be asked for it.
    assert ConvMixer.from_checkpoint(path).arch == replace(demo.DIGITS_ARCH, dim=32, depth=1)


def test_shifting_moves_scans_by_at_most_a_pixel(example):
    scans = torch.zeros(200, 1, 8, 8)
    scans[:, 0, 4, 4] = 1
    moved = example.shifted(scans, torch.Generator().manual_seed(0))
    places = {(int(i), int(j)) for _, _, i, j in moved.nonzero()}
    assert moved.sum() == 200
    assert places == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}
