"""Settings of activation sparsity saved beside a model, which is never changed: `sparsity.json` and the parameters.

The parameters are f32 tensors under Hugging Face's names of the linear layers:
`model.layers.{i}.{self_attn,mlp}.{q,...}_proj.{channel_weight,shift,bias,scale,low_rank_a,low_rank_b}`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from venom_jax.activation.linear import Parameters
from venom_jax.activation.settings import LINEARS, Sparsity, as_json, from_json
from venom_jax.pretrained.architecture import Architecture
from venom_jax.pretrained.folder import linear_name

SETTINGS = "sparsity.json"
PARAMETERS = "sparsity.safetensors"
FORMAT = 1


class Saved(NamedTuple):
    """A setting with its parameters, as `hidden` takes them."""

    sparsity: Sparsity
    parameters: dict[str, Parameters]


def write(
    folder: Path,
    sparsity: Sparsity,
    parameters: Mapping[str, Parameters],
    *,
    model: Mapping[str, str],
    calibration: Mapping[str, Any],
    seed: int,
) -> None:
    """Writes both files; the settings come last, so that a folder with them is complete.

    Args:
      folder: made where it does not exist.
      sparsity, parameters: what is saved.
      model: hashes of the model's files.
      calibration: the text it was calibrated on: `sha256` and `tokens`.
      seed: of calibration and learning.

    Raises:
      ValueError: the folder cannot be written.
    """
    tensors = {}
    for name, values in parameters.items():
        for field, value in values._asdict().items():
            if value is not None:
                for i, one in enumerate(np.asarray(value, np.float32)):
                    tensors[f"{linear_name(i, name)}.{field}"] = np.ascontiguousarray(one)
    blob = save(tensors)
    content = {
        "format": FORMAT,
        "settings": as_json(sparsity),
        "model_sha256": dict(model),
        "parameters_sha256": hashlib.sha256(blob).hexdigest(),
        "calibration": dict(calibration),
        "seed": seed,
        "versions": {name: metadata.version(name) for name in ("venom-jax", "jax", "numpy")},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARAMETERS).write_bytes(blob)
        unfinished = folder / f"{SETTINGS}.unfinished"
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.rename(folder / SETTINGS)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; give --output another folder") from error


def read(folder: Path, arch: Architecture, hashes: Mapping[str, str], *, other_weights: bool = False) -> Saved:
    """What `write` wrote, for a model of this architecture and these hashes.

    Args:
      folder: with both files.
      arch: the model's.
      hashes: of the model's files.
      other_weights: take the parameters for other weights of the same shape, too.

    Raises:
      ValueError: a file is missing, damaged, altered, of another format version, or the parameters are another
        model's, with what differs.
    """
    path = folder / SETTINGS
    try:
        content = json.loads(path.read_text())
        version = content["format"]
        if version != FORMAT:
            raise ValueError(f"format {version!r} is not read by this version, which reads {FORMAT}")
        sparsity, theirs = from_json(content["settings"]), dict(content["model_sha256"])
        expected = content["parameters_sha256"]
        blob = (folder / PARAMETERS).read_bytes()
        if hashlib.sha256(blob).hexdigest() != expected:
            raise ValueError(f"{PARAMETERS} is not the file that {SETTINGS} was written with")
        tensors = load(blob)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if theirs != dict(hashes) and not other_weights:
        named = [name for name in {**theirs, **hashes} if theirs.get(name) != hashes.get(name)]
        raise ValueError(
            f"{path} was made for other weights: {', '.join(named)} differ. Calibrate again, or take it all the same "
            "with --allow_other_weights"
        )
    return Saved(sparsity, _stack(tensors, arch, folder / PARAMETERS))


def _stack(tensors: Mapping[str, np.ndarray], arch: Architecture, path: Path) -> dict[str, Parameters]:
    pattern = re.compile(rf"model\.layers\.(\d+)\.\w+\.({'|'.join(LINEARS)})_proj\.({'|'.join(Parameters._fields)})")
    stacks: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        found = pattern.fullmatch(key)
        if found is None or found[2] not in arch.linears or int(found[1]) >= arch.layers:
            raise ValueError(f"{path} holds {key}, which this model does not have")
        stacks.setdefault((found[2], found[3]), {})[int(found[1])] = tensor
    fields: dict[str, dict[str, Any]] = {}
    for (name, field), layers in stacks.items():
        inputs, outputs = arch.linears[name]
        sizes = {"channel_weight": (inputs,), "bias": (outputs,), "scale": (outputs,)}
        for i, tensor in layers.items():
            fits = {
                "shift": tensor.shape in ((), (inputs,)),
                "low_rank_a": tensor.shape[:1] == (outputs,),
                "low_rank_b": tensor.shape[1:] == (inputs,),
            }.get(field, tensor.shape == sizes.get(field))
            if not fits:
                raise ValueError(f"{path}: {linear_name(i, name)}.{field} is {tensor.shape}, of another model")
        if len(layers) != arch.layers:
            raise ValueError(f"{path} holds {field} of {name} for {len(layers)} of {arch.layers} layers")
        fields.setdefault(name, {})[field] = jnp.asarray(np.stack([layers[i] for i in range(arch.layers)]))
    return {name: Parameters(**values) for name, values in fields.items()}
