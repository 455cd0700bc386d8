"""Prunes a trained model's activations N:M, without training it, and says what that costs.

python -m train.sparsify --model=FOLDER --pattern=8:16 --mitigation=channel+var --calibration='texts/*.txt' \
    --text=held-out.txt --output=runs/x-8of16
python -m train.sparsify --model=FILE.gguf --grid='pattern=2:4,8:16;mitigation=none,var,channel+var' \
    --calibration='texts/*.txt' --text=held-out.txt --output=runs/grid
python -m train.evaluate --model=FOLDER --sparsity=runs/x-8of16 --text=book.txt
"""

from pathlib import Path

from absl import app, flags

from train.command import keep_compiled_programs, program
from train.config.settings import trust_imports
from train.sparsity.grid import Options, parse_grid
from train.sparsity.run import Texts, run
from train.sparsity.subject import load_subject
from venom_jax.activation.patterns import parse_pattern
from venom_jax.activation.settings import Sparsity, parse_layers, parse_mitigation, parse_overrides


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    keep_compiled_programs()
    trust_imports(values.gin_allow_imports)
    base = Sparsity(
        parse_pattern(values.pattern),
        values.criterion,
        layers=parse_layers(values.layers),
        stage=values.stage,
        dense_prefix=values.dense_prefix,
        shared_mask=values.shared_mask,
        overrides=parse_overrides(values.override),
        **parse_mitigation(values.mitigation),
    )
    cells = parse_grid(values.grid, base)
    subject = load_subject(values.model, dtype=values.dtype, tokenizer=values.tokenizer)
    run(
        subject,
        cells,
        Texts(values.text, values.calibration, values.window, values.windows, values.skip, values.windows_per_text),
        Path(values.output),
        Options(values.seed, values.skip_first, values.learn_steps, values.learn_rate, values.budget),
        calibration_windows=values.calibration_windows,
        tasks=values.tasks,
        data_dir=Path(values.eval_data_dir) if values.eval_data_dir else None,
        limit=values.limit,
        torch_hooks=values.write_torch_hooks,
    )


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder, .gguf file, WORKDIR or WORKDIR@STEP", required=True)
    flags.DEFINE_list("text", None, "held-out texts, names or patterns such as 'texts/*.txt'", required=True)
    flags.DEFINE_list("calibration", None, "texts to calibrate on; not those of --text", required=True)
    flags.DEFINE_string("output", None, "folder for the report, the cells and what they save", required=True)
    flags.DEFINE_string("pattern", "8:16", "N:M, or the share to prune, such as 50%")
    flags.DEFINE_string("criterion", "act", "channel weight of the score (docs/activation-sparsity.md)")
    flags.DEFINE_string("mitigation", "channel+var", "shifts, variance, bias, scale, rankR, joined by +; or none")
    flags.DEFINE_string("layers", "all", "all, safe (k,v,gate,down), qwen (o,gate,up,down), or names")
    flags.DEFINE_list("override", [], "single layers, BLOCK.LAYER=PATTERN or BLOCK.LAYER=dense, such as 3.up=dense")
    flags.DEFINE_string("grid", "", "several settings: 'pattern=2:4,8:16;criterion=act,wina;mitigation=none,var'")
    flags.DEFINE_enum("stage", "both", ["prefill", "decode", "both"], "where the saved setting prunes")
    flags.DEFINE_integer("dense_prefix", 0, "tokens at the beginning that stay dense", lower_bound=0)
    flags.DEFINE_boolean("shared_mask", False, "one mask for q, k, v and one for gate, up")
    flags.DEFINE_float("budget", None, "prune at most this share of the linear operations, the best layers first")
    flags.DEFINE_integer("window", 512, "tokens of a window", lower_bound=2)
    flags.DEFINE_integer("windows", 64, "windows of --text at most", lower_bound=1)
    flags.DEFINE_integer("windows_per_text", None, "windows of one text at most", lower_bound=1)
    flags.DEFINE_integer("calibration_windows", 32, "windows of --calibration at most", lower_bound=1)
    flags.DEFINE_integer("skip", 0, "tokens left out at the beginning of each text", lower_bound=0)
    flags.DEFINE_integer("skip_first", 1, "tokens of a calibration window that statistics leave out", lower_bound=0)
    flags.DEFINE_integer("learn_steps", 64, "steps for learned parameters, one window each", lower_bound=1)
    flags.DEFINE_float("learn_rate", 1e-3, "their peak learning rate")
    flags.DEFINE_integer("seed", 0, "of calibration and learning")
    flags.DEFINE_boolean("write_torch_hooks", False, "a file that applies the setting to a model of transformers")
    flags.DEFINE_list("tasks", [], "tasks of lm-eval (extra eval) for every cell of activations")
    flags.DEFINE_string("eval_data_dir", None, "folder with TASK/SPLIT.jsonl or .parquet; else lm-eval downloads")
    flags.DEFINE_integer("limit", None, "only this many items of each task", lower_bound=1)
    flags.DEFINE_string("tokenizer", None, "a tokenizer.json in place of the model's own")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "to compute in; default: as the weights are stored")
    flags.DEFINE_boolean("gin_allow_imports", False, "let a run's configuration import modules: runs their code")
    app.run(main)
