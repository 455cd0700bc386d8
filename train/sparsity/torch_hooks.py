"""Applies saved activation sparsity to a model of `transformers`, so that a result can be checked with other code.

Needs torch and safetensors alone: `train.sparsify --write_torch_hooks` copies this file beside `sparsity.json`.

from torch_hooks import apply

apply(model, "runs/llama-8of16")      # a LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, ...
logits = model(tokens, use_cache=False).logits

Whole sequences in one call: every token of a call is pruned, and the first ones count as the sequence's first.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_LINEAR = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def apply(model: Any, folder: str | Path) -> int:
    """Replaces the forward pass of every pruned linear layer, and gives their number.

    Raises:
      ValueError: settings of another format, or of decoding alone.
    """
    content = json.loads((Path(folder) / "sparsity.json").read_text())
    if content["format"] != 1 or content["settings"]["stage"] == "decode":
        raise ValueError(
            f"{folder}: format {content['format']}, stage {content['settings']['stage']!r} cannot be applied"
        )
    settings, tensors = content["settings"], load_file(str(Path(folder) / "sparsity.safetensors"))
    overrides, count = dict(settings["overrides"]), 0
    for name, module in model.named_modules():
        if (found := _LINEAR.fullmatch(name)) is None:
            continue
        listed = settings["pattern"] if found[2] in settings["layers"] else None
        pattern = overrides.get(f"{found[1]}.{found[2]}", listed)
        if pattern is None:
            continue
        stored = name[name.index("layers.") :]
        own = {key.rsplit(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"model.{stored}.")}
        module.forward = functools.partial(_forward, module, settings, pattern, own)
        count += 1
    return count


def _forward(module: Any, settings: dict[str, Any], pattern: dict[str, Any], own: dict[str, Any], x: Any) -> Any:
    x32, w = x.float(), module.weight.float()
    own = {name: tensor.to(x.device) for name, tensor in own.items()}
    eta = {
        "none": lambda: torch.zeros((), device=x.device),
        "token": lambda: x32.median(-1, keepdim=True).values,
        "token_mean": lambda: x32.mean(-1, keepdim=True),
    }.get(settings["shift"], lambda: own["shift"])()
    z = x32 - eta
    score = z.abs()
    match settings["criterion"]:
        case "act":
            pass
        case "clact":
            score = score * x32.square().sum(-2, keepdim=True).sqrt()
        case "clact_causal":
            score = score * x32.square().cumsum(-2).sqrt()
        case _:
            score = score * own["channel_weight"]
    mask = _largest(score, pattern)
    mask[..., : settings["dense_prefix"], :] = True
    kept = torch.where(mask, z, 0)
    y = kept @ w.T
    if settings["variance"] != "none":
        whole, part = (
            a.var(-1, correction=0, keepdim=True)
            if settings["variance"] == "variance"
            else a.square().sum(-1, keepdim=True)
            for a in (z, kept)
        )
        scale = (whole / part.clamp(min=1e-9)).sqrt()
        scale[..., : settings["dense_prefix"], :] = 1
        y = y * scale
    y = y * (1 + own["scale"]) if "scale" in own else y
    y = y + (torch.zeros_like(x32) + eta) @ w.T
    for bias in (module.bias, own.get("bias")):
        y = y if bias is None else y + bias.float()
    if "low_rank_a" in own:
        y = y + (torch.where(mask, 0, z) @ own["low_rank_b"].T) @ own["low_rank_a"].T
    return y.to(x.dtype)


def _largest(score: Any, pattern: dict[str, Any]) -> Any:
    """True for the largest of each block or token; of equal ones the lower input."""
    if "n" in pattern:
        rows, kept = score.unflatten(-1, (-1, pattern["m"])), pattern["n"]
    elif pattern["scope"] == "token":
        rows = score
        kept = int(score.shape[-1] * (1 - pattern["ratio"]) + 1e-9)
    else:
        raise ValueError("a share of the whole batch is not computed here")
    order = torch.sort(rows, dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.reshape(score.shape)
