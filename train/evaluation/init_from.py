"""Weights to start a run from, `--init_from`: a checkpoint of this program, or a Hugging Face folder."""

from train.config.settings import Model, RunConfig
from train.data.sources import open_split
from train.data.token_files import TOKENIZER
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.evaluation import validation
from train.model import arcee

# What decides the function that a set of weights computes.
_SHAPE = (
    "vocab_size",
    "d_model",
    "d_ffn",
    "layers",
    "heads",
    "key_value_heads",
    "rope_base",
    "rope_factor",
    "rope_original_length",
    "rope_fast",
    "rope_slow",
    "rope_attention_factor",
    "gated",
    "activation",
    "clamp",
    "experts",
    "experts_per_token",
    "shared_experts",
    "expert_neurons",
    "expert_scores",
    "norm_epsilon",
    "tied_head",
    "qk_norm",
)


def load_params(source: str, config: Model) -> dict:
    """The dense model's parameters in ``source``: `WORKDIR`, `WORKDIR@STEP` or a folder as `train.export` writes it.

    Of a checkpoint inside a sparse phase it is the baked model, the one that evaluation reports and export writes.

    Raises:
      ValueError: nothing to load there, or a model of another shape than ``config``, with what differs.
      NotImplementedError: a Hugging Face model with something that this decoder lacks.
    """
    folder, _ = validation.split_source(source)
    if (folder / arcee.CONFIG).is_file():
        _check_same_shape(source, arcee.read_model(folder), config)
        return arcee.read_params(folder, config)
    if not (folder / validation.CONFIG_FILE).is_file():
        raise ValueError(
            f"--init_from={source} is neither a workdir of train.main (no {validation.CONFIG_FILE} in it) nor a "
            f"Hugging Face folder (no {arcee.CONFIG})"
        )
    _check_same_shape(source, validation.read_config(folder).model, config)
    return validation.restore(source).dense_params()


def foreign_tokenizer(source: str, config: RunConfig) -> str | None:
    """A line about it, if the weights in ``source`` were trained on other tokens than the run's data have; else None.

    None also where one of the two has no tokenizer to look at: random data, a source whose data are gone.
    """
    folder, _ = validation.split_source(source)
    try:
        if (folder / TOKENIZER).is_file():
            theirs, path = load_tokenizer(folder / TOKENIZER), folder / TOKENIZER
        else:
            dataset = open_split(validation.read_config(folder), "train")
            theirs, path = dataset.tokenizer, dataset.tokenizer_path
        ours = open_split(config, "train").tokenizer
    except ValueError:
        return None
    if _ids(theirs) == _ids(ours):
        return None
    return (
        f"--init_from={source} was trained with another tokenizer than the data's: its embedding means other tokens. "
        f"Prepare the data with --tokenizer={path}"
    )


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.core.get_vocab(with_added_tokens=True)


def _check_same_shape(source: str, found: Model, wanted: Model) -> None:
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in _SHAPE}
    listed = [
        f"Model.{name} is {there!r} there and {here!r} here" for name, (there, here) in pairs.items() if there != here
    ]
    if listed:
        text = ", ".join(listed).replace("key_value_heads", "kv_heads")
        raise ValueError(f"--init_from={source} is another model: {text}; bind the same values")
