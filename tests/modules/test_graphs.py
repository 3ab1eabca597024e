"""CUDA graphs and depth-first order: the same results as without, whatever changes in between."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager, nullcontext

import pytest
import torch
from fakes.triton import installed
from torch import nn

import convmixer_fast as cf
from convmixer_fast import ConvMixer, explain, optimize, refresh, use_backend
from convmixer_fast.modules import cuda_graph
from convmixer_fast.modules.cuda_graph import StackGraphs, images_at_a_time
from convmixer_fast.modules.stack import MixerStack
from convmixer_fast.testing import trained_like_

IMAGES = (2, 3, 20, 20)


class Tape:
    """A recorder that calls again: like a graph it reads and writes the memory of its capture."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run):
        self.captures += 1
        result = run()

        def replay() -> None:
            self.replays += 1
            result.copy_(run())

        return replay, result


@pytest.fixture
def double():
    with installed() as kernels:
        yield kernels


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def model(tape) -> ConvMixer:
    net = trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), IMAGES)
    assert optimize(net, cuda_graph=True) is net
    net.blocks._graphs = StackGraphs(tape)
    return net


def assert_true(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    got = net(x)
    with use_backend("reference"):
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-4)
    return got


@torch.no_grad()
def test_new_inputs_give_new_results_and_old_results_stay(double, model, tape):
    inputs = [torch.randn(IMAGES) for _ in range(5)]
    results = [assert_true(model, x) for x in inputs]
    kept = [r.clone() for r in results]
    assert (tape.captures, tape.replays) == (1, 4)  # the first call prepares, the second captures
    maps = model.forward_features(inputs[0])
    before = maps.clone()
    model.forward_features(inputs[1])
    assert torch.equal(maps, before)
    assert all(map(torch.equal, results, kept))


@torch.no_grad()
def test_weights_that_change_are_seen(double, model, tape):
    x = torch.randn(IMAGES)
    for _ in range(3):
        before = assert_true(model, x)
    for p in (model.blocks[1][1].weight, model.blocks[0][0].fn[0].weight, model.blocks[2][3].bias):
        p.mul_(1.5).add_(0.1)
        for _ in range(3):
            after = assert_true(model, x)
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        before = after
    assert tape.captures == 4
    model.blocks[0][3].running_mean.data.add_(1.0)
    assert_true(model, x)


@torch.no_grad()
def test_a_graph_that_is_replayed_asks_no_block_for_itself(double, model, tape, monkeypatch):
    x = torch.randn(IMAGES)
    for _ in range(3):
        want = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(MixerStack, "_packed_now", lambda self, x: pytest.fail("asked"))
        assert torch.equal(model(x), want)
    assert (tape.captures, tape.replays) == (1, 3)
    model.blocks[1][1].weight.mul_(1.5)
    assert not torch.equal(assert_true(model, x), want)


@torch.no_grad()
def test_weights_that_change_at_every_call_are_never_captured(double, model, tape):
    for _ in range(4):
        model.blocks[0][1].weight.mul_(1.01)
        assert_true(model, torch.randn(IMAGES))
    assert tape.captures == 0


@torch.no_grad()
def test_each_kind_of_input_has_its_graph_and_few_are_kept(double, model, tape):
    for size in range(16, 16 + 4 * 12, 4):
        for _ in range(3):
            assert_true(model, torch.randn(1, 3, size, 20))
    assert tape.captures == 12
    assert len(model.blocks._graphs) == cuda_graph.MAX_GRAPHS
    captures = tape.captures
    model(torch.randn(cuda_graph.MAX_BATCH + 1, 3, 16, 16))
    model(torch.randn(cuda_graph.MAX_BATCH + 1, 3, 16, 16))
    assert tape.captures == captures
    with torch.inference_mode():
        for _ in range(3):
            model(torch.randn(1, 3, 60, 20))
    assert tape.captures == captures + 1
    assert_true(model, torch.randn(1, 3, 60, 20))


def test_gradients_training_hooks_and_explain_go_without(double, model, tape):
    x = torch.randn(IMAGES)
    model(x).sum().backward()
    model(x).sum().backward()
    assert model.stem[0].weight.grad is not None
    with torch.no_grad():
        model.train()(x)
        model.eval()
        explain(model, x)
        seen = []
        handle = model.blocks[1][1].register_forward_hook(lambda *_: seen.append(1))
        for _ in range(3):
            assert_true(model, x)
        assert len(seen) == 6
        handle.remove()
    assert tape.captures == 0


@torch.no_grad()
def test_what_forgets_graphs(double, model, tape):
    x = torch.randn(IMAGES)
    for _ in range(3):
        model(x)
    assert len(model.blocks._graphs) == 1
    refresh(model)
    assert len(model.blocks._graphs) == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.blocks._graphs, StackGraphs)
        assert len(twin.blocks._graphs) == 0
    assert optimize(model).blocks._graphs is not None
    assert optimize(model, cuda_graph=False).blocks._graphs is None


def test_a_model_without_a_stack_is_told():
    flat = nn.Sequential(cf.DepthwiseMix(8, 3), nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="no stack of blocks"):
        optimize(flat, cuda_graph=True)


@torch.no_grad()
def test_on_a_cpu_nothing_changes(model, tape):
    x = torch.randn(IMAGES)
    for _ in range(3):
        model(x)
    assert tape.captures == 0


@pytest.mark.parametrize(
    ("images", "image", "l2", "want"),
    [
        (64, 3 << 20, 40 << 20, 2),  # 20 MiB hold two images of three 3 MiB maps
        (64, 1 << 20, 96 << 20, 16),
        (10, 1 << 20, 48 << 20, 5),  # 8 would fit: 5 and 5 rather than 8 and 2
        (3, 1 << 30, 1 << 20, 1),
        (7, 1, 1 << 20, 7),
        (1, 5, 5, 1),
        (0, 5, 5, 1),
        (9, 1 << 20, 0, 9),
    ],
)
def test_images_at_a_time(images, image, l2, want):
    assert images_at_a_time(images, image, l2) == want


@torch.no_grad()
def test_depth_first_gives_the_same(double, monkeypatch):
    net = trained_like_(ConvMixer(16, 3, 5, 4, num_classes=6), IMAGES)
    optimize(net, depth_first=True)
    x = torch.randn(7, 3, 20, 20)
    image = 16 * 5 * 5 * 4
    monkeypatch.setattr(cuda_graph, "l2_bytes", lambda device: 2 * 3 * image * 2)
    want = net(x)
    sizes = {shape[0] for name, shape in double.shapes[-12:] if name == "depthwise_mix"}
    assert sizes == {2, 1}
    with use_backend("reference"):
        torch.testing.assert_close(want, net(x), rtol=1e-4, atol=1e-4)
    assert isinstance(net.blocks[:2], MixerStack)
    assert net.blocks[:2]._depth_first


class Empty(Tape):
    """A capture that holds nothing: on another device or stream than the launches."""

    def __call__(self, run):
        self.captures += 1
        return lambda: None, run()


class Failing(Tape):
    def __call__(self, run):
        self.captures += 1
        raise RuntimeError("operation not permitted when stream is capturing")


@torch.no_grad()
@pytest.mark.parametrize(
    ("recorder", "why"),
    [(Empty, "its replay does not give what the blocks give"), (Failing, "not permitted")],
)
def test_a_capture_that_holds_nothing_or_fails_is_refused(double, model, recorder, why):
    tape = recorder()
    model.blocks._graphs = StackGraphs(tape)

    def calls() -> None:
        for _ in range(5):
            assert_true(model, torch.randn(IMAGES))
            assert_true(model, torch.randn(1, 3, 20, 20))

    with pytest.warns(RuntimeWarning, match=f"run without a CUDA graph.*{why}") as seen:
        calls()
    assert len(seen) == 1
    assert (tape.captures, len(model.blocks._graphs)) == (1, 0)
    assert why in model.blocks._graphs.why_not
    refresh(model)
    assert model.blocks._graphs.why_not == ""
    with pytest.warns(RuntimeWarning, match=why):
        calls()


@torch.no_grad()
def test_a_graph_of_results_that_are_not_finite_is_no_empty_one(double, model, tape):
    model.blocks[1][1].weight[0].fill_(float("nan"))
    model.blocks[2][3].bias[1] = float("inf")
    for _ in range(3):
        model(torch.randn(IMAGES))
    assert (tape.captures, len(model.blocks._graphs)) == (1, 1)


class OnDevice1(torch.Tensor):
    """CPU memory that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 1))


class Cuda:
    """What `torch.cuda` has for streams and graphs, of two devices with a current stream each.

    `launch` runs work at once, or keeps it for the graph that its stream records. Like torch's own,
    `graph` has one stream for all captures that bring none, on the device of the first.
    """

    def __init__(self, monkeypatch) -> None:
        owner, self.current_device, self.captures = self, 0, []

        class Stream:
            cuda_stream = 0

            def __init__(self, device=None) -> None:
                self.index = owner.current_device if device is None else device
                self.recording = None

            def wait_stream(self, other) -> None:
                assert other.index == self.index

        self.streams = [Stream(0), Stream(1)]

        class CUDAGraph:
            def __init__(self) -> None:
                self.nodes = []

            def replay(self) -> None:
                for node in self.nodes:
                    node()

        @contextmanager
        def device(which):
            before, self.current_device = self.current_device, torch.device(which).index
            try:
                yield
            finally:
                self.current_device = before

        @contextmanager
        def stream(which):
            with device(torch.device("cuda", which.index)):
                before, self.streams[which.index] = self.streams[which.index], which
                try:
                    yield
                finally:
                    self.streams[which.index] = before

        default = []

        @contextmanager
        def graph(graph, stream=None, capture_error_mode="global"):
            if stream is None:
                stream = default[0] if default else default.append(Stream()) or default[0]
            with contexts["stream"](stream):
                stream.recording = graph.nodes
                try:
                    yield
                finally:
                    stream.recording = None
                    self.captures.append((stream.index, len(graph.nodes)))

        def current_stream(which=None):
            index = None if which is None else torch.device(which).index
            return self.streams[self.current_device if index is None else index]

        contexts = {"device": device, "stream": stream, "graph": graph}
        found = {"Stream": Stream, "CUDAGraph": CUDAGraph, "current_stream": current_stream}
        for name, what in (contexts | found).items():
            monkeypatch.setattr(torch.cuda, name, what)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current_device)

    def launch(self, device: torch.device, work) -> None:
        stream = torch.cuda.current_stream(device)
        if stream.recording is None:
            work()
        else:
            stream.recording.append(work)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_model_on_a_device_that_is_not_current(monkeypatch, guarded):
    cuda, weight = Cuda(monkeypatch), object()
    if not guarded:
        monkeypatch.setattr(cuda_graph, "on_device", lambda device: nullcontext())

    def blocks(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        cuda.launch(x.device, lambda: out.copy_(x * 2))
        return out

    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # somebody's capture on the current device
        pass
    stack = StackGraphs()
    with nullcontext() if guarded else pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        for _ in range(5):
            x = torch.randn(2, 3).as_subclass(OnDevice1)
            assert torch.equal(stack.run("a kind", (weight,), blocks, x), x * 2)
    assert cuda.captures[1:] == ([(1, 1)] if guarded else [(0, 0)])
    assert len(stack) == guarded
    assert cuda.current_device == 0


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_hardware_graphs(dtype):
    net = trained_like_(ConvMixer(64, 3, 9, 7, num_classes=6), (2, 3, 63, 63)).to("cuda", dtype)
    plain = copy.deepcopy(net)
    optimize(net, cuda_graph=True)
    for step in range(8):
        x = torch.randn(2, 3, 63, 63, device="cuda", dtype=dtype)
        assert torch.equal(net(x), plain(x))
        if step == 4:
            for one, other in zip(net.parameters(), plain.parameters(), strict=True):
                one.mul_(1.1)
                other.mul_(1.1)
    assert len(net.blocks._graphs) == 1


@pytest.mark.gpu
@gpu
@torch.inference_mode()
def test_hardware_depth_first():
    net = trained_like_(ConvMixer(64, 3, 9, 7, num_classes=6), (2, 3, 63, 63)).to("cuda")
    x = torch.randn(300, 3, 63, 63, device="cuda")
    want = net(x)
    torch.testing.assert_close(optimize(net, depth_first=True)(x), want, rtol=1e-4, atol=1e-4)
