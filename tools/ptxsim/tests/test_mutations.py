"""Planted bugs are caught: by a finding in lockstep, by a wrong result in the other orders."""

import numpy as np
import ptxsim
import pytest
from ptxsim.types import PTXError, bf16_to_f32, f32_to_bf16
from test_cuda import gemm_problem, rng, run_gemm

SYNC_BUGS = {
    "no barrier after the wait": ("        __syncthreads();   // stage filled\n", ""),
    "no barrier before reuse": ("        __syncthreads();   // stage free\n", ""),
    "wait one group too late": ("copy_wait<1>()", "copy_wait<2>()"),
}


@pytest.fixture(scope="module")
def problem():
    return gemm_problem(200, 152, 96)


def mutate(source, old, new):
    assert source.count(old) == 1, old
    return ptxsim.cuda.compile(source.replace(old, new))


@pytest.mark.parametrize("name", SYNC_BUGS)
def test_synchronisation_bug_is_reported_and_changes_the_result(gemm_source, problem, name):
    module = mutate(gemm_source, *SYNC_BUGS[name])
    _, stats = run_gemm(module, problem)
    assert any("race" in finding for finding in stats.races), "lockstep order must report a race"
    wrong = []
    for order, seed in (("warp", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        c, stats = run_gemm(module, problem, order=order, seed=seed)
        assert stats.races
        if not np.allclose(c, problem[3], rtol=8e-3, atol=2e-2):
            wrong.append(order)
    assert len(wrong) >= 3, f"only {wrong} gave a wrong result"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("row_a = in_a ? m0 + row : 0", "row_a = m0 + row", "global load .* out of bounds"),
        ("row < M && col < N", "row <= M && col < N", "global store out of bounds"),
    ],
)
def test_out_of_bounds_is_an_error_with_the_thread(gemm_source, problem, old, new, message):
    source = (
        gemm_source.replace("int bytes = valid ? 16 : 0;", "int bytes = 16;")
        if "row_a" in old
        else gemm_source
    )
    with pytest.raises(PTXError, match=message + r".*cta \[.*thread \d+"):
        run_gemm(mutate(source, old, new), problem)


def test_wrong_swizzle_gives_a_wrong_result(gemm_source, problem):
    module = mutate(
        gemm_source,
        "swizzle(row, chunk));\n            }\n#pragma unroll\n            for (int i",
        "(row * 4 + chunk) * 16);\n            }\n#pragma unroll\n            for (int i",
    )
    c, _ = run_gemm(module, problem)
    assert not np.allclose(c, problem[3], rtol=8e-3, atol=2e-2)


def test_missing_swizzle_is_a_fourfold_bank_conflict(gemm_source, problem):
    module = mutate(
        gemm_source, "(row * 4 + (chunk ^ ((row >> 1) & 3))) * 16", "(row * 4 + chunk) * 16"
    )
    c, stats = run_gemm(module, problem)
    assert np.allclose(c, problem[3], rtol=8e-3, atol=2e-2)
    took, ideal = stats.bank_conflicts()["ldmatrix"]
    assert took == 4 * ideal


def test_strict_mode_raises(gemm_source, problem):
    module = mutate(gemm_source, *SYNC_BUGS["no barrier before reuse"])
    with pytest.raises(ptxsim.RaceError, match="race"):
        run_gemm(module, problem, strict=True)


def test_uninitialised_output_is_reported(basic):
    a, b, c = rng.standard_normal((3, 256)).astype("f4")
    stats = basic.launch("vadd", 1, 128, [a, b, c, 256], poison=(2,))
    assert stats.unwritten["2"] == 128 * 4
    assert np.isnan(c[128:]).all()
    stats = basic.launch("vadd", 1, 128, [a, b, c, 128], poison=(0,))
    assert any("uninitialised global" in f for f in stats.races)


def test_endless_loop_and_deadlock_are_errors(basic):
    with pytest.raises(PTXError, match="endless or spin loop"):
        basic.launch("stuck", 1, 64, [np.zeros(1, "i4")], max_steps=10000)
    with pytest.raises(PTXError, match=r"deadlock|spin"):
        basic.launch("divergent_barrier", 1, 64, [np.zeros(4, "i4")], max_steps=10000)


def test_misaligned_access(basic):
    device = ptxsim.Device(1 << 20)
    p = device.put(np.zeros(4096, "u1"))
    program = ptxsim.compile_kernel(basic.module, "vadd")
    with pytest.raises(PTXError, match="misaligned"):
        ptxsim.launch(program, device, 1, 32, [p + 2, p, p, 32])


def test_triton_barriers(triton, tmp_path):
    """Each bar.sync of a Triton matmul is removed in turn: some give races and wrong results."""
    import kernels

    built = ptxsim.sass.aot(
        kernels.matmul,
        {
            "a": "*bf16",
            "b": "*bf16",
            "c": "*bf16",
            "M": "i32",
            "N": "i32",
            "K": "i32",
            "sam": "i32",
            "sbk": "i32",
            "scm": "i32",
        },
        {"BM": 64, "BN": 64, "BK": 32},
        80,
        num_stages=3,
        divisible=("M", "N", "K", "sam", "sbk", "scm"),
    )
    a, b = (f32_to_bf16(rng.standard_normal((128, 128)).astype("f4")) for _ in "ab")
    expected = bf16_to_f32(a) @ bf16_to_f32(b)
    parts = built.ptx.split("bar.sync")

    def run(ptx, order):
        c = np.zeros((128, 128), np.uint16)
        stats = ptxsim.cuda.CudaModule(ptx).launch(
            built.name,
            (2, 2),
            128,
            [a, b, c] + [128] * 6 + [None, None],
            dynamic_smem=built.shared,
            order=order,
            poison=(2,),
        )
        return np.allclose(bf16_to_f32(c), expected, 8e-3, 3e-2), bool(stats.races)

    for order in ptxsim.ORDERS:
        assert run(built.ptx, order) == (True, False)
    reported = wrong = 0
    for i in range(1, len(parts)):
        ptx = "bar.sync".join(parts[:i]) + "bar.warp.sync -1; //" + "bar.sync".join(parts[i:])
        reported += run(ptx, "lockstep")[1]
        wrong += any(not run(ptx, order)[0] for order in ("warp", "reverse"))
    assert reported >= 3, (reported, wrong, len(parts) - 1)
    assert wrong >= 3, (reported, wrong, len(parts) - 1)
