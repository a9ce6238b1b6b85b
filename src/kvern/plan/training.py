"""What a training run needs on each rank, and how fast it can be: closed forms over config.json, for planning only.

    state       = parameters * (4 master + 4 gradient + 2 + 2 moments) / ranks           all of it is sharded (FSDP2)
    gathered    = 2 * the largest layer's weights, as a rank needs them whole            one computes, the next comes
    activations = tokens * (a layer's input, all layers + what one layer keeps)          where blocks are recomputed
    compute     = tokens * FLOPs a token / (peak * utilisation)
    gathers     = 3 * weights a rank needs whole * bytes / link                          forward, backward, gradients
    exchanges   = 6 * tokens * top-k * hidden * 2 bytes * MoE layers / link              2 forward, 2 again, 2 backward

A rank needs every layer's dense part whole, and of the experts those that it shares with world / expert others. FLOPs
are 6 a parameter that a token uses, and attention's two products over half the row; recomputation is not counted, as
in the report's figure. It takes balanced experts for granted, and gives up allocator waste, NCCL's buffers and the
overlap of products with transfers: `Step` says how long a step takes with none of it and with all of it.
Sources: DeepSeek-V3 technical report, sections 3.1-3.3 and table 1; the layout of `kvern.train`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvern.config import ModelConfig
from kvern.errors import ConfigError
from kvern.plan.flops import step_flops
from kvern.plan.memory import account

MASTER = GRADIENT = 4
MOMENTS = 4
"""Bytes a parameter: FP32, FP32, and two of BF16."""

WIDE, NARROW = 4, 2
"""Bytes of FP32 and BF16."""

LOGIT_ROWS = 1024
"""Rows whose logits the loss holds at a time (`train.loss.LOGIT_ROWS`)."""


@dataclass(frozen=True)
class Card:
    """An accelerator in its cluster: bytes of memory, dense BF16 FLOP/s, bytes/s one way to its node and past it."""

    name: str
    memory: int
    flops: float
    node_link: float
    link: float
    per_node: int = 8


H800 = Card("H800", 80_000_000_000, 989e12, 160e9, 50e9)
"""Links as the report gives them (section 3.2.2); memory and FLOP/s are the data sheet's."""

H100 = Card("H100", 80_000_000_000, 989e12, 450e9, 50e9)
"""The data sheet's, with one 400 Gb/s adapter a card."""

REPORT_HOURS_PER_TRILLION = 180_000
"""H800 hours that a trillion tokens took (report, table 1 and section 1)."""


@dataclass(frozen=True)
class Run:
    """A mesh and its micro-batch: `world` ranks, `expert` of them share one set of experts, `rows` of `length` tokens.

    recompute: whole blocks are computed again in the backward pass. fp8: inputs of products wait as E4M3.
    """

    world: int
    expert: int = 1
    rows: int = 1
    length: int = 4096
    recompute: bool = True
    fp8: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one rank's micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    masters: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    logits: int

    @property
    def state(self) -> int:
        """What lasts from step to step, gradients included."""
        return self.masters + self.gradients + self.moments

    @property
    def total(self) -> int:
        """Everything."""
        return self.state + self.gathered + self.activations + self.logits


@dataclass(frozen=True)
class Step:
    """Seconds of one micro-batch on every rank, and its `tokens` on one."""

    compute: float
    gathers: float
    exchanges: float
    tokens: int

    @property
    def slowest(self) -> float:
        """Tokens/s of a rank where nothing overlaps."""
        return self.tokens / (self.compute + self.gathers + self.exchanges)

    @property
    def fastest(self) -> float:
        """Tokens/s of a rank where products hide transfers, or transfers hide products."""
        return self.tokens / max(self.compute, self.gathers + self.exchanges)


def state_bytes(config: ModelConfig, *, mtp: bool = True) -> int:
    """Masters, gradients and moments of all ranks together: 8.05 TB for V3 without its MTP layer."""
    counted = account(config)
    return (counted.parameters + (counted.mtp_parameters if mtp else 0)) * (MASTER + GRADIENT + MOMENTS)


def memory(config: ModelConfig, run: Run) -> Memory:
    """Bytes on each rank. ConfigError where the mesh does not divide."""
    _check(config, run)
    counted = account(config)
    each = -(-(counted.parameters + counted.mtp_parameters) // run.world)
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    largest = max(_gathered(config, layer, run) for layer in layers)
    ends = WIDE * config.vocab_size * config.hidden_size
    return Memory(
        masters=MASTER * each,
        gradients=GRADIENT * each,
        moments=MOMENTS * each,
        gathered=2 * max(largest, ends),
        activations=run.tokens * _kept(config, run) + _codes(config, run),
        logits=3 * WIDE * min(LOGIT_ROWS, run.tokens) * config.vocab_size,
    )


def step(config: ModelConfig, run: Run, card: Card, utilisation: float) -> Step:
    """How long a micro-batch takes where products reach `utilisation` of the card's dense BF16 peak."""
    _check(config, run)
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    routed = sum(config.is_moe(layer) for layer in layers)
    dense = sum(_dense(config, layer) for layer in layers) + 2 * config.vocab_size * config.hidden_size
    experts = routed * _experts(config, run.expert)
    passes = 3 if run.recompute else 2
    sent = 2 * passes * run.tokens * config.num_experts_per_tok * config.hidden_size * NARROW * routed
    return Step(
        compute=run.tokens * flops_per_token(config, run.length) / (card.flops * utilisation),
        gathers=_seconds(3 * WIDE * dense, run.world, 1, card)
        + _seconds((2 * _expert_bytes(run) + WIDE) * experts, run.world // run.expert, run.expert, card),
        exchanges=_seconds(sent, run.expert, 1, card),
        tokens=run.tokens,
    )


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward, of the MTP layers too, in documents of `length` tokens."""
    return step_flops(config, 1, length / 2)


def report_utilisation(config: ModelConfig, card: Card = H800) -> float:
    """The share of the BF16 peak that the report's hours mean, all of its losses included."""
    tokens_per_second = 1e12 / (REPORT_HOURS_PER_TRILLION * 3600)
    return tokens_per_second * flops_per_token(config, 4096) / card.flops


def hours_per_trillion(tokens_per_second: float) -> float:
    """Hours of one card for 10^12 tokens, at its own tokens/s."""
    return 1e12 / tokens_per_second / 3600


def _check(config: ModelConfig, run: Run) -> None:
    if min(run.world, run.expert, run.rows, run.length) < 1:
        raise ConfigError("ranks, rows and tokens are counted from 1")
    if run.world % run.expert:
        raise ConfigError(f"{run.expert} expert ranks do not divide {run.world} ranks", param="expert")
    if (config.n_routed_experts or run.expert) % run.expert:
        raise ConfigError(f"{run.expert} expert ranks do not divide {config.n_routed_experts} experts", param="expert")


def _seconds(amount: float, ranks: int, apart: int, card: Card) -> float:
    """How long `amount` bytes take that lie in equal parts on `ranks` ranks, every `apart`-th of the world.

    What comes from the own node and what comes from others travel at the same time.
    """
    near = min(ranks, max(1, card.per_node // apart))
    return amount / ranks * max((near - 1) / card.node_link, (ranks - near) / card.link)


def _expert(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def _experts(config: ModelConfig, expert_ranks: int) -> int:
    """Parameters of one rank's experts in a layer."""
    return (config.n_routed_experts or 0) * _expert(config) // expert_ranks


def _dense(config: ModelConfig, layer: int) -> int:
    """Parameters of a layer without routed experts; an MTP layer's embedding and head are the model's."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = config.q_lora_rank
    out = hidden * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    out += heads * config.v_head_dim * hidden + 2 * hidden + config.kv_lora_rank
    out += (hidden if queries is None else queries) * heads * config.qk_head_dim
    out += 0 if queries is None else hidden * queries + queries
    if config.attention_bias:
        out += config.latent_dim + hidden + (queries or 0)
    if config.is_moe(layer):
        out += _expert(config) * (config.n_shared_experts or 0) + (config.n_routed_experts or 0) * hidden
    else:
        out += 3 * hidden * config.intermediate_size
    return out + (2 * hidden * hidden + 3 * hidden if layer >= config.num_hidden_layers else 0)


def _whole(config: ModelConfig, layer: int, expert_ranks: int) -> int:
    """Parameters that a rank needs whole to compute a layer."""
    return _dense(config, layer) + (_experts(config, expert_ranks) if config.is_moe(layer) else 0)


def _gathered(config: ModelConfig, layer: int, run: Run) -> int:
    """Bytes of a layer's weights on a rank that computes it."""
    experts = _experts(config, run.expert) if config.is_moe(layer) else 0
    return WIDE * _dense(config, layer) + _expert_bytes(run) * experts


def _expert_bytes(run: Run) -> int:
    """Bytes of an expert's parameter on its way: FP8 codes are made of the masters, BF16 products need no more."""
    return WIDE if run.fp8 else NARROW


def _kept(config: ModelConfig, run: Run) -> int:
    """Bytes that wait for the backward pass, for each token of the micro-batch."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    inside = [_layer_keeps(config, layer, run) for layer in layers]
    inputs = NARROW * config.hidden_size * (len(layers) + 2)
    return inputs + (max(inside) if run.recompute else sum(inside))


def _codes(config: ModelConfig, run: Run) -> int:
    """Bytes of the weights' FP8 codes, which wait for the backward pass: of one layer, or of all."""
    if not run.fp8:
        return 0
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    whole = [_whole(config, layer, run.expert) for layer in layers]
    return max(whole) if run.recompute else sum(whole)


def _layer_keeps(config: ModelConfig, layer: int, run: Run) -> int:
    """Bytes a token that a layer keeps: inputs of norms and products, operands of attention and SwiGLU, results."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    code = 1 if run.fp8 else NARROW
    queries = config.q_lora_rank or 0
    norms = NARROW * (2 * hidden + queries + config.kv_lora_rank)
    inputs = code * (2 * hidden + queries + config.kv_lora_rank + heads * config.v_head_dim)
    core = 4 * NARROW * heads * config.qk_head_dim  # queries, keys, values and output, all padded to the key size
    return norms + inputs + core + _feed_forward_keeps(config, layer, run, code)


def _feed_forward_keeps(config: ModelConfig, layer: int, run: Run, code: int) -> int:
    def mlp(width: int) -> int:
        return code * (config.hidden_size + width) + 2 * NARROW * width

    if not config.is_moe(layer):
        return mlp(config.intermediate_size)
    buffers = 2 if run.expert > 1 else 0  # what is sent and what comes
    routed = mlp(config.moe_intermediate_size) + (1 + buffers) * NARROW * config.hidden_size
    scores = 2 * WIDE * (config.n_routed_experts or 0)
    shared = mlp(config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else 0
    return config.num_experts_per_tok * routed + shared + scores
