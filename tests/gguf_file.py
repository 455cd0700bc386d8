"""Writes small GGUF files: a random Llama with a byte-level tokenizer, in the kinds that are read."""

import struct

import numpy as np
from tokenizers import pre_tokenizers

from venom_jax.pretrained.gguf_model import _gguf_name

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(v):
    """A value with its type."""
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    kind = 8 if isinstance(v[0], str) else 5
    items = b"".join(text(one) if kind == 8 else struct.pack("<i", one) for one in v)
    return struct.pack("<IIQ", 9, kind, len(v)) + items


def encode(w, kind):
    """Rows of weights as their blocks."""
    if kind in (F32, F16):
        return w.astype("<f4" if kind == F32 else "<f2").tobytes()
    blocks = w.reshape(-1, 32)
    if kind == Q8_0:
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
        q = np.rint(blocks / np.maximum(scale.astype(np.float32), 1e-8)).astype(np.int8)
        return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))
    low = blocks.min(1, keepdims=True).astype("<f2")
    scale = ((blocks.max(1, keepdims=True) - low) / 15).astype("<f2")
    q = np.clip(np.rint((blocks - low) / np.maximum(scale.astype(np.float32), 1e-8)), 0, 15).astype(np.uint8)
    packed = q[:, :16] | (q[:, 16:] << 4)
    return b"".join(s.tobytes() + m.tobytes() + row.tobytes() for s, m, row in zip(scale, low, packed, strict=True))


def file_bytes(values, tensors, version=3):
    """The file: values by name, tensors {name: (array, kind)}."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(text(name) + value(v) for name, v in values.items())
    body = b""
    for name, (w, kind) in tensors.items():
        head += text(name) + struct.pack("<I", w.ndim) + struct.pack(f"<{w.ndim}Q", *w.shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += encode(w, kind)
        body += bytes(-len(body) % 32)
    return head + bytes(-len(head) % 32) + body


def model_values(arch):
    """Metadata of a Llama, with a tokenizer of bytes and two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *letters, "th", "the"]
    return {
        "general.architecture": "llama",
        "llama.block_count": arch.layers,
        "llama.embedding_length": arch.width,
        "llama.feed_forward_length": arch.ffn,
        "llama.attention.head_count": arch.heads,
        "llama.attention.head_count_kv": arch.kv_heads,
        "llama.context_length": arch.context,
        "llama.rope.freq_base": float(arch.ropes[0].base),
        "llama.attention.layer_norm_rms_epsilon": float(arch.norm_epsilon),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eos_token_id": 0,
    }


def of_folder(tensors, arch, kinds):
    """Hugging Face's tensors under GGUF's names; rows of q and k in interleaved order."""
    found = {}
    for i, (theirs, w) in enumerate(sorted(tensors.items())):
        if theirs.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(-1, 2, arch.head_dim // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        found[_gguf_name(theirs)] = (w, F32 if w.ndim == 1 else kinds[i % len(kinds)])
    return found
