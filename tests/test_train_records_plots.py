"""The loss curve: phases where they were, records of a run as the trainer writes them."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from train.records.plots import (
    COLORS,
    Span,
    difference,
    distinct_names,
    pareto_front,
    plot_pareto,
    plot_run,
    plot_runs,
    smoothed,
    smoothing_steps,
    sparse_spans,
)


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


def test_the_front_holds_what_none_beats_in_both():
    assert pareto_front([(3, 1.0), (1, 3.0), (2, 2.0), (2, 2.5), (4, 1.0), (1, 3.0)]) == [1, 2, 0]
    assert pareto_front([(1, 1.0)]) == [0]


def test_the_picture_of_the_front_names_each_run_where_it_ended(tmp_path, monkeypatch):
    drawn = {}
    original = Axes.annotate
    monkeypatch.setattr(
        Axes, "annotate", lambda axes, text, xy, **rest: drawn.update({text: xy}) or original(axes, text, xy, **rest)
    )
    write_run(tmp_path / "slow")
    write_run(tmp_path / "fast", steps=30, seconds_per_step=1.0)
    plot_pareto([tmp_path / "slow", tmp_path / "fast"], tmp_path / "front.svg")
    assert drawn == {"slow": (80.0, pytest.approx(5.1)), "fast": (30.0, pytest.approx(5.6))}
    assert (tmp_path / "front.svg").stat().st_size > 1000
    plot_pareto([tmp_path / "fast"], tmp_path / "front.png", x="step")
    assert drawn["fast"] == (30.0, pytest.approx(5.6))
    write_run(tmp_path / "young", steps=5)
    with pytest.raises(ValueError, match="young has no evaluation yet"):
        plot_pareto([tmp_path / "young"], tmp_path / "front.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot_pareto([], tmp_path / "front.png")


def losses(values, every=1, start=1, shift=0.0):
    steps = range(start, start + every * len(values), every)
    return [
        {"kind": "train", "step": step, "time": 3.0 * step, "loss": value + shift}
        for step, value in zip(steps, values, strict=True)
    ]


def test_the_rolling_mean_goes_over_steps_not_records():
    xs, means = smoothed(losses([8, 6, 4, 2]), 2)
    assert xs.tolist() == [1, 2, 3, 4]
    assert means.tolist() == [8, 7, 5, 3]
    every_tenth = losses([8, 6, 4, 2], every=10)
    assert smoothed(every_tenth, 2)[1].tolist() == [8, 6, 4, 2]
    assert smoothed(every_tenth, 20, "seconds")[1].tolist() == [8, 7, 5, 3]
    assert smoothed(every_tenth, 20, "seconds")[0].tolist() == [3, 33, 63, 93]


@pytest.mark.parametrize(
    ("longest", "steps"), [(10, 1), (99, 1), (100, 2), (1300, 20), (50_000, 1000), (270_000, 5000)]
)
def test_the_rolling_mean_is_about_a_fiftieth_of_the_longest_run(longest, steps):
    assert smoothing_steps([[{"step": 3}], [{"step": 5}, {"step": longest}]]) == steps


def test_the_difference_is_taken_at_the_same_step_where_both_have_been():
    reference = losses(np.linspace(6, 4, 21), every=10)
    finer = losses(np.linspace(6, 3, 301), shift=0.25)
    xs, gap = difference(finer, reference, 1)
    assert (xs[0], xs[-1]) == (1, 201)
    np.testing.assert_allclose(gap, 0.25, atol=1e-12)
    assert difference(losses([5.0], start=500), reference, 1)[0].size == 0


def test_the_picture_of_a_difference_leaves_out_its_reference(tmp_path):
    for name in "abc":
        write_run(tmp_path / name)
    runs = [tmp_path / name for name in "abc"]
    plot_runs(runs, tmp_path / "out.svg", difference_to=tmp_path / "a")
    image = (tmp_path / "out.svg").read_text()
    assert COLORS[0] not in image
    for color in COLORS[1:3]:
        assert color in image, "a run keeps its colour"
    with pytest.raises(ValueError, match="at least one other run"):
        plot_runs([tmp_path / "a"], tmp_path / "out.svg", difference_to=tmp_path / "a")
    with pytest.raises(ValueError, match=r"none/metrics\.jsonl holds no training loss"):
        plot_runs(runs, tmp_path / "out.svg", difference_to=tmp_path / "none")
    with pytest.raises(ValueError, match="smooth=0 must be at least 1"):
        plot_runs(runs, tmp_path / "out.svg", smooth=0)


def test_names_tell_runs_apart():
    assert distinct_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert distinct_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    assert distinct_names([Path(".")]) == ["."]


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
    write_run(tmp_path / "other")
    command = [sys.executable, "-m", "train.plot", f"--output={tmp_path / 'out.png'}", "--x=seconds", "--smooth=5"]
    compared = [str(tmp_path / "run"), f"--difference_to={tmp_path / 'other'}"]
    done = subprocess.run([*command, *compared], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
