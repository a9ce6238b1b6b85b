"""Maths on tensors that knows no model: each op is one `Op`, a table from device type to implementation.

`reference` is the specification and the fallback; `native`, `native_attention`, `native_fp8` and `native_sampling` (CPU
kernels of `library`) register themselves for what they compute, as the Triton kernels of `triton_backends` do for
"cuda".
"""

from __future__ import annotations

from kvern.ops import (
    native,
    reference,
    reference_experts,
    reference_int4,
    reference_latent8,
    reference_sampling,
    training,
    triton_backends,
)
from kvern.ops.dispatch import Op
from kvern.ops.fp8_linear import Codes as Codes
from kvern.ops.fp8_linear import Fp8Recipe as Fp8Recipe
from kvern.ops.fp8_linear import fp8_codes as fp8_codes
from kvern.ops.fp8_linear import fp8_linear as fp8_linear
from kvern.ops.fp8_linear import scaled_product as scaled_product
from kvern.ops.grouped_linear import fp8_grouped_linear as fp8_grouped_linear
from kvern.ops.grouped_linear import grouped_linear as grouped_linear
from kvern.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

linear = Op("linear", reference.linear, native.backends("linear") | triton_backends.backends("linear"), training.linear)
dequantize = Op("dequantize", reference.dequantize, native.backends("dequantize"))
quantize_blocks = Op("quantize_blocks", reference.quantize_blocks)
linear_int4 = Op("linear_int4", reference_int4.linear_int4)
dequantize_int4 = Op("dequantize_int4", reference_int4.dequantize_int4)
grouped_experts = Op("grouped_experts", reference_experts.grouped_experts, triton_backends.backends("grouped_experts"))
expert_rows = Op("expert_rows", reference_experts.expert_rows, training=training.expert_rows)
combine_experts = Op("combine_experts", reference_experts.combine_experts, training=training.combine_experts)
rms_norm = Op("rms_norm", reference.rms_norm, training=training.rms_norm)
apply_rope = Op("apply_rope", reference.apply_rope, training=training.apply_rope)
swiglu = Op("swiglu", reference.swiglu, training=training.swiglu)
swiglu_halves = Op("swiglu_halves", reference.swiglu_halves, training=training.swiglu_halves)
route = Op("route", reference.route)
latent_attention = Op("latent_attention", reference.latent_attention)
paged_latent_attention = Op(
    "paged_latent_attention",
    reference.paged_latent_attention,
    native.backends("paged_latent_attention") | triton_backends.backends("paged_latent_attention"),
)
expanded_attention = Op("expanded_attention", reference.expanded_attention, native.backends("expanded_attention"))
document_attention = Op("document_attention", reference.document_attention, training=training.document_attention)
causal_attention = Op("causal_attention", reference.causal_attention)
encode_latents = Op("encode_latents", reference_latent8.encode_latents, native.backends("encode_latents"))
decode_latents = Op("decode_latents", reference_latent8.decode_latents, native.backends("decode_latents"))
draw = Op("draw", reference_sampling.draw, native.backends("draw"))
logprobs = Op("logprobs", reference_sampling.logprobs, native.backends("logprobs"))

ALL = (
    linear,
    dequantize,
    quantize_blocks,
    linear_int4,
    dequantize_int4,
    grouped_experts,
    expert_rows,
    combine_experts,
    rms_norm,
    apply_rope,
    swiglu,
    swiglu_halves,
    route,
    latent_attention,
    paged_latent_attention,
    expanded_attention,
    document_attention,
    causal_attention,
    encode_latents,
    decode_latents,
    draw,
    logprobs,
    scaled_product,
)
"""Every op, for `kvern doctor` and for the parity tests."""
