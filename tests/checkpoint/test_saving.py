"""Writing is exact, atomic and in each library's form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    ARCH,
    ARCHS,
    BUILD,
    assert_same_bits,
    refusal,
    trained,
)
from peers import mmpretrain_backbone
from torch import nn

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import FORMATS, read_checkpoint, save_checkpoint, saving
from convmixer_fast.reference import ReferenceConvMixer


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


def test_torch_files_match_those_of_each_library(tmp_path: Path) -> None:
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
            patch.setattr(saving, "save_file", broken)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    # A pipe stands for /dev/null, which root could lose.
    for name in ("pipe.pth", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
        refusal(lambda name=name: save_checkpoint(trained("timm"), tmp_path / name), "a device")
        assert (tmp_path / name).is_fifo()


def test_write_errors_are_one_line(tmp_path: Path) -> None:
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
