"""The model's shape; settings.py gives it to gin."""

from dataclasses import dataclass
from typing import Literal

from train.config import checks
from venom_jax.nonlinearity import CLAMP, Activation
from venom_jax.nonlinearity import check as check_activation


@dataclass(frozen=True)
class Model:
    """The decoder: RMSNorm, RoPE, (grouped-query) attention, squared-ReLU FFN."""

    vocab_size: int
    d_model: int
    d_ffn: int
    layers: int
    heads: int
    kv_heads: int | None = None  # None: one key-value head for each query head
    rope_base: float = 10000.0
    # YaRN: positions of contexts rope_factor times as long as rope_original_length; 1 is none (train/model/rope.py).
    rope_factor: float = 1.0
    rope_original_length: int | None = None
    rope_fast: float = 32.0  # turns within the original length above which a pair of features is left as it is,
    rope_slow: float = 1.0  # and below which it turns rope_factor times slower
    rope_attention_factor: float | None = None  # of cosine and sine; None: 0.1 ln(rope_factor) + 1
    norm_epsilon: float = 1e-5
    init_std: float = 0.02  # embedding, head, qkv; projections into the residual stream get this / sqrt(2 layers)
    ffn_init_std: float = 0.03  # W1
    tied_head: bool = False
    qk_norm: bool = False  # RMSNorm, with a scale for each feature, on every query and key before the rotation
    # id of the token at which a document begins (the data's end-of-document token): attention then stays inside a
    # document and positions count from its beginning.  None: documents in one sequence see each other.
    document_start: int | None = None
    gated: bool = False  # FFN: (phi(x W1) * (x Wu)) W2
    activation: Activation = "relu2"  # phi; relu2_clamped is (s tanh(relu / s))^2
    clamp: float = CLAMP  # s
    # A mixture of experts in place of each FFN, 0: none.  Of each a token computes experts_per_token, chosen by a
    # learned router, and all shared_experts; an expert has d_expert neurons (None: d_ffn).
    experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 0
    d_expert: int | None = None
    expert_scores: Literal["softmax", "sigmoid"] = "softmax"
    expert_balance_rate: float = 1e-3  # step of the bias that balances the experts' load; 0: none
    expert_balance_loss: float = 0.0  # weights of two terms of the training loss, each summed over layers:
    expert_z_loss: float = 0.0  # 1 where load is even, and the mean (log sum exp of the router's logits)^2

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(self, 1, "vocab_size", "d_model", "d_ffn", "layers", "heads", "kv_heads")
        checks.at_least(self, 1, "experts_per_token", "d_expert")
        checks.at_least(self, 0, "document_start", "experts", "shared_experts")
        checks.at_least(self, 0, "expert_balance_rate", "expert_balance_loss", "expert_z_loss")
        check_activation(self.activation, self.clamp)
        if self.rope_factor < 1 or (self.rope_factor > 1) != (self.rope_original_length is not None):
            raise ValueError(
                f"Model.rope_factor={self.rope_factor} with Model.rope_original_length={self.rope_original_length}: "
                "YaRN takes a factor above 1 and the length it stretches; leave both out for plain RoPE"
            )
        if not 0 < self.rope_slow < self.rope_fast:
            raise ValueError(
                f"Model.rope_slow={self.rope_slow} must lie between 0 and Model.rope_fast={self.rope_fast}"
            )
        if self.experts == 1 or (self.experts and self.experts_per_token > self.experts):
            raise ValueError(
                f"Model.experts={self.experts} with Model.experts_per_token={self.experts_per_token}: use at least 2 "
                "experts, and no more per token than there are; 0 experts for a plain FFN"
            )
        if not self.experts and (self.shared_experts or self.d_expert):
            raise ValueError(
                f"Model.shared_experts={self.shared_experts}, Model.d_expert={self.d_expert} describe experts, and "
                "Model.experts=0 has none; bind it"
            )
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError(
                f"Model.d_model={self.d_model} must be an even multiple of Model.heads={self.heads}: "
                "RoPE turns pairs of features; change one of the two"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"Model.heads={self.heads} must be a multiple of Model.kv_heads={self.kv_heads}")

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def expert_neurons(self) -> int:
        """Of one expert, or of the FFN where there are none."""
        return self.d_expert if self.experts and self.d_expert else self.d_ffn

    @property
    def neurons(self) -> int:
        """Of all experts of a layer."""
        return self.expert_neurons * (self.experts + self.shared_experts if self.experts else 1)

    @property
    def active_neurons(self) -> int:
        """What a token computes."""
        return self.expert_neurons * (self.experts_per_token + self.shared_experts if self.experts else 1)

    @property
    def is_plain(self) -> bool:
        """relu(x W1)^2 W2 and nothing else."""
        return not self.gated and not self.experts and self.activation == "relu2"

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.gated else 2
