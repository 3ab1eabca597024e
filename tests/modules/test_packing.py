"""A stale cache is a wrong answer: every change of a parameter is seen at the next forward."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from convmixer_fast import ConvMixer, refresh, use_backend
from convmixer_fast.modules.packing import PackedCache
from convmixer_fast.testing import trained_like_

SHAPE = (2, 3, 20, 20)


def nothing(module, args, output) -> None:
    """A hook: halves that have one are computed apart."""


@pytest.fixture(params=["whole blocks", "halves"])
def model(request) -> ConvMixer:
    net = trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6), SHAPE)
    if request.param == "halves":
        for block in net.blocks:
            block[0].register_forward_hook(nothing)
    with torch.no_grad():
        net(torch.randn(SHAPE))  # packs
    assert packed_entries(net) == expected_entries(net)
    return net


def expected_entries(net: nn.Module) -> int:
    # The stem, and each block whole or its two halves.
    return 1 + len(net.blocks) * (2 if net.blocks[0][0]._forward_hooks else 1)


def packed_entries(net: nn.Module) -> int:
    return sum(
        cache._entry is not None
        for module in net.modules()
        for cache in vars(module).values()
        if isinstance(cache, PackedCache)
    )


def assert_fresh(net: nn.Module, layout=torch.contiguous_format) -> torch.Tensor:
    """What the model gives now is what its parameters say now; returns it."""
    x = torch.randn(SHAPE).contiguous(memory_format=layout)
    with torch.no_grad():
        got = net(x)
        with use_backend("reference"):
            want = net(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    return got


def parts(net: ConvMixer) -> dict[str, torch.Tensor]:
    block = net.blocks[1]
    halves = {"dw": (block[0].fn[0], block[0].fn[2]), "pw": (block[1], block[3])}
    return {
        f"{half}.{name}": tensor
        for half, (conv, bn) in halves.items()
        for module in (conv, bn)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.is_floating_point()
        for name in [f"{type(module).__name__}.{name}"]
    }


NAMES = sorted(parts(ConvMixer(4, 2)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_in_place_update_of_any_tensor(model, name, layout):
    x = torch.randn(SHAPE).contiguous(memory_format=layout)
    with torch.no_grad():
        before = model(x)
        parts(model)[name].mul_(1.5).add_(0.1)
        assert not torch.allclose(model(x), before, rtol=1e-4, atol=1e-4)
    assert_fresh(model, layout)


@pytest.mark.parametrize("name", NAMES)
def test_dense_write_through_data_is_seen_by_the_fingerprint(model, name):
    tensor = parts(model)[name]
    version = tensor._version
    tensor.data.mul_(1.25).add_(0.05)
    assert tensor._version == version
    assert_fresh(model)


def test_dense_write_through_numpy(model):
    weight = model.blocks[0][0].fn[0].weight
    weight.detach().numpy()[...] *= 1.5
    assert_fresh(model)


def test_sparse_write_through_data_needs_refresh(model):
    weight = model.blocks[0][1].weight
    flat = weight.data.view(-1)
    flat[flat.numel() // 2 + 1] += 10.0
    refresh(model)
    assert packed_entries(model) == 0
    assert_fresh(model)


def test_a_change_of_eps(model):
    model.blocks[0][3].eps = 0.5
    assert_fresh(model)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(model, assign):
    other = trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6), SHAPE, seed=7)
    model.load_state_dict(other.state_dict(), assign=assign)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))


def test_replaced_parameter_and_replaced_module(model):
    block = model.blocks[0]
    block[0].fn[0].weight = nn.Parameter(torch.randn_like(block[0].fn[0].weight))
    assert_fresh(model)
    block[3] = trained_like_(nn.BatchNorm2d(16), (4, 16, 3, 3), seed=3)
    assert_fresh(model)


def test_data_assignment(model):
    weight = model.blocks[0][0].fn[0].weight
    weight.data = torch.randn_like(weight)
    assert_fresh(model)


def test_to_another_dtype_and_back(model):
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = model(x)
        out = model.bfloat16()(x.bfloat16())
        assert out.dtype == torch.bfloat16
        after = model.float()(x)
    assert not torch.equal(after, before)  # the weights were rounded on the way
    assert_fresh(model)


def test_optimizer_steps_are_seen(model):
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.05),
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        torch.optim.Adam(model.parameters(), lr=1e-2, foreach=True),
    ):
        model.eval()  # running statistics stand still: only the parameters move
        model(torch.randn(SHAPE)).square().sum().backward()
        optimizer.step()
        assert_fresh(model)


def test_training_moves_the_running_statistics(model):
    model.train()(torch.randn(SHAPE) * 3)
    model.eval()
    assert_fresh(model)


def test_ema_through_data_as_old_code_does_it(model):
    source = trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6), SHAPE, seed=5)
    for _ in range(2):
        for mine, other in zip(model.parameters(), source.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)
        assert_fresh(model)


def test_copies_start_without_a_cache_and_do_not_share_it(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    x = torch.randn(SHAPE)
    with torch.no_grad():
        want = model(x)
        for twin in twins:
            assert packed_entries(twin) == 0
            assert torch.equal(twin(x), want)
            for p in twin.parameters():
                p.mul_(2)
            assert_fresh(twin)
        assert torch.equal(model(x), want)


def test_state_dict_and_parameters_do_not_show_the_cache(model):
    fresh = ConvMixer(16, 2, 5, 4, num_classes=6)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert len(list(model.buffers())) == len(list(fresh.buffers()))


def test_tensors_made_in_inference_mode_are_never_cached():
    with torch.inference_mode():
        net = trained_like_(ConvMixer(8, 1, 3, 4, num_classes=3), SHAPE)
        x = torch.randn(SHAPE)
        first = net(x)
        net.blocks[0][3].running_mean.add_(1.0)
        second = net(x)
        with use_backend("reference"):
            torch.testing.assert_close(second, net(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second)
    assert packed_entries(net) == 0


def test_running_in_inference_mode_uses_and_keeps_the_cache(model):
    with torch.inference_mode():
        out = model(torch.randn(SHAPE))
    assert packed_entries(model) == expected_entries(model)
    assert out.is_inference()
    assert_fresh(model)


def test_a_cache_is_reused_while_nothing_changes(model):
    block = model.blocks[0]
    entries = (block._packed._entry, block._halves._entry)
    with torch.no_grad():
        model(torch.randn(SHAPE))
    assert (block._packed._entry, block._halves._entry) == entries


def test_gradient_mode_does_not_use_copies_that_cut_the_graph(model):
    out = model(torch.randn(SHAPE)).sum()
    out.backward()
    assert all(p.grad is not None for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    x = torch.randn(SHAPE, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_strided_parameters_work_without_a_cache():
    net = trained_like_(ConvMixer(8, 1, 3, 4, num_classes=3), SHAPE)
    wide = torch.randn(8, 2, 3, 3)
    net.blocks[0][0].fn[0].weight = nn.Parameter(wide[:, :1])
    assert_fresh(net)


def test_many_threads_with_updates_in_between(model):
    x = torch.randn(SHAPE)
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0 + 0.01 * step)
        results: list[torch.Tensor] = []

        def work(results: list[torch.Tensor] = results) -> None:
            with torch.no_grad():
                results.extend(model(x) for _ in range(5))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(results) == 20
        assert all(torch.equal(r, results[0]) for r in results)
        assert_fresh(model)


def of_the_stem(net: ConvMixer) -> dict[str, torch.Tensor]:
    conv, _, norm = net.stem
    return {
        "stem.weight": conv.weight,
        "stem.bias": conv.bias,
        "stem.norm": norm.weight,
        "stem.mean": norm.running_mean,
    }


#: Other views of the same memory: the address stays, what the kernels would read does not.
VIEWS = {
    "transposed": lambda t: t.transpose(-1, -2) if t.shape[-1] > 1 else t.transpose(0, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "every row the first": lambda t: t.as_strided(t.shape, (0, *t.stride()[1:])),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", [*NAMES, "stem.weight", "stem.bias", "stem.norm", "stem.mean"])
def test_another_view_of_the_same_memory_is_seen(model, name, view):
    tensor = (parts(model) | of_the_stem(model))[name]
    if tensor.dim() == 1 and view == "transposed":
        view = "expanded"
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = model(x)
        address, version = tensor.data_ptr(), tensor._version
        tensor.data = VIEWS[view](tensor.data)
        assert (tensor.data_ptr(), tensor._version) == (address, version)
        assert not torch.allclose(model(x), before, rtol=1e-4, atol=1e-4)
    assert_fresh(model)


#: Places of a wide tensor that one write changes. "element" only where tensors are hashed whole.
WRITES = {
    "row": lambda t, i: t[i % len(t)],
    "column": lambda t, i: t[:, i % t.shape[1]] if t.dim() > 1 else t[i % len(t)],
    "element": lambda t, i: t.view(-1)[i : i + 1],
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole blocks", "halves"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
def test_a_write_through_data_to_one_channel_is_seen(name, write, whole):
    net = trained_like_(ConvMixer(160, 2, 5, 4, num_classes=6), SHAPE)
    if not whole:
        for block in net.blocks:
            block[0].register_forward_hook(nothing)
    tensor = parts(net)[name]
    if tensor.nbytes > 16 * 1024:
        # Sampled once a row: `refresh` is for a write to one element.
        write = "row" if write == "element" else write
    x = torch.randn(SHAPE)
    with torch.no_grad():
        net(x)
        for i in range(3, 160, 13):
            before = net(x)
            place = WRITES[write](tensor.data, i)
            kept = place.clone()
            place.mul_(3).add_(0.5)
            got = net(x)
            assert not torch.equal(got, before), i
            with use_backend("reference"):
                torch.testing.assert_close(got, net(x), rtol=1e-3, atol=1e-3)
            place.copy_(kept)
            assert torch.equal(net(x), before), i


def test_parameters_can_be_swapped_by_conversions(model):
    """`torch.utils.swap_tensors` refuses tensors that anybody holds a weak reference to."""
    x = torch.randn(SHAPE)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            before = model(x)
            model.bfloat16()(x.bfloat16())
            assert not torch.equal(model.float()(x), before)
        assert_fresh(model)
        model.load_state_dict(model.double().state_dict(), assign=False)
        model.float()
        assert_fresh(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_after_a_look_in_inference_mode(frozen):
    """Evaluate, then a saliency map: copies made in inference mode could not be saved."""
    net = trained_like_(ConvMixer(16, 2, 5, 4, num_classes=6), SHAPE)
    net.requires_grad_(not frozen)
    for hooked in (False, True):
        if hooked:
            refresh(net)
            for block in net.blocks:
                block[0].register_forward_hook(nothing)
        with torch.inference_mode():
            net(torch.randn(SHAPE))
        grads = []
        image = torch.randn(SHAPE)
        for backend in ("auto", "reference"):
            x = image.clone().requires_grad_()
            with use_backend(backend):
                net(x)[:, 1].sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_tensor_in_another_role_and_an_attribute_in_front_of_a_parameter_are_seen(model):
    block, x = model.blocks[0], torch.randn(SHAPE)
    with torch.no_grad():
        block[3].weight = None
        model(x), model(x)
        moved, block[3].bias = block[3].bias, None
        block[3].weight = moved
        assert_fresh(model)
        model(x)
        conv = block[1]
        conv.__dict__["weight"] = 3 * conv._parameters["weight"].detach()
        assert_fresh(model)


def test_lazily_negated_parameters_are_read_as_they_are(model):
    for name, tensor in (parts(model) | of_the_stem(model)).items():
        if "var" in name:
            continue  # whose root is NaN
        # At the address that it has: of torch's public functions none gives such a view.
        tensor.data = torch._neg_view(tensor.data)
        refresh(model)
        assert_fresh(model)
        tensor.data = tensor.data.resolve_neg().neg()
