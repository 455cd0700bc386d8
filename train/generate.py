"""Text from a trained model: `python -m train.generate --workdir=runs/a --prompt="The state of"`.

A new token is computed from the cached keys and values of those before it. Once the text is as long as the model's
sequences, the oldest token falls out for each new one, and with it what it gave to the others: the last S tokens are
then computed again for each token, so that a text never depends on anything older. Made to look at what a run has
learned, one text at a time; not meant for serving.
"""

from absl import app, flags
from tqdm import tqdm

from train.command import program
from train.config.settings import trust_imports
from train.data.sources import open_split
from train.evaluation.sampling import TEMPERATURE, TOP_P, sample_text
from train.evaluation.validation import restore
from train.sparsity import usage


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    trust_imports(values.gin_allow_imports)
    options = {"temperature": values.temperature, "top_p": values.top_p, "seed": values.seed}
    if values.model is not None or values.sparsity is not None:
        model = usage.from_flags(values)
        text = usage.generate_text(model, values.prompt, new_tokens=values.new_tokens, **options)
        print(f"{model.subject.name}, {model.forward}:\n{text}")
        return
    run = restore(values.workdir, ema=values.ema)
    tokenizer = open_split(run.config, "train").tokenizer
    with tqdm(total=values.new_tokens, unit="token", disable=None) as bar:  # None: shown on a terminal only
        text = sample_text(
            run.graphdef,
            run.config,
            run.dense_params(),
            run.state.method,
            tokenizer,
            values.prompt,
            new_tokens=values.new_tokens,
            on_tokens=bar.update,
            **options,
        )
    print(f"step {run.step}:\n{text}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main; FOLDER@STEP for an older step")
    flags.DEFINE_string("model", None, "in its place: Hugging Face folder, .gguf file, or a workdir")
    flags.DEFINE_string("sparsity", None, "folder of train.sparsify: prune the model's activations as saved there")
    flags.DEFINE_boolean("allow_other_weights", False, "take --sparsity for weights that it was not calibrated on")
    flags.DEFINE_string("tokenizer", None, "with --model: a tokenizer.json in place of the model's own")
    flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)
    flags.DEFINE_string("prompt", "The ", "the text to continue; empty starts a new document")
    flags.DEFINE_integer("new_tokens", 200, "how many tokens to draw at most")
    flags.DEFINE_float("temperature", TEMPERATURE, "0 takes the most probable token")
    flags.DEFINE_float("top_p", TOP_P, "share of the probability to draw from")
    flags.DEFINE_integer("seed", 0, "of the drawing")
    flags.DEFINE_boolean("ema", False, "the averaged weights (Optimizer.ema) in place of the last ones")
    flags.DEFINE_boolean("gin_allow_imports", False, "let the run's configuration import modules: runs their code")
    app.run(main)
