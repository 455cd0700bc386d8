"""Weights from a Hugging Face folder: `config.json` and `.safetensors` files. Nothing in it is executed."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from venom_jax.pretrained.architecture import Architecture, from_config
from venom_jax.pretrained.decoder import Weights

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
_MAX_CONFIG = 1 << 24  # bytes of a config.json
_TYPES = ("BF16", "F16", "F32")
# Stored by some programs and computed here: the angles of rotary positions.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def read_architecture(folder: Path) -> Architecture:
    """The architecture that the folder's `config.json` describes.

    Raises:
      ValueError: it cannot be read, or lacks something.
      NotImplementedError: a model that this decoder cannot compute, by name.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for one")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return from_config(values, str(path))


def shards(folder: Path) -> list[Path]:
    """The `.safetensors` files of a folder.

    Raises:
      ValueError: there is none.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file; other weight formats are not read")
    return found


def read_weights(folder: Path, arch: Architecture) -> Weights:
    """The weights of a folder, in the dtype they are stored in, matrices as [inputs, outputs].

    Raises:
      ValueError: a file is damaged, a tensor is missing, stored twice, of another shape than the configuration says, or
        one that this architecture has no use for (it would be left out silently).
    """
    where: dict[str, tuple[Any, Path]] = {}
    expected = {theirs: shape for theirs, shape, *_ in tensor_names(arch)}
    for path in shards(folder):
        try:
            file = safe_open(path, framework="numpy")
            names = list(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name in names:
            if name in where:
                raise ValueError(f"{name} is stored in {where[name][1].name} and in {path.name}; keep one of the files")
            if name not in expected and not _COMPUTED.fullmatch(name) and not (arch.tied and name == "lm_head.weight"):
                raise ValueError(f"{path} holds {name}, which {arch.family} as {CONFIG} describes it does not have")
            where[name] = file, path

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in where:
            raise ValueError(f"the .safetensors files in {folder} lack {name}; is the folder complete?")
        file, path = where[name]
        try:
            part = file.get_slice(name)
            if tuple(part.get_shape()) != shape:
                raise ValueError(f"{path}: {name} is {tuple(part.get_shape())}, but {CONFIG} says {shape}")
            if part.get_dtype() not in _TYPES:
                raise ValueError(f"{path}: {name} is stored as {part.get_dtype()}; read are {', '.join(_TYPES)}")
            return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged at {name}: {error}") from error

    return assemble(arch, read)


def tensor_names(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...], str, str, int]]:
    """(Hugging Face's name, shape, our group, our name, layer or -1) of every tensor."""
    yield "model.embed_tokens.weight", (arch.vocab_size, arch.width), "", "embedding", -1
    yield "model.norm.weight", (arch.width,), "", "final_norm", -1
    if not arch.tied:
        yield "lm_head.weight", (arch.vocab_size, arch.width), "", "head", -1
    norms = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "pre_feedforward_layernorm" if arch.four_norms else "post_attention_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
        "query_norm": "self_attn.q_norm",
        "key_norm": "self_attn.k_norm",
    }
    for i in range(arch.layers):
        for name, (inputs, outputs) in arch.linears.items():
            theirs = linear_name(i, name)
            yield f"{theirs}.weight", (outputs, inputs), "w", name, i
            if arch.has_bias(name):
                yield f"{theirs}.bias", (outputs,), "b", name, i
        for name, size in arch.norms.items():
            yield f"model.layers.{i}.{norms[name]}.weight", (size,), "norms", name, i


def linear_name(layer: int, name: str) -> str:
    """Hugging Face's name of a linear layer."""
    return f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"


def assemble(arch: Architecture, read: Callable[[str, tuple[int, ...]], np.ndarray]) -> Weights:
    """Weights from a function (Hugging Face's name, shape) -> tensor, one tensor at a time."""
    top: dict[str, Any] = {}
    stacks: dict[tuple[str, str], np.ndarray] = {}
    for theirs, shape, group, name, layer in tensor_names(arch):
        tensor = read(theirs, shape)
        if group in ("w", "") and name != "embedding":
            tensor = tensor.T
        if layer < 0:
            top[name] = jnp.asarray(np.ascontiguousarray(tensor))
            continue
        if (group, name) not in stacks:
            stacks[group, name] = np.empty((arch.layers, *tensor.shape), tensor.dtype)
        stacks[group, name][layer] = tensor
    linears = {
        name: {kind: jnp.asarray(stacks[kind, name]) for kind in ("w", "b") if (kind, name) in stacks}
        for name in arch.linears
    }
    norms = {name: jnp.asarray(stacks["norms", name]) for name in arch.norms}
    return top | {"blocks": {"linears": linears, "norms": norms}}
