"""The roofline: what each unit needs by hand-made numbers, the table of a fake ncu, power from a fake meter."""

import functools
import itertools
import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.measure import bench, counters, power, roofline
from pallas_kernels.schedule import Schedule
from pallas_kernels.tiles import Problem, TileConfig

NARROW = TileConfig(warpgroup_m=64, warpgroup_n=256)
READ = {
    "ns": 540e3,
    "cycles": 810000.0,
    "hertz": 1.5e9,
    "l2": 50.0,
    "load": 75.0,
    "dram_read": 2e8,
    "dram_written": 1.35e8,
}


def test_bounds_of_a_whole_product():
    problem = Problem(16384, 4096, 4096)
    # 128 x 16 tiles in 16 rounds of 64 stages; 549.8 Gop; a stage takes 512 cycles, its operands 2 x (4 + 32) KiB.
    assert roofline.busiest(problem, NARROW, None, 132) == (1024, 16)
    found = roofline.bounds(problem, NARROW, None, 132, READ)
    expected = {
        "tensor": 549.756e9 / 8192 / 132 / 1.5e3,
        "rounds": 1024 * 512 / 1.5e3,
        "smem": 1024 * 576 / 1.5e3,
        "epilogue": 16 * 1024 / 1.5e3,
        "load": 405,
        "l2": 270,
        "dram": 100,
    }
    assert found.keys() == expected.keys()
    for unit, us in expected.items():
        assert found[unit] == pytest.approx(us, rel=1e-3), unit


def test_the_second_row_tile_of_a_warpgroup_reads_b_again():
    tall = TileConfig(warpgroup_m=128, warpgroup_n=128)
    found = roofline.bounds(Problem(16384, 4096, 4096), tall, None, 132, READ)
    assert found["smem"] / found["rounds"] == pytest.approx(1.25, rel=1e-3)


@pytest.mark.parametrize("name", [n for n in bench.problems() if n.startswith("E=8 D=2048")])
def test_tiles_are_those_of_the_kernels_schedule(name):
    problem, sizes = bench.problems()[name]
    stages = roofline.tile_stages(problem, NARROW, sizes)
    assert len(stages) == Schedule(problem, NARROW, np.array(sizes, np.int32)).count()
    # Ragged groups fill their last tiles only partly, never less than the products that there are.
    rows = {"rows": problem.m, "columns": problem.m // problem.groups, "contraction": problem.m}[problem.mode]
    needed = rows * problem.n * problem.k / 64
    assert needed <= stages.sum() * NARROW.tile_m * NARROW.tile_n <= 1.5 * needed


def test_the_contraction_walks_every_other_round_backwards():
    problem = Problem(128, 256, 640, mode="contraction", groups=4)
    # Groups of 4, 3, 2 and 1 stages, a tile each, on two multiprocessors: 4 + 1 and 3 + 2.
    assert roofline.busiest(problem, NARROW, (64, 192, 128, 256), 2) == (5, 2)


def test_twice_the_contraction_separates_what_does_not_grow():
    rows = [
        {"case": "a", "stages": 64, "counters": {"cycles": 42000.0}},
        {"case": "a 2k", "stages": 128, "counters": {"cycles": 80400.0}},
    ]
    roofline.add_slopes(rows)
    assert rows[0]["stage_cycles"] == 600
    assert rows[0]["fixed_cycles"] == 3600
    assert "stage_cycles" not in rows[1]


def test_cases_are_those_of_the_benchmark_and_their_doubles_keep_the_tile():
    cases = roofline.cases()
    assert set(bench.problems()) == {name for name in cases if not name.endswith(" 2k")}
    assert set(roofline.POWER) <= set(roofline.TWICE) <= set(bench.problems())
    for name in roofline.TWICE:
        (problem, sizes, config), (double, more, same) = cases[name], cases[f"{name} 2k"]
        assert (double.k, same) == (2 * problem.k, config)
        assert more == (sizes and tuple(size * (2 if problem.mode == "contraction" else 1) for size in sizes))
        assert config.violation(double) is None


FAKE_NCU = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
if "--query-metrics" in arguments:
    names = {known!r}
    suffixes = "--query-metrics-mode" in arguments
    print("Device NVIDIA H100 (GH100)")
    print(*(name if suffixes else name.split(".")[0] + "   Counter   of something" for name in names), sep="\\n")
    sys.exit()
log = arguments[arguments.index("--log-file") + 1]
metrics = arguments[arguments.index("--metrics") + 1].split(",")
with open(log, "w") as file:
    if {refused!r} in metrics:
        print("==ERROR== Failed to find metric", {refused!r}, file=file)
        sys.exit(1)
    subprocess.run(arguments[arguments.index("--metrics") + 2 :], check=True)
    print("==PROF== Connected to process 1", file=file)
    print('"ID","Kernel Name",' + ",".join(f'"{{m}}"' for m in metrics), file=file)
    print('"","",' + ",".join('"ns"' for m in metrics), file=file)
    for i, kernel in enumerate(["body_mosaic_gpu_kernel", "fusion", "body_mosaic_gpu_kernel"]):
        numbers = ('"1,0%02d.5"' % i if m.endswith("sum") else '"n/a"' for m in metrics)
        print(f'"{{i}}","{{kernel}}",' + ",".join(numbers), file=file)
"""
LAUNCHES = [sys.executable, "-c", "print('launched a case'); print('skipped b'); print('launched another')"]


def install(monkeypatch, folder, known, refused):
    (folder / "ncu").write_text(FAKE_NCU.format(python=sys.executable, known=known, refused=refused))
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_counters_through_a_fake_ncu(monkeypatch, tmp_path):
    known = ["gpu__time_duration.sum", "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed"]
    install(monkeypatch, tmp_path, known, refused=known[1])
    assert counters.choose_metrics(counters.find_ncu()) == {"ns": known[0], "tensor": known[1]}
    found = counters.count(LAUNCHES, str(tmp_path / "log.csv"))
    assert found == {"a case": {"ns": 1000.5}, "another": {"ns": 1002.5}}


def test_a_launch_without_a_row_is_an_error(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, ["gpu__time_duration.sum"], refused="none")
    one_too_many = [*LAUNCHES[:2], LAUNCHES[2] + "; print('launched a third')"]
    with pytest.raises(ValueError, match="ncu shows 2 launches of 'body' for 3 cases"):
        counters.count(one_too_many, str(tmp_path / "log.csv"))


def test_ncu_that_fails_says_why(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, ["gpu__time_duration.sum"], refused="none")
    with pytest.raises(RuntimeError, match="ncu ended with 1 after 0 launches"):
        counters.count([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path / "log.csv"))


class FakeMeter(power.Meter):
    """Draws 700 W at 1.5 GHz; every other reading says that the power limit holds the clock."""

    def __init__(self):
        self._readings = itertools.count()

    def limit_watts(self):
        return 700.0

    def joules(self):
        return 700 * time.perf_counter()

    def ghz(self):
        return 1.5

    def is_capped(self):
        return next(self._readings) % 2 == 0


def test_power_of_a_loop():
    def run():
        time.sleep(0.004)
        return [jnp.zeros(())]

    read = power.measure(FakeMeter(), run, 2, settle=0.01, seconds=0.2)
    assert 2 <= read["ms"] < 6
    assert read["watts"] == pytest.approx(700, rel=0.1)
    assert read["joules"] == pytest.approx(0.7 * read["ms"], rel=0.1)
    assert read["ghz"] == 1.5
    assert 0.3 <= read["capped"] <= 0.7


def test_the_program_writes_counters_and_power(monkeypatch, tmp_path):
    name = roofline.POWER[0]
    readings = {name: READ, f"{name} 2k": READ | {"cycles": 1620000.0}}
    monkeypatch.setattr(counters, "count", lambda command, log: readings)
    monkeypatch.setattr(power, "Meter", FakeMeter)
    monkeypatch.setattr(power, "measure", functools.partial(power.measure, settle=0.0, seconds=0.05))
    monkeypatch.setattr(roofline, "_loop", lambda name, kind: (lambda: [time.sleep(0.002)], 1))
    path, tables = tmp_path / "roofline.json", tmp_path / "roofline.md"
    monkeypatch.setattr(sys, "argv", ["roofline", f"--json={path}", f"--table={tables}", f"--cases={name}"])
    roofline.main()
    rows = json.loads(path.read_text())
    assert [(row["bench"], row.get("operands")) for row in rows] == [
        ("sparse24", None),
        ("sparse24", None),
        ("power", "sparse"),
        ("power", "zeros"),
        ("power", "dense"),
    ]
    assert rows[0]["stage_cycles"] == pytest.approx(810000 / 1024, rel=1e-3)
    assert all(row["device"] == "none" and row["date"] for row in rows)
    assert sum(line.startswith(f"| {name}") for line in tables.read_text().splitlines()) == 5


def test_what_fails_is_said(monkeypatch, tmp_path):
    def fail(command, log):
        raise FileNotFoundError("no ncu on PATH")

    monkeypatch.setattr(counters, "count", fail)
    monkeypatch.setattr(power, "Meter", FakeMeter)
    monkeypatch.setattr(roofline, "_loop", lambda name, kind: 1 / 0)
    path = tmp_path / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline", f"--json={path}", f"--cases={roofline.POWER[0]}"])
    with pytest.raises(SystemExit, match=r"^counters: no ncu on PATH$"):
        roofline.main()
    assert not path.exists()


def test_a_case_that_breaks_ncu_costs_itself_alone(monkeypatch, tmp_path):
    names = list(roofline.cases("mode=rows"))
    broken, asked = names[2], []

    def count(command, log):
        asked.append(command[command.index("--launch") + 1 :])
        if broken in asked[-1]:
            raise RuntimeError("ncu ended with -11 after 0 launches")
        return dict.fromkeys(asked[-1], READ)

    monkeypatch.setattr(counters, "count", count)
    *_, before, rows = roofline.read_counters("mode=rows", 600.0, str(tmp_path / "log"), at_once=4)
    assert rows[: len(before)] == before  # what was read is told before the rest is
    assert {row["case"] for row in rows} == set(names) - {broken}
    assert asked[:4] == [names[:4], names[:2], names[2:4], names[2:3]]
    monkeypatch.setattr(roofline, "cases", lambda words: [broken])
    with pytest.raises(RuntimeError, match="-11"):
        list(roofline.read_counters("mode=rows", 600.0, str(tmp_path / "log")))


def test_rows_and_table():
    stamp = {"device": "a GPU", "jax": "1", "date": "2026-01-01"}
    row = roofline.row_of("16384x4096x4096 b=nmajor", READ, 132)
    assert row["limit"] == "load"
    assert row["rest"] == 0.25
    drawn = {"bench": "power", "case": "c", "operands": "zeros", "ms": 0.5, "watts": 650.0, "limit_watts": 700.0}
    text = roofline.table([row | stamp, drawn | {"joules": 0.325, "ghz": 1.7, "capped": 0.5} | stamp])
    assert "| 16384x4096x4096 b=nmajor | 128x256 | 540.0 | 1.50 |" in text
    assert "| load | 25% |" in text
    assert "| c | zeros | 0.5000 | 650 of 700 | 0.325 | 1.70 | 50% of the time |" in text
    assert "| case | operands" not in roofline.table([row | stamp])
    assert "| case | tile" not in roofline.table([drawn | {"joules": 0.325, "ghz": 1.7, "capped": 0.5} | stamp])
    lines = [line for line in text.splitlines() if line.startswith(("| case | tile", "| 16384"))]
    assert lines[0].count("|") == lines[1].count("|")
