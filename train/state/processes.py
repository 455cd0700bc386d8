"""One run in several processes, usually one a host, through `jax.distributed`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(how: str | None) -> None:
    """Joins the processes of a run; before anything else asks JAX for its devices.

    how: None, one process. "auto": SLURM or Open MPI say who is who. "HOST:PORT,COUNT,INDEX": process INDEX of COUNT,
    of which number 0 listens on HOST:PORT.

    Raises:
      ValueError: another form, or the processes do not find each other.
    """
    if how is None:
        return
    parts = how.split(",")
    if how == "auto":
        options: dict[str, Any] = {}
    elif len(parts) == 3 and ":" in parts[0] and parts[1].isdecimal() and parts[2].isdecimal():
        options = {"coordinator_address": parts[0], "num_processes": int(parts[1]), "process_id": int(parts[2])}
    else:
        raise ValueError(f"--distributed={how} is neither 'auto' nor HOST:PORT,COUNT,INDEX such as node1:8476,2,0")
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed={how}: the processes did not find each other ({str(error).splitlines()[0]}); 'auto' needs "
            "SLURM or Open MPI, and HOST:PORT of process 0 must be reachable from all hosts"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes: metrics, reports, plots."""
    return jax.process_index() == 0


def first_alone[T](work: Callable[[], T]) -> T | None:
    """work() in the first process while the others wait; they get None.

    Raises:
      whatever `work` raises, in the first process; ValueError in the others where it raised there.
    """
    if jax.process_count() == 1:
        return work()
    result, problem = None, None
    if is_first():
        try:
            result = work()
        except Exception as error:
            problem = error
    failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise ValueError("the first process stopped; its message says why")
    return result
