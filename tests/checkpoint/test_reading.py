"""A state dict becomes a `Checkpoint` bit for bit, or an error that names its faults."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    ARCH,
    BUILD,
    assert_same_bits,
    refusal,
    snapshot,
    trained,
)
from peers import mmpretrain_backbone

from convmixer_fast.arch import Arch
from convmixer_fast.checkpoint import (
    FORMATS,
    Checkpoint,
    CheckpointError,
    LoadResult,
    formats,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from convmixer_fast.reference import ReferenceConvMixer


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_without_classifier_is_read(form: str) -> None:
    arch = Arch(**{**vars(ARCH), "num_classes": 0})
    build = mmpretrain_backbone if form == "mmpretrain" else BUILD[form]
    checkpoint = read_checkpoint(build(arch).state_dict())
    assert checkpoint.format == form
    assert checkpoint.arch == Arch(**{**vars(arch), "act": None})
    ours = ReferenceConvMixer(arch)
    load_checkpoint(ours, checkpoint)
    assert_same_bits(ours.state_dict(), checkpoint.state_dict)


def test_paddle_names_and_transposed_classifier_are_read() -> None:
    # As many classes as channels: the shape alone cannot tell a transposed matrix.
    arch = Arch(**{**vars(ARCH), "num_classes": ARCH.dim})
    theirs = trained("locuslab", arch)
    paddle: dict[str, Any] = {}
    for key, value in theirs.state_dict().items():
        name = key.replace("running_mean", "_mean").replace("running_var", "_variance")
        if not key.endswith("num_batches_tracked"):
            paddle[name] = (value.t() if value.ndim == 2 else value).numpy()
    ours = ReferenceConvMixer(arch).eval()
    load_checkpoint(ours, paddle)
    expected = read_checkpoint(theirs.state_dict()).state_dict
    for key in expected:
        if key.endswith("num_batches_tracked"):
            expected[key] = torch.tensor(0)
    assert_same_bits(ours.state_dict(), expected)


def test_batch_counters_default_to_zero_only_if_none_is_stored() -> None:
    state = trained("timm").state_dict()
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    counters = {k: v for k, v in read_checkpoint(bare).state_dict.items() if k not in bare}
    assert len(counters) == 1 + 2 * ARCH.depth
    assert all(v.dtype == torch.int64 and v == 0 for v in counters.values())
    bare["stem.2.num_batches_tracked"] = torch.tensor(4)
    refusal(lambda: read_checkpoint(bare), "blocks.0.0.fn.2.num_batches_tracked", "and 1 more")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_in_files_and_cast_by_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("timm").to(dtype)
    for name in ("a.safetensors", "a.pth"):
        save_checkpoint(model, tmp_path / name, format="locuslab")
        assert_same_bits(read_checkpoint(tmp_path / name).state_dict, dict(model.state_dict()))
        single = ReferenceConvMixer(ARCH)
        load_checkpoint(single, tmp_path / name)
        assert_same_bits(single.state_dict(), dict(trained("timm").to(dtype).float().state_dict()))


@pytest.mark.parametrize("form", FORMATS)
def test_missing_unexpected_and_misshapen_tensors_are_named_and_counted(form: str) -> None:
    model = trained("timm", seed=9)
    before = snapshot(model)
    good = dict(trained(form).state_dict())
    keys = list(good)

    def check(state: dict[str, Any], *words: str) -> None:
        refusal(lambda: read_checkpoint(state), "the state dict", *words)
        refusal(lambda: load_checkpoint(model, state), *words)
        assert_same_bits(dict(model.state_dict()), before)

    one = {k: v for k, v in good.items() if k != keys[9]}
    check(one, keys[9], "missing", "strict=False")
    four = {k: v for k, v in good.items() if k not in keys[-5:-1]}
    check(four, keys[-5], keys[-4], keys[-3], "and 1 more")
    check({**good, "neck.gain": torch.ones(3), keys[9] + "2": torch.ones(1)}, "neck.gain", "left")
    check({**good, keys[8]: torch.ones(3)}, "(3,) and should be (")
    check({**good, keys[0]: torch.ones(12, 3, 4, 5)}, "stem.0.weight", "(12, 3, 4, 5)", "square")
    check({**good, keys[8]: "text"}, keys[8], "str", "not a dense tensor")
    check({**good, keys[8]: good[keys[8]].to_sparse()}, keys[8], "sparse", "not a dense tensor")
    check({**good, keys[8]: good[keys[8]].to(torch.int8)}, keys[8], "int8")
    check({**good, "module." + keys[8]: good[keys[8]]}, "two names", "module." + keys[8])
    layout = formats.LAYOUTS[form]
    block = layout.block.format(layout.first_block) + "."
    gap = {k: v for k, v in good.items() if not k.startswith(block)}
    check(gap, f"block {layout.first_block} is missing", f"up to {layout.first_block + 1}")
    far = layout.block.format(999999) + "." + layout.mixing[2] + ".weight"
    check({**good, far: torch.ones(1)}, "is missing, though blocks go up to 999999")


def test_nan_and_infinity_warn_and_name_the_tensors() -> None:
    state = trained("timm").state_dict()
    state["blocks.1.1.weight"][3, 4] = float("nan")
    state["head.bias"][0] = float("inf")
    for call in (
        lambda: read_checkpoint(state),
        lambda: load_checkpoint(trained("timm"), state),
        lambda: load_checkpoint(trained("timm"), state, strict=False),
    ):
        with pytest.warns(UserWarning, match=r"NaN.*blocks\.1\.1\.weight, head\.bias:"):
            call()


def test_a_checkpoint_is_immutable_and_without_gradients() -> None:
    checkpoint = read_checkpoint(trained("timm").state_dict())
    assert isinstance(checkpoint, Checkpoint)
    with pytest.raises(AttributeError):
        checkpoint.format = "tweet"  # type: ignore[misc]
    assert not any(tensor.requires_grad for tensor in checkpoint.state_dict.values())


@pytest.mark.parametrize("kind", [Checkpoint, CheckpointError, LoadResult])
def test_pickles_carry_the_public_module(kind: type) -> None:
    assert kind.__module__ == "convmixer_fast.checkpoint"
    assert pickle.loads(pickle.dumps(kind)) is kind
