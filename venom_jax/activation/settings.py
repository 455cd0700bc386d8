"""What is pruned, where, and how the error is made smaller: one frozen value, readable from text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from venom_jax.activation.patterns import NM, Pattern, Unstructured, parse_pattern

Criterion = Literal[
    "act", "clact", "clact_causal", "rms", "amber", "amber_trimmed", "wina", "pcs", "outstanding", "weight_var"
]
Shift = Literal["none", "token", "token_mean", "tensor", "channel", "channel_mean", "learned"]
Variance = Literal["none", "variance", "energy"]
Stage = Literal["prefill", "decode", "both"]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
PRESETS = {"all": LINEARS, "safe": ("k", "v", "gate", "down"), "qwen": ("o", "gate", "up", "down")}
STATIC_SHIFTS = ("tensor", "channel", "channel_mean", "learned")


@dataclass(frozen=True)
class Sparsity:
    """How the inputs of a model's linear layers are pruned.

    Attributes:
      pattern: what stays.
      criterion: the channel weight c of the score |x - eta| c.
      shift: eta, what stands where an input is pruned.
      variance: what the row scale nu restores: the variance of a token's inputs, their energy, or nothing.
      learn_bias, learn_scale: an output bias and an output scale of their own, to be learned.
      low_rank: rank of the dense path that the pruned rest takes; 0 for none.
      layers: the linear layers of a block that are pruned.
      stage: prefill (several tokens at once), decode (one token at a time) or both.
      dense_prefix: this many tokens at the beginning of a sequence stay dense.
      shared_mask: layers that read the same input (q, k, v; gate, up) share their channel weights, so their mask.
      overrides: ("BLOCK.LAYER", pattern) pairs, such as ("3.up", None), which leaves that layer dense.

    Raises:
      ValueError: an unknown name, a number out of range, or shared masks with a weight of the layer's own.
    """

    pattern: Pattern = NM(8, 16)  # noqa: RUF009 (a frozen value)
    criterion: Criterion = "act"
    shift: Shift = "none"
    variance: Variance = "none"
    learn_bias: bool = False
    learn_scale: bool = False
    low_rank: int = 0
    layers: tuple[str, ...] = LINEARS
    stage: Stage = "both"
    dense_prefix: int = 0
    shared_mask: bool = False
    overrides: tuple[tuple[str, Pattern | None], ...] = ()

    def __post_init__(self):
        named = {"criterion": Criterion, "shift": Shift, "variance": Variance, "stage": Stage}
        for name, allowed in named.items():
            if getattr(self, name) not in get_args(allowed):
                options = ", ".join(get_args(allowed))
                raise ValueError(f"{name} = {getattr(self, name)!r}: use one of {options}")
        if unknown := [name for name in self.layers if name not in LINEARS]:
            raise ValueError(f"layers {', '.join(unknown)}: the linear layers of a block are {', '.join(LINEARS)}")
        if self.low_rank < 0 or self.dense_prefix < 0:
            raise ValueError(f"low_rank = {self.low_rank} and dense_prefix = {self.dense_prefix} must not be negative")
        for name, _ in self.overrides:
            if not re.fullmatch(rf"\d+\.({'|'.join(LINEARS)})", name):
                raise ValueError(f"override {name!r}: write BLOCK.LAYER, such as 3.up")

    def of(self, block: int, name: str) -> Pattern | None:
        """The pattern of one linear layer, None where it is dense."""
        return dict(self.overrides).get(f"{block}.{name}", self.pattern if name in self.layers else None)

    def runs(self, blocks: int) -> Iterator[tuple[int, int, dict[str, Pattern]]]:
        """[first, end) of neighbouring blocks that are pruned alike, with the patterns of their pruned layers."""
        found = [self._block(i) for i in range(blocks)]
        first = 0
        for i in range(1, blocks + 1):
            if i == blocks or found[i] != found[first]:
                yield first, i, found[first]
                first = i

    def _block(self, i: int) -> dict[str, Pattern]:
        return {name: pattern for name in LINEARS if (pattern := self.of(i, name)) is not None}

    @property
    def is_learned(self) -> bool:
        """Whether it has parameters that only gradients find."""
        return self.shift == "learned" or self.learn_bias or self.learn_scale

    @property
    def at_prefill(self) -> bool:
        """Whether tokens are pruned that are computed together."""
        return self.stage != "decode"

    @property
    def at_decode(self) -> bool:
        """Whether tokens are pruned that are computed one by one."""
        return self.stage != "prefill"


_MITIGATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"shift": "token"},
    "token_mean": {"shift": "token_mean"},
    "tensor": {"shift": "tensor"},
    "channel": {"shift": "channel"},
    "channel_mean": {"shift": "channel_mean"},
    "learned": {"shift": "learned"},
    "var": {"variance": "variance"},
    "energy": {"variance": "energy"},
    "bias": {"learn_bias": True},
    "scale": {"learn_scale": True},
}


def parse_mitigation(text: str) -> dict[str, Any]:
    """Fields of `Sparsity` for names joined by +: `channel+var`, `learned+bias`, `var+rank64`.

    Raises:
      ValueError: an unknown name, or two that set the same field.
    """
    found: dict[str, Any] = {}
    for name in text.split("+"):
        if rank := re.fullmatch(r"rank(\d{1,5})", name):
            fields: dict[str, Any] = {"low_rank": int(rank[1])}
        elif name in _MITIGATIONS:
            fields = _MITIGATIONS[name]
        else:
            raise ValueError(f"mitigation {name!r}: use names out of {', '.join(_MITIGATIONS)} and rankR, joined by +")
        if fields.keys() & found.keys():
            raise ValueError(f"mitigation {text!r}: two of its names set {', '.join(fields.keys() & found.keys())}")
        found |= fields
    return found


def parse_layers(text: str) -> tuple[str, ...]:
    """A preset (all, safe, qwen) or names joined by commas or +.

    Raises:
      ValueError: an unknown name.
    """
    names = PRESETS.get(text) or tuple(re.split(r"[,+]", text))
    if unknown := [name for name in names if name not in LINEARS]:
        known = f"{', '.join(LINEARS)} or a preset {', '.join(PRESETS)}"
        raise ValueError(f"layers {text!r}: no layer {', '.join(map(repr, unknown))}; use {known}")
    return names


def parse_overrides(entries: Sequence[str]) -> tuple[tuple[str, Pattern | None], ...]:
    """`3.up=dense`, `4.q=2:4`: patterns of single layers, as `Sparsity.overrides` takes them.

    Raises:
      ValueError: no such form.
    """
    found = []
    for entry in entries:
        name, _, pattern = entry.partition("=")
        found.append((name, None if pattern == "dense" else parse_pattern(pattern)))
    return tuple(found)


def describe(sparsity: Sparsity) -> str:
    """The setting in a few words, as tables name it."""
    parts = [str(sparsity.pattern), sparsity.criterion]
    plain = {key: value for key, value in _MITIGATIONS.items() if value}
    used = [name for name, fields in plain.items() if all(getattr(sparsity, k) == v for k, v in fields.items())]
    parts += ["+".join(used)] if used else []
    if sparsity.low_rank:
        parts.append(f"rank {sparsity.low_rank}")
    if sparsity.layers != LINEARS:
        parts.append("+".join(sparsity.layers))
    if sparsity.overrides:
        parts.append(f"{len(sparsity.overrides)} layers apart")
    if sparsity.dense_prefix:
        parts.append(f"first {sparsity.dense_prefix} tokens dense")
    if sparsity.stage != "both":
        parts.append(f"{sparsity.stage} only")
    return " ".join(parts)


def as_json(sparsity: Sparsity) -> dict[str, Any]:
    """Plain values that `from_json` reads back."""

    def text(pattern: Pattern | None) -> Any:
        if isinstance(pattern, Unstructured):
            return {"ratio": pattern.ratio, "scope": pattern.scope}
        return None if pattern is None else {"n": pattern.n, "m": pattern.m}

    fields = {name: getattr(sparsity, name) for name in sparsity.__dataclass_fields__}
    overrides = [[name, text(pattern)] for name, pattern in sparsity.overrides]
    return fields | {"pattern": text(sparsity.pattern), "layers": list(sparsity.layers), "overrides": overrides}


def from_json(values: Any) -> Sparsity:
    """The inverse of `as_json`.

    Raises:
      ValueError: an unknown field, a value of another kind, or one out of range.
    """

    def pattern(value: Any) -> Pattern | None:
        if value is None:
            return None
        return NM(**value) if "n" in value else Unstructured(**value)

    try:
        overrides = tuple((name, pattern(value)) for name, value in values["overrides"])
        found = pattern(values["pattern"])
        if found is None:
            raise ValueError("no pattern")
        rest = {"pattern": found, "layers": tuple(values["layers"]), "overrides": overrides}
        return replace(Sparsity(), **(values | rest))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"these are no settings of activation sparsity ({error!r}): {values}") from error
