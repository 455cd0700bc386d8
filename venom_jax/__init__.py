"""Sparse FFN training as a library: 2:4 weights, 2:4 and V:N:M activations.

from venom_jax import Recipe, SparseMLP

mlp = SparseMLP(d_model=2048, d_ffn=8192, max_experts=4, rngs=nnx.Rngs(0))
y = mlp(x)                                         # dense
y = mlp(x, recipe=Recipe.act24())                  # activations 2:4, forward and backward
y = mlp(x, recipe=Recipe.act24(precision="fp8"))   # the same, every operand in eight bits
"""

from venom_jax import fp8 as fp8
from venom_jax import linen as linen
from venom_jax import phases as phases
from venom_jax import prune as prune
from venom_jax import router as router
from venom_jax import stats as stats
from venom_jax.ffn import PackedWeights as PackedWeights
from venom_jax.ffn import pack_weights as pack_weights
from venom_jax.formats import VNM as VNM
from venom_jax.formats import Sparse24 as Sparse24
from venom_jax.fp8 import EightBitWeights as EightBitWeights
from venom_jax.general_ffn import feed_forward as feed_forward
from venom_jax.layer import sparse_ffn as sparse_ffn
from venom_jax.mlp import Method as Method
from venom_jax.mlp import SparseMLP as SparseMLP
from venom_jax.moe import SparseMoE as SparseMoE
from venom_jax.pattern import LayerRecipes as LayerRecipes
from venom_jax.pattern import Pattern as Pattern
from venom_jax.pattern import Recipe as Recipe
from venom_jax.pattern import StackRecipe as StackRecipe
from venom_jax.permutation import group_tokens as group_tokens
from venom_jax.stats import FFNStats as FFNStats
from venom_jax.vnm import VNMLinear as VNMLinear
from venom_jax.vnm import vnm_linear as vnm_linear
from venom_jax.vnm import vnm_matmul as vnm_matmul
