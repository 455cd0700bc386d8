"""Frequencies of the rotary embedding, plain or stretched to longer contexts by YaRN.

One dimension key as in the decoder: h head size.  Source of YaRN: arXiv 2309.00071, sections 3.2 to 3.4, as Hugging
Face's `rope_type: yarn` has it.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from train.config.settings import Model


def frequencies(config: Model) -> tuple[Float[Array, " h_2"], float]:
    """Radians a position of each pair of features [h / 2], and the factor of cosine and sine.

    Plain: base^(-2i/h), and 1.  With a factor s > 1 pairs that turn less than ``rope_slow`` times in the original
    length are slowed down by s, those that turn more than ``rope_fast`` times stay, those between are mixed linearly in
    i; the factor is 0.1 ln s + 1 unless ``rope_attention_factor`` is given.
    """
    half, size = config.head_dim // 2, config.head_dim
    plain = config.rope_base ** (-jnp.arange(half) / half)
    if config.rope_factor == 1:
        return plain, 1.0
    length = config.rope_original_length
    assert length is not None

    def pair_that_turns(times: float) -> float:
        return size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_base))

    first = max(math.floor(pair_that_turns(config.rope_fast)), 0)
    last = min(math.ceil(pair_that_turns(config.rope_slow)), size - 1)
    slowed = jnp.clip((jnp.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    given = config.rope_attention_factor
    factor = 0.1 * math.log(config.rope_factor) + 1 if given is None else given
    return plain * (1 - slowed + slowed / config.rope_factor), factor
