"""SparseMLP, SparseMoE and VNMLinear for flax.linen models, through nnx's bridge.

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, recipe):
            return x + venom_jax.linen.sparse_mlp(d_model=64, d_ffn=256, max_experts=4)(x, recipe=recipe)

Parameters appear under `params` (w1, w2), the method's state under the collection `Method` (beta, bias,
permutation). `venom_jax.phases.transition` takes both trees as they are.
"""

from typing import Any

from flax import linen, nnx

from venom_jax.mlp import SparseMLP
from venom_jax.moe import SparseMoE
from venom_jax.pattern import Pattern
from venom_jax.vnm import VNMLinear


def sparse_mlp(
    d_model: int, d_ffn: int, *, max_experts: int = 1, name: str | None = None, **options: Any
) -> linen.Module:
    """A linen module with the parameters and call arguments of `SparseMLP`."""
    return nnx.bridge.to_linen(SparseMLP, d_model, d_ffn, max_experts=max_experts, name=name, **options)


def sparse_moe(d_model: int, d_expert: int, *, name: str | None = None, **options: Any) -> linen.Module:
    """A linen module with the parameters and call arguments of `SparseMoE`; its biases are under `Method`."""
    return nnx.bridge.to_linen(SparseMoE, d_model, d_expert, name=name, **options)


def vnm_linear(d_in: int, d_out: int, *, pattern: Pattern, name: str | None = None, **options: Any) -> linen.Module:
    """A linen module with the parameters and call arguments of `VNMLinear`; its stored places are under `Method`."""
    return nnx.bridge.to_linen(VNMLinear, d_in, d_out, pattern=pattern, name=name, **options)
