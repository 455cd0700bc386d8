"""The Arcee forward pass in numpy, written from its definition: a second opinion on exported files."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """float64 logits [S, V] of a Hugging Face folder for the tokens [S]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads

    def norm(x, name):
        return weights[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def linear(x, name):
        return x @ weights[name].T

    frequency, factor = _yarn(config.get("rope_scaling"), config["rope_theta"], size)
    turn = factor * np.exp(1j * np.outer(np.arange(len(tokens)), frequency))

    def rotate(x):
        turned = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (linear(h, f"{layer}self_attn.{name}_proj.weight") for name in "qkv")
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head * kv_heads // heads * size, (head * kv_heads // heads + 1) * size)
            scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(size)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        x = x + linear(np.concatenate(mixed, axis=-1), f"{layer}self_attn.o_proj.weight")
        h = norm(x, f"{layer}post_attention_layernorm.weight")
        hidden = np.maximum(linear(h, f"{layer}mlp.up_proj.weight"), 0) ** 2
        x = x + linear(hidden, f"{layer}mlp.down_proj.weight")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return linear(norm(x, "model.norm.weight"), head)


def _yarn(scaling: dict | None, base: float, size: int) -> tuple[np.ndarray, float]:
    """Pair by pair, by the number of its turns within the original length."""
    if scaling is None:
        return base ** (-np.arange(0, size, 2) / size), 1.0
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    # The pair (not whole) that turns t times: base^(-2i/size) length = 2 pi t.
    edges = [
        size / 2 * np.log(length / 2 / np.pi / scaling[name]) / np.log(base) for name in ("beta_fast", "beta_slow")
    ]
    first, last = max(np.floor(edges[0]), 0), min(np.ceil(edges[1]), size - 1)
    found = []
    for i in range(size // 2):
        frequency = base ** (-2 * i / size)
        share = min(max((i - first) / (last - first), 0), 1)
        found.append(frequency * (1 - share) + frequency / factor * share)
    return np.array(found), 1 + np.log(factor) / 10
