"""Local items, and lm-eval itself over them where it is installed."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.trainer import three_phases, token_folder
from train.data.token_files import open_dataset
from train.evaluation import validation
from train.evaluation.harness import LOCAL_TASKS, find_items, local_task, run_tasks
from train.evaluation.likelihood import windows

ITEMS = Path(__file__).parent / "data" / "eval"
UNUSED: Any = None  # model or tokenizer of what does not come to scoring


def lines(task):
    return [json.loads(line) for line in (ITEMS / task / f"{LOCAL_TASKS[task].split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_each_task_has_twenty_items_with_a_balanced_answer(task):
    items = lines(task)
    assert len(items) == 20
    answers = [str(item.get("answerKey", item.get("label", item.get("answer")))) for item in items]
    assert np.unique(answers, return_counts=True)[1].max() <= 12
    assert find_items(ITEMS, task)[LOCAL_TASKS[task].split][0].endswith(".jsonl")


def test_a_local_task_is_lm_evals_own_with_other_files():
    files = find_items(ITEMS, "winogrande")
    content = local_task("winogrande", files, Path("tasks"), cache="scratch")
    assert content["include"] == "tasks/winogrande/default.yaml"
    assert content["dataset_path"] == "json"
    assert "validation_split" not in content, "stays as it is in lm-eval's file"
    assert (content["training_split"], content["test_split"]) == (None, None)
    assert content["dataset_kwargs"] == {"data_files": files, "cache_dir": "scratch"}


def test_missing_and_broken_items_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task 'mmlu' has no local form; those with one are arc_easy"):
        find_items(ITEMS, "mmlu")
    with pytest.raises(ValueError, match=r"piqa holds no validation\*\.jsonl or \.parquet"):
        find_items(tmp_path, "piqa")
    shutil.copytree(ITEMS / "piqa", tmp_path / "piqa")
    path = tmp_path / "piqa" / "validation.jsonl"
    item = json.loads(path.read_text().splitlines()[0])
    del item["sol2"]
    path.write_text(path.read_text() + json.dumps(item) + "\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 21: no field sol2; the item has goal, label, sol1"):
        find_items(tmp_path, "piqa")
    path.write_text("[\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 1: not a JSON object"):
        find_items(tmp_path, "piqa")
    path.write_text("")
    with pytest.raises(ValueError, match=r"validation\.jsonl holds no items"):
        find_items(tmp_path, "piqa")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[eval\]'"):
        run_tasks(UNUSED, UNUSED, ["piqa"], data_dir=ITEMS, limit=None, model_args={})


TRUSTING = {"dataset_path": "someone/items", "dataset_kwargs": {"trust_remote_code": True}}
FILES = {
    "plain": {"task": "plain", "dataset_kwargs": {"trust_remote_code": False}, "unsafe_code": False},
    "trusting": {"task": "trusting", "tag": ["tagged"]} | TRUSTING,
    "unsafe": {"task": "unsafe", "unsafe_code": True},
    "group": {"group": "group", "task": ["plain", {"group": "inner", "task": ["plain", "trusting"]}]},
    "overriding": {"group": "overriding", "task": [{"task": "plain"} | TRUSTING]},
    "in a circle": {"group": "in a circle", "task": ["in a circle", "plain", "not there"]},
}


def lm_eval_with(monkeypatch, files):
    """An lm-eval that knows these task files; returns what it is asked to score."""
    index = {name: SimpleNamespace(cfg=cfg, yaml_path=f"{name}.yaml", tags=set()) for name, cfg in files.items()}
    index["tagged"] = SimpleNamespace(cfg=None, yaml_path=None, tags={"plain", "trusting"})
    parts = {name: ModuleType(f"lm_eval.{name}") for name in ("tasks", "utils", "evaluator")}
    scored = []
    manager = SimpleNamespace(all_tasks=list(index), task_index=index)
    vars(parts["tasks"]).update(TaskManager=lambda **_: manager, __file__="tasks/__init__.py")
    vars(parts["evaluator"]).update(simple_evaluate=lambda **options: scored.append(options) or {})
    vars(parts["utils"]).update(make_table=str, handle_non_serializable=str)
    package = ModuleType("lm_eval")
    vars(package).update(parts)
    for module in (package, *parts.values()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("train.evaluation.harness._as_lm", lambda *_: None)
    return scored


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("trusting", "task 'trusting' has trust_remote_code: True in trusting.yaml"),
        ("tagged", "task 'trusting' has trust_remote_code: True"),
        ("group", "task 'trusting' has trust_remote_code: True"),
        ("overriding", "task 'overriding' has trust_remote_code: True in overriding.yaml"),
        ("unsafe", "task 'unsafe' has unsafe_code: True"),
    ],
)
def test_a_task_that_asks_for_code_of_its_data_set_is_refused(monkeypatch, task, named):
    scored = lm_eval_with(monkeypatch, FILES)
    with pytest.raises(ValueError, match=re.escape(named)):
        run_tasks(UNUSED, UNUSED, ["plain", task], data_dir=None, limit=None, model_args={})
    assert not scored, "nothing was opened or scored"


def test_other_tasks_are_scored_and_lm_eval_is_told_to_trust_nothing(monkeypatch):
    scored = lm_eval_with(monkeypatch, FILES)
    run_tasks(UNUSED, UNUSED, ["plain", "in a circle"], data_dir=None, limit=3, model_args={"step": 6})
    (options,) = scored
    assert options["tasks"] == ["plain", "in a circle"]
    assert not {name for name in options if "trust" in name or "unsafe" in name}


def test_local_items_are_looked_at_too(monkeypatch):
    scored = lm_eval_with(monkeypatch, {"piqa": {"task": "piqa"} | TRUSTING})
    with pytest.raises(ValueError, match="task 'piqa' has trust_remote_code"):
        run_tasks(UNUSED, UNUSED, ["piqa"], data_dir=ITEMS, limit=None, model_args={})
    assert not scored


def test_without_a_network_local_items_are_named(monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")

    def unreachable(**_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", unreachable)
    tokenizer = open_dataset(token_folder(), "train").tokenizer
    unused: Any = None
    with pytest.raises(
        ValueError, match=r"data of piqa: Couldn't reach the Hub; put items into a folder.*--eval_data_dir"
    ):
        run_tasks(unused, tokenizer, ["piqa"], data_dir=ITEMS, limit=None, model_args={})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(workdir, what was printed) of all six tasks, dense and sparse, on a checkpoint inside a sparse phase."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    workdir = tmp_path_factory.mktemp("evaluated")
    run = validation.restore(f"{three_phases()[1]}@6")
    validation.report_tasks(run, workdir, list(LOCAL_TASKS), sparse=True, data_dir=ITEMS, limit=None)
    return workdir


def test_lm_eval_scores_all_six_tasks(evaluated):
    for name in ("dense", "sparse"):
        found = json.loads((evaluated / f"lm_eval-6-{name}.json").read_text())
        assert found["results"].keys() == LOCAL_TASKS.keys()
        assert found["n-samples"] == {task: {"original": 20, "effective": 20} for task in LOCAL_TASKS}
        assert found["config"]["model_args"] == {"workdir": str(evaluated), "step": 6, "forward": name}


def prompts(task, item):
    """(context, choices, gold) as lm-eval's task files word them."""
    if task == "piqa":
        return f"Question: {item['goal']}\nAnswer:", [" " + item["sol1"], " " + item["sol2"]], item["label"]
    gold = "ABCD".index(item["answerKey"])
    return f"Question: {item['question']}\nAnswer:", [" " + text for text in item["choices"]["text"]], gold


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_its_accuracy_is_that_of_our_log_likelihoods(evaluated, task, name):
    tokenizer = open_dataset(token_folder(), "train").tokenizer
    scorer = dict(validation.restore(f"{three_phases()[1]}@6").scorers(sparse=True))[name]
    right, right_per_byte = [], []
    for item in lines(task):
        context, choices, gold = prompts(task, item)
        ids = tokenizer.encode(context)
        answers = [tokenizer.encode(context + choice)[len(ids) :] for choice in choices]
        stretches = [list(windows(answer, ids, scorer.max_length)) for answer in answers]
        logp = np.array([sum(score for score, _ in scorer(some)) for some in stretches])
        right.append(logp.argmax() == gold)
        right_per_byte.append((logp / [len(choice) - 1 for choice in choices]).argmax() == gold)
    result = json.loads((evaluated / f"lm_eval-6-{name}.json").read_text())["results"][task]
    assert result["acc,none"] == pytest.approx(np.mean(right))
    assert result["acc_norm,none"] == pytest.approx(np.mean(right_per_byte))


def test_the_table_and_a_limit(capsys, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    run = validation.restore(three_phases()[1])
    validation.report_tasks(run, tmp_path, ["hellaswag"], sparse=True, data_dir=ITEMS, limit=3)
    printed = capsys.readouterr().out
    assert "|hellaswag|" in printed.replace(" ", "")
    assert [path.name for path in tmp_path.iterdir()] == ["lm_eval-12-dense.json"]
    found = json.loads((tmp_path / "lm_eval-12-dense.json").read_text())
    assert found["n-samples"]["hellaswag"]["effective"] == 3
