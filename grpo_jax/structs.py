"""The data types shared by all parts, and the letters that name array axes.

An array's name ends in its axes, slowest first: `logp_PGC` is [prompts, completions per prompt,
completion tokens]. A `1` marks a broadcast axis. The letters mean one thing everywhere:

    P prompts in a step        G completions per prompt      B rows (of any grouping)
    Q prompt tokens            C completion tokens           T tokens in a row
    R decode slots             S cache positions             W lanes: of a slot, one completion
                                                               each; of a packed prompt, several
    V vocabulary               D model width                 F MLP width
    N query heads              K key-value heads             H head size
    L layers                   M microbatches

A file that needs more letters declares them at its top.

A mask says what True means (`action_PGC`: a token the policy chose). Log-probabilities are float32
nats. Lengths count tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import struct

Array = Any  # jax.Array or numpy.ndarray
Params = Any  # nested dict of arrays


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 rescaling of the rotary frequencies by wavelength (Hugging Face "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by one factor."""

    factor: float


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Slow frequencies divided by a factor, fast ones kept (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_max_position: int
    beta_fast: float  # frequencies with more turns in the original length are kept
    beta_slow: float  # those with fewer are divided; linear in between
    truncate: bool  # round both bounds to whole pairs


@dataclasses.dataclass(frozen=True)
class LongScaling:
    """A divisor for each frequency (Ding et al. 2024, arXiv:2402.13753).

    `ModelConfig.longest` selects the list, so that a run uses only one. A sampler that changed
    lists when a row grew long would not be the policy that is scored.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]  # for rows longer than the original length
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings. Pairs that are not rotated have a frequency of zero."""

    theta: float  # base of the frequencies
    scaling: RopeScaling | LinearScaling | YarnScaling | LongScaling | None = None
    share: float = 1.0  # of a head's dimensions that are rotated; 0: no positions
    proportional: bool = False  # exponents count all dimensions, not only rotated ones
    amplitude: float = 1.0  # factor of cosine and sine


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """A query at position t times 1 + beta * ln(1 + floor(t / period)) (Llama 4, Ministral 3)."""

    beta: float
    period: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """The settings that may differ between layers of a decoder; all are static in compilation."""

    mixer: str = "attention"  # mixes tokens
    window: int | None = None  # keys that a query sees, its own included; None: all
    rotary: int = 0  # index in `ModelConfig.rotaries`
    ffn: str = "dense"  # applied to each token alone


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The low-rank adapters of one dense layer, by the layers of a decoder.

    A family that keeps several dense layers in one tensor adapts them as one: they share A, and
    have the columns of B in order.
    """

    path: str  # of the dense layer within its layer, such as "attention/q", or "mlp/gate_up" of two
    parts: tuple[str, ...]  # the paths of the dense layers
    ranks: tuple[int, ...]  # 0: no adapter
    scalings: tuple[float, ...]  # of the products A B: alpha / rank


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters that are trained in place of a decoder's parameters, which stay fixed."""

    adapters: tuple[Adapter, ...]
    base: str = "auto"  # the layers' kernels, in "int8" or "nf4"; "auto": plain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder: dense families are settings of it (`models/families`)."""

    family: str  # the Hugging Face model_type
    vocab_size: int
    width: int  # D
    mlp_width: int  # F
    layers: tuple[Layer, ...]
    num_heads: int  # N
    num_kv_heads: int  # K
    head_size: int  # H
    rotaries: tuple[Rotary, ...]
    norm_eps: float
    max_position: int  # the model's longest row, in tokens
    tied_head: bool  # the LM head is the embedding, transposed
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    qk_norm: str = ""  # RMS norm of queries and keys before rotation: of each "head", or "whole"
    norms: str = "before"  # of a layer's two branches: "before", "after" (on the output), "both"
    norm_offset: float = 0.0  # added to the scale of all norms
    activation: str = "silu"  # or "gelu_tanh"
    attention_scale: float | None = None  # of the scores; None: H ** -0.5
    attention_cap: float | None = None  # scores s become cap * tanh(s / cap)
    query_growth: QueryGrowth | None = None
    embed_factor: float = 1.0  # of the embedding's output
    residual_factor: float = 1.0  # of a branch's output
    logit_factor: float = 1.0
    logit_cap: float | None = None  # as `attention_cap`, for logits
    wrapper: str = ""  # model_type of the image-text config that holds this one
    codes: str = ""  # of the layers' kernels in the source: "nf4" or "nf4 double"; "": none
    lora: Lora | None = None  # None: all parameters are trained
    # "vocabulary": the LM head; "scalar": one number for each state, as reward models and critics
    # have; "none": none, as a model without one is read from its folder
    head: str = "vocabulary"
    longest: int | None = None  # tokens of the longest row in use; None: max_position

    def within(self, longest: int) -> ModelConfig:
        """The model for rows of at most `longest` tokens.

        The same model, unless its rotary frequencies depend on the length (`LongScaling`).
        """
        if not any(isinstance(rotary.scaling, LongScaling) for rotary in self.rotaries):
            return self
        return dataclasses.replace(self, longest=longest)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def has_windows(self) -> bool:
        return any(layer.window is not None for layer in self.layers)

    @property
    def num_params(self) -> int:
        """The number of parameters, embedding and head included."""
        q, kv = self.head_size * self.num_heads, self.head_size * self.num_kv_heads
        layer = self.width * (2 * q + 2 * kv) + 3 * self.width * self.mlp_width
        layer += (4 if self.norms == "both" else 2) * self.width
        layer += (q + 2 * kv) * self.qkv_bias + self.width * self.out_bias
        layer += {"": 0, "head": 2 * self.head_size, "whole": q + kv}[self.qk_norm]
        has_own = self.head == "vocabulary" and not self.tied_head
        embeddings = self.vocab_size * self.width * (1 + has_own)
        embeddings += self.width * (self.head == "scalar")
        return embeddings + self.num_layers * layer + self.width


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; sampler and scorer use the same one.

    Temperature 0 is greedy: the highest logit, with log-probabilities reported at temperature 1.
    """

    temperature: float = 1.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability

    @property
    def is_cut(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1.0


@struct.dataclass
class Rollouts:
    """Completions of a step's prompts, padded on the right; padding holds zeros.

    A completion that stopped ends with its stop token, which is an action like any other: it is
    counted by `length_PG`, scored and trained.
    """

    prompt_PQ: Array  # int32 token ids
    prompt_length_P: Array  # int32
    completion_PGC: Array  # int32 token ids
    logp_PGC: Array  # float32, under the sampling distribution
    length_PG: Array  # int32, stop token included
    stopped_PG: Array  # bool: ended by a stop token; False: cut at the token limit
    # bool: tokens that the policy chose or must imitate; None: all tokens within the length
    chosen_PGC: Array | None = None
    # bool: tokens of demonstrations, not drawn by the policy; their `logp_PGC` is 0; None: none
    given_PGC: Array | None = None
    # int32: where in the completion the part begins that a token is in. A part is a text of its
    # own: it sees the prompt and itself, and its positions follow the prompt's. None: there is one
    begin_PGC: Array | None = None

    @property
    def num_trained_PG(self) -> Array:  # noqa: N802
        """Tokens of each completion that are trained on, unless it is left out as a whole."""
        return self.length_PG if self.chosen_PGC is None else self.chosen_PGC.sum(-1)


@struct.dataclass
class Experience:
    """A rollout with the values that stay fixed during its updates.

    `advantage` is one number for each completion, [P, G], or one for each of its tokens, [P, G, C],
    which the tokens of a turn may share. What lies past a completion's length is not read.
    """

    rollouts: Rollouts
    advantage: Array  # float32
    action_PGC: Array  # bool: tokens the policy chose and is trained on
    old_logp_PGC: Array | None  # before the first update; None: one update, the current policy
    ref_logp_PGC: Array | None  # reference; None: no KL term
    kl_coef_PG: Array | None = None  # float32, alike everywhere; None: that of the objective
    entropy_coef_PG: Array | None = None  # the same
    top_entropy_PGC: Array | None = None  # bool: carries the policy gradient; None: all actions
    # Of hybrids (`algorithm/hybrids.py`), float32: weights of each token in the policy loss and in
    # the nll, whose divisors they contain; and the share of the nll in the sum of both, None: 1.
    policy_weight_PGC: Array | None = None
    nll_weight_PGC: Array | None = None
    mix_PG: Array | None = None
    teacher_logp_PGC: Array | None = None  # of the teacher; None: the loss reads none
    value_PGC: Array | None = None  # float32: of the critic, before its update; None: no critic
    return_PGC: Array | None = None  # float32: what the critic learns
    # Of losses of preferences; None: the loss does not read it.
    ref_logp_PG: Array | None = None  # float32: the reference's, summed over the actions
    nll_weight_PG: Array | None = None  # float32: of the summed nll beside the loss
    desirable_PG: Array | None = None  # bool: the label of unpaired data
    divergence_PG: Array | None = None  # float32: KTO's reference point, alike everywhere


@struct.dataclass
class TrainState:
    """The state that an optimizer update changes."""

    params: Params  # the trained weights, in `config.model.param_dtype`
    opt_state: Any
    num_updates: Array  # int32 scalar: updates attempted, skipped ones included
    num_skipped: Array  # int32 scalar: updates refused as not finite or by a guard

    @property
    def num_made(self) -> Array:
        """int32 scalar: updates that changed the parameters; the optimizer's count."""
        return self.num_updates - self.num_skipped


@struct.dataclass
class ActorCritic(TrainState):
    """The state of a policy with a critic: `TrainState` is the policy's."""

    critic: TrainState


def pad_rows(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows as one int32 array [B, width], padded with zeros on the right, and lengths [B]."""
    ids_BT = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = row
    return ids_BT, np.array([len(row) for row in rows], np.int32)
