"""The benchmark: it finds wrong results, refuses to time them, and its rows and names have the documented form."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.epilogue import Epilogue
from pallas_kernels.measure import bench, timing
from pallas_kernels.tile_order import from_tiles
from pallas_kernels.tiles import Problem
from tests.kernels import dense, oracle

SIZES = (64, 0, 128, 64)
SIZES8 = (128, 0, 256, 128)


def small(mode: Any, *, fp8: bool = False) -> tuple[Problem, tuple[int, ...] | None]:
    if fp8:
        sizes = {"dense": (128, 64, 256), "rows": (512, 64, 128), "columns": (256, 512, 128)}.get(mode, (64, 128, 512))
        groups = 1 if mode == "dense" else 4
        problem = Problem(
            *sizes, mode=mode, groups=groups, b_k_major=True, dtype="float8_e4m3fn", transpose_out=mode == "columns",
            epilogue=Epilogue(row_scale=True, column_scale=True, powers_of_two=True),
        )  # fmt: skip
        return problem, None if mode == "dense" else SIZES8
    if mode == "dense":
        return Problem(128, 64, 192, b_k_major=True, transpose_out=True), None
    m, n, k = {"rows": (256, 64, 128), "columns": (256, 256, 64), "contraction": (64, 128, 256)}[mode]
    return Problem(m, n, k, mode=mode, groups=4), SIZES


def exact(problem: Problem, sizes, arguments) -> np.ndarray:
    values, metadata, b, *scales = arguments
    a, b = dense(from_tiles(values), metadata), np.asarray(b, np.float64)
    b = b.T if problem.b_k_major else b
    if sizes is None:
        out = a @ b
    else:
        out = oracle(
            problem.mode, a, b.reshape(4, -1, problem.n) if problem.mode == "rows" else b, sizes, problem.dtype
        )
    out = out.reshape(-1, problem.n)
    if scales:
        rows, columns = (np.asarray(scale, np.float64) for scale in scales)
        if problem.mode == "columns":
            out = out * rows.reshape(4, -1)[np.repeat(np.arange(4), sizes)].T * columns
        else:
            out = out * rows[:, None] * columns
    return out.T if problem.transpose_out else out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("mode", ["dense", "rows", "columns", "contraction"])
def test_error_is_zero_for_the_product_and_not_for_another(mode, fp8):
    problem, sizes = small(mode, fp8=fp8)
    arguments = bench.operands(problem, 0)
    groups = bench.group_array(problem, sizes)
    out = jnp.asarray(exact(problem, sizes, arguments), jnp.float32)
    assert bench.relative_error(problem, groups, arguments, out) < 1e-6
    assert bench.relative_error(problem, groups, arguments, out.at[-1, 3].add(100)) > bench.MAX_ERROR
    assert not bench.relative_error(problem, groups, arguments, out.at[0, 0].set(jnp.nan)) <= bench.MAX_ERROR


def test_wrong_results_are_not_timed(monkeypatch):
    problem, _ = small("dense")
    zeros = jnp.zeros(problem.out_shape, jnp.bfloat16)
    monkeypatch.setattr(bench, "launch", lambda problem, config: lambda values, metadata, b, groups: zeros)
    with pytest.raises(RuntimeError, match=r"a case: relative error 1\.00e\+00 exceeds 2e-03; not timed"):
        bench.prepare("a case", problem, None)


def test_names_read_as_documented():
    names = [*bench.problems(), *bench.problems(small=True), *bench.problems(fp8=True)]
    assert len(names) == len(set(names))
    sparse = re.compile(r"\d+x\d+x\d+ (b=(nmajor|kmajor)( out=transposed)?|(promoted )?fp8)")
    grouped = re.compile(r"E=\d+ D=\d+ F=\d+ mode=(rows|columns|contraction) sizes=(equal|ragged)( fp8)?")
    assert all(sparse.fullmatch(name) or grouped.fullmatch(name) for name in names)
    for wanted in ("16384x4096x4096 b=nmajor", "E=4 D=2048 F=8192 mode=rows sizes=equal"):
        assert wanted in names


def test_ragged_sizes_cover_all_tokens_with_two_empty_groups():
    for problem, sizes in (bench.problems() | bench.problems(fp8=True)).values():
        if sizes is not None:
            assert sum(sizes) == 16384
            assert not any(size % problem.tile_k for size in sizes)
            assert sizes.count(0) in (0, 2)


def test_rows_and_table(monkeypatch):
    problem, _ = small("dense")
    runs = {"dense xla NN": (lambda: [jnp.zeros(3)], 1), "dense xla NT": (lambda: [jnp.zeros(3)], 1)}
    monkeypatch.setattr(bench, "_rivals", lambda *_: runs)
    rows = bench.time_case("128x64x192 b=kmajor", problem, None, (lambda: [jnp.ones(2)], 1, 1.5e-3))
    assert [row["rival"] for row in rows] == ["dense"]
    fields = "bench case ms rival rival_ms speedup relerr device jax date"
    assert " ".join(rows[0]) == fields
    assert rows[0]["speedup"] == pytest.approx(rows[0]["rival_ms"] / rows[0]["ms"], rel=0.5)
    assert "| sparse24 | 128x64x192 b=kmajor |" in bench.table(rows)


def test_race_divides_by_calls_and_build_keeps_errors():
    def fail():
        raise ValueError("no such tile")

    built = timing.build({"good": lambda: 1, "bad": fail})
    assert built["good"] == 1
    assert str(built["bad"]) == "no such tile"
    out = jnp.zeros(1)
    times = timing.race({"a": lambda: [out]}, {"a": 1000}, rounds=1, seconds=0.0)
    assert 0 < times["a"] < 10
