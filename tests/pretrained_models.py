"""Small random models of every family as Hugging Face folders, and their forward pass in float64 numpy."""

import json
import math

import numpy as np
from safetensors.numpy import load_file, save_file

from venom_jax.pretrained.architecture import from_config
from venom_jax.pretrained.folder import tensor_names

V, LAYERS, LENGTH = 61, 3, 24
_BASE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
_BASE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
_BASE |= {
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32}

CONFIGS = {
    "llama": _BASE | {"model_type": "llama", "hidden_act": "silu", "attention_bias": True, "rope_scaling": _LLAMA3},
    "mistral": _BASE | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 7, "head_dim": 16},
    "qwen2": _BASE | {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": True},
    "qwen3": _BASE
    | {"model_type": "qwen3", "hidden_act": "silu", "head_dim": 16, "use_sliding_window": True}
    | {"sliding_window": 5, "max_window_layers": 1},
    "gemma3": _BASE
    | {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "sliding_window": 6}
    | {"query_pre_attn_scalar": 24, "rope_local_base_freq": 10.0, "sliding_window_pattern": 2}
    | {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "arcee": _BASE
    | {"model_type": "arcee", "hidden_act": "relu2", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def write(folder, config, *, seed=0, dtype=np.float32):
    """A model whose every weight matters, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, *_ in tensor_names(from_config(config, "config.json")):
        spread = 0.4 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        tensors[name] = np.ascontiguousarray((spread * rng.normal(size=shape) + 0.3 * (len(shape) == 1)).astype(dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numpy_logits(folder, tokens):
    """float64 logits [S, V] for the tokens [S], from each family's definition."""
    c = json.loads((folder / "config.json").read_text())
    w = {name: t.astype(np.float64) for name, t in load_file(folder / "model.safetensors").items()}
    kind, heads, kv = c["model_type"], c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or c["hidden_size"] // heads
    gemma = kind == "gemma3_text"
    s = len(tokens)

    def norm(x, name):
        scale = w[f"{name}.weight"] + (1 if gemma else 0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * scale

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def frequencies(local):
        base = c["rope_local_base_freq"] if gemma and local else c["rope_theta"]
        f = base ** (-np.arange(0, size, 2) / size)
        scaling = {} if gemma and local else c.get("rope_scaling", {})
        if scaling.get("rope_type") == "linear":
            return f / scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            out = []
            for one in f:
                wavelength, old = 2 * np.pi / one, scaling["original_max_position_embeddings"]
                if wavelength < old / scaling["high_freq_factor"]:
                    out.append(one)
                elif wavelength > old / scaling["low_freq_factor"]:
                    out.append(one / scaling["factor"])
                else:
                    smooth = (old / wavelength - scaling["low_freq_factor"]) / (
                        scaling["high_freq_factor"] - scaling["low_freq_factor"]
                    )
                    out.append((1 - smooth) * one / scaling["factor"] + smooth * one)
            return np.array(out)
        return f

    x = w["model.embed_tokens.weight"][tokens] * (math.sqrt(c["hidden_size"]) if gemma else 1)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        local = (
            (gemma and (i + 1) % c["sliding_window_pattern"] != 0)
            or kind == "mistral"
            or (kind == "qwen3" and i >= c["max_window_layers"])
        )
        turn = np.exp(1j * np.outer(np.arange(s), frequencies(local)))
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(h, f"{at}.self_attn.{n}_proj").reshape(s, -1, size) for n in "qkv")
        if gemma or kind == "qwen3":
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        mixed = []
        for head in range(heads):

            def rotated(a):
                z = (a[:, : size // 2] + 1j * a[:, size // 2 :]) * turn  # noqa: B023
                return np.concatenate([z.real, z.imag], axis=-1)

            own = head * kv // heads
            scale = c["query_pre_attn_scalar"] if gemma else size
            scores = rotated(q[:, head]) @ rotated(k[:, own]).T / math.sqrt(scale)
            back = np.arange(s)[:, None] - np.arange(s)
            scores[(back < 0) | (back >= (c["sliding_window"] if local else s))] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(p / p.sum(-1, keepdims=True) @ v[:, own])
        y = linear(np.concatenate(mixed, axis=-1), f"{at}.self_attn.o_proj")
        x = x + (norm(y, f"{at}.post_attention_layernorm") if gemma else y)
        h = norm(x, f"{at}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm")
        up = linear(h, f"{at}.mlp.up_proj")
        if kind == "arcee":
            hidden = np.maximum(up, 0) ** 2
        else:
            g = linear(h, f"{at}.mlp.gate_proj")
            tanh = np.tanh(math.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
            hidden = up * (0.5 * g * (1 + tanh) if gemma else g / (1 + np.exp(-g)))
        y = linear(hidden, f"{at}.mlp.down_proj")
        x = x + (norm(y, f"{at}.post_feedforward_layernorm") if gemma else y)
    return norm(x, "model.norm") @ w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T
