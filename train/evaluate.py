"""Validation loss and bits per byte, inside a run and of a finished or interrupted one; tasks of lm-eval; any text.

python -m train.evaluate --workdir=runs/a            # the dense model (a baked copy inside a sparse phase)
python -m train.evaluate --workdir=runs/a --sparse   # with the recipe of the checkpoint's phase as well
python -m train.evaluate --workdir=runs/a --text=book.txt
python -m train.evaluate --workdir=runs/a --tasks=piqa,arc_easy --eval_data_dir=items
python -m train.evaluate --model=FOLDER --sparsity=runs/x-8of16 --text=book.txt   # any model train.sparsify takes
"""

from pathlib import Path

from absl import app, flags

from train.command import program
from train.config.settings import trust_imports
from train.evaluation.validation import report_tasks, report_text, report_validation, restore, split_source
from train.sparsity import usage


def evaluate_pruned(values: flags.FlagValues) -> None:
    """Text or tasks by the inference decoder."""
    if values.text is None and not values.tasks:
        raise ValueError("--model and --sparsity need --text or --tasks: such a model has no validation split")
    if values.sparse or values.ema:
        raise ValueError("--sparse and --ema are of runs; leave them out with --model and --sparsity")
    model = usage.from_flags(values)
    if values.text is not None:
        usage.report_text(model, Path(values.text), text_field=values.text_field)
        return
    data_dir = None if values.eval_data_dir is None else Path(values.eval_data_dir)
    text, table = usage.run_tasks(model, values.tasks, data_dir=data_dir, limit=values.limit)
    print(f"{model.subject.name}, {model.forward}:\n{table}")
    if values.json is not None:
        Path(values.json).write_text(text)


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    trust_imports(values.gin_allow_imports)
    if values.model is not None or values.sparsity is not None:
        evaluate_pruned(values)
        return
    run = restore(values.workdir, ema=values.ema)
    if values.text is not None:
        report_text(run, Path(values.text), text_field=values.text_field, sparse=values.sparse)
    elif values.tasks:
        data_dir = None if values.eval_data_dir is None else Path(values.eval_data_dir)
        report_tasks(
            run,
            split_source(values.workdir)[0],
            values.tasks,
            sparse=values.sparse,
            data_dir=data_dir,
            limit=values.limit,
        )
    else:
        report_validation(run, sparse=values.sparse)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main; FOLDER@STEP for an older step")
    flags.DEFINE_string("model", None, "in its place: Hugging Face folder, .gguf file, or a workdir")
    flags.DEFINE_string("sparsity", None, "folder of train.sparsify: prune the model's activations as saved there")
    flags.DEFINE_boolean("allow_other_weights", False, "take --sparsity for weights that it was not calibrated on")
    flags.DEFINE_string("tokenizer", None, "with --model: a tokenizer.json in place of the model's own")
    flags.DEFINE_string("json", None, "with --model and --tasks: write lm-eval's results to this file")
    flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)
    flags.DEFINE_boolean("ema", False, "the averaged weights (Optimizer.ema) in place of the last ones")
    flags.DEFINE_boolean("sparse", False, "also evaluate with the recipe of the checkpoint's phase")
    flags.DEFINE_string("text", None, "bits per byte of this file instead of the validation split")
    flags.DEFINE_string("text_field", "text", "field (.jsonl) or column (.parquet) with the text of --text")
    flags.DEFINE_list("tasks", [], "tasks of lm-eval (extra eval) instead, such as arc_easy,piqa")
    flags.DEFINE_string("eval_data_dir", None, "folder with TASK/SPLIT.jsonl or .parquet; else lm-eval downloads")
    flags.DEFINE_integer("limit", None, "only this many items of each task", lower_bound=1)
    flags.DEFINE_boolean("gin_allow_imports", False, "let the run's configuration import modules: runs their code")
    app.run(main)
