"""The model that is pruned: a Hugging Face folder, a GGUF file, or a checkpoint of this trainer, read alike."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config.settings import Model
from train.data.sources import open_split
from train.data.tokenizer import Tokenizer, wrap_tokenizer
from train.evaluation.validation import CONFIG_FILE, restore, split_source
from venom_jax import pretrained
from venom_jax.pretrained.architecture import Architecture, Rope
from venom_jax.pretrained.decoder import Weights


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
      name: where it comes from, as it was given.
      architecture, weights: the model.
      tokenizer: its tokenizer.
      hashes: SHA-256 of each file with weights, or of a checkpoint's arrays.
    """

    name: str
    architecture: Architecture
    weights: Weights
    tokenizer: Tokenizer
    hashes: dict[str, str]


def load_subject(source: str, *, dtype: str | None = None, tokenizer: str | None = None) -> Subject:
    """Reads `FOLDER`, `FILE.gguf`, `WORKDIR` or `WORKDIR@STEP`.

    Args:
      source: the model.
      dtype: to convert weights to; by default as they are stored.
      tokenizer: a `tokenizer.json` in place of the source's own.

    Raises:
      ValueError: nothing to read there, a damaged file, or no tokenizer.
      NotImplementedError: a model that the inference decoder cannot compute.
    """
    folder = split_source(source)[0]
    if (folder / CONFIG_FILE).is_file():
        return _from_checkpoint(source, dtype)
    model = pretrained.load(source, dtype, tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{source} holds no tokenizer.json: give one with --tokenizer")
    eos = next((name for i in model.architecture.eos_ids if (name := model.tokenizer.id_to_token(i))), None)
    core = wrap_tokenizer(model.tokenizer, eos, source)
    return Subject(source, model.architecture, model.weights, core, model.hashes())


def _from_checkpoint(source: str, dtype: str | None) -> Subject:
    run = restore(source)
    params, config = run.dense_params(), run.config
    weights = jax.tree.map(lambda a: jnp.asarray(a, dtype or a.dtype), of_decoder(params, config.model))
    tokenizer = open_split(config, "train").tokenizer
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    arch = architecture_of(config.model, config.train.seq_len, tokenizer.eos_id)
    return Subject(f"{source} (step {run.step})", arch, weights, tokenizer, {f"step {run.step}": digest.hexdigest()})


def architecture_of(config: Model, seq_len: int, eos_id: int) -> Architecture:
    """The trainer's decoder as the inference decoder describes it.

    Raises:
      NotImplementedError: attention that stays inside documents, which the inference decoder does not compute.
    """
    if config.document_start is not None:
        raise NotImplementedError(
            f"Model.document_start={config.document_start}: the inference decoder's attention does not stop at a "
            "document's end"
        )
    return Architecture(
        family="venom-jax",
        vocab_size=config.vocab_size,
        width=config.d_model,
        ffn=config.d_ffn,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.key_value_heads,
        head_dim=config.head_dim,
        activation="relu2",
        norm_epsilon=config.norm_epsilon,
        windows=(None,) * config.layers,
        ropes=(Rope(config.rope_base),) * config.layers,
        tied=config.tied_head,
        context=seq_len,
        qk_norm=config.qk_norm,
        attention_scale=config.head_dim**-0.5,
        eos_ids=(eos_id,),
    )


def of_decoder(params: dict, config: Model) -> Weights:
    """The trainer's parameters under the inference decoder's names."""
    blocks = params["blocks"]
    attention, ffn = blocks["attention"], blocks["ffn"]
    queries, keys = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    query, key, value = jnp.split(attention["qkv"], (queries, queries + keys), axis=-1)
    matrices = {"q": query, "k": key, "v": value, "o": attention["out"], "up": ffn["w1"], "down": ffn["w2"]}
    norms = {"attention_norm": blocks["attention_scale"], "ffn_norm": blocks["ffn_scale"]}
    if config.qk_norm:
        norms |= {"query_norm": attention["query_scale"], "key_norm": attention["key_scale"]}
    top: dict[str, Any] = {"embedding": params["embedding"], "final_norm": params["final_scale"]}
    top |= {} if config.tied_head else {"head": params["head"]}
    return top | {"blocks": {"linears": {name: {"w": w} for name, w in matrices.items()}, "norms": norms}}
