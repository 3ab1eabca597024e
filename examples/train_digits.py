"""Train the small ConvMixer that ``convmixer-fast demo`` evaluates, on scikit-learn's digits.

    python examples/train_digits.py [--output FILE] [--epochs N] [--seed N]

About a minute on one core. The same seed, torch version and processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convmixer_fast
from convmixer_fast.demo import (
    DIGITS_ARCH,
    DIGITS_FILE,
    PREPROCESSING,
    SPLIT_SEED,
    Digits,
    digits_split,
)
from convmixer_fast.files import replacement


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each scan moved by -1, 0 or 1 pixel along both axes; the edge is repeated."""
    n, _, rows, cols = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    down, right = torch.randint(0, 3, (2, n), generator=generator)
    i = down[:, None] + torch.arange(rows)
    j = right[:, None] + torch.arange(cols)
    return padded[torch.arange(n)[:, None, None], 0, i[:, :, None], j[:, None, :]][:, None]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, digits: Digits) -> float:
    model.eval()
    return (model(digits.images).argmax(1) == digits.targets).float().mean().item()


def train(epochs: int, seed: int, batch_size: int = 64) -> tuple[convmixer_fast.ConvMixer, float]:
    """A trained model in eval mode, and its accuracy on the held-out scans."""
    # The order of sums, and so the last bits, depends on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = digits_split()
    a = DIGITS_ARCH
    model = convmixer_fast.ConvMixer(
        a.dim, a.depth, a.kernel_size, a.patch_size, a.in_chans, a.num_classes, act_layer=a.act
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(training.targets) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        total, start = 0.0, time.perf_counter()
        for index in torch.randperm(len(training.targets), generator=generator).split(batch_size):
            logits = model(shifted(training.images[index], generator))
            loss = F.cross_entropy(logits, training.targets[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(
                f"epoch {epoch + 1:3d}  loss {total / len(training.targets):.4f}  "
                f"held-out {accuracy(model, held_out):.2%}  "
                f"{time.perf_counter() - start:.2f} s an epoch",
                flush=True,
            )
    return model.eval(), accuracy(model, held_out)


def annotate(path: Path, notes: dict[str, str]) -> None:
    """Add to the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    with replacement(path) as unfinished:
        save_file(load_file(path), unfinished, metadata | notes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo's ConvMixer on scikit-learn's digits."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(DIGITS_FILE),
        help="default: %(default)s, here; the demo's own is convmixer_fast/data/%(default)s",
    )
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, held_out = train(args.epochs, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    convmixer_fast.save_checkpoint(model, args.output, preprocessing=PREPROCESSING)
    annotate(
        args.output,
        {
            "trained_by": "examples/train_digits.py",
            "data": "scikit-learn load_digits",
            "split_seed": str(SPLIT_SEED),
            "seed": str(args.seed),
            "epochs": str(args.epochs),
            "held_out_accuracy": f"{held_out:.4f}",
        },
    )
    print(f"{held_out:.2%} of the held-out scans right; wrote {args.output}")


if __name__ == "__main__":
    main()
