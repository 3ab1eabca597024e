"""A checkpoint under mmpretrain's keys, read into our model, without mmpretrain.

    python examples/mmpretrain_keys.py [CHECKPOINT] [--img-size N] [--rounds N]

Without CHECKPOINT one is made first: a small model with random weights, saved under those keys.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from side_by_side import compare

from convmixer_fast import ConvMixer, read_checkpoint, save_checkpoint, to_reference
from convmixer_fast.testing import trained_like_


def make_checkpoint(folder: Path) -> Path:
    """A file as mmpretrain's training leaves it: ``backbone.stem.0.weight``, ``head.fc.weight``."""
    model = ConvMixer(64, 4, kernel_size=5, patch_size=4, num_classes=10)
    path = folder / "mmpretrain.pth"
    save_checkpoint(trained_like_(model, (4, 3, 32, 32)), path, format="mmpretrain")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--img-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--act", help="activation, where the file does not say, as gelu or relu")
    args = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or make_checkpoint(Path(folder))
        held = read_checkpoint(path)
        print(f"{path.name}: {held.format} keys, {held.arch}")
        model = ConvMixer.from_checkpoint(path, act=args.act or held.arch.act or "gelu").eval()

    images = torch.randn(4, model.in_chans, args.img_size, args.img_size)
    compare(to_reference(model), model, images, args.rounds)


if __name__ == "__main__":
    main()
