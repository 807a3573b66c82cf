# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the Triton backend without a GPU: simulators execute its launches.

Here is one problem per regime. ``pytest --simulate ttsem -k triton`` runs every test of every
backend on it too, which takes its time.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from marginkernels import ArcFace, CosFace, backends, margin_cross_entropy, ops
from marginkernels.backends import triton
from marginkernels.backends.triton import configs
from marginkernels.backends.triton.configs import Config
from marginkernels.testing import assert_within_budget
from marginkernels.transforms import TRANSFORMS
from tests.support import hard_cases, losses, sweeps, unchecked, updates
from tests.support.losses import LOSSES, dense, fused, solve
from tests.support.problems import random_problem
from tests.support.simulation import TARGETS, needs_triton, require_interpreter, simulated
from tools.ptxsim import triton_adapter

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# the regimes of test_head, each in one of its types: a single number, one row, no negatives, ragged
# tiles in every direction, several row tiles, saved tiles
PROBLEMS = {
    "1x1x1 fp32": ((1, 1, 1), (F32, F32, None), False),
    "1x300x31 bf16": ((1, 300, 31), (BF16, BF16, None), False),
    "5x1x16 fp16": ((5, 1, 16), (F16, F16, None), False),
    "17x7x31 fp32, bf16 compute": ((17, 7, 31), (F32, F32, BF16), True),
    "33x525x500 bf16": ((33, 525, 500), (BF16, BF16, None), False),
    "70x150x513 fp32": ((70, 150, 513), (F32, F32, None), True),
    "150x300x64 fp32, fp16 compute": ((150, 300, 64), (F32, F32, F16), False),
    "9x257x1024 bf16, fp32 weights": ((9, 257, 1024), (BF16, F32, None), True),
}
# functions of a backend
HARD_CASES = {
    "zero rows fp16": partial(hard_cases.zero_rows, F16),
    "duplicates": hard_cases.duplicates,
    "easy rows, saved tiles": partial(hard_cases.easy_rows, "auto"),
    "small rows opposite to every class": hard_cases.small_opposite_rows,
    "cosines near -1": partial(hard_cases.cosines_of_one_sign, -1, 256.0),
    "cosines near 1": partial(hard_cases.cosines_of_one_sign, 1, 72.9),
    "norms of 1e14": partial(hard_cases.extreme_norms, 1e14, "both", F32),
    "nothing to average fp16": partial(hard_cases.nothing_to_average, F16),
    "no rows": partial(hard_cases.smallest_problems, 0, 5),
    "large biases": partial(hard_cases.large_biases, 1e4),
    "learnable scale": hard_cases.learnable_scale_and_bias,
    "labels out of range": partial(unchecked.labels_out_of_range, "both", F16),
    "a sample out of range": partial(unchecked.samples_are_checked, "too large"),
    "gradients through norms": partial(hard_cases.gradients_through_the_norms, "none"),
    **{
        f"cosines of {name}": partial(
            sweeps.agrees_with_the_definition, name, sweeps.usual_constants(name)
        )
        for name in TRANSFORMS
        if name != "identity"
    },
    **{
        f"operands, {case}": partial(sweeps.wrong_operands_are_named, case) for case in sweeps.WRONG
    },
    "AirFace": partial(losses.stays_in_the_definitions_budget, "AirFace", F32),
    "AirFace at the ends": partial(losses.finite_at_the_ends, "AirFace", F16),
    "MV-Softmax": partial(losses.stays_in_the_definitions_budget, "MV-AM-Softmax", BF16),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_ttsem_matches_fp64(name, poisoned):
    shape, dtypes, save_tiles = PROBLEMS[name]
    problem = random_problem(*shape, dtypes=dtypes, margin=ArcFace(0.3), scale=32.0)
    with simulated("ttsem"):
        problem.check("triton", save_tiles=save_tiles)


@pytest.mark.parametrize("name", HARD_CASES)
def test_ttsem_passes_hard_cases(name, poisoned):
    with simulated("ttsem"):
        HARD_CASES[name]("triton")


@pytest.mark.parametrize(
    "normalize, compute_dtype", [("both", BF16), ("weight", F32), ("none", BF16)]
)
def test_ttsem_normalize_modes_with_bias_and_smoothing(normalize, compute_dtype, poisoned):
    scale = {"both": 16.0, "weight": 2.0, "none": 0.2}[normalize]
    problem = random_problem(
        37, 301, 48, dtypes=(F32, F32, compute_dtype), bias=True, margin=CosFace(0.1), scale=scale,
        normalize=normalize, label_smoothing=0.1,
    )  # fmt: skip
    with simulated("ttsem"):
        problem.check("triton")


@pytest.mark.parametrize(
    "name, dtype", [("CurricularFace", F16), ("ArcNegFace", BF16), ("inter-class filter", F32)]
)
def test_ttsem_transforms_across_tiles(name, dtype, poisoned):
    """Has two tiles of rows and several of classes; the definition is the plain path."""
    x, w, y = losses.operands(n=70, d=48, dtype=dtype)
    w = torch.cat([w, x[:11] + torch.randn(11, 48).to(dtype), torch.randn(200, 48).to(dtype)])
    loss, settings = LOSSES[name], dict(label_smoothing=0.1)
    exact = solve(lambda x, w: dense(loss, x, w, y, **settings), x.double(), w.double())
    draws = []
    for _ in range(6):
        order = torch.randperm(x.shape[1])
        rows, dx, dw = solve(
            lambda x, w: losses.plain(loss, x, w, y, settings), x[:, order], w[:, order]
        )
        draws.append([rows, dx[:, order.argsort()], dw[:, order.argsort()]])
    with simulated("ttsem"):
        ours = solve(lambda x, w: fused(loss, x, w, y, backend="triton", **settings), x, w)
    for index, what in enumerate(("loss", "dx", "dw")):
        assert_within_budget(what, ours[index], [d[index] for d in draws], exact[index])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16, None), (F32, F32, F16)], ids=["bf16", "fp16"])
def test_ptx_matches_fp64(dtypes, target, poisoned):
    """Executes the input of the GPU's assembler with every check on.

    It shows races and unfinished copies inside a program, which the IR cannot show.
    """
    problem = random_problem(20, 150, 72, dtypes=dtypes, margin=ArcFace(0.3), scale=32.0)
    with simulated("ptxsim", target):
        problem.check("triton", save_tiles=False)


def test_ptx_with_tensor_descriptors_matches_fp64(monkeypatch, poisoned):
    """Has two tiles of rows and three of classes, where the last ones are not full."""
    problem = random_problem(
        70, 300, 72, dtypes=(BF16, BF16, None), bias=True, margin=ArcFace(0.3), scale=16.0,
        label_smoothing=0.1,
    )  # fmt: skip
    config = Config(64, 128, 64, 4, 3, 2, descriptors=True, flatten=True)
    monkeypatch.setattr(configs, "choose", lambda *_: config)
    with simulated("ptxsim", "sm_90"):
        problem.check("triton", save_tiles=False)


@needs_triton
def test_interpreter_agrees(request):
    """Runs Triton's own interpreter, in a process that starts with it, in fp32 and fp16 only."""
    require_interpreter()
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"{__file__}::{request.node.name}"]
        result = subprocess.run(
            command, env=dict(os.environ, TRITON_INTERPRET="1"), capture_output=True, text=True
        )
        assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-2000:]
        return
    for compute_dtype in (F32, F16):
        problem = random_problem(
            20, 150, 40, dtypes=(F32, F32, compute_dtype), margin=ArcFace(0.3), scale=32.0
        )
        with simulated("interpreter"):
            problem.check("triton", save_tiles=compute_dtype == F32)
    case = updates.Case("adamw", BF16, BF16, c=40, sampled=True, project=True, max_row_norm=0.05)
    step = updates.problem(case, "cpu")
    with simulated("interpreter"):
        updates.assert_as_expected(case, step, updates.take("triton", case, step))


def test_chunks_of_w_and_of_g_stay_in_the_budget(monkeypatch):
    """Sends rounded w, G and dw through small buffers many times instead of once.

    A vendor's GEMM may round another way for each shape.
    """
    from marginkernels.backends.triton import operands

    problem = random_problem(
        20, 700, 40, dtypes=(F32, F32, BF16), margin=ArcFace(0.3), scale=32.0, label_smoothing=0.1
    )
    monkeypatch.setattr(operands, "CHUNK_BYTES", 128 * 64 * 8)
    with simulated("ttsem", races="off"):
        problem.check("triton")


@pytest.mark.parametrize("most_scanned", [0, 100])
def test_targets_of_a_class_are_added_up_wherever_they_stand(most_scanned, monkeypatch, poisoned):
    """Has classes with one row, none, and some in several blocks of labels, sorted and scanned."""
    from marginkernels.backends.triton import backward

    monkeypatch.setattr(backward, "MOST_SCANNED", most_scanned)
    monkeypatch.setattr(backward, "LABEL_GROUPS", 1)
    problem = random_problem(70, 30, 40, margin=ArcFace(0.3), scale=32.0)
    problem.y[:] = torch.tensor([*range(5, 15), *[3] * 25, *[29, 3] * 17, 0])
    with simulated("ttsem"):
        problem.check("triton")


@needs_triton
def test_targets_are_added_up_alike_scanned_and_sorted(monkeypatch, poisoned):
    """Has several targets of a row, one of them twice, and classes with targets of many rows."""
    from marginkernels.backends.triton import backward

    problem = updates.problem(updates.Case(targets=5, c=30), "cpu")
    taken = []
    for most_scanned in (0, 10_000):
        monkeypatch.setattr(backward, "MOST_SCANNED", most_scanned)
        torch.manual_seed(1)
        with simulated("ttsem", races="off"):
            taken.append(updates.take("triton", updates.Case(targets=5, c=30), problem))
    for is_sorted, scanned in zip(*((t.dw, t.plain_dx, t.w) for t in taken), strict=True):
        torch.testing.assert_close(is_sorted, scanned, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits(poisoned):
    problem = random_problem(
        70, 300, 40, dtypes=(BF16, BF16, None), bias=True, margin=ArcFace(0.3), scale=16.0,
        label_smoothing=0.1,
    )  # fmt: skip
    with simulated("ttsem", races="off"):
        once, again = (problem.solve_fused("triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_results_do_not_depend_on_the_number_of_programs(monkeypatch):
    problem = random_problem(20, 1100, 40, margin=ArcFace(0.3), scale=32.0)
    solutions = []
    for multiprocessors in (1, 7):
        device = configs.Target("sm_80", multiprocessors)
        monkeypatch.setattr(configs, "target", lambda _, device=device: device)
        with simulated("ttsem"):
            solutions.append(problem.solve_fused("triton"))
    for a, b in zip(*solutions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_statistics_keep_every_device_busy_at_every_batch_size():
    """Counts whole waves of programs, and class tiles of the longest program, for a million."""
    for rows, multiprocessors in itertools.product(
        configs.TABLE, (58, 82, 108, 132, 148, 170, 304)
    ):
        for kind, n in itertools.product(configs.TABLE[rows], range(64, 65_537, 61)):
            config = configs.choose(rows, kind, configs.Load.STATISTICS, n)
            slots = multiprocessors * config.ctas
            row_tiles, class_tiles = -(-n // config.block_n), -(-(10**6) // config.block_c)
            columns = configs.columns(slots, row_tiles, class_tiles)
            waves = -(-row_tiles * columns // slots)
            time = waves * -(-class_tiles // columns)
            assert row_tiles * class_tiles / slots / time >= 0.93, (rows, multiprocessors, kind, n)


@pytest.mark.parametrize("n, padded", [(1, 64), (64, 64), (65, 128), (150, 192), (300, 384)])
def test_tiles_pad_few_rows(n, padded):
    for load in (configs.Load.STATISTICS, configs.Load.GRADIENT):
        block = configs.choose("sm_90", "half", load, n).block_n
        assert -(-n // block) * block == padded


def test_saved_tiles_meet_no_tile_that_is_wider():
    kinds = [kind for row in configs.TABLE.values() for kind in row.values()]
    for config in itertools.chain(*kinds):
        saves = config.serves & configs.Load.STATISTICS_SAVED
        assert configs.TILES_PADDING % config.block_c == 0 or not saves


def test_each_load_has_a_tile():
    for row, load in itertools.product(configs.TABLE.values(), configs.Load):
        assert all(any(load & config.serves for config in kind) for kind in row.values())


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (dict(sub_centers=2), "sub_centers = 2"),
        (dict(y=torch.zeros(4, 3, dtype=torch.int64)), "shape \\(4, 3\\)"),
        (dict(transform="sphereface2", constants=torch.ones(4)), "'sphereface2'"),
    ],
)
@needs_triton
def test_exponentials_are_saved_for_softmax_over_whole_classes_alone(changed, complaint):
    from marginkernels.backends.triton.forward import head_fwd

    call = dict(
        x=torch.ones(4, 8), w=torch.ones(6, 8), y=torch.zeros(4, dtype=torch.int64),
        scale=torch.ones(()), bias=None, normalize_x=True, normalize_w=True, compute_dtype=F32,
        want_sum=False, want_max=False, transform="identity", row_parameter=None, constants=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"save_tiles: expected False with .*{complaint}"):
        head_fwd(**call | changed, save_tiles=True)


@needs_triton
def test_offsets_beyond_32_bits():
    """Reads the last rows of operands of more than 2^31 elements; only touched pages exist."""
    from marginkernels.backends.triton.row_kernels import prepare_rows_kernel
    from marginkernels.backends.triton.tile_kernels import statistics_kernel

    n, c, d = 4, 2**22 + 128, 512
    w = torch.empty(c, d, dtype=BF16)
    w[-128:] = torch.randn(128, d)
    q = torch.zeros(c)
    common = dict(inverse_limit=1e12, num_warps=8)
    last = c // 8 - 1
    triton_adapter.run(
        prepare_rows_kernel, (c // 8,), w, None, None, q, c, d, d // 64, d, 1, UNIT=1, TILE_D=64,
        BLOCK_R=8, BLOCK_D=512, ctas=range(last - 15, last + 1), **common,
    )  # fmt: skip
    torch.testing.assert_close(q[-128:], 1 / w[-128:].float().norm(dim=1))

    x, y, tiles = torch.randn(n, d).to(BF16), torch.full((n,), -1), c // 128
    partials = torch.zeros(4, tiles, n)
    triton_adapter.run(
        statistics_kernel, (tiles,), x, w, y, torch.ones(n), q, torch.tensor(1.0), None, None, None,
        torch.zeros(1, tiles, dtype=torch.int8), partials, None, n, c, None, d // 64, 0, tiles,
        tiles, tiles, 0, 0, TRANSFORM=None, ONE_VERSUS_REST=False, NORMALIZE_W=True,
        SUB_CENTERS=1, SAVE_TILES=False, WANT_SUM=False, SEPARATE_MAX=False,
        PRECISION="ieee", BLOCK_N=64, BLOCK_C=128, BLOCK_D=64, num_stages=3, DESCRIPTORS=False,
        FLATTEN=False,
        ctas=range(tiles - 1, tiles), **common,
    )  # fmt: skip
    logits = x.double() @ (w[-128:].double() * q[-128:, None].double()).T
    maximum, total = partials[0, -1], partials[1, -1]
    lse = (maximum + total.log2()).double() * torch.log(torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@needs_triton
def test_tuning_keeps_the_fastest(tmp_path, monkeypatch):
    """Replaces the clock: a tile beyond the table is the fastest, is found once, and then read."""
    from marginkernels.backends.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "found", {})
    calls, tried = [], tuning.candidates("sm_80", "half", 100, False)
    assert {config[:6] for config in tried} > {c[:6] for c in configs.TABLE["sm_80"]["half"]}

    def op(x, w, *, config=None, compute_dtype):
        calls.append(config)

    def clock(function):
        function()
        return 1.0 if calls[-1] == tried[-1] else 2.0

    monkeypatch.setattr("triton.testing.do_bench", clock)
    x, w = torch.zeros(100, 8), torch.zeros(1000, 8)
    assert tuning.fastest(op, x, w, compute_dtype=BF16) == tried[-1] and calls == tried
    assert tuning.fastest(op, x[:70], w[:900], compute_dtype=BF16) == tried[-1]
    monkeypatch.setattr(tuning, "found", {})
    assert tuning.fastest(op, x, w, compute_dtype=BF16) == tried[-1] and calls == tried
    assert tuning.fastest(op, x, w[:100], compute_dtype=BF16) and len(calls) == 2 * len(tried)


@needs_triton
def test_tuning_tries_tensor_descriptors_and_no_tile_that_cannot_run():
    from marginkernels.backends.triton import tuning

    tried = tuning.candidates("sm_90", "half", 1000, False)
    assert any(config.descriptors for config in tried) and len(set(tried)) == len(tried)
    assert any(config.block_c == 256 for config in tried)
    assert all(config.block_c <= 128 for config in tuning.candidates("sm_90", "half", 1000, True))
    assert all(config.block_n == 64 for config in tuning.candidates("sm_90", "half", 60, False))
    assert not any(config.descriptors for config in tuning.candidates("sm_86", "half", 999, False))
    assert not any(config.flatten for config in tuning.candidates("sm_90", "half", 999, False, 3))
    for tile in ((256, 256, 64, 8, 2, 1), (128, 128, 64, 4, 4, 2), (128, 256, 64, 8, 3, 2)):
        assert not tuning.fits(Config(*tile), "sm_90", "half")


def test_reasons_name_everything_that_is_missing(monkeypatch):
    monkeypatch.setattr(triton, "installed_version", lambda: (3, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "; ".join(backends.reasons("triton", "cpu", F64))
    assert all(part in text for part in ("cuda devices, not on cpu", "not in float64"))
    assert "triton" in text
    assert "torch finds no GPU" in backends.reasons("triton")
    problem = random_problem(3, 4, 5, margin=ArcFace(0.3), scale=2.0)
    with pytest.raises(RuntimeError, match="'triton' cannot run here"):
        margin_cross_entropy(problem.x, problem.w, problem.y, backend="triton", **problem.settings)


def test_triton_is_imported_only_when_it_is_used():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, marginkernels as m\n"
        "assert m.backend_report()['triton']\n"
        "m.margin_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]),"
        " margin=m.NSoftmax(), scale=2.0, backend='reference')\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("save_tiles", [False, True])
def test_fakes_agree_with_the_ops(save_tiles):
    """Compares shapes, types and strides under torch.compile, and finds no input changed."""
    x, w, y = torch.randn(5, 8), torch.randn(70, 8), torch.tensor([0, 69, 3, -1, 3])
    functor = dict(transform="identity", row_parameter=None, constants=None)
    sides = dict(normalize_x=True, normalize_w=True, compute_dtype=BF16, **functor)
    forward = (x, w, y, torch.tensor(16.0), None)
    wanted = dict(save_tiles=save_tiles, want_sum=False, want_max=True)
    needs = dict(need_x=True, need_w=True, need_bias=False, need_scale=not save_tiles)
    with simulated("ttsem"):
        torch.library.opcheck(ops.head_fwd("triton"), forward, sides | wanted)
        lse, _, _, _, _, x_inv, w_inv, tiles, _ = ops.head_fwd("triton")(
            *forward, **sides, **wanted
        )
        g = torch.randn(5)
        backward = (*forward, None, lse, x_inv, w_inv, tiles, g, g, None, None)
        torch.library.opcheck(ops.head_bwd("triton"), backward, sides | needs)
