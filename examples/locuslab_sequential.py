"""The original repository's form, one flat nn.Sequential, with an import changed.

    python examples/locuslab_sequential.py [--dim N] [--depth N] [--img-size N] [--rounds N]

Keys stay those of the original: a state dict goes from one to the other and back.
"""

from __future__ import annotations

import argparse

import torch
from side_by_side import compare

from convmixer_fast import to_reference
from convmixer_fast.compat.locuslab import ConvMixer  # changed: was the original's ConvMixer
from convmixer_fast.testing import trained_like_


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--depth", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--img-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = ConvMixer(args.dim, args.depth, kernel_size=5, patch_size=2, n_classes=10)
    trained_like_(model, (4, 3, 8, 8))
    keys = list(model.state_dict())
    print(f"keys: {keys[0]}, {keys[1]}, ... {keys[-2]}, {keys[-1]}")

    plain = to_reference(model)  # PyTorch's own modules, under the same keys
    plain.load_state_dict(model.state_dict())
    compare(plain, model, torch.randn(4, 3, args.img_size, args.img_size), args.rounds)


if __name__ == "__main__":
    main()
