"""The decoder as Hugging Face's `ArceeForCausalLM` (squared ReLU, otherwise Llama): the same function, other names.

Both rotate the feature pairs (i, i + h/2) and give query head n the key-value head n // (H / K), so tensors are only
cut, stacked and transposed: our matrices multiply from the right (x W), theirs are stored [outputs, inputs].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from train.config.settings import Model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DEFAULT_ROPE_BASE = 10000.0  # of ArceeConfig, where config.json is silent
DEFAULT_EPSILON = 1e-5


def config_json(config: Model, *, seq_len: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """Content of `config.json`.  ``seq_len`` becomes the longest context, ``dtype`` is that of the stored weights.

    Raises:
      NotImplementedError: the architecture lacks something that the model has.
    """
    if not config.is_plain:
        raise NotImplementedError(
            "ArceeForCausalLM has a squared-ReLU FFN without a gate; Model.gated, Model.experts and another "
            "Model.activation have no export"
        )
    if config.qk_norm:
        raise NotImplementedError("ArceeForCausalLM has no norm on queries and keys; Model.qk_norm=True has no export")
    return {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "hidden_act": "relu2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        **_yarn(config),
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "max_position_embeddings": seq_len,
        "bos_token_id": eos_id,  # a document begins where another ended
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def _yarn(config: Model) -> dict[str, Any]:
    if config.rope_factor == 1:
        return {}
    values = {
        "rope_type": "yarn",
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
        "beta_fast": config.rope_fast,
        "beta_slow": config.rope_slow,
        "attention_factor": config.rope_attention_factor,
    }
    return {"rope_scaling": {name: value for name, value in values.items() if value is not None}}


def _read_yarn(rope: Mapping[str, Any], longest: int | None) -> dict[str, Any]:
    """Fields of `Model`; `longest` is the context where the original one is not named."""
    if rope.get("rope_type", "default") != "yarn":
        return {}
    return {
        "rope_factor": float(rope.get("factor", 1)),
        "rope_original_length": rope.get("original_max_position_embeddings", longest),
        "rope_fast": float(rope.get("beta_fast") or 32),
        "rope_slow": float(rope.get("beta_slow") or 1),
        "rope_attention_factor": rope.get("attention_factor"),
    }


def read_model(folder: Path) -> Model:
    """The shape of the model in a Hugging Face folder.

    Raises:
      ValueError: `config.json` cannot be read or is another architecture's.
      NotImplementedError: an Arcee model with something that this decoder lacks.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    kind = values.get("model_type"), values.get("hidden_act", "relu2")
    if kind != ("arcee", "relu2"):
        raise ValueError(f"{path} has model_type {kind[0]!r} and hidden_act {kind[1]!r}; only arcee with relu2 is read")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [name for name in required if name not in values]:
        raise ValueError(f"{path} lacks {', '.join(absent)}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads, width = values["num_attention_heads"], values["hidden_size"]
    lacking = {
        "attention_bias": (values.get("attention_bias", False), False),
        "mlp_bias": (values.get("mlp_bias", False), False),
        "head_dim": (values.get("head_dim") or width // heads, width // heads),
        "rope_type": (kind, "default" if kind != "yarn" else "yarn"),
        "mscale_all_dim": (rope.get("mscale_all_dim") or None, None),
        "truncate": (rope.get("truncate", True), True),
    }
    for name, (found, supported) in lacking.items():
        if found != supported:
            raise NotImplementedError(f"{path} has {name} = {found!r}; this decoder has only {supported!r}")
    return Model(
        vocab_size=values["vocab_size"],
        d_model=width,
        d_ffn=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads"),
        rope_base=rope.get("rope_theta", values.get("rope_theta", DEFAULT_ROPE_BASE)),
        **_read_yarn(dict(rope) | {"rope_type": kind}, values.get("max_position_embeddings")),
        norm_epsilon=values.get("rms_norm_eps", DEFAULT_EPSILON),
        tied_head=values.get("tie_word_embeddings", False),
    )


def to_tensors(params: Mapping[str, Any], config: Model) -> dict[str, Float[np.ndarray, "..."]]:
    """Our parameters under Hugging Face's names, in the dtype that they have."""
    blocks = params["blocks"]
    tensors = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_scale"]}
    if not config.tied_head:
        tensors["lm_head.weight"] = params["head"].T
    for i in range(config.layers):
        query, key, value = np.split(np.asarray(blocks["attention"]["qkv"][i]), _cuts(config), axis=1)
        layer = {
            "input_layernorm": blocks["attention_scale"][i],
            "self_attn.q_proj": query.T,
            "self_attn.k_proj": key.T,
            "self_attn.v_proj": value.T,
            "self_attn.o_proj": blocks["attention"]["out"][i].T,
            "post_attention_layernorm": blocks["ffn_scale"][i],
            "mlp.up_proj": blocks["ffn"]["w1"][i].T,
            "mlp.down_proj": blocks["ffn"]["w2"][i].T,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def from_tensors(tensors: Mapping[str, np.ndarray], config: Model) -> dict[str, Any]:
    """The inverse of ``to_tensors``, as float32 arrays."""

    def one(name: str) -> Float[Array, "..."]:
        return jnp.asarray(tensors[f"{name}.weight"], jnp.float32)

    def stacked(name: str) -> Float[Array, "L ..."]:
        layers = [tensors[f"model.layers.{i}.{name}.weight"].astype(np.float32).T for i in range(config.layers)]
        return jnp.asarray(np.stack(layers))

    projections = [stacked(f"self_attn.{name}_proj") for name in "qkv"]
    params = {
        "embedding": one("model.embed_tokens"),
        "final_scale": one("model.norm"),
        "blocks": {
            "attention_scale": stacked("input_layernorm"),
            "attention": {"qkv": jnp.concatenate(projections, axis=-1), "out": stacked("self_attn.o_proj")},
            "ffn_scale": stacked("post_attention_layernorm"),
            "ffn": {"w1": stacked("mlp.up_proj"), "w2": stacked("mlp.down_proj")},
        },
    }
    return params if config.tied_head else params | {"head": one("lm_head").T}


def read_params(folder: Path, config: Model) -> dict[str, Any]:
    """The parameters in a Hugging Face folder, from one or several `.safetensors` files.

    Raises:
      ValueError: a tensor is missing, has another shape than ``config`` says, or a file is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    for name, shape in _shapes(config).items():
        if name not in tensors:
            raise ValueError(f"the .safetensors files in {folder} lack {name}; is the folder complete?")
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name} is {tensors[name].shape}, but its {CONFIG} says {shape}")
    return from_tensors(tensors, config)


def _cuts(config: Model) -> list[int]:
    """Columns of the fused projection where the keys and the values begin."""
    keys = config.heads * config.head_dim
    return [keys, keys + config.key_value_heads * config.head_dim]


def _shapes(config: Model) -> dict[str, tuple[int, ...]]:
    width, ffn, kv = config.d_model, config.d_ffn, config.key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape for i in range(config.layers) for name, shape in layer.items()
    }
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    return shapes if config.tied_head else shapes | {"lm_head.weight": (config.vocab_size, width)}
