"""How fast the input pipeline is: `python -m train.data_bench --folder=runs/data --batch_size=8 --seq_len=2048`.

Takes batches as the trainer does, with nothing else to do, and compares the rate with what a training run consumes.
"""

import datetime
import json
import os

from absl import app, flags

from train.command import program
from train.data.bench import fastest_step, measure


@program
def main(values: flags.FlagValues) -> None:
    """The command: one JSON object on a line."""
    consumed = fastest_step() if values.consumed is None else values.consumed
    found = measure(
        values.folder,
        batch_size=values.batch_size,
        seq_len=values.seq_len,
        seconds=values.seconds,
        consumed=consumed,
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(json.dumps({"bench": "data"} | found | {"consumed": consumed, "cores": os.cpu_count(), "date": date}))


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "a folder written by train.prepare", required=True)
    flags.DEFINE_integer("batch_size", 8, "sequences in a batch")
    flags.DEFINE_integer("seq_len", 2048, "tokens in a sequence")
    flags.DEFINE_float("seconds", 5.0, "how long to measure")
    flags.DEFINE_float(
        "consumed", None, "tokens per second that training consumes (default: the fastest measured step of a 1B model)"
    )
    app.run(main)
