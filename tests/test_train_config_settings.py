"""Configurations: every bundled file loads, and what gin would let pass is refused."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer import gin_bindings, run_config
from train.config.settings import CONFIG_ROOT, Data, LearningRate, Model, Optimizer, Phases, Train, load_config
from train.records.logger import plan
from venom_jax import LayerRecipes, Recipe

CONFIGS = CONFIG_ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.gin"))
DATA = ["Data.folder = 'somewhere'"]


def names(axis):
    return [f"configs/{axis}/{path.name}" for path in sorted((CONFIGS / axis).glob("*.gin"))]


@pytest.mark.parametrize(("size", "recipe"), list(itertools.product(names("size"), names("recipe"))))
def test_every_size_goes_with_every_recipe(size, recipe):
    config = load_config([size, recipe], DATA)
    words = {"recommended": "act24", "half": "half act24", "half_upper": "half act24"}.get(Path(recipe).stem)
    wanted = (words or Path(recipe).stem).split()
    named = [part for phase in config.schedule.phases for part in phase.label.split(", ")]
    assert {part.split()[0] for part in named} == {"dense", *wanted}
    assert f"{config.train.steps:,}" in plan(config)


@pytest.mark.parametrize("name", names("data") + names("options"))
def test_every_option_goes_with_a_size(name):
    changed = load_config(["configs/size/tiny.gin", name], [] if "/data/" in name else DATA)
    assert changed != load_config(["configs/size/tiny.gin"], ["Data.folder = 'elsewhere'"])


def test_the_papers_sizes():
    """Table 1 of arXiv 2602.06183."""
    for size, layers, d_model, d_ffn, heads, rate in (
        ("1b", 22, 2048, 8192, 16, 3e-4),
        ("7b", 32, 4096, 16384, 32, 4e-4),
    ):
        config = load_config([f"configs/size/{size}.gin"], DATA)
        model, train = config.model, config.train
        assert (model.layers, model.d_model, model.d_ffn, model.heads) == (layers, d_model, d_ffn, heads)
        assert (config.learning_rate.peak, config.learning_rate.kind) == (rate, "cosine")
        assert (train.batch_size, train.seq_len, model.vocab_size) == (2, 8192, 128256)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_say_how_to_use_them_and_import_nothing(path):
    lines = path.read_text().splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert len(header) >= 4
    assert path.name == "base.gin" or any("python -m train." in line for line in header)
    assert not any(line.lstrip().startswith(("import ", "from ")) for line in lines)


def test_bundled_files_are_found_from_any_folder(tmp_path):
    """As from an installed wheel: nothing of the checkout in the working directory."""
    command = [sys.executable, "-m", "train.main", "--dry_run", "--gin_file=configs/size/tiny.gin"]
    command += ["--gin_file=configs/recipe/venom.gin", "--gin_bindings=Data.folder='x'"]
    environment = os.environ | {"PYTHONPATH": str(CONFIG_ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "venom E=4 k=1" in done.stdout


def test_a_file_in_the_working_directory_may_include_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.gin").write_text("include 'configs/size/tiny.gin'\nTrain.steps = 7\nLearningRate.warmup = 2\n")
    config = load_config(["mine.gin"], DATA)
    assert (config.train.steps, config.model.d_model) == (7, 128)


def test_the_text_of_a_config_reproduces_it(tmp_path):
    bindings = ["Phases.schedule = [(0, 'dense'), (0.2, 'late'), (0.5, @last/Recipe())]"]
    bindings += ["late/Recipe.preset = 'venom'", "late/Recipe.experts = 8", "last/Recipe.preset = 'act24'"]
    first = load_config(["configs/size/tiny.gin", "configs/options/gqa.gin"], [*DATA, *bindings])
    (tmp_path / "config.gin").write_text(first.text)
    assert load_config([str(tmp_path / "config.gin")]) == first
    assert [phase.label for phase in first.schedule.phases] == ["dense", "late E=8 k=1", "act24"]


def test_presets_take_options_through_their_scope():
    bindings = ["venom/Recipe.experts = 16", "venom/Recipe.top_k = 4", "venom/Recipe.wgrad = 'dense'"]
    config = load_config(["configs/size/tiny.gin", "configs/recipe/venom.gin"], [*DATA, *bindings])
    dense, venom, _ = (phase.recipe for phase in config.schedule.phases)
    assert venom == Recipe.venom(experts=16, top_k=4, wgrad="dense")
    assert dense == Recipe.dense()
    assert config.max_experts == 16


def test_layers_may_have_recipes_of_their_own():
    schedule = "Phases.schedule = [(0, 'dense'), (0.1, [(0, 'all24'), (0.5, 'upper')])]"
    upper = ["upper/Recipe.preset = 'venom'", "upper/Recipe.top_k = 2", "upper/Recipe.shared = 1"]
    config = load_config(["configs/size/tiny.gin"], [*DATA, schedule, *upper])
    found = config.schedule.phases[1]
    assert found.recipe == LayerRecipes(((0, Recipe.all24()), (2, Recipe.venom(4, 2, shared=1))))
    assert found.label == "all24, upper E=4 k=2 from layer 2"
    assert config.max_experts == 4
    assert "all24, upper E=4 k=2 from layer 2, executes" in plan(config)


def test_python_configs_ignore_gin():
    load_config(["configs/size/tiny.gin"], [*DATA, "Optimizer.b1 = 0.5"])
    assert Optimizer().b1 == 0.9
    assert run_config().optimizer.b1 == 0.9


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Modle.layers = 3", "No configurable matching 'Modle'. In bindings string line"),
        ("Model.layer = 3", "'Model' doesn't have a parameter named 'layer'. In bindings string line"),
        ("Model.layer = 3", "; did you mean layers?"),
        ("Trian.steps = 3", "; did you mean Train?"),
        ("Train.quux = 3", "; there are steps, batch_size, seq_len,"),
        ("Data.folder = runs/data", "Data.folder = runs/data has no value; text needs quotes, as in --gin_bindings="),
        ("Train.steps = abc", "Train.steps = abc has no value"),
        ("LearningRate.peak = 1e400", "LearningRate.peak=inf must be positive and finite"),
        ("Model = 3", "Model is bound but nothing is called so"),
        ("SPARSE_UNTL = 3", "SPARSE_UNTL is bound but nothing is called so"),
        ("venm/Recipe.experts = 3", "no phase uses 'venm'"),
        ("Phases.schedule = [(0, 'dnese')]", "'dnese' is none of the presets"),
        ("Phases.schedule = [(0, @d/Recipe())]", "'d' is none of the presets"),
        ("Phases.schedule = [(0, 3)]", "has the entry (0, 3)"),
        ("Phases.schedule = []", "must be a list"),
        ("Phases.schedule = [(0, [(0, 'dense'), (9, 'act24')])]", "between 0 and Model.layers=4"),
        ("Phases.schedule = [(0, [(0, 'dense'), (4, 'act24')])]", "from layer 4 on, but the stack has 4 layers"),
        ("Phases.schedule = [(0, [(1, 'dense')])]", "the layers [1]; they must start at 0"),
        ("Phases.schedule = [(0, [('dense', 0)])]", "or a list of (first layer, one of these)"),
        ("venom/Recipe.shared = 1", "shared = 1 must be a whole number from 0 to below top_k = 1"),
        ("venom/Recipe.clustering = 'best'", "use one of 'kmeans', 'coactivation'"),
        ("LearningRate.rewarm = -1", "LearningRate.rewarm=-1 must be at least 0"),
        ("Phases.rescale = 1", "Phases.rescale=1 must be bool"),
        ("Model.layers = 2 * 3", "Model.layers = 2 * 3"),
        ("venom/Recipe.router = 'best'", "use one of 'cosine'"),
        ("Data.folder = @missing()", "missing"),
    ],
)
def test_what_gin_lets_pass_or_words_badly(binding, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_config(["configs/size/tiny.gin", "configs/recipe/venom.gin"], [*DATA, binding])
    assert "\n" not in str(raised.value)
    assert "0x" not in str(raised.value)


def test_an_unknown_name_in_a_file_is_located(tmp_path):
    path = tmp_path / "bad.gin"
    path.write_text("Train.steps = 7\nTrain.stepz = 8\n")
    with pytest.raises(ValueError, match=r"stepz.*bad\.gin.*line 2"):
        load_config(["configs/size/tiny.gin", str(path)], DATA)


def test_a_missing_size_and_a_missing_file_are_explained():
    with pytest.raises(ValueError, match=r"Model lacks 'vocab_size'.*--gin_file=configs/size/tiny.gin"):
        load_config(["configs/recipe/venom.gin"], DATA)
    with pytest.raises(ValueError, match=r"no file 'configs/size/huge.gin' in .*; configs/size has 125m.gin, 1b.gin"):
        load_config(["configs/size/huge.gin"], DATA)


@pytest.mark.parametrize("late", ["configs/size/tiny.gin", "configs/size/7b-layers.gin"])
def test_a_size_behind_another_file_would_undo_it_and_is_refused(late):
    """configs/base.gin, which a size includes, has a schedule of its own: all dense."""
    for first in ("configs/recipe/venom.gin", "configs/size/40m.gin"):
        with pytest.raises(
            ValueError, match=rf"{late} includes configs/base.gin, .* undo what .*{first} has bound; name"
        ):
            load_config([first, late], DATA)


VALID = {
    Model: {"vocab_size": 8, "d_model": 8, "d_ffn": 16, "layers": 1, "heads": 2},
    Data: {"folder": "x"},
    Optimizer: {},
    LearningRate: {"peak": 1.0},
    Phases: {},
    Train: {"steps": 4, "batch_size": 4, "seq_len": 4},
}


@pytest.mark.parametrize(
    ("cls", "field", "value", "message"),
    [
        (Model, "layers", "3", "Model.layers='3' must be int"),
        (Model, "layers", True, "must be int"),
        (Model, "layers", 0, "at least 1"),
        (Model, "kv_heads", 1.0, "must be int or None"),
        (Model, "heads", 3, "even multiple of Model.heads=3"),
        (Model, "heads", 8, "even multiple of Model.heads=8"),
        (Model, "kv_heads", 3, "multiple of Model.kv_heads=3"),
        (Model, "rope_base", "1e4", "must be float"),
        (Data, "folder", 3, "Data.folder=3 must be str"),
        (Optimizer, "b2", 1.0, "must be below 1"),
        (Optimizer, "clip", 0.0, "must be positive"),
        (Optimizer, "weight_decay", -0.1, "at least 0"),
        (LearningRate, "peak", 0.0, "must be positive"),
        (LearningRate, "kind", "linear", "one of 'cosine', 'wsd'"),
        (LearningRate, "final_fraction", 1.5, r"must lie in \[0, 1\]"),
        (Train, "dtype", "float16", "one of 'float32', 'bfloat16'"),
        (Train, "accumulation", 3, "must be a multiple of Train.accumulation=3"),
        (Train, "loss_chunks", 3, "must be a multiple of Train.loss_chunks=3"),
        (Train, "implementation", "triton", "one of 'reference', 'hopper', 'warp' or None"),
        (Train, "remat", "some", "one of 'none', 'dots', 'full'"),
        (Train, "seed", -1, "at least 0"),
    ],
)
def test_fields_are_checked(cls, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cls(**VALID[cls]), **{field: value})


def test_the_bindings_of_the_test_run_give_the_test_run():
    assert load_config([], gin_bindings()) == run_config()
