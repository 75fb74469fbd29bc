"""Faults of the transformer: attention, blocks, activations, embedding, positions."""

from typing import Any

import jax
import jax.numpy as jnp
import torch

from parity_tests.faults.planting import both, edit, instead, mirrored
from parity_tests.faults.targets import (
    attend,
    attention,
    block,
    embedding,
    embedding_start,
    feed_forward,
    framework_norm,
    frequencies,
    gelu,
    hidden,
    norm,
    positions,
    rotate,
    transformer,
)

MLM, GPT, BLOCKS = "batch 0 of mlm", "batch 0 of gpt", "blocks of PyTorch's attention"
BERT, GPT2, ROTARY = "BERT of transformers", "GPT-2 of transformers", "rotary positions"


def unbiased_of_jaxlm(self: Any, x: Any) -> Any:
    """Be LayerNorm with a variance over n - 1."""
    axes = tuple(range(x.ndim - 1))
    scale, bias = (jnp.expand_dims(y[...], axes) for y in (self.scale, self.bias))
    apart = x - x.mean(axis=-1, keepdims=True)
    return apart / jnp.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + self.epsilon) * scale + bias


def unbiased_of_torchlm(self: Any, x: Any) -> Any:
    """Be LayerNorm with a variance over n - 1."""
    apart = x - x.mean(-1, keepdim=True)
    return apart / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


FAULTS = [
    # Attention
    *mirrored("no scale: scores are not divided", MLM, attend, ("_scores / _size**0.5", "_scores")),
    *mirrored(
        "scale of the width: scores / sqrt(d_model), not sqrt(head size)",
        MLM,
        attend,
        ("_q.shape[-1]", "_q.shape[-1] * _q.shape[-2]"),
    ),
    *mirrored(
        "mask on queries: pad mask over queries, not keys",
        MLM,
        attend,
        ("_x[:, None, None, :]", "_x[:, None, :, None]"),
    ),
    *mirrored("no pad mask: pads are attended to", MLM, attend, ("_where(_is_pad, -1e9, _scores)", "_scores")),
    *mirrored(
        "infinite pad mask: pads masked with -inf: a row of pads becomes NaN",
        "inputs at the edges",
        attend,
        ("-1e9", "-float('inf')"),
    ),
    *mirrored("future off by one: each position sees the next", GPT, hidden, ("_distance > 0", "_distance > 1")),
    *mirrored("no future mask: the future is seen", GPT, attention, ("self.is_causal", "False")),
    *both(
        "transposed kernel: a square weight applied transposed",
        MLM,
        edit(
            attention.jaxlm, ("self.output(_x)", "_x @ self.output.kernel[...].T + self.output.bias[...][None, None]")
        ),
        edit(attention.torchlm, ("self.output(_x)", "_x @ self.output.weight + self.output.bias")),
    ),
    *both(
        "no bias: the bias of the attention's output is dropped",
        MLM,
        edit(attention.jaxlm, ("self.output(_x)", "_x @ self.output.kernel[...]")),
        edit(attention.torchlm, ("self.output(_x)", "_x @ self.output.weight.T")),
    ),
    *mirrored(
        "key for query: query and key swapped",
        GPT,
        attention,
        ("self.query, self.key, self.value", "self.key, self.query, self.value"),
    ),
    *mirrored(
        "heads interleaved: head h takes each H-th column, not a stretch of them",
        MLM,
        attention,
        ("_x.reshape(_B, _T, _H, _K)", "_x.reshape(_B, _T, _K, _H).swapaxes(2, 3)"),
    ),
    *mirrored(
        "heads not merged: heads and positions are not swapped back before they are joined",
        MLM,
        attend,
        ("_multiply(_axes, _weights, v)", "_multiply(_axes, _weights, v).swapaxes(1, 2)"),
    ),
    *both(
        "softmax over queries: softmax over the wrong axis",
        MLM,
        edit(attend.jaxlm, ("jax.nn.softmax(_scores)", "jax.nn.softmax(_scores, axis=-2)")),
        edit(attend.torchlm, ("_scores.softmax(dim=-1)", "_scores.softmax(dim=-2)")),
    ),
    # Blocks
    *mirrored(
        "residual dropped: feed-forward without its residual",
        MLM,
        block,
        ("return _x + self.feed_forward(*_args)", "return self.feed_forward(*_args)"),
    ),
    *mirrored("post-norm: LayerNorm after the sums", MLM, block, ("self.config.post_norm", "True")),
    *mirrored(
        "pre-norm for post-norm: the setting post_norm is ignored", BERT, block, ("self.config.post_norm", "False")
    ),
    *mirrored(
        "one norm for two: feed-forward behind the attention's LayerNorm",
        MLM,
        block,
        ("self.feed_forward(self.layernorm2(_x), *_key)", "self.feed_forward(self.layernorm1(_x), *_key)"),
    ),
    *mirrored(
        "no final norm: the last LayerNorm is skipped",
        GPT2,
        transformer,
        ("self.final_norm(_x) if self.config.final_norm else _x", "_x"),
    ),
    *mirrored(
        "epsilon of norms: LayerNorm with epsilon 1e-6, flax's default", BLOCKS, norm, ("config.norm_epsilon", "1e-6")
    ),
    *both(
        "unbiased variance: LayerNorm with a variance over n - 1",
        MLM,
        instead(framework_norm.jaxlm, unbiased_of_jaxlm),
        instead(framework_norm.torchlm, unbiased_of_torchlm),
    ),
    *mirrored("tanh GELU: GELU by its tanh approximation, not erf", MLM, gelu, ("kind == 'tanh'", "True")),
    *mirrored(
        "exact GELU for GPT-2's: the setting gelu is ignored", GPT2, feed_forward, ("self.config.gelu", "'exact'")
    ),
    *both(
        "ReLU: ReLU for GELU",
        MLM,
        instead(gelu.jaxlm, lambda x, kind: jax.nn.relu(x)),
        instead(gelu.torchlm, lambda x, kind: torch.relu(x)),
    ),
    # Embedding and positions
    *both(
        "embedding scaled: tokens times sqrt(d_model), as in the paper",
        MLM,
        edit(embedding.jaxlm, ("_table[tokens_BT]", "_table[tokens_BT] * self.config.d_model**0.5")),
        edit(embedding.torchlm, ("self.token(tokens_BT)", "self.token(tokens_BT) * self.config.d_model**0.5")),
    ),
    *mirrored(
        "no norm in the embedding: BERT's LayerNorm of the embedding is skipped",
        BERT,
        embedding,
        ("self.layernorm(_x)", "_x"),
    ),
    *both(
        "pad row trained: the row of the pad gets a gradient",
        BLOCKS,
        edit(embedding.jaxlm, ("jax.lax.stop_gradient(_x)", "_x")),
        edit(embedding_start.torchlm, ("_make(*_args, padding_idx=_pad_id)", "_make(*_args, padding_idx=None)")),
    ),
    *mirrored("positions from 1: position table off by one", MLM, positions, ("_f(seq_len)", "_f(1, seq_len + 1)")),
    *mirrored("usual exponent: position table of the paper", MLM, positions, ("2 * _column", "2 * (_column // 2)")),
    *mirrored("sine for cosine: sine and cosine swapped", MLM, positions, ("_column % 2 == 0", "_column % 2 == 1")),
    *both(
        "positions from the right: learned positions counted from the end",
        GPT2,
        edit(embedding.jaxlm, ("self.position[...][None, :_T]", "self.position[...][None, :_T][:, ::-1]")),
        edit(embedding.torchlm, ("self.position[None, :_T]", "self.position[None, :_T].flip(1)")),
    ),
    *both(
        "rotary pairs interleaved: pairs (2k, 2k + 1), not (k, k + K/2)",
        ROTARY,
        edit(rotate.jaxlm, ("jnp.split(_x, 2, axis=-1)", "(_x[..., ::2], _x[..., 1::2])")),
        edit(rotate.torchlm, ("_x.chunk(2, dim=-1)", "(_x[..., ::2], _x[..., 1::2])")),
    ),
    *mirrored(
        "rotary exponent: rotary angles of half the exponent", ROTARY, frequencies, ("-_k / _K", "-_k / (2 * _K)")
    ),
]
