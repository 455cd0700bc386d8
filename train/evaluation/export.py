"""A run as a Hugging Face model, an `ArceeForCausalLM` with its tokenizer: what `python -m train.export` writes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from train.config.settings import Model
from train.data.sources import open_split
from train.data.tokenizer import Tokenizer
from train.evaluation import validation
from train.model import arcee

DTYPES = ("float32", "bfloat16", "float16")


def write_folder(
    output: Path,
    params: dict,
    config: Model,
    *,
    seq_len: int,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    dtype: str = "bfloat16",
) -> None:
    """Writes model and tokenizer; the weights come last, so that a folder with weights is complete.

    Args:
      output: folder, made where it does not exist.
      params: the dense model's parameters.
      config: its shape.
      seq_len: the longest context it was trained with.
      tokenizer: what its vocabulary means.
      tokenizer_path: the `tokenizer.json` that holds it.
      dtype: of the stored weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    # A post-processor puts tokens around a text (a begin of text, say) that neither training nor evaluation has seen.
    content = json.loads(tokenizer_path.read_text(encoding="utf-8")) | {"post_processor": None}
    (output / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    documents: dict[str, dict[str, Any]] = {
        arcee.CONFIG: arcee.config_json(config, seq_len=seq_len, eos_id=tokenizer.eos_id, dtype=dtype),
        "generation_config.json": {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.eos_token,
            "eos_token": tokenizer.eos_token,
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in documents.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n")
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    unfinished = output / f"{arcee.WEIGHTS}.unfinished"
    save_file(arcee.to_tensors(jax.device_get(cast), config), unfinished, metadata={"format": "pt"})
    unfinished.rename(output / arcee.WEIGHTS)


def export(workdir: str, output: Path, dtype: str, *, ema: bool = False) -> str:
    """Exports the checkpoint ``workdir`` (or `WORKDIR@STEP`), or its average, and says in a line what was written.

    Raises:
      ValueError: no such checkpoint, its tokenizer is gone, or ``output`` holds files already.
    """
    check_output(output)
    run = validation.restore(workdir, ema=ema)
    write(run, run.dense_params(), output, dtype)
    text = f"step {run.step}{', averaged weights,' if ema else ''} as ArceeForCausalLM, {dtype}, in {output}"
    if not run.phase.recipe.is_dense:
        baked = ", its thresholded weights baked into it" if run.phase.recipe.weights else ""
        text += f". The checkpoint stands inside a sparse phase ({run.phase.label}): the exported model is dense{baked}"
    return text


def check_output(output: Path) -> None:
    """Raise ValueError unless ``output`` is a new or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give --output a new one")


def write(run: validation.Restored, params: dict, output: Path, dtype: str) -> None:
    """Writes the dense model with these parameters and the run's shape and tokenizer.

    Raises:
      ValueError: the run's tokenizer is gone, or ``output`` cannot be written.
    """
    dataset = open_split(run.config, "train")
    try:
        write_folder(
            output,
            params,
            run.config.model,
            seq_len=run.config.train.seq_len,
            tokenizer=dataset.tokenizer,
            tokenizer_path=dataset.tokenizer_path,
            dtype=dtype,
        )
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}; give --output another folder") from error
