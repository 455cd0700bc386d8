"""The figures of the documentation show what the configurations and the benchmark say."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes

from train.config.settings import load_config
from train.model import decoder
from train.sweeps import figures
from venom_jax import Recipe

COMMON = {"rival": "dense", "device": "H100", "jax": "1", "date": "2026-01-02"}


@pytest.fixture
def kernels(tmp_path):
    """A table of the benchmark with two shapes of the 2:4 product and two numbers of experts."""
    rows = [
        {"bench": "sparse24", "case": f"{shape} b={layout}", "speedup": speed}
        for shape, layout, speed in [("8x4x4", "nmajor", 1.5), ("8x4x4", "kmajor", 1.4), ("2x4x4", "nmajor", 0.9)]
    ]
    rows += [{"bench": "sparse24", "case": "8x4x4 b=kmajor out=transposed", "speedup": 9.0}]
    rows += [
        {"bench": "grouped24", "case": f"E={experts} D=16 F=64 mode=rows sizes={sizes}", "speedup": speed}
        for experts, sizes, speed in [(4, "equal", 6.0), (16, "equal", 20.0), (16, "ragged", 9.0)]
    ]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps([row | COMMON for row in rows] + [rows[0] | COMMON | {"rival": "cusparselt"}]))
    return path


def test_the_figures_show_the_numbers_of_their_sources(tmp_path, kernels, monkeypatch):
    bars, curves = [], []
    bar, plot = Axes.bar, Axes.plot
    monkeypatch.setattr(Axes, "bar", lambda axes, x, y, *a, **o: bars.append(list(y)) or bar(axes, x, y, *a, **o))
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *a, **o: curves.append(list(y)) or plot(axes, x, y, *a, **o))
    paths = figures.draw_all(kernels, tmp_path / "out")
    assert [path.name for path in paths] == ["operations.svg", "products.svg", "routed.svg"]
    np.testing.assert_allclose(np.sum(bars[:4], axis=0), [100] * 4)
    config = load_config(["configs/size/1b.gin"], ["Data.synthetic = True"])
    dense, act24 = (
        decoder.flops_per_token(config.model, config.train.seq_len, recipe) for recipe in (Recipe(), Recipe.act24())
    )
    assert curves[0][2] == pytest.approx(100 * act24 / dense)
    np.testing.assert_equal(bars[4:], [[1.5, 0.9], [1.4, np.nan]])
    assert curves[-2:] == [[6.0, 20.0], [8, 32]]
    assert "H100, jax 1, 2026-01-02" in paths[2].read_text()
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.draw_all(kernels, tmp_path / "out")] == before


def test_the_front_has_the_means_of_the_seeds_over_their_times(tmp_path, kernels, monkeypatch):
    def row(case, seed, steps, step_time, difference, twin="dense"):
        times = [
            {"of": "1b on H100", "step_time": step_time},
            {"of": "7b on H100", "step_time": step_time and step_time**2 if case != "b" else None},
            {"of": "40m on H100", "step_time": 1.0 if case == "dense" else None},  # of no run that has a twin
        ]
        found = {"case": case, "seed": seed, "steps": steps, "difference": difference, "twin": twin}
        options = [case.split("-")[0], f"Train.steps = {steps}"]
        return found | {"step_times": times, "options": options, "val_loss": 3 + (difference or 0)}

    rows = [row("dense", seed, 100, 1.0, None, twin=None) for seed in (0, 1)]
    rows += [row("a", 0, 100, 0.8, 0.03), row("a", 1, 100, 0.8, 0.05), row("b", 0, 110, 0.9, 0.02)]
    rows += [row("dense-90", 0, 90, 1.0, 0.1)]
    rows += [row("worse", 0, 100, 0.9, 0.3), row("beside", 0, 100, 0.9, 0.305)]
    rows += [row("untimed", 0, 100, None, 0.0), row("later", 0, 100, 0.5, None, twin=None)]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(rows))
    dots, curves, plot = {}, [], Axes.plot
    annotate = Axes.annotate
    monkeypatch.setattr(
        Axes,
        "annotate",
        lambda axes, name, at, **o: dots.setdefault(name, []).append(at) or annotate(axes, name, at, **o),
    )
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *a, **o: curves.append((x, y)) or plot(axes, x, y, *a, **o))
    figures.draw_front(figures.read_sweep(path), tmp_path / "front.svg")
    assert dots["a"] == [pytest.approx((0.8, 0.04)), pytest.approx((0.64, 0.04))]
    assert dots["b"] == [pytest.approx((0.99, 0.02))]
    assert dots["dense"] == [(1.0, 0.0)] * 2
    assert dots.keys() == {"a", "b", "dense", "dense-90", "worse"}, "beside would lie over worse"
    fronts = [x for x, _ in curves if 1 < np.size(x) < 10]
    assert fronts == [pytest.approx([0.8, 0.99, 1.0]), pytest.approx([0.64, 1.0])]
    shorter = [dict(zip(np.round(x, 3), y, strict=True)) for x, y in curves if np.size(x) > 10]
    assert [line[1.0] for line in shorter] == [0, 0]
    assert shorter[0][0.8] == pytest.approx(0.1 * np.log(0.8) / np.log(0.9)), "what dense loses with fewer steps"
    path.write_text(json.dumps([rows[0], rows[-2]]))
    with pytest.raises(ValueError, match="holds no run with a time"):
        figures.draw_all(kernels, tmp_path, path)


def test_what_is_no_table_is_refused(tmp_path, kernels):
    for content in ("{", "[1]", "[]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad.json (is no table|holds no comparison)"):
            figures.read_rows(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot make the folder"):
        figures.draw_all(kernels, kernels / "out")


def test_the_bars_of_steps_are_their_parts(tmp_path, kernels, monkeypatch):
    def row(case, **parts):
        return COMMON | {"bench": "train_step", "case": case, "part_ms": parts}

    rows = [row("1b dense", ffn=60.0, head=20.0, idle=2.0), row("1b venom E=4 k=1", ffn=15.0, head=21.0, other=4.0)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*rows, COMMON | {"bench": "train_step", "case": "1b dense, switch"}]))
    bars, labels = {}, []
    bar, annotate = Axes.bar, Axes.annotate

    def taken(axes, x, y, width, bottom, **options):
        bars[options["label"]] = (list(bottom), list(y))
        return bar(axes, x, y, width, bottom.copy(), **options)

    monkeypatch.setattr(
        Axes, "annotate", lambda axes, text, *a, **o: labels.append(text) or annotate(axes, text, *a, **o)
    )
    monkeypatch.setattr(Axes, "bar", taken)
    figures.draw_steps(figures.read_steps(path), tmp_path / "steps.svg")
    assert bars == {
        "ffn": ([0, 0], [60, 15]),
        "head": ([60, 15], [20, 21]),
        "other": ([80, 36], [0, 4]),
        "idle": ([80, 40], [2, 0]),
    }
    assert labels == ["82", "40"]
    assert "1b venom" not in (text := (tmp_path / "steps.svg").read_text())
    assert "venom" in text
    path.write_text(json.dumps([COMMON | {"bench": "train_step", "case": "1b dense"}]))
    with pytest.raises(ValueError, match="holds no part_ms"):
        figures.draw_all(kernels, tmp_path, steps=path)


def test_the_components_are_the_whole():
    shape = load_config(["configs/size/40m.gin"], ["Data.synthetic = True"]).model
    parts = decoder.component_flops(shape, 512)
    assert sum(parts.values()) == decoder.flops_per_token(shape, 512, Recipe.dense())
    assert parts["ffn"] == 6 * 2 * 8 * 512 * 2048
