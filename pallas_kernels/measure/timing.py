"""Timing on the GPU: interleaved, with rotating buffers, in one process."""

import statistics
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import jax

type Run = Callable[[], list]
"""Enqueue some calls and return their results, which `jax.block_until_ready` can wait for."""


def repeated(function, argument_sets: list[tuple]) -> Run:
    """One compiled program that calls `function` on each argument set: no launch waits for Python.

    The sets must differ, or the compiler may merge calls.
    """
    once = jax.jit(function)  # traced and lowered once, however many calls
    compiled = jax.jit(lambda sets: [once(*arguments) for arguments in sets]).lower(argument_sets).compile()
    return lambda: compiled(argument_sets)


def race[Key: Hashable](
    runs: dict[Key, Run], calls: dict[Key, int], *, rounds: int = 7, seconds: float = 0.02
) -> dict[Key, float]:
    """Median milliseconds of one call for each run.

    All runs take turns, so that a card which warms up or throttles treats them alike.

    Args:
      runs: what to time.
      calls: how many calls of the function each run makes.
      seconds: the least time one round of one run should take.
    """
    times: dict[Key, list[float]] = {key: [] for key in runs}
    repeats = {key: max(1, round(seconds / max(_once(run, 2), 1e-6))) for key, run in runs.items()}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(_once(run, repeats[key]))
    return {key: 1e3 * statistics.median(t) / calls[key] for key, t in times.items()}


def _once(run: Run, repeats: int) -> float:
    """Seconds per run, waiting only for the last."""
    start = time.perf_counter()
    out = None
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def build[Key: Hashable, Result](
    jobs: dict[Key, Callable[[], Result]], *, at_once: int = 8
) -> dict[Key, Result | Exception]:
    """Compile in parallel, `at_once` jobs at a time: key -> result, or the exception that building it raised."""

    def attempt(job: Callable[[], Result]) -> Result | Exception:
        try:
            return job()
        except Exception as error:  # a tile that the compiler refuses is a result of the search
            return error

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))
