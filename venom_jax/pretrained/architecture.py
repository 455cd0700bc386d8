"""What a decoder is built like: read from a Hugging Face `config.json`, or refused by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Activation = Literal["silu", "gelu_tanh", "relu2"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions: feature pair i turns by s * frequency_i at position s.

    Attributes:
      base: frequency_i = base^(-2 i / h), before scaling.
      kind: "default", "linear" (all frequencies divided by factor) or "llama3" (the slow ones, with a ramp).
      factor, low, high, original: of the scaling, as `config.json` names them.
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 [h / 2]."""
        plain = self.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        match self.kind:
            case "linear":
                plain = plain / self.factor
            case "llama3":
                turns = self.original * plain / (2 * math.pi)  # over the original context
                ramp = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
                plain = ramp * plain + (1 - ramp) * plain / self.factor
        return plain.astype(np.float32)


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama kind.

    Attributes:
      family: `model_type` of its configuration.
      width, ffn, layers, heads, kv_heads, head_dim, vocab_size: D, F, L, H, K, h, V.
      activation: of the FFN; silu and gelu multiply `up` by act(`gate`), relu2 stands alone without a gate.
      norm_epsilon: of every RMSNorm.
      norm_plus_one: norms multiply by 1 + weight.
      four_norms: also attention's and the FFN's outputs are normalised.
      qk_norm: each head's queries and keys are normalised.
      qkv_bias, out_bias, mlp_bias: which linear layers have a bias.
      embedding_scale: what embeddings are multiplied by, rounded to their dtype.
      attention_scale: what the scores are multiplied by.
      windows: of each layer how many tokens back it sees, itself counted; None for all.
      ropes: of each layer.
      tied: the head is the embedding.
      context: the longest sequence it was made for.
      eos_ids: tokens that end a text, as its configuration says.
      bos_id: the token that a text begins with, where its configuration has one.
    """

    family: str
    vocab_size: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: Activation
    norm_epsilon: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    tied: bool
    context: int
    norm_plus_one: bool = False
    four_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "width", "ffn", "layers", "heads", "kv_heads", "head_dim", "context")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"{name} = {value!r} must be a whole number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are no multiple of {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary positions need an even one")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm epsilon {self.norm_epsilon!r} must lie in (0, 1)")
        for rope in self.ropes:
            if not (0 < rope.base < math.inf and 0 < rope.factor < math.inf and rope.high > rope.low):
                raise ValueError(f"rotary positions cannot be computed from {rope}")

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.activation != "relu2"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(I, O) of the linear layers of a block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {"q": (self.width, queries), "k": (self.width, keys), "v": (self.width, keys)}
        sizes |= {"o": (queries, self.width), "gate": (self.width, self.ffn), "up": (self.width, self.ffn)}
        sizes |= {"down": (self.ffn, self.width)}
        return {name: size for name, size in sizes.items() if name != "gate" or self.gated}

    def has_bias(self, name: str) -> bool:
        """Whether a linear layer has a bias."""
        if name in "qkv":
            return self.qkv_bias
        return self.out_bias if name == "o" else self.mlp_bias

    @property
    def norms(self) -> dict[str, int]:
        """Sizes of the norms of a block."""
        names = {"attention_norm": self.width, "ffn_norm": self.width}
        if self.four_norms:
            names |= {"attention_out_norm": self.width, "ffn_out_norm": self.width}
        return names | ({"query_norm": self.head_dim, "key_norm": self.head_dim} if self.qk_norm else {})

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())


# What the configuration classes of each family assume where `config.json` is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
    "mistral": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 8}
    | {"sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 32}
    | {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 32}
    | {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128, "max_position_embeddings": 32768},
    "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    | {"rope_local_base_freq": 1e4, "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 256}
    | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 131072}
    | {"tie_word_embeddings": True, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216}
    | {"num_hidden_layers": 26, "bos_token_id": 2, "eos_token_id": 1},
    "arcee": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096},
}
FAMILIES = tuple(_DEFAULTS)
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_config(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a `config.json` describes.

    Args:
      values: its content.
      where: the file's name, for messages.

    Raises:
      ValueError: a value is missing or out of range.
      NotImplementedError: another family, or something in it that this decoder lacks, by name.
    """
    family = values.get("model_type")
    if family not in _DEFAULTS:
        raise NotImplementedError(f"{where}: model_type {family!r} is not read; read are {', '.join(FAMILIES)}")
    # null leaves a value to the family, except that it takes a sliding window away.
    given = {name: value for name, value in values.items() if value is not None or name == "sliding_window"}
    found = _DEFAULTS[family] | given
    if absent := [name for name in _REQUIRED if name not in found]:
        raise ValueError(f"{where} lacks {', '.join(absent)}")
    try:
        return _build(family, found, where)
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where} holds a value of a wrong kind: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _build(family: str, found: dict[str, Any], where: str) -> Architecture:
    gemma = family == "gemma3_text"
    name = found["hidden_activation" if gemma else "hidden_act"]
    expected = {"gemma3_text": "gelu_pytorch_tanh", "arcee": "relu2"}.get(family, "silu")
    lacking = {
        "hidden activation": (name, expected),
        "quantization_config": (found.get("quantization_config"), None),
        "final_logit_softcapping": (found.get("final_logit_softcapping"), None),
        "attn_logit_softcapping": (found.get("attn_logit_softcapping"), None),
        "use_bidirectional_attention": (bool(found.get("use_bidirectional_attention")), False),
        "partial_rotary_factor": (found.get("partial_rotary_factor", 1.0), 1.0),
    }
    for what, (value, allowed) in lacking.items():
        if value != allowed:
            raise NotImplementedError(f"{where} has {what} {value!r}; this decoder computes {family} with {allowed!r}")
    heads, width, layers = (found[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if not isinstance(layers, int) or not 0 < layers < 10_000:
        raise ValueError(f"num_hidden_layers = {layers!r} must be a whole number above 0")
    kinds = _layer_types(family, found, layers)
    ropes = {kind: _rope(found, kind, where) for kind in set(kinds)}
    window = found.get("sliding_window")
    head_dim = found.get("head_dim") or width // heads
    bias = bool(found.get("attention_bias", False))
    eos = found.get("eos_token_id", ())
    return Architecture(
        family=family,
        vocab_size=found["vocab_size"],
        width=width,
        ffn=found["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        activation=_ACTIVATIONS[name],
        norm_epsilon=float(found["rms_norm_eps"]),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
        tied=bool(found.get("tie_word_embeddings", False)),
        context=found["max_position_embeddings"],
        norm_plus_one=gemma,
        four_norms=gemma,
        qk_norm=gemma or family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=bool(found.get("mlp_bias", False)) and family in ("llama", "arcee"),
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        attention_scale=float(found["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        bos_id=found.get("bos_token_id") if gemma else None,
    )


def _layer_types(family: str, found: dict[str, Any], layers: int) -> list[str]:
    """ "full_attention" or "sliding_attention" of each layer."""
    full, sliding = "full_attention", "sliding_attention"
    if family in ("llama", "arcee"):
        return [full] * layers
    if family == "mistral":
        return [sliding if found.get("sliding_window") else full] * layers
    if given := found.get("layer_types"):
        if len(given) != layers or set(given) - {full, sliding}:
            raise ValueError(f"layer_types {given!r} are not one of {full}, {sliding} for each of {layers} layers")
    elif family == "gemma3_text":
        every = found.get("sliding_window_pattern", 6)
        given = [sliding if (i + 1) % every else full for i in range(layers)]
    else:
        given = [sliding if i >= found["max_window_layers"] else full for i in range(layers)]
    if family != "gemma3_text" and not found.get("use_sliding_window", False):
        return [full] * layers
    return list(given)


def _rope(found: dict[str, Any], kind: str, where: str) -> Rope:
    gemma = found["model_type"] == "gemma3_text"
    base = found["rope_local_base_freq"] if gemma and kind == "sliding_attention" else found["rope_theta"]
    given = found.get("rope_parameters") or {}
    values: Mapping[str, Any] = given[kind] if isinstance(given.get(kind), Mapping) else given
    if not values and not (gemma and kind == "sliding_attention"):
        values = found.get("rope_scaling") or {}
    name = values.get("rope_type", values.get("type", "default"))
    if name not in ("default", "linear", "llama3"):
        raise NotImplementedError(f"{where} has rope_type {name!r}; this decoder has default, linear and llama3")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(
            f"{where} rotates only a part of each head (partial_rotary_factor), not computed here"
        )
    return Rope(
        base=float(values.get("rope_theta", base)),
        kind=name,
        factor=float(values.get("factor", 1.0)),
        low=float(values.get("low_freq_factor", 1.0)),
        high=float(values.get("high_freq_factor", 4.0)),
        original=int(values.get("original_max_position_embeddings", found["max_position_embeddings"])),
    )
