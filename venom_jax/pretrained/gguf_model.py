"""A model of the Llama kind in a GGUF file: architecture, weights under Hugging Face's names, and the tokenizer."""

import re
from typing import Any, TypeGuard

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from venom_jax.pretrained.architecture import Architecture, Rope
from venom_jax.pretrained.decoder import Weights
from venom_jax.pretrained.folder import assemble, tensor_names
from venom_jax.pretrained.gguf import File

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# How texts are cut before byte-level BPE, by the name that the file gives.
_CUTS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
}
_NORMAL_TOKEN = 1


def read_architecture(file: File, where: str) -> Architecture:
    """The architecture that the file's metadata describe.

    Raises:
      ValueError: a value is missing or out of range.
      NotImplementedError: another architecture than Llama's, or something in it that this decoder lacks.
    """
    name = file.values.get("general.architecture")
    if name != "llama":
        raise NotImplementedError(f"{where}: architecture {name!r} is not read from GGUF; read is 'llama'")
    if experts := file.values.get("llama.expert_count", 0):
        raise NotImplementedError(f"{where} has {experts} experts; models with routed experts are not read")
    kind = file.values.get("llama.rope.scaling.type", "none")
    if kind not in ("none", None):
        raise NotImplementedError(f"{where} has rope scaling {kind!r}; from GGUF only models without scaling are read")

    def whole(key: str, high: int = 1 << 20) -> int:
        return file.get(f"llama.{key}", int, 1, high)

    layers, heads, width = whole("block_count", 9999), whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length") if "llama.attention.key_length" in file.values else width // heads
    if (turned := file.values.get("llama.rope.dimension_count", head_dim)) != head_dim:
        raise NotImplementedError(f"{where} rotates {turned} of {head_dim} features of a head; all are rotated here")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{where} holds no matrix token_embd.weight")
    base = file.get("llama.rope.freq_base", float, 1, 1e12) if "llama.rope.freq_base" in file.values else 1e4
    return Architecture(
        family="llama",
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        width=width,
        ffn=whole("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=whole("attention.head_count_kv") if "llama.attention.head_count_kv" in file.values else heads,
        head_dim=head_dim,
        activation="silu",
        norm_epsilon=file.get("llama.attention.layer_norm_rms_epsilon", float, 1e-12, 0.1),
        windows=(None,) * layers,
        ropes=(Rope(base),) * layers,
        tied="output.weight" not in file.tensors,
        context=whole("context_length", 1 << 30),
        attention_scale=head_dim**-0.5,
        eos_ids=(eos,) if isinstance(eos := file.values.get("tokenizer.ggml.eos_token_id"), int) else (),
    )


def read_weights(file: File, arch: Architecture, where: str) -> Weights:
    """The weights, matrices as [inputs, outputs], in float32.

    Rows of q and k are stored in the order of interleaved rotary pairs and come back as halves.

    Raises:
      ValueError: a tensor is missing, of another shape, or one that the decoder has no use for.
    """
    names = {theirs: _gguf_name(theirs) for theirs, *_ in tensor_names(arch)}
    if extra := sorted(file.tensors.keys() - set(names.values())):
        raise ValueError(f"{where} holds {', '.join(extra[:3])}, which a plain Llama model does not have")

    def read(theirs: str, shape: tuple[int, ...]) -> np.ndarray:
        found = file.tensors.get(names[theirs])
        if found is None:
            raise ValueError(f"{where} lacks {names[theirs]}")
        if found.shape != shape:
            raise ValueError(f"{where}: {names[theirs]} is {found.shape}, but the metadata say {shape}")
        tensor = file.read(names[theirs]).astype(np.float32)
        if theirs.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = tensor.reshape(-1, arch.head_dim // 2, 2, shape[1])
            tensor = pairs.swapaxes(1, 2).reshape(shape)
        return tensor

    return assemble(arch, read)


def read_tokenizer(file: File, where: str) -> tokenizers.Tokenizer:
    """The tokenizer in the file.

    Raises:
      ValueError: it is missing or contradicts itself.
      NotImplementedError: another kind than byte-level BPE, or texts are cut by rules that are not known here.
    """
    values = file.values
    kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _CUTS:
        known = ", ".join(_CUTS)
        raise NotImplementedError(
            f"{where} has a tokenizer {kind!r} with cutting rules {cut!r}; read is 'gpt2' with {known}. Give the "
            "model's tokenizer.json with --tokenizer"
        )
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges")
    types = values.get("tokenizer.ggml.token_type", [])
    if not _texts(tokens) or not _texts(merges) or not len(types) == len(tokens) == len(set(tokens)):
        raise ValueError(f"{where}: the lists of tokens, their types and merges do not make a tokenizer")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        core = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # the library raises bare Exception for anything it cannot use
        raise ValueError(f"{where}: the tokens and merges do not make a tokenizer: {error}") from error
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*_CUTS[cut], bytes_])  # pyrefly: ignore
    core.decoder = decoders.ByteLevel()  # pyrefly: ignore
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ != _NORMAL_TOKEN]
    core.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return core


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _gguf_name(theirs: str) -> str:
    if theirs in _NAMES:
        return _NAMES[theirs]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", theirs)
    assert found is not None  # a plain Llama model has no other names
    return f"blk.{found[1]}.{_IN_LAYER[found[2]]}.weight"
