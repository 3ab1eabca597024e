"""Models, state dicts and assertions that the tests of checkpoints share."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from peers import locuslab, mmpretrain_classifier, tweet
from torch import Tensor, nn

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import FORMATS, CheckpointError, convert_state_dict, read_checkpoint
from convmixer_fast.modules.model import ConvMixer
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import trained_like_

ARCH = Arch(dim=12, depth=2, kernel_size=5, patch_size=4, num_classes=7)

#: Even kernel, odd dim, one channel, no square input, another activation, no blocks, many blocks.
ARCHS = [
    ARCH,
    Arch(dim=99, depth=1, kernel_size=8, patch_size=7, num_classes=3),
    Arch(dim=16, depth=3, kernel_size=3, patch_size=2, in_chans=1, num_classes=1, act="relu"),
    Arch(dim=8, depth=0, patch_size=5, num_classes=4),
    Arch(dim=4, depth=12, kernel_size=1, patch_size=1, in_chans=5, num_classes=4, act="silu"),
]

BUILD: dict[str, Callable[[Arch], nn.Module]] = {
    "timm": ReferenceConvMixer,
    "locuslab": locuslab,
    "mmpretrain": mmpretrain_classifier,
    "tweet": tweet,
}

#: mmpretrain's backbone returns the maps of its blocks, so it has at least one.
CASES = [(f, arch) for f in FORMATS for arch in ARCHS if arch.depth or f != "mmpretrain"]

WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")

PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module.")

SMALL = [Arch(4, 1, 3, 2, num_classes=3), Arch(6, 4, 4, 3, in_chans=1, num_classes=2)]


def image(arch: Arch, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, arch.in_chans, 50, 47, generator=generator)


def trained(form: str, arch: Arch = ARCH, seed: int = 0) -> nn.Module:
    """A model in the format's module tree whose every tensor, counters too, is its own."""
    torch.manual_seed(seed)
    model = trained_like_(BUILD[form](arch), image(arch).shape, seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.num_batches_tracked.fill_(1000 * seed + i)  # type: ignore[union-attr]
    return model


def weights(arch: Arch = SMALL[0], form: str = "timm", seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = ConvMixer(arch.dim, arch.depth, arch.kernel_size, arch.patch_size, arch.in_chans,
                      arch.num_classes)  # fmt: skip
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(0, 1000, value.shape))
    return convert_state_dict(model.state_dict(), form)


def memoryless(name: str) -> dict[str, Tensor]:
    """timm's state dict of a real variant, each tensor one number of its own, repeated."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    return {
        key: torch.tensor(i).to(like.dtype).expand(like.shape)
        for i, (key, like) in enumerate(state.items())
    }


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


def assert_holds(held: Any, expected: dict[str, Tensor], form: str, **options: Any) -> None:
    found = read_checkpoint(held, **options)
    assert found.format == form
    back = convert_state_dict(found.state_dict, form)
    assert list(back) == list(expected)
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def refusal(call: Callable[[], Any], *words: str) -> str:
    """The one line of the CheckpointError that ``call`` must raise, holding every word."""
    with pytest.raises(CheckpointError) as caught:
        call()
    line = str(caught.value)
    assert line == " ".join(line.split()), repr(line)
    assert len(line) < 1000
    for word in words:
        assert word in line, (word, line)
    return line


def torch_bytes(held: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()
