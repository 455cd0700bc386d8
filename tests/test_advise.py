"""The advice: measured figures where this shape was measured, and plain words everywhere else."""

import json
import sys
from pathlib import Path

import pytest

from pallas_kernels import device
from venom_jax import advise, bench, dispatch
from venom_jax.advise import Shape, compute_capability, is_same_gpu, read_rows

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
H100 = "NVIDIA H100 80GB HBM3"
SHAPE = Shape(2048, 8192, 16384)


def ffn(recipe, speedup, *, d_model=2048, d_ffn=8192, tokens=16384, masters="float32", device=H100):
    return {
        "bench": "ffn",
        "case": f"{recipe} D={d_model} F={d_ffn}",
        "tokens": tokens,
        "masters": masters,
        "ms": None if speedup is None else 5.0 / speedup,
        "rival": "dense",
        "rival_ms": 5.0,
        "speedup": speedup,
        "relerr": 1e-3,
        "device": device,
        "jax": "0.0.0",
        "date": "2000-01-01",
    }


def product(case, speedup, rival="dense"):
    return ffn("", speedup) | {"bench": "sparse24", "case": case, "rival": rival}


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_very_shape_gets_its_figure_and_no_other_does():
    rows = [
        ffn("act24", 1.25),
        ffn("all24", 1.5, d_model=4096, d_ffn=16384),
        ffn("venom E=4 k=1", 3.0, tokens=1024),
        ffn("venom E=16 k=1", 7.0, masters="bfloat16"),
        ffn("venom E=2 k=1", 2.0, device="NVIDIA H200"),
        ffn("venom E=4 k=2", None),
    ]
    text = advise.advise(SHAPE, "h100", rows)
    assert lines(text, "| act24 |") == ["| act24 | 64:2:4 | 1.25x | 4.000 | 5.000 |"]
    for name in ("all24", "venom E=4 k=1", "venom E=16 k=1", "venom E=2 k=1", "venom E=16 k=4"):
        assert "not measured" in lines(text, f"| {name} ")[0]
    assert "failed its check or did not run" in lines(text, "| venom E=4 k=2")[0]
    assert lines(text, "- all24") == ["- all24, faster than dense: D=4096 F=16384 T=16384 (1.50x)"]
    in_bf16 = advise.advise(SHAPE, "h100", rows, "bfloat16")
    assert "7.00x" in lines(in_bf16, "| venom E=16 k=1")[0]
    assert "2.00x" in lines(advise.advise(SHAPE, "H200", rows), "| venom E=2 k=1")[0]


def test_break_even_names_what_wins_and_what_loses():
    rows = [
        ffn("act24", 1.25),
        ffn("act24", 0.8, tokens=512),
        product("16384x4096x4096 b=nmajor", 1.5),
        product("512x4096x4096 b=nmajor", 0.9),
        product("512x4096x4096 b=nmajor", 0.5, rival="cusparselt"),
    ]
    text = advise.advise(SHAPE, "h100", rows)
    assert lines(text, "- act24") == [
        "- act24, faster than dense: D=2048 F=8192 T=16384 (1.25x)",
        "- act24, not faster than dense: D=2048 F=8192 T=512 (0.80x)",
    ]
    assert lines(text, "- Single") == [
        "- Single 2:4 products: 0.90x to 1.50x dense over 2 cases; not faster at 512x4096x4096 b=nmajor (0.90x)."
    ]


def test_without_tables_nothing_is_claimed():
    text = advise.advise(SHAPE, "h100", [])
    assert text.count("| not measured |") == len(bench.RECIPES)
    assert "- Whole FFNs: no table (ffn.json) with float32 weights for h100." in text
    assert "- Single 2:4 products: no table (kernels.json) for h100." in text
    assert "- 2:4 products over groups of tokens: no table (kernels.json) for h100." in text
    elsewhere = advise.advise(SHAPE, "h200", [ffn("act24", 1.25)])
    assert f"weights for h200; there are measurements on {H100}." in elsewhere
    assert "1.25x" not in elsewhere


@pytest.mark.parametrize("gpu", ["a100", "NVIDIA A100-SXM4-80GB", "RTX 4090", "rtx5090", "RTX PRO 6000"])
def test_gpus_of_the_other_kernels_are_told_that_nothing_was_measured(gpu):
    text = advise.advise(SHAPE, gpu, [ffn("act24", 1.25)])
    assert text.count("| not measured |") == len(bench.RECIPES)
    assert f"{gpu} runs {advise.WARP}" in text
    assert "1.25x" not in text


@pytest.mark.parametrize("gpu", ["B200", "cpu"])
def test_other_gpus_are_told_that_nothing_is_faster(gpu):
    text = advise.advise(SHAPE, gpu, [ffn("act24", 1.25)])
    assert text.count("| not faster than dense |") == len(bench.RECIPES)
    assert f"{gpu} runs the masked reference" in text
    assert "1.25x" not in text


def test_what_it_says_about_the_default_is_so(monkeypatch):
    monkeypatch.setattr(device, "hopper_available", lambda: True)
    default = dispatch.resolve_implementation(None)
    assert ("by default the masked reference" in advise.KERNELS) == (default == "reference")


def test_shapes_that_the_recipe_or_the_kernels_do_not_take():
    text = advise.advise(Shape(2048, 8200, 16384), "h100", [])
    assert "cannot run: d_ffn = 8200" in lines(text, "| venom E=16 k=1")[0]
    text = advise.advise(Shape(2080, 8192, 16384), "h100", [])
    assert "runs the masked reference, as d_model = 2080" in lines(text, "| act24")[0]
    with pytest.raises(ValueError, match="must be positive, got D=0"):
        advise.advise(Shape(0, 8192, 16384), "h100", [])


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("h100", "9.0"),
        (H100, "9.0"),
        ("NVIDIA H100 PCIe", "9.0"),
        ("NVIDIA H200", "9.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("A100", "8.0"),
        ("NVIDIA A10G", "8.6"),
        ("NVIDIA GeForce RTX 3090", "8.6"),
        ("NVIDIA RTX A6000", "8.6"),
        ("NVIDIA L4", "8.9"),
        ("L40S", "8.9"),
        ("NVIDIA RTX 6000 Ada Generation", "8.9"),
        ("GB200", "10.0"),
        ("NVIDIA B300", "10.3"),
        ("NVIDIA GeForce RTX 5090", "12.0"),
    ],
)
def test_gpus_by_name(name, capability):
    assert compute_capability(name) == capability


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match=r"gpu = 'V100' is not known; name one of H100"):
        compute_capability("V100")


def test_a_table_counts_for_its_own_gpu_only():
    assert is_same_gpu("h100", H100)
    assert is_same_gpu(H100, H100)
    assert not is_same_gpu("h20", "NVIDIA H200")
    assert not is_same_gpu("h200", H100)


def test_tables_are_found_and_bad_ones_named(tmp_path):
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "ffn.json").write_text(json.dumps([ffn("act24", 1.25)]))
    (tmp_path / "h100" / "quality.json").write_text("no table of speeds")
    assert [row["case"] for row in read_rows(tmp_path)] == ["act24 D=2048 F=8192"]
    for bad in ("[", '{"bench": "ffn"}', "[1]"):
        (tmp_path / "h100" / "kernels.json").write_text(bad)
        with pytest.raises(ValueError, match=r"kernels\.json is no"):
            read_rows(tmp_path)


def test_the_package_holds_the_tables_of_docs():
    """After a new measurement: python -m venom_jax.advise --collect=docs/results"""
    assert advise.collect(RESULTS) == advise.MEASURED.read_text()


def test_what_is_collected_leaves_stages_out_and_is_read_as_it_was(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds none of ffn\.json, kernels\.json, train\.json"):
        advise.collect(tmp_path)
    rows = [ffn("act24", 1.25), product("one", 1.5)]
    (tmp_path / "ffn.json").write_text(json.dumps([rows[0] | {"stage_ms": {"y1": 1.0}}]))
    (tmp_path / "kernels.json").write_text(json.dumps(rows[1:]))
    monkeypatch.setattr(advise, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(sys, "argv", ["advise", f"--collect={tmp_path}"])
    assert advise.main() == 0
    assert read_rows() == rows


def test_whole_training_steps_are_told_of_the_same_gpu():
    step = ffn("", 1.35) | {"bench": "train_step", "case": "1b venom E=4 k=1", "ms": 280.2}
    dense = step | {"case": "1b dense", "speedup": 1.0}
    assert lines(advise.advise(SHAPE, "h100", [dense, step]), "- 1b") == ["- 1b venom E=4 k=1: 1.35x dense (280 ms)"]
    assert "- No table (train.json) for h200." in advise.advise(SHAPE, "h200", [step])


def test_the_committed_tables_can_be_read():
    rows = read_rows()
    known = [m.recipe for m in advise.measurements(rows)]
    assert set(known) <= set(bench.RECIPES)
    assert len(known) == sum(row["bench"] == "ffn" for row in rows)


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "ffn.json").write_text(json.dumps([ffn("act24", 1.25)]))
    command = ["advise", "--d_model=2048", "--d_ffn=8192"]
    monkeypatch.setattr(sys, "argv", [*command, "--gpu=h100", f"--results={tmp_path}"])
    assert advise.main() == 0
    assert "1.25x" in capsys.readouterr().out
    for option, message in (("--gpu=V100", "gpu = 'V100' is not known"), ("--results=none", "none is no folder")):
        monkeypatch.setattr(sys, "argv", [*command, option])
        assert advise.main() == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed


def step(case, speedup, device=H100):
    return ffn("", speedup, device=device) | {"bench": "train_step", "case": case}


@pytest.mark.parametrize(
    ("gpu", "rows", "sentence"),
    [
        (
            "h100",
            [step("1b act24", 1.08), step("1b act24 fp8", 1.3)],
            "Take act24 fp8: a training step of 1b runs 1.30x",
        ),
        ("h100", [step("1b act24", 1.08), ffn("act24", 1.4)], "Take act24: a training step of 1b runs 1.08x"),
        ("h100", [step("7b-layers act24", 1.1), ffn("act24", 1.4)], "Take act24: this layer runs 1.40x"),
        ("h100", [ffn("act24", 0.9)], "Train dense: this layer runs 0.90x"),
        ("h200", [step("1b act24", 1.08)], "Nothing of this shape is measured on h200"),
        ("b200", [step("1b act24", 1.08)], "Train dense: on b200"),
    ],
)
def test_one_sentence_comes_first(gpu, rows, sentence):
    first = advise.advise(SHAPE, gpu, rows).splitlines()[2]
    assert first.startswith(sentence)
    assert first.endswith(".")
