"""Eight bits: the FFN's forms for `Recipe(precision="fp8")`, and `linear`, a dense projection.

Every operand is e4m3 (`float8_e4m3fn`) with scales that are powers of two, so that scaling is exact and commutes with
rounding: the reference and the kernels cast to the same bytes.
"""

from venom_jax.fp8.linear import LinearWeight as LinearWeight
from venom_jax.fp8.linear import linear as linear
from venom_jax.fp8.linear import pack_linear as pack_linear
from venom_jax.fp8.operands import EightBitWeights as EightBitWeights
from venom_jax.fp8.operands import check_packed as check_packed
from venom_jax.fp8.operands import pack_weights as pack_weights
