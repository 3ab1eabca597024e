"""Training: gradients, statistics, mixed precision, checkpointing, DDP and timm's own loop."""

from __future__ import annotations

import copy
import subprocess
import textwrap
import warnings

import fresh_python
import pytest
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_fast import ConvMixer, use_backend
from convmixer_fast.arch import Arch
from convmixer_fast.reference import ReferenceConvMixer
from convmixer_fast.testing import trained_like_

ARCH = Arch(12, 2, kernel_size=4, patch_size=3, num_classes=5)
SHAPE = (4, 3, 19, 16)


def pair(dtype=torch.float32) -> tuple[nn.Module, ConvMixer]:
    reference = trained_like_(ReferenceConvMixer(ARCH).to(dtype), SHAPE)
    ours = ConvMixer(12, 2, 4, 3, num_classes=5, dtype=dtype)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def assert_same_tensors(a: nn.Module, b: nn.Module, of: str, **tolerance) -> None:
    for (name, x), (_, y) in zip(getattr(a, of)(), getattr(b, of)(), strict=True):
        if of == "named_parameters":
            x, y = x.grad, y.grad
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_statistics_equal_the_references(training):
    reference, ours = pair(torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64)
    inputs = []
    for model in (reference, ours):
        leaf = x.clone().requires_grad_()
        F.cross_entropy(model.train(training)(leaf), torch.arange(4)).backward()
        inputs.append(leaf.grad)
    torch.testing.assert_close(inputs[0], inputs[1])
    assert_same_tensors(reference, ours, "named_parameters")
    assert_same_tensors(reference, ours, "named_buffers")


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_a_whole_model(training):
    model = trained_like_(ConvMixer(3, 2, 3, 2, num_classes=2, dtype=torch.float64), (3, 3, 6, 7))
    x = torch.randn(3, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    model.train(training)
    parameters = dict(model.named_parameters())

    def run(x, *values):
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(model, replaced, (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_frozen_batch_norm_trains_through_the_fused_operators():
    reference, ours = pair()
    x = torch.randn(SHAPE)
    for model in (reference, ours):
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        model(x).square().sum().backward()
    assert_same_tensors(reference, ours, "named_parameters", rtol=1e-3, atol=1e-3)


def test_half_frozen_model_has_gradients_only_where_asked():
    _, ours = pair()
    for p in ours.blocks[0].parameters():
        p.requires_grad_(False)
    ours.eval()(torch.randn(SHAPE)).sum().backward()
    assert all(p.grad is None for p in ours.blocks[0].parameters())
    assert all(p.grad is not None for p in ours.blocks[1].parameters())
    assert all(p.grad is not None for p in ours.stem.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_references_dtypes_and_values(training, dtype):
    reference, ours = pair()
    x, outs = torch.randn(SHAPE), []
    for model in (reference, ours):
        model.train(training)
        with torch.autocast("cpu", dtype=dtype):
            outs.append(model(x))
        outs[-1].float().square().mean().backward()
    assert outs[0].dtype == outs[1].dtype == dtype
    torch.testing.assert_close(outs[1], outs[0], rtol=0.05, atol=0.1)
    for (name, a), b in zip(reference.named_parameters(), ours.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        cosine = F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.98, f"{name}: cosine {cosine}"


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_nothing_but_memory(training):
    _, plain = pair(torch.float64)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(SHAPE, dtype=torch.float64)
    kept = []
    for model in (plain, saving):
        saved = 0

        def pack(t):
            nonlocal saved
            saved += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model.train(training)(x)
        out.sum().backward()
        kept.append(saved)
    assert_same_tensors(plain, saving, "named_parameters")
    assert kept[1] < kept[0]
    with torch.no_grad():
        saving(x)
    saving.forward_intermediates(x)[0].sum().backward()


def test_drop_path_rates_grow_with_depth_and_train():
    model = ConvMixer(8, 3, 3, 4, num_classes=3, drop_path_rate=0.4)
    rates = [getattr(block[0].drop_path, "p", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    model.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    assert list(model.state_dict()) == list(ConvMixer(8, 3, 3, 4, num_classes=3).state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fullgraph_compile_equals_eager(training, layout):
    _, ours = pair()
    ours.train(training)
    twin = copy.deepcopy(ours)
    x = torch.randn(SHAPE).contiguous(memory_format=layout)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    out, want = compiled(x), ours(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    want.square().sum().backward()
    assert_same_tensors(ours, twin, "named_parameters", rtol=1e-3, atol=1e-3)
    assert_same_tensors(ours, twin, "named_buffers")
    if not training:
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)


def test_inductor_and_dynamic_batch():
    _, ours = pair()
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, *SHAPE[1:])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-4)


def test_export_keeps_the_operators_and_the_result():
    _, ours = pair()
    x = torch.randn(SHAPE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours.eval(), (x,), dynamic_shapes=({0: batch},))
    operators = {str(node.target) for node in program.graph.nodes}
    assert "convmixer_fast.depthwise_mix.default" in operators
    assert "convmixer_fast.pointwise_mix.default" in operators
    for n in (4, 7):
        y = torch.randn(n, *SHAPE[1:])
        with torch.no_grad():
            torch.testing.assert_close(program.module()(y), ours(y), rtol=1e-4, atol=1e-4)


def test_functional_transforms_see_plain_operators():
    _, ours = pair(torch.float64)
    ours.eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    parameters = dict(ours.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        ours.zero_grad()
        loss(parameters, x[i]).backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad)


def test_jit_trace_follows_the_parameters():
    _, ours = pair()
    x = torch.randn(SHAPE)
    with torch.no_grad():
        with warnings.catch_warnings():
            # That shapes of the example were taken for constants.
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(ours.eval(), x)
        torch.testing.assert_close(
            traced(x[:1, :, :9, 3:]), ours(x[:1, :, :9, 3:]), rtol=1e-4, atol=1e-4
        )
        for p in ours.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(traced(x), ours(x), rtol=1e-4, atol=1e-4)


def test_timms_training_loop_takes_the_model():
    torch.manual_seed(1)
    model = ConvMixer(12, 2, 3, 4, num_classes=3, drop_path_rate=0.1)
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.8
    )
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=40, warmup_epochs=2)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    x = torch.randn(32, 3, 16, 16)
    y = (x.mean((2, 3)).argmax(1)).long()
    x += F.one_hot(y, 3).float()[:, :, None, None]
    losses = []
    for epoch in range(30):
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        scheduler.step(epoch)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for net in (model, ema.module):
        net.eval()
        with torch.no_grad():
            got = net(x)
            with use_backend("reference"):
                torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-4)


def test_data_parallel_wrapper_on_the_cpu():
    _, ours = pair()
    wrapped = nn.DataParallel(ours.eval())
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), ours(x))


DDP = """
    import os, sys
    import torch, torch.distributed as dist, torch.nn.functional as F
    from convmixer_fast import ConvMixer
    from convmixer_fast.arch import Arch
    from convmixer_fast.reference import ReferenceConvMixer

    torch.set_num_threads(1)
    rank, rendezvous = int(sys.argv[1]), "file://" + sys.argv[2]
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(0)
    reference = ReferenceConvMixer(Arch(8, 2, 3, 4, num_classes=3))
    ours = ConvMixer(8, 2, 3, 4, num_classes=3)
    ours.load_state_dict(reference.state_dict())
    models = [torch.nn.parallel.DistributedDataParallel(m) for m in (reference, ours)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    torch.manual_seed(rank + 1)
    for step in range(3):
        x, y = torch.randn(6, 3, 16, 16), torch.randint(3, (6,))
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    mine, plain = ours.state_dict(), reference.state_dict()
    for key in plain:
        torch.testing.assert_close(mine[key], plain[key], rtol=1e-4, atol=1e-4)
    for p in ours.parameters():
        other = p.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(p, other)
    print("ok", rank)
    dist.destroy_process_group()
"""


def test_ddp_over_gloo_with_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(DDP))
    processes = [
        fresh_python.start(
            script,
            str(rank),
            tmp_path / "rendezvous",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"ok {rank}" in output
