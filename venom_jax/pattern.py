"""Plain data that says what is sparse: the V:N:M pattern, and the recipe of one phase of training."""

import dataclasses
import itertools
import math
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal, get_args

WeightGemm = Literal["y1", "y3", "dy2", "dx"]
"""The four products that have a weight operand; the order of the scales `beta` of a layer."""

WEIGHT_GEMMS: tuple[WeightGemm, ...] = get_args(WeightGemm)
WeightGradient = Literal["dense", "24", "split95", "mvue"]
TokenOrder = Literal["interleaved", "natural"]
TokenCopy = Literal["kept", "rebuilt"]
Clustering = Literal["kmeans", "coactivation"]
Router = Literal["cosine", "dot", "learned", "oracle", "random"]
Hidden = Literal["routed", "full"]
ThresholdGradient = Literal["ste", "ste_scaled", "exact"]
WeightMask = Literal["threshold", "transposable"]
Precision = Literal["compute", "fp8"]

FP8_ROWS = 128
"""Columns of a tile of an 8-bit 2:4 operand: groups of tokens start at multiples of it."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """V:N:M: of each v x m block 4 columns are kept, and of each four of those n entries a row.

    Density is n / m. v is the row count of the tensor core's tile, n is 2, m a multiple of 4 for a stored matrix
    and any fraction >= 4 where it only describes a density (m = 4 E / k for k of E experts).

    Source: Castro et al., arXiv 2310.02065; arXiv 2602.06183, Table 5.
    """

    v: int = 64
    n: int = 2
    m: Fraction = Fraction(4)

    def __post_init__(self):
        if not isinstance(self.v, Integral):
            raise ValueError(f"pattern.v = {self.v!r} is no integer; use a multiple of 64.")
        if not isinstance(self.m, Real) or not math.isfinite(self.m):
            raise ValueError(f"pattern.m = {self.m!r} is no finite number; use m >= 4.")
        if self.v < 64 or self.v % 64:
            raise ValueError(f"pattern.v = {self.v}: the tensor core works on 64 rows; use a multiple of 64.")
        if self.n != 2:
            raise ValueError(f"pattern.n = {self.n}: the hardware keeps 2 of each 4; use n = 2.")
        if self.m < 4:
            raise ValueError(f"pattern.m = {self.m}: 4 of m columns are kept; use m >= 4.")

    @property
    def density(self) -> Fraction:
        return self.n / Fraction(self.m)

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is sparse during one phase. Every ingredient is a switch of its own; the default is all dense.

    W  `weights`: the products that read a soft-thresholded 2:4 weight. y1 and dy2 are sparse along D, y3 and dx
       along F (for ablations; such a product takes its activation dense).
       `threshold_grad`: gradient through the threshold: identity (`ste`), identity times beta, or exact.
       `weight_mask`: S is the soft threshold, or keeps the largest magnitudes that are 2:4 both along D and along F
       ("transposable", an ablation), so that y1 and dx, or y3 and dy2, read the very same matrix.
    A  `activations`: y3 and dx read activations with two of each four neighbouring neurons kept by magnitude.
       `wgrad`: dW1 and dW2 read the activations pruned two of four along *tokens* ("24"), with the densest 5 % of
       the features exempt ("split95"; 128 at a time, so none where an expert has fewer than 2,560), drawn at random
       and scaled so that no bias is left ("mvue"), or "dense".
       `token_order`: fours of tokens far apart ("interleaved") or neighbours ("natural", harmful: ablation only).
       `token_blocks`: form groups and fours inside this many equal blocks of the batch, so that results do not
       depend on how many devices and microbatches share it ("mvue" draws anew in each part all the same).
       `token_copy`: of two packed copies of the activations, keep the one along tokens for the backward, or rebuild it
       there from the other: 9/16 of a dense activation of memory for one pass over it. The packed form only; same bits.
    V  `experts`, `top_k`: a token computes only the neurons of its top_k experts; experts = 1 turns routing off.
       `clustering`: which neurons make an expert: those whose columns of W1 point the same way ("kmeans"), or
       those that fire for the same tokens ("coactivation"). `shared`: of the top_k experts so many are the first
       ones for every token; they hold the neurons with the largest energy.
       `router`: the score, see `venom_jax.router`; "learned" is a linear map fitted to the best choice in hindsight.
       All three need a sample of the inputs when the phase begins, see `venom_jax.phases.transition`.
       `hidden`: compute y1 and dy2 for routed neurons only ("routed") or for all ("full", then mask).
       `balance_rate`: step of the load-balancing bias, 0 is off. `v`: rows a group is padded to.
    8  `precision`: the operands of all six products are x's dtype ("compute"), or e4m3 with scales ("fp8", see
       `venom_jax.ffn8`), for weights in y1 and dy2 by the soft threshold, wgrad "24" or "dense", and hidden "routed".
       `token_copy` = "rebuilt" then ranks tokens by the 8 bits that are kept, so it may choose others among near
       equals, and groups are padded to multiples of 128 rows at least.

    Example:
      >>> Recipe.venom(experts=16, top_k=4, wgrad="dense").pattern.m
      Fraction(16, 1)
    """

    weights: tuple[WeightGemm, ...] = ()
    threshold_grad: ThresholdGradient = "ste"
    weight_mask: WeightMask = "threshold"
    activations: bool = False
    wgrad: WeightGradient = "dense"
    token_order: TokenOrder = "interleaved"
    token_blocks: int = 1
    token_copy: TokenCopy = "kept"
    experts: int = 1
    top_k: int = 1
    shared: int = 0
    clustering: Clustering = "kmeans"
    router: Router = "cosine"
    hidden: Hidden = "routed"
    balance_rate: float = 0.0
    v: int = 64
    precision: Precision = "compute"

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(sorted(self.weights, key=_position_of_gemm)))
        if len(set(self.weights)) < len(self.weights):
            raise ValueError(f"Recipe.weights = {self.weights} names a product twice.")
        _check_choice("threshold_grad", self.threshold_grad, ThresholdGradient)
        _check_choice("weight_mask", self.weight_mask, WeightMask)
        if self.weight_mask == "transposable" and self.threshold_grad == "exact":
            raise ValueError(
                "Recipe.threshold_grad = 'exact' is the soft threshold's: use 'ste' with transposable masks."
            )
        _check_choice("wgrad", self.wgrad, WeightGradient)
        _check_choice("token_order", self.token_order, TokenOrder)
        _check_choice("token_copy", self.token_copy, TokenCopy)
        _check_choice("clustering", self.clustering, Clustering)
        _check_choice("router", self.router, Router)
        _check_choice("hidden", self.hidden, Hidden)
        if not isinstance(self.activations, bool):
            raise ValueError(f"Recipe.activations = {self.activations!r}: use True or False.")
        for name in ("token_blocks", "experts", "top_k", "v"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Recipe.{name} = {value!r}: use a whole number >= 1.")
        if not isinstance(self.balance_rate, (int, float)) or not 0 <= self.balance_rate < float("inf"):
            raise ValueError(f"Recipe.balance_rate = {self.balance_rate!r}: use a finite number >= 0.")
        if self.top_k > self.experts:
            raise ValueError(f"Recipe.top_k = {self.top_k} exceeds experts = {self.experts}; lower top_k.")
        if not isinstance(self.shared, int) or isinstance(self.shared, bool) or not 0 <= self.shared < self.top_k:
            raise ValueError(
                f"Recipe.shared = {self.shared!r} must be a whole number from 0 to below top_k = {self.top_k}."
            )
        if self.v % 64:
            raise ValueError(f"Recipe.v = {self.v}: the tensor core works on 64 rows; use a multiple of 64.")
        if self.router == "oracle" and self.hidden != "full":
            raise ValueError("Recipe.router = 'oracle' scores experts by their activations: set hidden = 'full'.")
        _check_choice("precision", self.precision, Precision)
        if self.precision == "fp8":
            self._check_fp8()

    def _check_fp8(self) -> None:
        along_ffn = [gemm for gemm in self.weights if gemm in ("y3", "dx")]
        ablations = {
            f"weights = {self.weights} (sparse along d_ffn in {', '.join(along_ffn)})": bool(along_ffn),
            f"weight_mask = {self.weight_mask!r}": self.weight_mask != "threshold",
            f"wgrad = {self.wgrad!r}": self.wgrad not in ("24", "dense"),
            f"hidden = {self.hidden!r}": self.hidden != "routed",
        }
        refused = [name for name, is_set in ablations.items() if is_set]
        if refused:
            raise ValueError(
                f"Recipe.precision = 'fp8' has no scales for {'; '.join(refused)}: use precision = 'compute' for it."
            )

    @classmethod
    def dense(cls, **overrides: Any) -> "Recipe":
        """Every product dense."""
        return cls(**overrides)

    @classmethod
    def act24(cls, **overrides: Any) -> "Recipe":
        """A alone: 2:4 activations in y3, dx, dW1 and dW2 (arXiv 2503.16672)."""
        return cls(**(dict[str, Any](activations=True, wgrad="24") | overrides))

    @classmethod
    def all24(cls, **overrides: Any) -> "Recipe":
        """A + W: all six products 2:4."""
        return cls.act24(**{"weights": ("y1", "dy2")} | overrides)

    @classmethod
    def venom(cls, experts: int = 4, top_k: int = 1, **overrides: Any) -> "Recipe":
        """A + W + V: all six products 2:4 and routed, the recipe of arXiv 2602.06183."""
        return cls.all24(**{"experts": experts, "top_k": top_k} | overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "Recipe":
        """The preset of that name: dense, act24, all24 or venom."""
        presets = {"dense": cls.dense, "act24": cls.act24, "all24": cls.all24, "venom": cls.venom}
        if name not in presets:
            raise ValueError(f"unknown recipe preset {name!r}; the presets are {', '.join(presets)}.")
        return presets[name](**overrides)

    @property
    def routed(self) -> bool:
        return self.experts > 1

    @property
    def is_dense(self) -> bool:
        """True where nothing is sparse, so that the FFN is the plain one."""
        return not (self.weights or self.activations or self.wgrad != "dense" or self.routed)

    @property
    def in_fp8(self) -> bool:
        """Whether the products' operands have 8 bits."""
        return self.precision == "fp8"

    @property
    def group_rows(self) -> int:
        """The multiple to which a group's rows are padded: v, in 8 bits at least 128."""
        return math.lcm(self.v, FP8_ROWS) if self.in_fp8 else self.v

    @property
    def pattern(self) -> Pattern:
        """The V:N:M pattern of the hidden activations that this recipe amounts to: m = 4 E / k."""
        return Pattern(v=self.group_rows, m=Fraction(4 * self.experts, self.top_k))

    def check(self, d_model: int, d_ffn: int) -> None:
        """Raise ValueError where an FFN of these sizes cannot run this recipe."""
        if self.routed and d_ffn % (4 * self.experts):
            raise ValueError(
                f"d_ffn = {d_ffn} does not split into experts = {self.experts} slices of groups of four; "
                f"use a d_ffn divisible by {4 * self.experts}, or fewer experts."
            )
        both_ways = self.weight_mask == "transposable" and bool(self.weights)
        along_ffn = self.activations or "y3" in self.weights or "dx" in self.weights or both_ways
        if along_ffn and d_ffn % 4:
            raise ValueError(f"d_ffn = {d_ffn} is no multiple of 4, the size of a 2:4 group; round it up.")
        if ("y1" in self.weights or "dy2" in self.weights or both_ways) and d_model % 4:
            raise ValueError(f"d_model = {d_model} is no multiple of 4, the size of a 2:4 group; round it up.")

    @property
    def forward(self) -> "Recipe":
        """What a forward needs that no gradient follows: blocks part the fours that weight gradients read, no others.

        So tokens that do not split into `token_blocks` can be evaluated.
        """
        return dataclasses.replace(self, token_blocks=1)

    def parts(self, layers: int) -> list[tuple[int, int, "Recipe"]]:
        """(0, layers, self): one recipe for every layer of a stack; see `LayerRecipes`."""
        return [(0, layers, self)]


@dataclasses.dataclass(frozen=True)
class LayerRecipes:
    """Recipes for the layers of one stack: `starts` holds (first layer, recipe), and each goes on to the next's first.

    Where a whole stack is asked for its recipe, this may stand for it: `venom_jax.phases`, and the trainer.

    Example: all24 in layers 0 to 3, routing above:

      >>> mixed = LayerRecipes(((0, Recipe.all24()), (4, Recipe.venom(4, 1))))
      >>> [part.experts for _, _, part in mixed.parts(6)]
      [1, 4]
    """

    starts: tuple[tuple[int, Recipe], ...]

    def __post_init__(self):
        firsts = [first for first, _ in self.starts]
        if not firsts or firsts[0] != 0 or any(b <= a for a, b in itertools.pairwise(firsts)):
            raise ValueError(f"LayerRecipes.starts has the layers {firsts}; they must start at 0 and increase.")

    @property
    def forward(self) -> "LayerRecipes":
        """`Recipe.forward` of each part."""
        return LayerRecipes(tuple((first, part.forward) for first, part in self.starts))

    def parts(self, layers: int) -> list[tuple[int, int, Recipe]]:
        """(first, end, recipe) of each part of a stack of so many layers.

        Raises:
          ValueError: a part starts beyond the last layer.
        """
        firsts = [first for first, _ in self.starts]
        if firsts[-1] >= layers:
            raise ValueError(f"LayerRecipes has a part from layer {firsts[-1]} on, but the stack has {layers} layers.")
        return [(first, end, part) for (first, part), end in zip(self.starts, [*firsts[1:], layers], strict=True)]

    @property
    def experts(self) -> int:
        """The most of any layer."""
        return max(part.experts for _, part in self.starts)

    @property
    def routed(self) -> bool:
        """Whether any layer routes."""
        return any(part.routed for _, part in self.starts)

    @property
    def in_fp8(self) -> bool:
        """Whether any layer's operands have 8 bits."""
        return any(part.in_fp8 for _, part in self.starts)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is sparse in any layer."""
        return all(part.is_dense for _, part in self.starts)

    @property
    def weights(self) -> tuple[WeightGemm, ...]:
        """The products that read a 2:4 weight in any layer."""
        used = {gemm for _, part in self.starts for gemm in part.weights}
        return tuple(gemm for gemm in WEIGHT_GEMMS if gemm in used)

    def check(self, d_model: int, d_ffn: int) -> None:
        """Raise ValueError where an FFN of these sizes cannot run one of the recipes."""
        for _, part in self.starts:
            part.check(d_model, d_ffn)


StackRecipe = Recipe | LayerRecipes
"""What runs in a stack of layers: one recipe for all, or one for each part."""


def _position_of_gemm(name: str) -> int:
    if name not in WEIGHT_GEMMS:
        raise ValueError(f"Recipe.weights holds {name!r}; it may hold {', '.join(WEIGHT_GEMMS)}.")
    return WEIGHT_GEMMS.index(name)


def _check_choice(field: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"Recipe.{field} = {value!r}: use one of {', '.join(map(repr, get_args(choices)))}.")
