"""The transformer of the original design, in build order: Embedding, Attention, FeedForward, Block, Transformer.

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
Every module takes `key`: a PRNG key turns dropout on (training), None turns it off.
Parameters are float32; `dtype` is what products compute in, summed in float32 at least.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import GATED, ModelConfig
from jaxlm.ops import flash_attention, local_attention, matmul
from jaxlm.ops.dropout import dropout
from jaxlm.parallel import BATCH, constrain, is_one_cpu, is_one_device, platform
from jaxlm.params.names import lora_products

DROPOUTS = 3  # of a block: attention weights and output, and inside the feed-forward
REMAT = {  # what is kept of a block for its gradients
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Places(NamedTuple):
    """What is known of positions. None: there are no pads, a row is one document, positions are 0 to T - 1."""

    is_pad_BT: Array | None = None
    segments_BT: Array | None = None  # the document that each position is of; one follows the other in a row
    positions_BT: Array | None = None  # where in its document each position is


class Mask(NamedTuple):
    """What hides keys from queries. None: nothing of the kind does."""

    is_pad_BS: Array | None = None  # the keys that are pads
    segments_BT: Array | None = None  # of keys and queries: those of other documents are hidden
    is_causal: bool = False  # keys behind a query are hidden
    queries_BT: Array | None = None  # where the queries are among the keys; None: they are 0 to T - 1
    window: int = 0  # keys that are farther away from a query are hidden; 0: none


Attend = Callable[[Array, Array, Array, Mask], Array]  # queries, keys, values [B, T, H, K] -> what each position takes


class Linear(nnx.Linear):
    """nnx.Linear on [..., n_in], with the derivatives of matmul.py; its kernel may have an adapter (add_adapters)."""

    lora_scale = 0.0  # of the adapter; 0: there is none
    lora_a: nnx.Param
    lora_b: nnx.Param

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        is_rounded = self.preferred_element_type == self.dtype
        bias = None if self.bias is None else self.bias[...]
        y = matmul.linear(x, self.kernel[...], bias, self.dtype, is_rounded=is_rounded)
        if self.lora_scale:
            x_R = matmul.linear(x, self.lora_a[...], None, self.dtype)
            y += self.lora_scale * matmul.linear(x_R, self.lora_b[...], None, self.dtype)
        return checkpoint_name(y.astype(self.preferred_element_type), "product")


def start(config: ModelConfig, std: float = 0.02) -> nnx.Initializer:
    """Return start values of a matrix: normal(0, std), without its ends for ModernBERT (arXiv 2412.13663, app. A.2)."""
    if config.initialization == "modernbert":
        return jax.nn.initializers.truncated_normal(std, lower=-2, upper=2)
    return jax.nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Return the std of start values where 2 L sublayers add to the stream: less, so that the sum's does not grow."""
    return 0.02 if config.initialization == "llama" else 0.02 / (2 * config.n_layers) ** 0.5


def linear(
    config: ModelConfig,
    n_in: int,
    n_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    has_bias: bool = True,
    std: float = 0.02,
) -> Linear:
    """Return a linear layer of a block.

    The original starts with Xavier-uniform weights and PyTorch's default bias; others with `start` and zero.
    """
    bound = n_in**-0.5 if config.initialization == "original" else 0.0
    xavier = jax.nn.initializers.xavier_uniform()
    return Linear(
        n_in,
        n_out,
        use_bias=has_bias,
        kernel_init=xavier if config.initialization == "original" else start(config, std),
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        dtype=dtype,
        preferred_element_type=dtype,
        rngs=rngs,
    )


def add_adapters(blocks: "Block", config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Let kernels W of stacked blocks be W + alpha / rank A B, where B is zero at first (LoRA, arXiv 2106.09685)."""
    for name in lora_products(config):
        layer = getattr(blocks.attention if hasattr(blocks.attention, name) else blocks.feed_forward, name)
        L, n_in, n_out = layer.kernel.shape
        bound = n_in**-0.5
        lora_a = jax.random.uniform(rngs.params(), (L, n_in, config.lora_rank), minval=-bound, maxval=bound)
        layer.lora_a, layer.lora_b = nnx.Param(lora_a), nnx.Param(jnp.zeros((L, config.lora_rank, n_out)))
        layer.lora_scale = config.lora_alpha / config.lora_rank


def norm(config: ModelConfig, rngs: nnx.Rngs, size: int = 0) -> nnx.LayerNorm | nnx.RMSNorm:
    """Return LayerNorm or RMSNorm (arXiv 1910.07467) of `size` or d_model numbers, in float32."""
    size, epsilon = size or config.d_model, config.norm_epsilon
    if config.norm in ("rmsnorm", "rmsnorm_no_scale"):
        return nnx.RMSNorm(size, epsilon=epsilon, use_scale=config.norm == "rmsnorm", rngs=rngs)
    has_bias = config.norm == "layernorm"
    return nnx.LayerNorm(size, epsilon=epsilon, use_bias=has_bias, use_fast_variance=False, rngs=rngs)


def gelu(x: Array, kind: str) -> Array:
    """Return x times the share of a normal distribution below x, exactly or by tanh. Source: arXiv 1606.08415.

    By erf, as PyTorch does it: jax.nn.gelu takes erfc, which is three times as slow on a CPU.
    """
    return jax.nn.gelu(x, approximate=True) if kind == "tanh" else matmul.elementwise(_gelu, x)


def _gelu(x: Array) -> Array:
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def activation(x: Array, mlp: str, kind: str) -> Array:
    """Return the nonlinearity of a feed-forward: GELU of a `kind`, SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return matmul.elementwise(jax.nn.silu, x)
    return matmul.elementwise(_relu2, x) if mlp == "relu2" else gelu(x, kind)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


def fixed_positions(seq_len: int, d_model: int) -> np.ndarray:
    """Return the original's position table, float32 [T, D].

    The exponent uses the column number itself, so it runs twice as fast as in "Attention Is All You Need" (3.5).
    """
    column = np.arange(d_model)
    angle_TD = np.arange(seq_len)[:, None] / 10000.0 ** (2 * column / d_model)
    return np.where(column % 2 == 0, np.sin(angle_TD), np.cos(angle_TD)).astype(np.float32)


def frequencies(config: ModelConfig, is_local: bool) -> np.ndarray:
    """Return by how much each pair of a head turns from one position to the next, base^(-2k/K), [K/2].

    With `rotary_scaling`, pairs that turn less than once in `rotary_scaling_len` positions turn so much slower, those
    that turn 4 times or more as before, and those between in proportion (Llama 3.1's rope_scaling).
    """
    K, base = config.head_size, is_local and config.rotary_base_local or config.rotary_base
    frequency_K = base ** (-np.arange(0, K, 2) / K)
    if config.rotary_scaling == 1:
        return frequency_K
    n_turns_K = config.rotary_scaling_len * frequency_K / (2 * np.pi)
    share_K = np.clip((n_turns_K - 1) / (4 - 1), 0, 1)
    return frequency_K * (share_K + (1 - share_K) / config.rotary_scaling)


def rotate(x_BTHK: Array, frequency_K: np.ndarray, positions_BT: Array | None = None, seq_len: int = 0) -> Array:
    """Turn each pair (k, k + K/2) by position * frequency. Source: RoFormer, arXiv 2104.09864, eq. 34.

    Positions are 0 to T - 1, or `positions_BT`, each below `seq_len`.
    """
    T = x_BTHK.shape[1]
    angle_TK = np.arange(seq_len or T)[:, None] * frequency_K
    cos, sin = (f(angle_TK).astype(np.float32)[None, :, None, :] for f in (np.cos, np.sin))
    if positions_BT is not None:
        cos, sin = (jnp.asarray(x[0])[positions_BT] for x in (cos, sin))  # type: ignore[assignment]
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def future(T: int) -> np.ndarray:
    """Return which positions are after each, [1, T, T]."""
    return np.triu(np.ones((T, T), bool), k=1)[None]


def restarting(segments_BT: Array) -> Array:
    """Return where in its document each position is, [B, T]."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    is_first_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_BT - jax.lax.cummax(jnp.where(is_first_BT, index_BT, 0), axis=1)


def hidden(mask: Mask, T: int, S: int) -> Any:
    """Return which of S keys are hidden from each of T queries for another reason than being pads, [B or 1, T, S]."""
    is_hidden_BTS: Any = None
    if mask.is_causal:
        queries_BT = mask.queries_BT
        is_hidden_BTS = future(T) if queries_BT is None else jnp.arange(S)[None, None] > queries_BT[:, :, None]
    if mask.segments_BT is not None:
        is_other_BTS = mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :]
        is_hidden_BTS = is_other_BTS if is_hidden_BTS is None else is_hidden_BTS | is_other_BTS
    if mask.window:
        places_BT: Any = np.arange(T)[None] if mask.queries_BT is None else mask.queries_BT
        is_far_BTS = abs(np.arange(S)[None, None] - places_BT[:, :, None]) > mask.window
        is_hidden_BTS = is_far_BTS if is_hidden_BTS is None else is_hidden_BTS | is_far_BTS
    return is_hidden_BTS


def attend(
    q_BTHK: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array] = lambda weights_BHTS: weights_BHTS,
    axes: str = "BSHK",
) -> Array:
    """Return what each of T positions takes from S values, [B, T, H, K]: the plain attention, which all others equal.

    Keys and values have the given axes, and H or fewer heads: key head g is of the H / G queries from g H / G on.
    `drop` gets the weights [B, H, T, S], and may change them.
    """
    H, head_axis = q_BTHK.shape[2], axes.index("H")
    if H != k.shape[head_axis]:
        k, v = (jnp.repeat(x, H // x.shape[head_axis], head_axis) for x in (k, v))

    def multiply(subscripts: str, a: Array, b: Array) -> Array:
        return matmul.einsum(subscripts, a.astype(q_BTHK.dtype), b, b.dtype)

    scores_BHTS = multiply(f"BTHK,{axes}->BHTS", q_BTHK, k) / q_BTHK.shape[-1] ** 0.5
    # Pads mask keys only: a query at a pad position still attends, and a row of pads stays finite.
    if mask.is_pad_BS is not None:
        scores_BHTS = jnp.where(mask.is_pad_BS[:, None, None, :], -1e9, scores_BHTS)
    is_hidden_BTS = hidden(mask, *scores_BHTS.shape[2:])
    if is_hidden_BTS is not None:
        scores_BHTS = jnp.where(is_hidden_BTS[:, None], -jnp.inf, scores_BHTS)
    return multiply(f"BHTS,{axes}->BTHK", drop(jax.nn.softmax(scores_BHTS)), v)


class Embedding(nnx.Module):
    """Token table plus positions, norm, dropout. The row of `pad_id` starts at zero and gets no gradient."""

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
        if config.embedding_norm:
            self.layernorm = norm(config, rngs)

    @jax.named_scope("embedding")
    def __call__(self, tokens_BT: Array, key: Array | None, positions_BT: Array | None = None) -> Array:
        """Return [B, T, D]; positions are 0 to T - 1, or `positions_BT`."""
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
        if self.config.embedding_norm:
            x_BTD = self.layernorm(x_BTD)
        return constrain(dropout(x_BTD, self.config.dropout, key), BATCH)


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
        keys: Sequence[Array | None],
        attend_to: Attend | None = None,
        layer: int = 0,
    ) -> Array:
        """Return [B, T, D]. Cached decoding and maps of attention give their own `attend_to`.

        `layer` is the number of the block, or that of another with the same window and rotary base.
        """
        (B, T, _), K = x_BTD.shape, self.config.head_size
        weights_key, output_key = keys
        q_BTHK, k_BTGK, v_BTGK = (f(x_BTD).reshape(B, T, -1, K) for f in (self.query, self.key, self.value))
        if self.config.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        window = self.config.window_of(layer)
        if self.config.positions == "rotary":
            seq_len, frequency_K = self.config.seq_len, frequencies(self.config, window > 0)
            seq_len = 0 if places.positions_BT is None else seq_len
            q_BTHK, k_BTGK = (rotate(x, frequency_K, places.positions_BT, seq_len) for x in (q_BTHK, k_BTGK))
        q_BTHK, k_BTGK, v_BTGK = (x.astype(self.dtype) for x in (q_BTHK, k_BTGK, v_BTGK))
        mask = Mask(places.is_pad_BT, places.segments_BT, self.is_causal, window=window)
        if attend_to is not None:
            x_BTHK = attend_to(q_BTHK, k_BTGK, v_BTGK, mask)
        elif not flash_attention.hindrance(
            self.config, self.dtype, T, mask.segments_BT is not None, window, mask.is_causal
        ):
            x_BTHK = flash_attention.attend(q_BTHK, k_BTGK, v_BTGK, mask)
        elif local_attention.fits(mask, T) and (weights_key is None or self.config.dropout == 0):
            x_BTHK = local_attention.attend(q_BTHK, k_BTGK, v_BTGK, mask)
        else:
            x_BTHK = attend(
                *(q_BTHK, k_BTGK, v_BTGK, mask),
                lambda weights_BHTT: dropout(weights_BHTT, self.config.dropout, weights_key),
            )
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
    def __call__(self, x_BTD: Array, key: Array | None) -> Array:
        x_BTF = activation(self.fc1(x_BTD), self.config.mlp, self.config.gelu)
        if self.config.mlp in GATED:
            x_BTF = x_BTF * self.up(x_BTD)
        return self.fc2(dropout(x_BTF, self.config.dropout, key))


class Block(nnx.Module):
    """Attention and feed-forward, each on a residual; a norm before each, or with `post_norm` after each sum."""

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.layernorm1 = norm(config, rngs)
        self.attention = Attention(config, is_causal, dtype, rngs)
        self.layernorm2 = norm(config, rngs)
        self.feed_forward = FeedForward(config, dtype, rngs)

    def __call__(
        self,
        x_BTD: Array,
        places: Places,
        keys: Array | None,
        attend_to: Attend | None = None,
        layer: int = 0,
    ) -> Array:
        *attention_keys, feed_forward_key = [None] * DROPOUTS if keys is None else keys
        how = (places, attention_keys, attend_to, layer)
        if self.config.post_norm:
            x_BTD = self.layernorm1(x_BTD + self.attention(x_BTD, *how))
            return self.layernorm2(x_BTD + self.feed_forward(x_BTD, feed_forward_key))
        has_norm = self.config.first_norm or layer > 0
        x_BTD += self.attention(self.layernorm1(x_BTD) if has_norm else x_BTD, *how)
        return x_BTD + self.feed_forward(self.layernorm2(x_BTD), feed_forward_key)


def blocks_of(config: ModelConfig, stacks: Any, first: int, last: int) -> Any:
    """Return the blocks from `first` to before `last`, of stacks of the parameters of all blocks.

    Without `first_norm`, block 0 has no layernorm1: that stack begins with block 1, and `first` is at least 1.
    """

    def cut(x: Array) -> Array:
        n_missing = config.n_layers - len(x)
        return x[first - n_missing : last - n_missing]

    return stacks if (first, last) == (0, config.n_layers) else jax.tree.map(cut, stacks)


def block_of(config: ModelConfig, stacks: Any, i: int) -> Any:
    """Return one block of such stacks; block 0 gets that of block 1 where it has none, and does not use it."""
    return jax.tree.map(lambda x: x[max(i - config.n_layers + len(x), 0)], stacks)


def scan_blocks(
    config: ModelConfig,
    run_block: Callable[[Array, Any, int], tuple[Array, Any]],
    x: Array,
    stacks: Any,
    first: int,
    last: int,
    is_unrolled: bool = False,
) -> tuple[Array, Any]:
    """Run the blocks from `first` to before `last`; return x, and stacks of what `run_block` returns second.

    The scan is over groups of so many blocks that all groups are alike; those before the first group run one by one.
    """
    n = config.period
    n_groups = (last - max(first, int(not config.first_norm))) // n
    first_grouped = last - n_groups * n
    apart = []
    for i in range(first, first_grouped):
        x, out = run_block(x, block_of(config, stacks, i), i)
        apart.append(out)

    def run_group(x: Array, group: Any) -> tuple[Array, Any]:
        if n == 1:
            return run_block(x, group, first_grouped)
        outs = []
        for i in range(n):
            x, out = run_block(x, jax.tree.map(lambda y, i=i: y[i], group), first_grouped + i)
            outs.append(out)
        return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outs)

    grouped = blocks_of(config, stacks, first_grouped, last)
    if n > 1:
        grouped = jax.tree.map(lambda y: y.reshape(-1, n, *y.shape[1:]), grouped)
    x, outs = jax.lax.scan(run_group, x, grouped, unroll=max(1, n_groups) if is_unrolled else 1)
    if n > 1:
        outs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outs)
    return x, jax.tree.map(lambda y, *ys: jnp.concatenate([jnp.stack(ys), y]) if ys else y, outs, *apart)


class Transformer(nnx.Module):
    """Token ids [B, T] to hidden states float32 [B, T, D]; `segments_BT` says which document of a row each token is of.

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

    def __call__(self, tokens_BT: Array, key: Array | None = None, segments_BT: Array | None = None) -> Array:
        is_pad_BT = tokens_BT == self.config.pad_id if self.config.pad_id >= 0 else None
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else restarting(segments_BT))
        embedding_key, keys = None, None
        if key is not None:  # at once: to split a key takes 64 operations, however many it gives
            all_keys = jax.random.split(key, 1 + DROPOUTS * self.config.n_layers)
            embedding_key, keys = all_keys[0], all_keys[1:].reshape(-1, DROPOUTS)
        x_BTD = self.embedding(tokens_BT, embedding_key, places.positions_BT)

        def run_block(x_BTD: Array, block_and_keys: tuple[Block, Array | None], layer: int) -> tuple[Array, None]:
            block, block_keys = block_and_keys
            return constrain(block(x_BTD, places, block_keys, layer=layer), BATCH), None

        if self.config.remat != "none":
            policy = REMAT[self.config.remat]
            run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=False, static_argnums=2)
        stacks, n, L = (self.blocks, keys), self.config.frozen_layers, self.config.n_layers
        # Where one block is compiled, what all keep for their gradients is copied to stacks: a tenth of a step on a
        # CPU, a fifth on a GPU.
        is_unrolled = is_one_cpu() or (is_one_device() and platform() == "gpu" and self.config.remat == "none")
        if n:  # in a scan of their own: one has the gradients of all its blocks
            frozen = (jax.lax.stop_gradient(self.blocks), keys)
            x_BTD, _ = scan_blocks(self.config, run_block, x_BTD, frozen, 0, n, is_unrolled)
        x_BTD, _ = scan_blocks(self.config, run_block, x_BTD, stacks, n, L, is_unrolled)
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
