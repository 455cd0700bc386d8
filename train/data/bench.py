"""How fast the input pipeline is, against what a training run consumes: what `python -m train.data_bench` measures."""

import time

from train.data.token_files import open_dataset, train_iterator
from venom_jax import advise


def fastest_step() -> float:
    """Tokens per second of the fastest measured step of the 1B model on one GPU."""
    steps = [row for row in advise.read_rows() if row["bench"] == "train_step" and row["case"].startswith("1b ")]
    return float(max(row["tokens_per_second"] for row in steps if row["devices"] == 1))


def measure(folder: str, *, batch_size: int, seq_len: int, seconds: float, consumed: float) -> dict:
    """Rates of one process in tokens per second: `tokens_per_second`, and `times_consumed` as its ratio to `consumed`.

    `first_batch_seconds` is the wait for the first batch; it and the batches that were made ahead while waiting for it
    are outside of the rate.

    Raises:
      ValueError: no prepared data in `folder`, or an option out of range.
    """
    if seconds <= 0 or consumed <= 0:
        raise ValueError(f"{seconds=} and {consumed=} must be above 0")
    start = time.perf_counter()
    batches = train_iterator(open_dataset(folder), batch_size=batch_size, seq_len=seq_len, seed=0)
    next(batches)
    first = time.perf_counter() - start
    for _ in range(16):  # twice what the iterator prefetches
        next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    rate = count * batch_size * seq_len / elapsed
    return {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "first_batch_seconds": first,
        "tokens_per_second": rate,
        "times_consumed": rate / consumed,
    }
