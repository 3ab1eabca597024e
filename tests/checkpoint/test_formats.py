"""Key formats: names convert both ways without touching the values."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import (
    BUILD,
    memoryless,
    refusal,
    trained,
)

from convmixer_fast.arch import VARIANTS
from convmixer_fast.checkpoint import FORMATS, convert_state_dict, read_checkpoint


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.hf_hub_id])
def test_timm_state_dicts_of_the_published_variants_convert_both_ways(name: str) -> None:
    state = memoryless(name)
    checkpoint = read_checkpoint(state)
    assert checkpoint.arch == VARIANTS[name].arch
    for form in FORMATS:
        converted = convert_state_dict(checkpoint.state_dict, form)
        with torch.device("meta"):
            peer = BUILD[form](checkpoint.arch).state_dict()
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in peer.items()}
        back = read_checkpoint(converted)
        assert back.format == form
        assert back.arch == checkpoint.arch
        assert [t.data_ptr() for t in back.state_dict.values()] == [
            t.data_ptr() for t in state.values()
        ]
        assert list(back.state_dict) == list(state)


def test_part_of_a_network_converts_when_the_depth_is_given() -> None:
    head = {"head.weight": "W", "head.bias": "b"}
    assert convert_state_dict(head, "locuslab", depth=32) == {"37.weight": "W", "37.bias": "b"}
    assert convert_state_dict(head, "tweet", depth=32) == {"35.weight": "W", "35.bias": "b"}
    assert convert_state_dict(head, "mmpretrain") == {"head.fc.weight": "W", "head.fc.bias": "b"}


def test_keys_that_are_not_timms_are_not_converted() -> None:
    state = trained("locuslab").state_dict()
    refusal(lambda: convert_state_dict(state, "tweet"), "0.weight", "read_checkpoint")
    state = trained("timm").state_dict()
    refusal(lambda: convert_state_dict(state, "caffe"), "caffe", "tweet")
    refusal(lambda: convert_state_dict(state, "tweet", depth=1), "blocks.1.0.fn.0.weight", "and 11")
    state = {k: v for k, v in state.items() if not k.startswith("blocks.0.")}
    refusal(lambda: convert_state_dict(state, "tweet"), "block 0 is missing")
