"""Autoregressive decoding with a key-value cache. Only jaxlm has it.

Letters as in model.py; S cached positions, C positions of a chunk. Each row of a batch has its own length, end and
random numbers, so that its result does not depend on the other rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.heads import LanguageModel
from jaxlm.model import Places
from jaxlm.ops import matmul
from jaxlm.ops.plain_attention import Mask, attend
from jaxlm.ops.stacks import block_of
from jaxlm.parallel import platform

SHORT = 1024  # positions for which every row has room, where a model has as many
CHUNK = 32  # positions of a prompt per forward pass


class Sampling(NamedTuple):
    """How the next token of each row is sampled; arrays [B]."""

    temperature: Any  # divides the logits; 0: greedy
    top_k: Any  # sample from the k likeliest tokens; 0: from all
    top_p: Any  # sample from the fewest likeliest tokens whose probabilities sum to p
    seed: Any  # random numbers depend only on the seed and the position of the token


class Rows(NamedTuple):
    """The state of a batch: tokens, lengths and caches."""

    tokens_BS: Array  # valid up to n_B
    n_B: Array  # number of tokens
    end_B: Array  # number of tokens at which the row ends
    keys: tuple[Array, ...]  # of each layer, [B, G, S, K], up to position n - 2, in the type of matmuls
    values: tuple[Array, ...]


class Parts(NamedTuple):
    """The modules of a causal model, with unstacked blocks: slicing the stack would copy a block for each token."""

    embedding: Any
    blocks: tuple[Any, ...]
    final_norm: Any
    head: Any


class Decoder:
    """A causal model that continues prompts. Compiled once for each batch size and room; lengths do not matter."""

    def __init__(self, model: LanguageModel, stops: tuple[int, ...]):
        """`stops` are the ids of the tokens that end a row."""
        self.config, self.stops = model.base.config, stops
        self.dtype = model.base.blocks.attention.dtype
        blocks = tuple(block_of(self.config, model.base.blocks, i) for i in range(self.config.n_layers))
        final_norm = model.base.final_norm if self.config.final_norm else None
        # Flattened once, because flattening takes longer than one token of a small model.
        self.leaves, self.structure = jax.tree.flatten(Parts(model.base.embedding, blocks, final_norm, model.head))
        self._fill = jax.jit(lambda leaves, rows: fill(self._parts(leaves), rows), donate_argnums=1)
        self._extend = jax.jit(lambda leaves, *args: extend(self._parts(leaves), stops, *args), donate_argnums=1)
        self._put = jax.jit(
            lambda rows, i, row: jax.tree.map(lambda x, new: x.at[i].set(new[0]), rows, row), donate_argnums=0
        )

    def begin(self, prompts: Sequence[Sequence[int]], most_new: int, room: int = 0) -> Rows:
        """Return rows with prompts of 1 to seq_len tokens, each to be continued by at most `most_new` tokens.

        `room`: positions of each row, as `room` returns them; 0: all of the model.
        """
        return self._fill(self.leaves, self._rows(prompts, most_new, room))

    def empty(self, n: int, room: int = 0) -> Rows:
        """Return n finished rows, to be replaced by `put` with rows of the same room."""
        return self._rows([[self.stops[0]]] * n, 0, room)

    def room(self, n: int, short: int = SHORT) -> int:
        """Return the positions of rows for n tokens: those of the model, halved while more than `short` and n suffice.

        So there are few shapes to compile.
        """
        length = self.config.seq_len
        while length > short and length >= 2 * n:
            length //= 2
        return length

    def put(self, rows: Rows, i: int, row: Rows) -> Rows:
        """Return the rows with the i-th replaced by the only row of `row`; `rows` is donated."""
        return self._put(rows, np.int32(i), row)

    def extend(self, rows: Rows, sampling: Sampling, n: int) -> Rows:
        """Return the rows with `n` more tokens each, or fewer if a row ends; `rows` is donated."""
        kinds = (np.float32, np.int32, np.float32, np.uint32)
        with np.errstate(over="ignore"):  # temperatures above the range of float32 become infinite
            sampling = Sampling(*(np.asarray(x, kind) for x, kind in zip(sampling, kinds, strict=True)))
        return self._extend(self.leaves, rows, sampling, np.int32(n))

    def _rows(self, prompts: Sequence[Sequence[int]], most_new: int, room: int) -> Rows:
        config = self.config
        n_B = np.array([len(prompt) for prompt in prompts])
        assert n_B.min() > 0 and n_B.max() <= config.seq_len, (n_B, config.seq_len)
        B, S = len(prompts), ((room or config.seq_len) // CHUNK + 1) * CHUNK
        tokens_BS = np.zeros((B, S), np.int32)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt)] = prompt
        # The last token needs no forward pass, so a row can have one token more than the model has positions.
        end_B = np.minimum(n_B + most_new, config.seq_len + 1)
        shape = (B, config.kv_heads, S, config.head_size)
        # A CPU converts bfloat16 to float32 in matmuls with batch axes; this converts the cache only once.
        dtype = matmul.sum_dtype(self.dtype) if platform() == "cpu" else self.dtype
        cache = [tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in range(2)]
        rows = Rows(jnp.asarray(tokens_BS), jnp.asarray(n_B, jnp.int32), jnp.asarray(end_B, jnp.int32), *cache)
        # On the device of the model, like the result of `extend`; otherwise `put` would be recompiled.
        return jax.device_put(rows, self.leaves[0].sharding)

    def _parts(self, leaves: list[Array]) -> Parts:
        return jax.tree.unflatten(self.structure, leaves)


def fill(parts: Parts, rows: Rows) -> Rows:
    """Return the rows with keys and values of the prompts cached, except those of their last tokens."""

    def run_chunk(i: Array, rows: Rows) -> Rows:
        B = len(rows.n_B)
        tokens_BC = jax.lax.dynamic_slice(rows.tokens_BS, (0, i * CHUNK), (B, CHUNK))
        positions_BC = jnp.broadcast_to(i * CHUNK + jnp.arange(CHUNK), (B, CHUNK))
        return forward(parts, tokens_BC, positions_BC, rows)[1]

    # Entries behind the end of a shorter prompt are overwritten before they are read.
    return jax.lax.fori_loop(0, (jnp.max(rows.n_B) - 1 + CHUNK - 1) // CHUNK, run_chunk, rows)


def extend(parts: Parts, stops: tuple[int, ...], rows: Rows, sampling: Sampling, n: Array) -> Rows:
    """Return the rows with up to `n` more tokens each, in one loop on the device."""

    def is_unfinished(state: tuple[Array, Rows]) -> Array:
        i, rows = state
        return (i < n) & jnp.any(rows.n_B < rows.end_B)

    def add_token(state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        i, rows = state
        position_B1 = rows.n_B[:, None] - 1
        token_B1 = jnp.take_along_axis(rows.tokens_BS, position_B1, axis=1)
        x_B1D, rows = forward(parts, token_B1, position_B1, rows)
        logits_BV = parts.head(x_B1D, parts.embedding.token.embedding[...])[:, 0]
        token_B = sample(logits_BV, sampling, rows.n_B)
        is_open_B = rows.n_B < rows.end_B
        place_B = jnp.where(is_open_B, rows.n_B, rows.tokens_BS.shape[1])  # out of bounds, so dropped, for ended rows
        tokens_BS = rows.tokens_BS.at[jnp.arange(len(place_B)), place_B].set(token_B, mode="drop")
        n_B = rows.n_B + is_open_B
        end_B = jnp.where(is_open_B & jnp.isin(token_B, jnp.array(stops)), n_B, rows.end_B)
        return i + 1, rows._replace(tokens_BS=tokens_BS, n_B=n_B, end_B=end_B)

    return jax.lax.while_loop(is_unfinished, add_token, (jnp.int32(0), rows))[1]


def forward(parts: Parts, tokens_BC: Array, positions_BC: Array, rows: Rows) -> tuple[Array, Rows]:
    """Return the hidden states [B, C, D] of tokens at some positions, and the rows with updated caches.

    Like Transformer.__call__, but earlier positions are read from the caches.
    """
    pad_id = parts.embedding.config.pad_id
    x_BCD = parts.embedding(tokens_BC, None, positions_BC)
    is_pad_BS = rows.tokens_BS == pad_id if pad_id >= 0 else None
    keys, values = list(rows.keys), list(rows.values)

    def attend_to(q_BCHK: Array, k_BCGK: Array, v_BCGK: Array, mask: Mask, i: int) -> Array:
        keys[i] = _put(keys[i], k_BCGK, positions_BC)
        values[i] = _put(values[i], v_BCGK, positions_BC)
        mask = mask._replace(is_pad_BS=is_pad_BS, queries_BT=positions_BC)
        return attend(q_BCHK, keys[i], values[i], mask, axes="BHSK")

    for i, block in enumerate(parts.blocks):
        x_BCD = block(x_BCD, Places(positions_BT=positions_BC), i, None, functools.partial(attend_to, i=i))
    if parts.final_norm is not None:
        x_BCD = parts.final_norm(x_BCD)
    return x_BCD, rows._replace(keys=tuple(keys), values=tuple(values))


def sample(logits_BV: Array, sampling: Sampling, place_B: Array) -> Array:
    """Return the next token of each row [B], for the positions `place_B`."""

    def drawn() -> Array:
        scaled_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        is_kept_BV = kept(scaled_BV, sampling.top_k, sampling.top_p)
        keys_B = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(sampling.seed, place_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        # Not matmul.argmax: XLA may compute the sum twice with different rounding, so no value equals the maximum.
        return jnp.argmax(jnp.where(is_kept_BV, scaled_BV + noise_BV, -jnp.inf), axis=-1).astype(jnp.int32)

    likeliest_B = matmul.argmax(logits_BV)
    some_B = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: likeliest_B)
    return jnp.where(sampling.temperature > 0, some_B, likeliest_B)


def kept(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    """Return a mask [B, V] of the tokens to sample from: of the k likeliest, the fewest whose probabilities sum to p.

    Ties with the last one are kept, too. Source of top-p: arXiv 1904.09751, section 3.1.
    """
    p_BV = jax.nn.softmax(logits_BV)
    k_B = jnp.where(top_k_B > 0, top_k_B, p_BV.shape[1])
    p_BV *= p_BV >= _threshold(p_BV, lambda is_kept_BV: jnp.sum(is_kept_BV, axis=1) >= k_B)
    p_BV /= jnp.sum(p_BV, axis=1, keepdims=True)
    top_p_B = jnp.maximum(top_p_B, jnp.finfo(jnp.float32).tiny)  # small values may be rounded to 0
    least_B1 = _threshold(p_BV, lambda is_kept_BV: jnp.sum(p_BV * is_kept_BV, axis=1) >= top_p_B)
    is_all_B1 = top_p_B[:, None] >= 1  # a rounded sum may reach 1 before the last token
    return jnp.where(is_all_B1, p_BV > 0, p_BV >= least_B1)


def _threshold(p_BV: Array, is_enough: Callable[[Array], Array]) -> Array:
    """Return the largest threshold [B, 1] such that the values not below it are enough; 0 if there is none.

    Found bit by bit, because non-negative floats are ordered like their bits. This is faster than sorting V values.
    """
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)

    def try_bit(i: Array, bits_B: Array) -> Array:
        tried_B = bits_B | jnp.left_shift(1, 30 - i)
        return jnp.where(is_enough(bits_BV >= tried_B[:, None]), tried_B, bits_B)

    bits_B = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(len(p_BV), jnp.int32))
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]


def _put(cache_BGSK: Array, new_BCGK: Array, positions_BC: Array) -> Array:
    rows_B1 = jnp.arange(len(positions_BC))[:, None]
    return cache_BGSK.at[rows_B1, :, positions_BC].set(new_BCGK.astype(cache_BGSK.dtype))
