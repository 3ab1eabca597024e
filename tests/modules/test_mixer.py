"""Whole blocks in one native call: values, every shape, threads, batches, interrupts, errors."""

from __future__ import annotations

import copy
import re
import sys
import textwrap
import threading
from pathlib import Path

import fresh_python
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from convmixer_fast import MixerBlock, explain, use_backend
from convmixer_fast.arch import ACTIVATIONS
from convmixer_fast.backends.cpu import native
from convmixer_fast.modules.stack import MixerStack
from convmixer_fast.ops import mixer_stack
from convmixer_fast.reference import reference_block
from convmixer_fast.testing import assert_numerics, trained_like_

pytestmark = pytest.mark.skipif(not native.load(), reason=native.why_unavailable() or "built")


@pytest.fixture(params=native.load().isas() if native.load() else [])
def isa(request):
    engine = native.load()
    before = engine.isa()
    engine.set_isa(request.param)
    yield request.param
    engine.set_isa(before)


def pair(
    dim: int, depth: int, k: int, act: str = "gelu", shape=None
) -> tuple[nn.Module, MixerStack]:
    """The plain blocks, trained-like, and ours with the same parameters."""
    plain = nn.Sequential(*[reference_block(dim, k, ACTIVATIONS[act]) for _ in range(depth)])
    trained_like_(plain, shape or (3, dim, 9, 9))
    ours = MixerStack(*[MixerBlock(dim, k, act) for _ in range(depth)])
    ours.load_state_dict(plain.state_dict())
    return plain, ours.eval()


def check(plain: nn.Module, ours: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        assert {row.op for row in explain(ours, x)} == {"mixer_stack"}
        got = ours(x)
        same, oracle = plain(x), copy.deepcopy(plain).double()(x.double())
    assert_numerics(got, same, oracle)
    return got


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8, 9, 15])
def test_every_kernel_size_and_activation(isa, k, act):
    plain, ours = pair(13, 2, k, act)
    check(plain, ours, torch.randn(2, 13, 9, 11))


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 7, 11, 12, 13, 24, 31, 64, 99, 400])
def test_every_width(isa, dim):
    plain, ours = pair(dim, 1, 3)
    check(plain, ours, torch.randn(2, dim, 7, 7))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1), (2, 2), (4, 8), (8, 8), (1, 97), (33, 2)])
def test_maps_smaller_than_kernel_panel_and_tile(isa, size):
    plain, ours = pair(10, 2, 9)
    check(plain, ours, torch.randn(3, 10, *size))


def test_large_planes_of_several_blocks(isa):
    plain, ours = pair(3, 1, 7, shape=(2, 3, 40, 40))
    check(plain, ours, torch.randn(1, 3, 130, 301))


# The examples: maps of one column, where each term was once rounded as a bias that came first.
@settings(deadline=None, max_examples=40)
@example(n=1, dim=9, depth=1, h=7, w=1, k=23, layout="contiguous", seed=2)
@example(n=1, dim=2, depth=1, h=11, w=1, k=30, layout="sliced", seed=0)
@example(n=47, dim=3, depth=1, h=12, w=1, k=16, layout="contiguous", seed=0)
@example(n=47, dim=3, depth=1, h=12, w=1, k=16, layout="channels_last", seed=0)
@given(
    n=st.integers(0, 4),
    dim=st.integers(1, 40),
    depth=st.integers(1, 3),
    h=st.integers(1, 24),
    w=st.integers(1, 24),
    k=st.integers(1, 31),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "expanded"]),
    seed=st.integers(0, 99),
)
def test_any_problem(n, dim, depth, h, w, k, layout, seed):
    torch.manual_seed(seed)
    plain, ours = pair(dim, depth, k)
    if n > 0:  # PyTorch's own error on a few values can be nearly zero by luck
        values = h if layout == "expanded" else dim * h * w  # of an image, that differ
        n = max(n, -(-256 // values))
    x = torch.randn(n, dim, h, w)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(n + 1, dim + 2, h + 1, 2 * w)[1:, 1:-1, 1:, ::2]
    elif layout == "expanded":
        x = torch.randn(n, 1, h, 1).expand(n, dim, h, w)
    if n == 0:
        with torch.no_grad():
            assert ours(x).shape == x.shape
        return
    got = check(plain, ours, x)
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.channels_last if last else torch.contiguous_format
    assert got.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("size", [(16, 16), (7, 5)])
def test_bits_do_not_depend_on_threads_batch_or_company(isa, size):
    _, ours = pair(40, 3, 5)
    x = torch.randn(7, 40, *size)
    before = torch.get_num_threads()
    results = []
    try:
        with torch.no_grad():
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(ours(x))
                results.append(torch.cat([ours(image[None]) for image in x]))
                results.append(torch.cat([ours(x[:3]), ours(x[3:])]))
                results.append(ours(x.flip(0)).flip(0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


# A thread that has no image left ends the others' after their next block, and all go on together:
# sooner or later with every draw of the clock, whose times the sizes vary.
def test_images_that_threads_finish_together_keep_their_bits():
    _, ours = pair(48, 12, 5)
    before = torch.get_num_threads()
    try:
        for i in range(24):
            x = torch.randn(2 + i % 4, 48, 20 + i % 7, 25)
            results = []
            with torch.no_grad():
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(ours(x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


# Even, and beyond the size from which Strassen's algorithm is taken; an odd width never is.
@pytest.mark.parametrize("dim", [400, 401, 1100])
@pytest.mark.parametrize("strassen", ["0", "1"])
def test_wide_blocks_with_and_without_strassen(isa, dim, strassen, monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", strassen)
    plain, ours = pair(dim, 1, 3, shape=(2, dim, 3, 3))
    # More than a tile, whose rest is a single panel and a part of one; less; a part of a panel.
    for size in ((23, 23), (17, 17), (5, 1)):
        check(plain, ours, torch.randn(1, dim, *size))


# Two chunks of channels. The tolerance is for a product that is left out or added twice.
@pytest.mark.parametrize("size", [(23, 23), (8, 9)])
def test_strassen_over_several_chunks_is_the_direct_gemm(isa, size, monkeypatch):
    _, ours = pair(1600, 1, 3, shape=(2, 1600, 3, 3))
    x = torch.randn(1, 1600, *size)
    results = []
    with torch.no_grad():
        for levels in "01":
            monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", levels)
            results.append(ours(x))
    # 72 pixels are no pair of whole panels with the widest vectors.
    assert size == (8, 9) or not torch.equal(*results)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def strassen_from(isa):
    """From how many channels on one level is the default: AVX-512's multiply-adds are too fast
    for it, but for Zen 4's, of half a vector each."""
    if isa != "avx512":
        return 384
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("nothing here tells which CPU this is")
    words = cpuinfo.read_text()
    zen4 = "AuthenticAMD" in words and re.search(r"^cpu family\s*: 25$", words, re.MULTILINE)
    return 384 if zen4 else 3072


@pytest.mark.parametrize("dim", [382, 384])
def test_few_channels_are_multiplied_directly_unless_asked(isa, dim, monkeypatch):
    _, ours = pair(dim, 1, 3)
    x = torch.randn(1, dim, 16, 16)
    with torch.no_grad():
        monkeypatch.delenv("CONVMIXER_FAST_STRASSEN", raising=False)
        default = ours(x)
        monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", "0")
        assert torch.equal(default, ours(x)) == (dim < strassen_from(isa))
        monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", "1")
        assert torch.equal(default, ours(x)) == (dim >= strassen_from(isa))


def test_the_default_is_what_is_fastest_and_others_can_be_asked_for(isa, monkeypatch):
    _, ours = pair(640, 1, 3)
    x = torch.randn(1, 640, 16, 16)
    results = {}
    with torch.no_grad():
        for value in (None, "0", "1"):
            monkeypatch.delenv("CONVMIXER_FAST_STRASSEN", raising=False)
            if value is not None:
                monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", value)
            results[value] = ours(x)
    assert torch.equal(results[None], results["0" if strassen_from(isa) > 640 else "1"])
    assert not torch.equal(results["0"], results["1"])
    torch.testing.assert_close(results["0"], results["1"], rtol=1e-4, atol=1e-4)


# Maps of more than half a tile, and maps that share one: whole sets of panels, or the rest of one.
@pytest.mark.parametrize("shape", [(3, 19, 17), (7, 8, 8), (11, 3, 7), (9, 4, 4)])
@pytest.mark.parametrize("dim", [300, 640])
@pytest.mark.parametrize("strassen", ["0", "1"])
def test_bits_of_wide_blocks_do_not_depend_on_threads_or_batch(
    isa, strassen, dim, shape, monkeypatch
):
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", strassen)
    _, ours = pair(dim, 2, 5)
    batch, height, width = shape
    x = torch.randn(batch, dim, height, width)
    before = torch.get_num_threads()
    results = []
    try:
        with torch.no_grad():
            # Five: more than write panels past the caches.
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(ours(x))
                results.append(torch.cat([ours(image[None]) for image in x]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_pointwise_weights_are_not_copied():
    _, ours = pair(64, 2, 3)
    x = torch.randn(1, 64, 5, 5)
    with torch.no_grad():
        for block in ours:
            whole = block._whole(x)
            assert whole.weight.data_ptr() == block[1].weight.data_ptr()
            assert whole.packed.numel() < block[1].weight.numel()
            # So that even a write that leaves no trace is seen.
            before = ours(x)
            block[1].weight.data[3, 5] += 1
            assert not torch.equal(ours(x), before)


def test_the_input_is_left_as_it_was():
    _, ours = pair(24, 3, 5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 24, 8, 8).to(dtype)
        before = x.clone()
        with torch.no_grad():
            ours.to(dtype)(x)
        assert torch.equal(x, before)


def test_in_place_equals_out_of_place():
    _, ours = pair(24, 2, 5)
    x = torch.randn(3, 24, 9, 7)
    with torch.no_grad():
        wholes = [block._whole(x) for block in ours]
        blocks = [w.weight for w in wholes], [w.packed for w in wholes]
        want = native.mixer_stack(x, *blocks, 5, "gelu")
        got = native.mixer_stack(x, *blocks, 5, "gelu", out=x)
    assert got is x
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="out must be contiguous"):
        native.mixer_stack(x, *blocks, 5, "gelu", out=x.permute(0, 1, 3, 2).contiguous().mT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_at_the_edges(dtype, layout):
    plain, ours = pair(24, 3, 5)
    plain, ours = plain.to(dtype), ours.to(dtype)
    check(plain, ours, torch.randn(2, 24, 8, 8).to(dtype).contiguous(memory_format=layout))


def test_autocast_takes_whole_blocks_too():
    plain, ours = pair(24, 3, 5)
    x = torch.randn(2, 24, 8, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {row.op for row in explain(ours, x)} == {"mixer_stack"}
        got, same = ours(x), plain(x)
    assert got.dtype == same.dtype == torch.bfloat16
    assert_numerics(got, same, plain.double()(x.double()).detach())


def test_one_call_equals_block_by_block():
    _, ours = pair(24, 3, 5)
    x = torch.randn(2, 24, 8, 8)
    with torch.no_grad():
        y = x
        for block in ours:
            y = block(y)
        assert torch.equal(ours(x), y)


def test_nan_stays_in_its_image_and_reaches_its_neighbourhood():
    _, ours = pair(8, 1, 3)
    x = torch.randn(3, 8, 9, 9)
    x[1, 2, 4, 4] = float("nan")
    with torch.no_grad():
        nan = ours(x).isnan()
    assert not nan[0].any()
    assert not nan[2].any()
    assert nan[1, :, 3:6, 3:6].all()
    assert nan[1].sum() == 8 * 9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("strassen", ["0", "1"])
def test_what_is_not_finite_stays_under_its_kernel_in_wide_blocks(strassen, value, monkeypatch):
    monkeypatch.setenv("CONVMIXER_FAST_STRASSEN", strassen)
    plain, ours = pair(640, 1, 3)
    x = torch.randn(3, 640, 12, 12)
    x[1, 2, 4, 4] = value
    with torch.no_grad():
        # In float64: oneDNN's float32 GELU of infinity is NaN on CPUs with AVX-512.
        out, expected = ours(x), plain.double()(x.double()).float()
    bad = ~out.isfinite()
    assert bad[1, :, 3:6, 3:6].any()
    assert torch.equal(bad, ~expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out[~bad], expected[~bad], rtol=1e-4, atol=1e-4)


def test_several_python_threads_at_once():
    _, ours = pair(32, 2, 7)
    inputs = [torch.randn(2, 32, 12, 12) for _ in range(4)]
    with torch.no_grad():
        wanted = [ours(x) for x in inputs]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(ours(inputs[i]), wanted[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_in_the_workers_of_a_data_loader():
    _, ours = pair(16, 2, 5)
    images = torch.randn(6, 16, 8, 8)
    with torch.no_grad():
        wanted = ours(images)  # the pool of the parent is up before the fork

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> torch.Tensor:
            with torch.no_grad():
                return ours(images[i : i + 1])[0]

    loader = torch.utils.data.DataLoader(Rows(), batch_size=6, num_workers=2, timeout=60)
    assert torch.equal(next(iter(loader)), wanted)


@pytest.mark.parametrize("training", [True, False])
def test_where_gradients_or_statistics_are_wanted_the_halves_run(training):
    plain, ours = pair(8, 2, 3)
    x = torch.randn(2, 8, 6, 6)
    plain.train(training)
    ours.train(training)
    assert "mixer_stack" not in {row.op for row in explain(ours, x)}
    ours(x).square().sum().backward()
    plain(x).square().sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[1].register_forward_hook(lambda *_: None),
        lambda s: s[1][0].register_forward_hook(lambda *_: None),
        lambda s: s[1][2].register_forward_hook(lambda *_: None),
        lambda s: s[1].__setitem__(2, nn.ReLU()),
        lambda s: s[1].__setitem__(2, nn.Tanh()),
        lambda s: s[1].append(nn.Identity()),
        lambda s: s.__setitem__(1, MixerBlock(8, 5).eval()),
        lambda s: s.append(nn.Identity()),
    ],
)
def test_stacks_that_are_not_alike_run_block_by_block_and_right(change):
    _, ours = pair(8, 3, 3)
    change(ours)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        got = ours(x)
        with use_backend("reference"):
            torch.testing.assert_close(got, ours(x), rtol=1e-4, atol=1e-4)


def test_slices_of_a_stack_are_stacks_with_the_same_keys():
    _, ours = pair(8, 3, 3)
    part = ours[1:]
    assert type(part) is MixerStack
    assert list(part._modules) == ["1", "2"]
    assert part[0] is ours[1]
    assert not part.training
    assert len(MixerStack()) == 0
    x = torch.randn(1, 8, 5, 5)
    assert MixerStack()(x) is x


def test_opcheck_and_layouts():
    _, ours = pair(8, 2, 3)
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        wholes = [block._whole(x) for block in ours]
    weights, packed = [w.weight for w in wholes], [w.packed for w in wholes]
    for like in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        torch.randn(2, 9, 5, 6)[:, 1:],
    ):
        opcheck(mixer_stack.default, (like, weights, packed, 3, "gelu"))


BAD = {
    "x must be (N, C, H, W)": lambda x, w, p: (x[0], w, p, 3, "gelu"),
    "x must be float32, bfloat16 or float16": lambda x, w, p: (x.double(), w, p, 3, "gelu"),
    "at least one block": lambda x, w, p: (x, [], [], 3, "gelu"),
    "kernel_size must be at least 1": lambda x, w, p: (x, w, p, 0, "gelu"),
    "unknown activation": lambda x, w, p: (x, w, p, 3, "mish"),
    "packed must have shape": lambda x, w, p: (x, w, [p[0][1:]], 3, "gelu"),
    "weights must have shape": lambda x, w, p: (x, [w[0][1:]], p, 3, "gelu"),
    "1 packed blocks, but 2 weights": lambda x, w, p: (x, 2 * w, p, 3, "gelu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    _, ours = pair(8, 1, 3)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        whole = ours[0]._whole(x)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")) as info:
        mixer_stack(*BAD[message](x, [whole.weight], [whole.packed]))
    assert "\n" not in str(info.value)


def test_mixer_pack_names_what_does_not_fit():
    conv, vector = torch.randn(8, 1, 3, 3), torch.randn(8)
    good = [conv, None, vector, vector, vector, vector, vector]
    native.mixer_pack(*good)
    for i, (name, wrong) in enumerate(
        {"taps": torch.randn(8, 2, 3, 3), "bias1": vector[1:], "scale1": vector.double()}.items()
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            native.mixer_pack(*good[:i], wrong, *good[i + 1 :])


def test_the_measured_limit_is_a_rate():
    engine = native.load()
    one = engine.multiply_add_rate(1, 0.02)
    assert 1e8 < one < 1e13
    with pytest.raises(ValueError, match="threads"):
        engine.multiply_add_rate(0)


INTERRUPT = """
    import threading, time, os, signal
    import torch
    from convmixer_fast.modules.blocks import MixerBlock
    from convmixer_fast.modules.stack import MixerStack

    # Jobs that a script runs in the background inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = MixerStack(*[MixerBlock(256, 9) for _ in range(8)]).eval()
    x = torch.randn(400, 256, 32, 32)
    with torch.no_grad():
        stack(x[:1])
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            stack(x)
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_heard_between_images():
    result = fresh_python.run(
        "-c", textwrap.dedent(INTERRUPT), timeout=300, env={"OMP_NUM_THREADS": "2"}
    )
    assert result.stdout == "interrupted\n", result.stderr


@pytest.mark.skipif(native.load() is None, reason=native.why_unavailable() or "built")
def test_a_band_has_the_bits_of_the_map_and_bad_ones_are_refused() -> None:
    c, k = 6, 4
    weight, taps = torch.randn(c, c, 1, 1), torch.randn(c, 1, k, k)
    vectors = [torch.rand(c) for _ in range(6)]
    packed = native.mixer_pack(taps, *vectors)
    x = torch.randn(2, c, 12, 9)
    expected = native.mixer_stack(x, [weight], [packed], k, "gelu")
    out = torch.empty(2, c, 3, 4)
    # Rows 5 to 7 and columns 2 to 5 see one row and column before them and two after.
    window, band = x[:, :, 4:10, 1:8], (1, 4, 1, 5)
    native.mixer_band(window, band, weight, packed, k, "gelu", out, 108)
    assert torch.equal(out, expected[:, :, 5:8, 2:6])
    with pytest.raises(ValueError, match=r"does not lie in a window of 6 x 7"):
        native.mixer_band(window, (1, 8, 1, 5), weight, packed, k, "gelu", out, 108)
    with pytest.raises(ValueError, match=r"out must have shape \(2, 6, 3, 3\)"):
        native.mixer_band(window, (1, 4, 1, 4), weight, packed, k, "gelu", out, 108)
    gaps = torch.empty(2, c, 3, 8)[..., ::2]
    with pytest.raises(ValueError, match="channel of out must be contiguous"):
        native.mixer_band(window, band, weight, packed, k, "gelu", gaps, 108)
