"""A transformer, encoder or decoder, in build order: Embedding, Attention, FeedForward, Block, Transformer.

Settings `model.*` choose among, the original design being the first of each:
- positions: fixed sines and cosines, learned, or rotary
- attention to all positions, or in local layers to those within a window; causal or to both sides
- as many heads of keys and values as of queries, or fewer; with or without a norm of queries and keys
- padding, and several documents in a row: pads and other documents are hidden
- feed-forward with GELU or squared ReLU, or with a gate: GEGLU, SwiGLU
- LayerNorm or RMSNorm, before each sublayer or after each sum; with or without a final one and one of the embedding
- biases in all linear layers, some, or none
- frozen blocks, LoRA adapters, rematerialization
ops/ has the parts: layers.py (linear layers, start values, adapters, norms), attention.py (kernels, and the plain
attention which they equal), token_positions.py, activations.py, and stacks.py (blocks are scanned).

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
Every module takes a PRNG key, which turns dropout on (training); None turns it off.
Parameters are float32; `dtype` is what products compute in, summed in float32 at least.
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
from jaxlm.ops.layers import add_adapters, linear, norm, residual_std, start
from jaxlm.ops.plain_attention import Attend, Mask
from jaxlm.ops.position_tables import fixed_positions, frequencies
from jaxlm.ops.stacks import is_unrolled, rematerialized, scan_blocks
from jaxlm.ops.token_positions import restarting, rotate
from jaxlm.parallel import BATCH, constrain

DROPOUTS = 3  # of a block: attention weights and output, and inside the feed-forward


class Places(NamedTuple):
    """What is known of positions. None: there are no pads, a row is one document, positions are 0 to T - 1."""

    is_pad_BT: Array | None = None
    segments_BT: Array | None = None  # the document that each position is of; one follows the other in a row
    positions_BT: Array | None = None  # where in its document each position is


class Embedding(nnx.Module):
    """Token table plus positions and types, norm, dropout. The row of `pad_id` starts at zero and gets no gradient."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # A tied table is also the output layer, whose start values are small (GPT-2 does the same). Where a norm takes
        # away its scale, a small one lets the same steps move it further (BERT does the same).
        is_small = config.tied_embedding or config.embedding_norm or config.initialization != "original"
        init = start(config, 0.02 if is_small else 1.0)
        self.token = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, rngs=rngs)
        if config.pad_id >= 0:
            self.token.embedding[...] = self.token.embedding[...].at[config.pad_id].set(0)
        if config.positions == "learned":
            self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.seq_len, config.d_model)))
        if config.segments:
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
        # Gathered over fsdp before the lookup: XLA would gather the result of the whole batch otherwise.
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
    """Self-attention of H queries to G keys and values (arXiv 2305.13245); `is_causal` also masks the future."""

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
        """Return [B, T, D]. Cached decoding and maps of attention give their own `attend`.

        `layer` is the number of the block, or that of another with the same window and rotary base.
        """
        (B, T, _), K = x_BTD.shape, self.config.head_size
        weights_key, output_key = dropout_keys
        q_BTHK, k_BTGK, v_BTGK = (f(x_BTD).reshape(B, T, -1, K) for f in (self.query, self.key, self.value))
        if self.config.qk_norm:
            wide = matmul.sum_dtype(self.dtype)  # a norm without parameters would compute in the type of its input
            q_BTHK, k_BTGK = self.query_norm(q_BTHK.astype(wide)), self.key_norm(k_BTGK.astype(wide))
        window = self.config.window_of(layer)
        if self.config.positions == "rotary":
            frequency_K = frequencies(self.config, window > 0)
            seq_len = 0 if places.positions_BT is None else self.config.seq_len
            q_BTHK, k_BTGK = (rotate(x, frequency_K, places.positions_BT, seq_len) for x in (q_BTHK, k_BTGK))
        q_BTHK, k_BTGK, v_BTGK = (x.astype(self.dtype) for x in (q_BTHK, k_BTGK, v_BTGK))
        mask = Mask(places.is_pad_BT, places.segments_BT, self.is_causal, window=window)
        attend = attend or functools.partial(attention.attend, config=self.config, dropout_key=weights_key)
        x_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, mask)
        return dropout(self.output(x_BTHK.reshape(B, T, -1)), self.config.dropout, output_key)


class FeedForward(nnx.Module):
    """D -> F, activation, dropout, F -> D; a gated one (arXiv 2002.05202) multiplies the activation by a second D -> F.

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
    """Attention and feed-forward, each on a residual; a norm before each, or with `post_norm` after each sum."""

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
        how = (places, layer, attention_keys, attend)
        if self.config.post_norm:
            x_BTD = self.layernorm1(x_BTD + self.attention(x_BTD, *how))
            return self.layernorm2(x_BTD + self.feed_forward(x_BTD, feed_forward_key))
        has_norm = self.config.first_norm or layer > 0
        x_BTD += self.attention(self.layernorm1(x_BTD) if has_norm else x_BTD, *how)
        return x_BTD + self.feed_forward(self.layernorm2(x_BTD), feed_forward_key)


class Transformer(nnx.Module):
    """Token ids [B, T] to hidden states float32 [B, T, D].

    `segments_BT` says which document of a row each token is of, and `types_BT` which of two texts (model.segments).

    The blocks are one Block whose parameters have a leading axis of n_layers, run by a scan (scan_blocks).
    """

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        self.blocks = jax.vmap(lambda rngs: Block(config, is_causal, dtype, rngs))(rngs.split(config.n_layers))
        if not config.first_norm:
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
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else restarting(segments_BT))
        embedding_key, dropout_keys = None, None
        if key is not None:  # at once: to split a key takes 64 operations, however many it gives
            all_keys = jax.random.split(key, 1 + DROPOUTS * self.config.n_layers)
            embedding_key, dropout_keys = all_keys[0], all_keys[1:].reshape(-1, DROPOUTS)
        x_BTD = self.embedding(tokens_BT, embedding_key, places.positions_BT, types_BT)

        def run_block(x_BTD: Array, of_block: tuple[Block, Array | None], layer: int) -> tuple[Array, None]:
            block, block_keys = of_block
            return constrain(block(x_BTD, places, layer, block_keys), BATCH), None

        run, n, L = rematerialized(self.config, run_block), self.config.frozen_layers, self.config.n_layers
        if n:  # in a scan of their own: one has the gradients of all its blocks
            frozen = (jax.lax.stop_gradient(self.blocks), dropout_keys)
            x_BTD, _ = scan_blocks(self.config, run, x_BTD, frozen, 0, n, is_unrolled(self.config))
        stacks = (self.blocks, dropout_keys)
        x_BTD, _ = scan_blocks(self.config, run, x_BTD, stacks, n, L, is_unrolled(self.config))
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
