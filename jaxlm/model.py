"""A transformer, encoder or decoder, in build order: Embedding, Attention, FeedForward, Block, Transformer.

What the settings `model.*` choose; the default comes first in each line:
- positions: fixed sines and cosines, learned, or rotary
- attention: causal or bidirectional; global, or in a sliding window in some layers; with norms of queries and keys
- key-value heads: as many as query heads (multi-head), or fewer (grouped-query)
- masks: padding; several documents packed in a row, which do not see each other
- feed-forward: GELU, squared ReLU, GEGLU or SwiGLU
- norms: LayerNorm or RMSNorm; before each sublayer, or after each residual sum; also on the embedding and at the end
- biases: in all linear layers, some, or none
- frozen blocks, LoRA adapters, rematerialization
The parts are in ops/: layers.py (linear layers, initialization, adapters, norms), attention.py (choice of a kernel),
token_positions.py, activations.py, and stacks.py (the scan over blocks).

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
Modules take a PRNG key for dropout; without one (None, in evaluation) there is no dropout.
Parameters are float32. Matmuls compute in `dtype`, and accumulate in float32 or wider.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxlm.config import GATED, ModelConfig
from jaxlm.ops import attention, matmul
from jaxlm.ops.activations import activation
from jaxlm.ops.dropout import dropout
from jaxlm.ops.layers import add_adapters, initial_weights, linear, norm, residual_std
from jaxlm.ops.plain_attention import Attend, Mask
from jaxlm.ops.position_tables import fixed_positions, frequencies
from jaxlm.ops.stacks import is_unrolled, rematerialized, scan_blocks
from jaxlm.ops.token_positions import document_positions, rotate
from jaxlm.parallel import BATCH, constrain

DROPOUTS = 3  # per block: attention weights, attention output, and inside the feed-forward


class Places(NamedTuple):
    """Pads, documents and positions in a batch. A field of None means: no pads; one document a row; 0 to T - 1."""

    is_pad_BT: Array | None = None
    segments_BT: Array | None = None  # number of the document at each position; documents follow each other in a row
    positions_BT: Array | None = None  # index of each position in its document


class Embedding(nnx.Module):
    """Embeddings of tokens, positions and token types, added up; norm; dropout. The pad's row stays zero."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # A tied table is also the output layer, which needs small initial values (as in GPT-2). Before a norm, which
        # cancels the table's scale, Adam's updates, of a fixed size, change a small table more (as in BERT).
        is_small = config.tied_embedding or config.embedding_norm or config.initialization != "original"
        init = initial_weights(config, 0.02 if is_small else 1.0)
        self.token = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, rngs=rngs)
        if config.pad_id >= 0:
            self.token.embedding[...] = self.token.embedding[...].at[config.pad_id].set(0)
        if config.positions == "learned":
            self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.seq_len, config.d_model)))
        if config.segments:  # token types, as BERT's segments; not the documents of a packed row
            self.segment = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.segments, config.d_model)))
        if config.embedding_norm:
            self.layernorm = norm(config, rngs)

    @jax.named_scope("embedding")
    def __call__(
        self,
        tokens_BT: Array,
        dropout_key: Array | None,
        positions_BT: Array | None = None,
        types_BT: Array | None = None,
    ) -> Array:
        """Return [B, T, D]; positions are 0 to T - 1, or `positions_BT`; token types are 0, or `types_BT`."""
        T = tokens_BT.shape[1]
        # All-gathers the table over fsdp first; otherwise XLA would all-gather the embeddings of the whole batch.
        x_BTD = constrain(self.token.embedding[...], "tensor")[tokens_BT]
        if self.config.pad_id >= 0:
            is_pad_BT1 = (tokens_BT == self.config.pad_id)[:, :, None]
            x_BTD = jnp.where(is_pad_BT1, jax.lax.stop_gradient(x_BTD), x_BTD)
        if self.config.positions == "fixed":
            table_TD = fixed_positions(self.config.seq_len, self.config.d_model)
            x_BTD += table_TD[None, :T] if positions_BT is None else jnp.asarray(table_TD)[positions_BT]
        elif self.config.positions == "learned":
            x_BTD += self.position[...][None, :T] if positions_BT is None else self.position[...][positions_BT]
        if self.config.segments:
            x_BTD += self.segment[...][None, :1] if types_BT is None else self.segment[...][types_BT]
        if self.config.embedding_norm:
            x_BTD = self.layernorm(x_BTD)
        return constrain(dropout(x_BTD, self.config.dropout, dropout_key), BATCH)


class Attention(nnx.Module):
    """Self-attention with H query heads, and G heads of keys and values (grouped-query attention, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.is_causal, self.dtype = config, is_causal, dtype
        D, K, has_bias = config.d_model, config.head_size, config.biases in ("all", "attention")
        self.query = linear(config, D, config.n_heads * K, dtype, rngs, has_bias)
        self.key = linear(config, D, config.kv_heads * K, dtype, rngs, has_bias)
        self.value = linear(config, D, config.kv_heads * K, dtype, rngs, has_bias)
        self.output = linear(config, config.n_heads * K, D, dtype, rngs, has_bias, residual_std(config))
        if config.qk_norm:
            self.query_norm, self.key_norm = norm(config, rngs, K), norm(config, rngs, K)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Array,
        places: Places,
        layer: int,
        dropout_keys: Sequence[Array | None],
        attend: Attend | None = None,
    ) -> Array:
        """Return [B, T, D]. Cached decoding and attention maps pass their own `attend`.

        `layer` is the index of the block, from 0. A scan traces one block for several: `layer` is then that of
        one of them; all have the same window and rotary base.
        """
        (B, T, _), K = x_BTD.shape, self.config.head_size
        weights_key, output_key = dropout_keys
        q_BTHK, k_BTGK, v_BTGK = (f(x_BTD).reshape(B, T, -1, K) for f in (self.query, self.key, self.value))
        if self.config.qk_norm:
            wide = matmul.sum_dtype(self.dtype)  # rmsnorm_no_scale would compute in the input's type
            q_BTHK, k_BTGK = self.query_norm(q_BTHK.astype(wide)), self.key_norm(k_BTGK.astype(wide))
        window = self.config.window_of(layer)
        if self.config.positions == "rotary":
            frequency_K = frequencies(self.config, window > 0)
            seq_len = 0 if places.positions_BT is None else self.config.seq_len  # rows of the rotary table; 0: T
            q_BTHK, k_BTGK = (rotate(x, frequency_K, places.positions_BT, seq_len) for x in (q_BTHK, k_BTGK))
        q_BTHK, k_BTGK, v_BTGK = (x.astype(self.dtype) for x in (q_BTHK, k_BTGK, v_BTGK))
        mask = Mask(places.is_pad_BT, places.segments_BT, self.is_causal, window=window)
        attend = attend or functools.partial(attention.attend, config=self.config, dropout_key=weights_key)
        x_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, mask)
        return dropout(self.output(x_BTHK.reshape(B, T, -1)), self.config.dropout, output_key)


class FeedForward(nnx.Module):
    """fc2(dropout(activation(fc1(x)))); with a gate, fc2(dropout(activation(fc1(x)) * up(x))) (arXiv 2002.05202).

    `fc1`, `up` and `fc2` are Llama's gate_proj, up_proj and down_proj.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        D, F, has_bias = config.d_model, config.n_hidden, config.biases in ("all", "feed_forward")
        self.fc1 = linear(config, D, F, dtype, rngs, has_bias)
        if config.mlp in GATED:
            self.up = linear(config, D, F, dtype, rngs, has_bias)
        self.fc2 = linear(config, F, D, dtype, rngs, has_bias, residual_std(config))

    @jax.named_scope("feed-forward")
    def __call__(self, x_BTD: Array, dropout_key: Array | None) -> Array:
        x_BTF = activation(self.fc1(x_BTD), self.config.mlp, self.config.gelu)
        if self.config.mlp in GATED:
            x_BTF = x_BTF * self.up(x_BTD)
        return self.fc2(dropout(x_BTF, self.config.dropout, dropout_key))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with `post_norm`, norm(x + sublayer(x)) instead."""

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.layernorm1 = norm(config, rngs)
        self.attention = Attention(config, is_causal, dtype, rngs)
        self.layernorm2 = norm(config, rngs)
        self.feed_forward = FeedForward(config, dtype, rngs)

    def __call__(
        self, x_BTD: Array, places: Places, layer: int, dropout_keys: Array | None, attend: Attend | None = None
    ) -> Array:
        *attention_keys, feed_forward_key = [None] * DROPOUTS if dropout_keys is None else dropout_keys
        options = (places, layer, attention_keys, attend)
        if self.config.post_norm:
            x_BTD = self.layernorm1(x_BTD + self.attention(x_BTD, *options))
            return self.layernorm2(x_BTD + self.feed_forward(x_BTD, feed_forward_key))
        has_norm = self.config.first_norm or layer > 0
        x_BTD += self.attention(self.layernorm1(x_BTD) if has_norm else x_BTD, *options)
        return x_BTD + self.feed_forward(self.layernorm2(x_BTD), feed_forward_key)


class Transformer(nnx.Module):
    """Token ids [B, T] to hidden states float32 [B, T, D].

    `segments_BT` has the number of each token's document in a packed row. `types_BT` has its token type: 0 or 1 for
    the first or second text of a pair. `model.segments` is the number of token types, not of documents.

    `blocks` is one Block whose parameters have a leading axis of n_layers; a scan runs it (scan_blocks).
    """

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        self.blocks = jax.vmap(lambda rngs: Block(config, is_causal, dtype, rngs))(rngs.split(config.n_layers))
        if not config.first_norm:  # block 0 has no layernorm1: the stack of layernorm1 begins with block 1
            self.blocks.layernorm1 = jax.tree.map(lambda x: x[1:], self.blocks.layernorm1)
        add_adapters(self.blocks, config, rngs)
        if config.final_norm:
            self.final_norm = norm(config, rngs)

    def __call__(
        self,
        tokens_BT: Array,
        key: Array | None = None,
        segments_BT: Array | None = None,
        types_BT: Array | None = None,
    ) -> Array:
        is_pad_BT = tokens_BT == self.config.pad_id if self.config.pad_id >= 0 else None
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else document_positions(segments_BT))
        embedding_key, dropout_keys = None, None
        if key is not None:  # one split for all: it costs 64 operations, however many keys it returns
            all_keys = jax.random.split(key, 1 + DROPOUTS * self.config.n_layers)
            embedding_key, dropout_keys = all_keys[0], all_keys[1:].reshape(-1, DROPOUTS)
        x_BTD = self.embedding(tokens_BT, embedding_key, places.positions_BT, types_BT)

        def run_block(x_BTD: Array, block_and_keys: tuple[Block, Array | None], layer: int) -> tuple[Array, None]:
            block, block_keys = block_and_keys
            return constrain(block(x_BTD, places, layer, block_keys), BATCH), None

        run, n, L = rematerialized(self.config, run_block), self.config.frozen_layers, self.config.n_layers
        if n:  # a separate scan: a scan computes the gradients of all of its blocks, or of none
            frozen = (jax.lax.stop_gradient(self.blocks), dropout_keys)
            x_BTD, _ = scan_blocks(self.config, run, x_BTD, frozen, 0, n, is_unrolled(self.config))
        stacks = (self.blocks, dropout_keys)
        x_BTD, _ = scan_blocks(self.config, run, x_BTD, stacks, n, L, is_unrolled(self.config))
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
