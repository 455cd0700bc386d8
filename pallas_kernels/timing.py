"""Timing on the GPU: interleaved, with rotating buffers, in one process."""

import statistics
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import jax

Run = Callable[[], object]
"""Enqueue some calls and return something `jax.block_until_ready` or a `synchronize` method can wait for."""


def repeated(function, argument_sets: list[tuple], copies: int = 1) -> Run:
    """One compiled program that calls `function` on each argument set `copies` times: no launch waits for Python.

    Outputs are kept apart, so no call is merged with another or left out.
    """
    calls = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    compiled = calls.lower(argument_sets * copies).compile()
    return lambda: compiled(argument_sets * copies)


def race(runs: dict[Hashable, Run], calls: dict[Hashable, int], *, rounds: int = 7, seconds: float = 0.02) -> dict:
    """Median milliseconds of one call for each run.

    All runs take turns, so that a card which warms up or throttles treats them alike.

    Args:
      runs: what to time.
      calls: how many calls of the function each run makes.
      seconds: the least time one round of one run should take.
    """
    times = {key: [] for key in runs}
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


def build(jobs: dict[Hashable, Callable[[], Run]]) -> dict:
    """Compile in parallel: key -> run, or the exception that building it raised."""

    def attempt(job):
        try:
            return job()
        except Exception as error:  # a tile that the compiler refuses is a result of the search
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))
