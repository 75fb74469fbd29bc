"""Continue prompts a token at a time, with the keys and values of earlier tokens kept. Only jaxlm has it.

Letters as in model.py; S positions kept, C positions run at once. All rows of a batch are alike to what they would be
alone: each has its own length, its own end and its own random numbers.
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

CHUNK = 32  # positions of a prompt that go through the model at once


class Sampling(NamedTuple):
    """How each row's next token is chosen; arrays [B]."""

    temperature: Any  # what logits are divided by; 0: always the likeliest token
    top_k: Any  # of so many likeliest tokens; 0: of all
    top_p: Any  # of the fewest likeliest tokens whose probabilities sum to this
    seed: Any  # of the random numbers, which depend on it and the place of the token alone


class Rows(NamedTuple):
    """Prompts and what has become of them."""

    tokens_BS: Array  # the first `n` are made
    n_B: Array
    end_B: Array  # where `n` is to stop
    keys: tuple[Array, ...]  # of each layer, [B, G, S, K], up to position n - 2, rounded as products want them
    values: tuple[Array, ...]


class Parts(NamedTuple):
    """A causal model's parts, block by block: one cut out of the stacked blocks would be copied for each token."""

    embedding: Any
    blocks: tuple[Any, ...]
    final_norm: Any
    head: Any


class Decoder:
    """A causal model that continues prompts. Compiled once for each number of rows, whatever their lengths."""

    def __init__(self, model: LanguageModel, stop: int):
        """`stop` is the token that ends a row."""
        self.config, self.stop = model.base.config, stop
        self.dtype = model.base.blocks.attention.dtype
        blocks = tuple(block_of(self.config, model.base.blocks, i) for i in range(self.config.n_layers))
        final_norm = model.base.final_norm if self.config.final_norm else None
        # Flattened once: it takes longer than a token of a small model.
        self.leaves, self.structure = jax.tree.flatten(Parts(model.base.embedding, blocks, final_norm, model.head))
        self._fill = jax.jit(lambda leaves, rows: fill(self._parts(leaves), rows), donate_argnums=1)
        self._extend = jax.jit(lambda leaves, *args: extend(self._parts(leaves), stop, *args), donate_argnums=1)
        self._put = jax.jit(
            lambda rows, i, row: jax.tree.map(lambda x, new: x.at[i].set(new[0]), rows, row), donate_argnums=0
        )

    def begin(self, prompts: Sequence[Sequence[int]], most_new: int) -> Rows:
        """Return rows that hold prompts of 1 to seq_len tokens, each to get `most_new` tokens or as many as fit."""
        return self._fill(self.leaves, self._rows(prompts, most_new))

    def empty(self, n: int) -> Rows:
        """Return n rows that get no tokens, for others to be put in their place."""
        return self._rows([[self.stop]] * n, 0)

    def put(self, rows: Rows, i: int, row: Rows) -> Rows:
        """Return the rows with a new one, the only one of `row`, as the i-th; `rows` cannot be used any more."""
        return self._put(rows, np.int32(i), row)

    def extend(self, rows: Rows, sampling: Sampling, n: int) -> Rows:
        """Return the rows with `n` more tokens each, or fewer where a row ends; `rows` cannot be used any more."""
        kinds = (np.float32, np.int32, np.float32, np.uint32)
        with np.errstate(over="ignore"):  # an infinite temperature is none that differs from the largest
            sampling = Sampling(*(np.asarray(x, kind) for x, kind in zip(sampling, kinds, strict=True)))
        return self._extend(self.leaves, rows, sampling, np.int32(n))

    def _rows(self, prompts: Sequence[Sequence[int]], most_new: int) -> Rows:
        config = self.config
        n_B = np.array([len(prompt) for prompt in prompts])
        assert n_B.min() > 0 and n_B.max() <= config.seq_len, (n_B, config.seq_len)
        B, S = len(prompts), (config.seq_len // CHUNK + 1) * CHUNK
        tokens_BS = np.zeros((B, S), np.int32)
        for row, prompt in zip(tokens_BS, prompts, strict=True):
            row[: len(prompt)] = prompt
        # The last token is never run through the model, so that one more fits than it has positions.
        end_B = np.minimum(n_B + most_new, config.seq_len + 1)
        shape = (B, config.kv_heads, S, config.head_size)
        # A CPU converts bfloat16 to float32 for products with batch axes; done here, it is done once.
        dtype = matmul.sum_dtype(self.dtype) if platform() == "cpu" else self.dtype
        cache = [tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in range(2)]
        rows = Rows(jnp.asarray(tokens_BS), jnp.asarray(n_B, jnp.int32), jnp.asarray(end_B, jnp.int32), *cache)
        # On the device of the model, where `extend` returns them: elsewhere, `put` would compile anew.
        return jax.device_put(rows, self.leaves[0].sharding)

    def _parts(self, leaves: list[Array]) -> Parts:
        return jax.tree.unflatten(self.structure, leaves)


def fill(parts: Parts, rows: Rows) -> Rows:
    """Return the rows with the keys and values of all but the last token of each prompt."""

    def run_chunk(i: Array, rows: Rows) -> Rows:
        B = len(rows.n_B)
        tokens_BC = jax.lax.dynamic_slice(rows.tokens_BS, (0, i * CHUNK), (B, CHUNK))
        positions_BC = jnp.broadcast_to(i * CHUNK + jnp.arange(CHUNK), (B, CHUNK))
        return forward(parts, tokens_BC, positions_BC, rows)[1]

    # What a shorter prompt gets from behind its end is overwritten before it is looked at.
    return jax.lax.fori_loop(0, (jnp.max(rows.n_B) - 1 + CHUNK - 1) // CHUNK, run_chunk, rows)


def extend(parts: Parts, stop: int, rows: Rows, sampling: Sampling, n: Array) -> Rows:
    """Return the rows with up to `n` more tokens each, without a word to the host in between."""

    def is_going_on(state: tuple[Array, Rows]) -> Array:
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
        place_B = jnp.where(is_open_B, rows.n_B, rows.tokens_BS.shape[1])  # behind the end, where nothing is written
        tokens_BS = rows.tokens_BS.at[jnp.arange(len(place_B)), place_B].set(token_B, mode="drop")
        n_B = rows.n_B + is_open_B
        end_B = jnp.where(is_open_B & (token_B == stop), n_B, rows.end_B)
        return i + 1, rows._replace(tokens_BS=tokens_BS, n_B=n_B, end_B=end_B)

    return jax.lax.while_loop(is_going_on, add_token, (jnp.int32(0), rows))[1]


def forward(parts: Parts, tokens_BC: Array, positions_BC: Array, rows: Rows) -> tuple[Array, Rows]:
    """Return the hidden states [B, C, D] of tokens at some positions, and the rows with their keys and values.

    Transformer.__call__ for a part of the positions: those before are known by their keys and values alone.
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
    """Return the next token of each row [B], which is to stand at `place_B`."""

    def drawn() -> Array:
        scaled_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
        is_kept_BV = kept(scaled_BV, sampling.top_k, sampling.top_p)
        keys_B = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(sampling.seed, place_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        # Not matmul.argmax: XLA may compute the sum twice, rounded otherwise, and then nothing equals the largest.
        return jnp.argmax(jnp.where(is_kept_BV, scaled_BV + noise_BV, -jnp.inf), axis=-1).astype(jnp.int32)

    likeliest_B = matmul.argmax(logits_BV)
    some_B = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: likeliest_B)
    return jnp.where(sampling.temperature > 0, some_B, likeliest_B)


def kept(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    """Return which tokens can be drawn, [B, V]: of the k likeliest, the fewest whose probabilities sum to p.

    Tokens that are as likely as the last of them are kept, too. Source of top-p: arXiv 1904.09751, section 3.1.
    """
    p_BV = jax.nn.softmax(logits_BV)
    k_B = jnp.where(top_k_B > 0, top_k_B, p_BV.shape[1])
    p_BV *= p_BV >= _threshold(p_BV, lambda is_kept_BV: jnp.sum(is_kept_BV, axis=1) >= k_B)
    p_BV /= jnp.sum(p_BV, axis=1, keepdims=True)
    top_p_B = jnp.maximum(top_p_B, jnp.finfo(jnp.float32).tiny)  # of 0, to which it may be rounded, none is enough
    least_B1 = _threshold(p_BV, lambda is_kept_BV: jnp.sum(p_BV * is_kept_BV, axis=1) >= top_p_B)
    is_all_B1 = top_p_B[:, None] >= 1  # which a sum may be, by rounding, before the last of them
    return jnp.where(is_all_B1, p_BV > 0, p_BV >= least_B1)


def _threshold(p_BV: Array, is_enough: Callable[[Array], Array]) -> Array:
    """Return the largest number, [B, 1], for which what is not below it is enough; 0 if nothing is.

    Bit by bit, since numbers that are not negative are in the order of their bits: sorting V of them takes longer.
    """
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)

    def try_bit(i: Array, found_B: Array) -> Array:
        tried_B = found_B | jnp.left_shift(1, 30 - i)
        return jnp.where(is_enough(bits_BV >= tried_B[:, None]), tried_B, found_B)

    found_B = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(len(p_BV), jnp.int32))
    return jax.lax.bitcast_convert_type(found_B, jnp.float32)[:, None]


def _put(cache_BGSK: Array, new_BCGK: Array, positions_BC: Array) -> Array:
    rows_B1 = jnp.arange(len(positions_BC))[:, None]
    return cache_BGSK.at[rows_B1, :, positions_BC].set(new_BCGK.astype(cache_BGSK.dtype))
