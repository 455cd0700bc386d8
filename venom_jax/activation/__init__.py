"""N:M sparse activations of models that are trained already: which inputs of a linear layer stay, and what mends it.

from venom_jax import activation

setting = activation.Sparsity(activation.NM(8, 16), shift="channel", variance="variance")
statistics = activation.collect(inputs)                        # inputs [T, I] of the layer over some text
parameters = activation.parameters(setting, w, statistics)     # w [I, O]
y = activation.sparse_linear(x, w, bias, setting, parameters)  # x [..., S, I]
"""

from venom_jax.activation.criteria import Statistics as Statistics
from venom_jax.activation.criteria import collect as collect
from venom_jax.activation.criteria import join as join
from venom_jax.activation.criteria import parameters as parameters
from venom_jax.activation.criteria import prune_weight as prune_weight
from venom_jax.activation.linear import Parameters as Parameters
from venom_jax.activation.linear import Pruned as Pruned
from venom_jax.activation.linear import linear as linear
from venom_jax.activation.linear import prune as prune
from venom_jax.activation.linear import sparse_linear as sparse_linear
from venom_jax.activation.patterns import NM as NM
from venom_jax.activation.patterns import Pattern as Pattern
from venom_jax.activation.patterns import Unstructured as Unstructured
from venom_jax.activation.patterns import parse_pattern as parse_pattern
from venom_jax.activation.selection import select as select
from venom_jax.activation.settings import LINEARS as LINEARS
from venom_jax.activation.settings import Sparsity as Sparsity
