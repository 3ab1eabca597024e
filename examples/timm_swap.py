"""Code that uses timm, with two lines changed, and what they bring.

    python examples/timm_swap.py [--model NAME] [--batch-size N] [--img-size N] [--rounds N]

Weights are random: with `timm.create_model(..., pretrained=True)` the rest stays as it is.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from side_by_side import compare

import convmixer_fast  # changed: this line is new
from convmixer_fast.testing import trained_like_


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="convmixer_768_32", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--img-size", type=int, default=224, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)

    model = timm.create_model(args.model).eval()
    # Random weights whose outputs can be compared: those of a fresh deep network grow with depth.
    side = 4 * model.stem[0].stride[0]
    trained_like_(model, (4, 3, side, side))
    before = copy.deepcopy(model)  # only for the comparison

    model = convmixer_fast.optimize(model)  # changed: and this one

    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    compare(before, model, images, args.rounds)


if __name__ == "__main__":
    main()
