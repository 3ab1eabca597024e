"""Files state their activation; tests/project/test_recipe.py is about preprocessing and labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import ARCH, trained
from safetensors import safe_open
from torch import nn

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    build_model_kwargs,
    load_checkpoint,
    read_checkpoint,
    reading,
    save_checkpoint,
)


def test_safetensors_metadata_keeps_the_activation(tmp_path: Path) -> None:
    arch = Arch(**{**vars(ARCH), "act": "silu"})
    for form in FORMATS:
        save_checkpoint(trained(form, arch), tmp_path / "a.safetensors", format=form)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["convmixer_fast.act"] == "silu"
        assert metadata["convmixer_fast.format"] == form
        checkpoint = read_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.arch == arch
        assert build_model_kwargs(checkpoint)["act_layer"] is nn.SiLU
        save_checkpoint(checkpoint, tmp_path / "b.safetensors", format="tweet")
        assert read_checkpoint(tmp_path / "b.safetensors").arch == arch
        with pytest.warns(UserWarning, match="trained with silu.*activation is gelu"):
            load_checkpoint(trained(form), tmp_path / "b.safetensors")
        with pytest.warns(UserWarning, match="trained with silu"):
            load_checkpoint(trained(form), tmp_path / "b.safetensors", strict=False)


def test_a_stated_activation_overrides_the_published_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "known_activation", lambda arch: "relu")
    save_checkpoint(trained("timm"), tmp_path / "gelu.safetensors")
    save_checkpoint(trained("timm"), tmp_path / "silent.pth")
    assert read_checkpoint(tmp_path / "gelu.safetensors").arch.act == "gelu"
    assert read_checkpoint(tmp_path / "silent.pth").arch.act == "relu"

    tanh = trained("timm")
    for module in list(tanh.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.GELU(approximate="tanh"))
    save_checkpoint(tanh, tmp_path / "tanh.safetensors")
    nameless = read_checkpoint(tmp_path / "tanh.safetensors")
    assert nameless.arch.act is None
    save_checkpoint(nameless, tmp_path / "again.safetensors")
    assert read_checkpoint(tmp_path / "again.safetensors").arch.act is None
    with pytest.warns(UserWarning, match="activation is GELU.*tanh"):
        load_checkpoint(tanh, tmp_path / "silent.pth")
    load_checkpoint(tanh, tmp_path / "tanh.safetensors", strict=False)
