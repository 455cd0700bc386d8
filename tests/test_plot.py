"""The loss curve: phases where they were, records of a run as the trainer writes them."""

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from train.plot import COLORS, Span, plot_run, plot_runs, sparse_spans


def write_run(folder, steps=40, sparse=(10, 22), seconds_per_step=2.0):
    """A run with a jump of the loss at each switch, as metrics.jsonl has it."""
    start, end = sparse
    folder.mkdir()
    records = [{"step": 0, "kind": "phase", "time": 0.0, "phase": "dense", "phase_index": 0, "report": {}}]
    for step in range(1, steps + 1):
        if step - 1 in sparse:
            label = "venom E=4 k=1" if step - 1 == start else "dense"
            time = seconds_per_step * (step - 1)
            records.append({"step": step - 1, "kind": "phase", "time": time, "phase": label, "report": {"beta": 1.5}})
        time = seconds_per_step * step
        records.append({"step": step, "kind": "train", "time": time, "loss": 7 - step / 20})
        if step % 10 == 0:
            inside = {"val_loss_sparse": 7.2 - step / 20} if start < step <= end else {}
            records.append({"step": step, "kind": "eval", "time": time, "val_loss": 7.1 - step / 20, **inside})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def greys(path):
    """Shape of an image and the levels of its grey pixels."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.uint8)
    grey = (image[..., 0] == image[..., 1]) & (image[..., 1] == image[..., 2])
    return image.shape, np.bincount(image[grey][:, 0], minlength=256)


def test_spans_are_the_sparse_phases_on_either_axis(tmp_path):
    records = write_run(tmp_path / "run")
    assert sparse_spans(records) == [Span("venom E=4 k=1", 10, 22)]
    assert sparse_spans(records, "seconds") == [Span("venom E=4 k=1", 20.0, 44.0)]


def test_a_phase_that_still_runs_ends_with_the_last_record(tmp_path):
    records = write_run(tmp_path / "run", steps=15)
    assert sparse_spans(records) == [Span("venom E=4 k=1", 10, 15)]


def test_the_image_shows_the_phase_over_its_share_of_the_axis(tmp_path):
    write_run(tmp_path / "run")
    plot_run(tmp_path / "run", tmp_path / "run.png")
    (height, width, _), pixels = greys(tmp_path / "run.png")
    assert (height, width) == (600, 1080)
    shaded = pixels[235:238].sum()  # grey 0.5 at alpha 0.15 over white is 236
    plot_area = 0.84  # of the image, the rest being labels
    assert shaded / (height * width) == pytest.approx(12 / 40 * plot_area, abs=0.04)


def test_several_runs_on_the_axis_of_seconds(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seconds_per_step=1.0)
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "both.svg", x="seconds")
    image = (tmp_path / "both.svg").read_text()
    for color in COLORS[:2]:
        assert color in image
    assert COLORS[2] not in image


def test_a_line_cut_off_by_a_kill_is_no_obstacle(tmp_path):
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "kind": "tr')
    plot_run(tmp_path / "run", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none/metrics\.jsonl holds no training loss"):
        plot_run(tmp_path / "none", tmp_path / "out.png")
    with pytest.raises(ValueError, match="give at least one run"):
        plot_runs([], tmp_path / "out.png")
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="x='epoch' must be one of step, seconds"):
        plot_runs([tmp_path / "run"], tmp_path / "out.png", x="epoch")  # pyrefly: ignore
    with pytest.raises(ValueError, match="cannot write"):
        plot_run(tmp_path / "run", tmp_path / "none" / "out.png")
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        plot_run(tmp_path / "run", tmp_path / "out.xyz")


def test_command_line(tmp_path):
    write_run(tmp_path / "run")
    command = [sys.executable, "-m", "train.plot", f"--output={tmp_path / 'out.png'}", "--x=seconds"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
