"""Every example runs as its first lines say, at a small size, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from convmixer_fast import ConvMixer, save_checkpoint
from convmixer_fast.testing import trained_like_

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as its command line does; returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def start(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        out: str = capsys.readouterr().out
        check(out)
        return out

    return start


def check(out: str) -> None:
    """The output was held against float64, and the speed-up is the ratio of the printed rates."""
    assert "right: max error" in out
    rates = {n: float(r) for n, r in re.findall(r"^(plain|fast): .* ms, (\S+) img/s$", out, re.M)}
    (speed_up,) = re.findall(r"^speed-up: (\S+)$", out, re.M)
    assert float(speed_up) == pytest.approx(rates["fast"] / rates["plain"], rel=0.05, abs=0.01)


def test_timms_model_is_swapped_by_two_lines(run):
    pytest.importorskip("timm")
    small = ("--img-size", 28, "--batch-size", 1, "--rounds", 1)
    out = run("timm_swap.py", "--model", "convmixer_1024_20_ks9_p14", *small)
    assert re.search(r"^(mixer_stack|depthwise_mix) +20 x +blocks", out, re.M), out
    marked = re.findall(r"^.*# changed: .*$", (EXAMPLES / "timm_swap.py").read_text(), re.M)
    assert len(marked) == 2
    assert all("convmixer_fast" in line for line in marked)


def test_mmpretrains_keys_are_read(run, tmp_path):
    small = ("--img-size", 32, "--rounds", 1)
    assert "mmpretrain.pth: mmpretrain keys, ConvMixer-64/4" in run("mmpretrain_keys.py", *small)
    model = ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=5, act_layer=torch.nn.ReLU)
    path = tmp_path / "own.pth"
    save_checkpoint(trained_like_(model, (4, 3, 32, 32)), path, format="mmpretrain")
    out = run("mmpretrain_keys.py", path, "--act", "relu", *small)
    assert "own.pth: mmpretrain keys, ConvMixer-16/2" in out


def test_the_original_sequential_keeps_its_keys(run):
    out = run("locuslab_sequential.py", "--dim", 16, "--depth", 2, "--img-size", 16, "--rounds", 1)
    assert "keys: 0.weight, 0.bias, ... 7.weight, 7.bias" in out
