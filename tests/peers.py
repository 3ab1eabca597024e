"""Other people's ConvMixers: the same network in the module trees, and so the keys, they publish.

Each builder takes an `Arch` and returns a fresh model with random weights. Only the structure is
theirs: which module stands where, under which name, and which are shared.
"""

from typing import Any

from torch import Tensor, nn

from convmixer_fast.arch import Arch, activation_layer


class Skip(nn.Module):
    """Input plus ``fn`` of the input, with ``fn`` a named child, as in the original repository."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class SkipFirst(nn.Sequential):
    """Input plus the first child of the input: the short form's residual, its child named "0"."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + x


def _act(arch: Arch) -> nn.Module:
    if arch.act is None:
        raise ValueError("the activation of this Arch is not known: set act")
    return activation_layer(arch.act)()


def _depthwise(arch: Arch) -> nn.Conv2d:
    return nn.Conv2d(arch.dim, arch.dim, arch.kernel_size, groups=arch.dim, padding="same")


def _stem(arch: Arch) -> nn.Conv2d:
    return nn.Conv2d(arch.in_chans, arch.dim, arch.patch_size, stride=arch.patch_size)


def _classifier(arch: Arch) -> list[nn.Module]:
    linear = [nn.Linear(arch.dim, arch.num_classes)] if arch.num_classes else []
    return [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), *linear]


def _block(arch: Arch, act: nn.Module | None = None) -> nn.Sequential:
    """One block; ``act`` stands in both places when given, else each has its own."""
    return nn.Sequential(
        Skip(nn.Sequential(_depthwise(arch), act or _act(arch), nn.BatchNorm2d(arch.dim))),
        nn.Conv2d(arch.dim, arch.dim, kernel_size=1),
        act or _act(arch),
        nn.BatchNorm2d(arch.dim),
    )


def locuslab(arch: Arch) -> nn.Sequential:
    """The original repository's flat Sequential: (N, in_chans, H, W) -> (N, num_classes)."""
    blocks = [_block(arch) for _ in range(arch.depth)]
    stem = [_stem(arch), _act(arch), nn.BatchNorm2d(arch.dim)]
    return nn.Sequential(*stem, *blocks, *_classifier(arch))


def tweet(arch: Arch) -> nn.Sequential:
    """The original README's short form, every convolution in a Sequential with its act and norm."""

    def unit(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(conv, _act(arch), nn.BatchNorm2d(arch.dim))

    blocks = [
        nn.Sequential(SkipFirst(unit(_depthwise(arch))), unit(nn.Conv2d(arch.dim, arch.dim, 1)))
        for _ in range(arch.depth)
    ]
    return nn.Sequential(unit(_stem(arch)), *blocks, *_classifier(arch))


class MMPretrainBackbone(nn.Module):
    """mmpretrain's backbone: a tuple of feature maps, one activation object in every place."""

    def __init__(self, arch: Arch, out_indices: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.act = _act(arch)
        self.out_indices = tuple(i % arch.depth for i in out_indices)
        self.stem = nn.Sequential(_stem(arch), self.act, nn.BatchNorm2d(arch.dim))
        self.stages = nn.Sequential(*[_block(arch, self.act) for _ in range(arch.depth)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)


class _LinearHead(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


class MMPretrainClassifier(nn.Module):
    """mmpretrain's classifier around that backbone; called directly, it returns the logits."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.backbone = MMPretrainBackbone(arch)
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.head = _LinearHead(arch.dim, arch.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.neck(self.backbone(x)[-1]))
        return logits


def mmpretrain_backbone(arch: Arch, **kwargs: Any) -> MMPretrainBackbone:
    return MMPretrainBackbone(arch, **kwargs)


def mmpretrain_classifier(arch: Arch) -> MMPretrainClassifier:
    return MMPretrainClassifier(arch)
