"""`optimize_for_inference` gives the same results, with fewer comparisons."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from fakes.triton import installed
from torch import nn

from convmixer_fast import (
    ConvMixer,
    MixerBlock,
    explain,
    optimize,
    optimize_for_inference,
    refresh,
    to_reference,
)
from convmixer_fast.backends.cpu import native
from convmixer_fast.modules.route import ModuleSnapshot
from convmixer_fast.testing import trained_like_

SHAPE = (2, 3, 20, 24)
engine = pytest.mark.skipif(native.load() is None, reason=native.why_unavailable() or "built")


@pytest.fixture(autouse=True, params=["engine", "gpu kernels"])
def no_gradients(request):
    kernels = installed() if request.param == "gpu kernels" else nullcontext()
    with torch.no_grad(), kernels:
        yield


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(SHAPE)


@pytest.fixture
def net(x) -> ConvMixer:
    """A prepared model that has been called."""
    torch.manual_seed(0)
    net = trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), SHAPE).eval()
    assert optimize_for_inference(net) is net
    net(x), net(x)
    return net


def compares_settings(net: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call looks at more than the structure of the modules."""
    asked = []
    compare = ModuleSnapshot.is_unchanged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ModuleSnapshot, "is_unchanged", lambda self: asked.append(self) or compare(self)
        )
        net(x)
    return bool(asked)


@engine
def test_the_result_is_the_same_and_less_is_compared(net, x):
    plain = copy.deepcopy(net)
    for module in plain.modules():
        module.__dict__.pop("_promise", None)
    assert torch.equal(net(x), plain(x))
    assert not compares_settings(net, x)
    assert compares_settings(plain, x)
    for other in (x[:1], x[:, :, :9, 3:], x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(net(other), plain(other))
    assert [row[:3] for row in explain(net, x)] == [row[:3] for row in explain(plain, x)]


def assert_fresh(net: ConvMixer, x: torch.Tensor, before: torch.Tensor) -> None:
    got = net(x)
    want = to_reference(net)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)


def loaded(net: ConvMixer) -> None:
    net.load_state_dict({k: v * 1.5 for k, v in net.state_dict().items()})


def loaded_into_a_block(net: ConvMixer) -> None:
    block = net.blocks[1]
    block.load_state_dict({k: v * 1.5 for k, v in block.state_dict().items()})


def trained(net: ConvMixer) -> None:
    net.train()
    net.blocks[0][1].weight.mul_(3.0)
    net.eval()


def refreshed(net: ConvMixer) -> None:
    net.blocks[2][0].fn[0].weight.data[0, 0, 0, 1] += 50.0
    refresh(net)


def refreshed_block(net: ConvMixer) -> None:
    net.blocks[2][3].bias.data.add_(5.0)
    refresh(net.blocks[2])


def prepared_again(net: ConvMixer) -> None:
    net.stem[2].bias.data.add_(5.0)
    optimize_for_inference(net)


SEEN = {
    "load_state_dict": loaded,
    "load_state_dict of a block": loaded_into_a_block,
    "train": trained,
    "refresh": refreshed,
    "refresh of a block": refreshed_block,
    "a second promise": prepared_again,
    "a block": lambda net: net.blocks.__setitem__(1, MixerBlock(16, 5).eval()),
    "a block less": lambda net: net.blocks.__delitem__(1),
    "an activation": lambda net: net.blocks[1][0].fn.__setitem__(1, nn.ReLU().eval()),
    "a parameter": lambda net: setattr(
        net.blocks[0][1], "weight", nn.Parameter(-net.blocks[0][1].weight)
    ),
    "a bias less": lambda net: setattr(net.stem[0], "bias", None),
    "a buffer": lambda net: setattr(net.stem[2], "running_var", torch.full((16,), 9.0)),
}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_a_change_is_seen(net, x, change):
    before = net(x)
    change(net)
    assert_fresh(net, x, before)


def test_another_dtype_ends_the_promise(net, x):
    net.bfloat16()
    assert net(x.bfloat16()).dtype == torch.bfloat16
    net.float()
    before = net(x)
    torch.testing.assert_close(before, to_reference(net)(x), rtol=1e-4, atol=1e-4)
    net.stem[2].bias.data.add_(5.0)
    assert_fresh(net, x, before)


@pytest.mark.parametrize("of", ["stem.0", "blocks", "blocks.1", "blocks.1.0.fn.2", "blocks.2.3"])
def test_hooks_are_called(net, x, of):
    seen = []
    handle = net.get_submodule(of).register_forward_hook(lambda m, a, out: seen.append(out))
    net(x)
    handle.remove()
    assert len(seen) == 1


def test_gradients_modes_and_autocast_work_as_before(net, x):
    with torch.enable_grad():
        net(x).sum().backward()
    assert net.blocks[0][1].weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    _, tangent = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    assert tangent.any()


def test_copies_and_pickles_keep_the_promise_to_themselves(net, x):
    want = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), want)
        twin.load_state_dict({k: v * 1.5 for k, v in twin.state_dict().items()})
        assert_fresh(twin, x, want)
        assert net.stem._promise.is_kept
    assert net.state_dict().keys() == to_reference(net).state_dict().keys()


def test_optimize_prepares_what_it_fused(x):
    torch.manual_seed(0)
    theirs = to_reference(trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), SHAPE).eval())
    want = theirs(x)
    ours = optimize(theirs, for_inference=True)
    for _ in range(2):
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
    assert not compares_settings(ours, x)


def test_what_cannot_be_promised_is_refused(net):
    net.blocks[1][2].train()
    with pytest.raises(ValueError, match=r"'blocks\.1\.2' is in training mode: call model\.eval"):
        optimize_for_inference(net)
    with pytest.raises(TypeError, match="got str: pass the model itself"):
        optimize_for_inference("model")
    with pytest.warns(UserWarning, match="Linear has no fused module"):
        optimize_for_inference(nn.Linear(2, 2).eval())
