"""The transformer of the original design, in build order: Embedding, Attention, FeedForward, Block, Transformer.

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
The mode of a module turns dropout on (`train()`) or off (`eval()`).
Parameters are float32; products compute in bfloat16 inside `torch.autocast`, which the models of heads.py open.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from jaxlm.config import GATED, ModelConfig
from jaxlm.params.names import is_trained, lora_products

REMAT: dict[str, list[Any]] = {  # what is kept of a block for its gradients
    "dots": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    "full": [],
}


class Places(NamedTuple):
    """What is known of positions. None: there are no pads, a row is one document, positions are 0 to T - 1."""

    is_pad_BT: Tensor | None = None
    segments_BT: Tensor | None = None  # the document that each position is of; one follows the other in a row
    positions_BT: Tensor | None = None  # where in its document each position is


class Mask(NamedTuple):
    """What hides keys from queries. None: nothing of the kind does."""

    is_pad_BS: Tensor | None = None  # the keys that are pads
    segments_BT: Tensor | None = None  # of keys and queries: those of other documents are hidden
    is_causal: bool = False  # keys behind a query are hidden
    window: int = 0  # keys that are farther away from a query are hidden; 0: none


class Linear(nn.Linear):
    """nn.Linear on [..., n_in]; its weight may have an adapter (add_adapters)."""

    lora_scale = 0.0  # of the adapter; 0: there is none
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_scale:
            lora_a, lora_b = self.lora_a, self.lora_b
            y = y + self.lora_scale * nn.functional.linear(nn.functional.linear(x, lora_a), lora_b)
        return y


def start(x: Tensor, config: ModelConfig, rngs: torch.Generator, std: float = 0.02) -> None:
    """Fill a matrix with start values: normal(0, std), without its ends for ModernBERT (arXiv 2412.13663, app. A.2)."""
    if config.initialization == "modernbert":
        nn.init.trunc_normal_(x, std=std, a=-2 * std, b=2 * std, generator=rngs)
    else:
        nn.init.normal_(x, std=std, generator=rngs)


def residual_std(config: ModelConfig) -> float:
    """Return the std of start values where 2 L sublayers add to the stream: less, so that the sum's does not grow."""
    return 0.02 if config.initialization == "llama" else 0.02 / (2 * config.n_layers) ** 0.5


def linear(
    config: ModelConfig, n_in: int, n_out: int, rngs: torch.Generator, has_bias: bool = True, std: float = 0.02
) -> Linear:
    """Return a linear layer of a block.

    The original starts with Xavier-uniform weights and PyTorch's default bias; others with `start` and zero.
    """
    bound = n_in**-0.5 if config.initialization == "original" else 0.0
    layer: Linear = nn.utils.skip_init(Linear, n_in, n_out, bias=has_bias)
    if config.initialization == "original":
        nn.init.xavier_uniform_(layer.weight, generator=rngs)
    else:
        start(layer.weight, config, rngs, std)
    if has_bias:
        nn.init.uniform_(layer.bias, -bound, bound, generator=rngs)
    return layer


def add_adapters(blocks: nn.ModuleList, config: ModelConfig, rngs: torch.Generator) -> None:
    """Let weights W of blocks be W + alpha / rank B A, where B is zero at first (LoRA, arXiv 2106.09685)."""
    for block in blocks:
        for name in lora_products(config):
            layer = getattr(block.attention if hasattr(block.attention, name) else block.feed_forward, name)
            lora_a, bound = torch.empty(config.lora_rank, layer.in_features), layer.in_features**-0.5
            layer.lora_a = nn.Parameter(nn.init.uniform_(lora_a, -bound, bound, generator=rngs))
            layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, config.lora_rank))
            layer.lora_scale = config.lora_alpha / config.lora_rank


def norm(config: ModelConfig, size: int = 0) -> nn.LayerNorm | nn.RMSNorm:
    """Return LayerNorm or RMSNorm (arXiv 1910.07467) of `size` or d_model numbers, in float32."""
    size, epsilon = size or config.d_model, config.norm_epsilon
    if config.norm in ("rmsnorm", "rmsnorm_no_scale"):
        return nn.RMSNorm(size, eps=epsilon, elementwise_affine=config.norm == "rmsnorm")
    return nn.LayerNorm(size, eps=epsilon, bias=config.norm == "layernorm")


def dropout(x: Tensor, rate: float, is_training: bool) -> Tensor:
    """Zero a share `rate` of the elements and scale up the rest; outside training, return `x`."""
    return nn.functional.dropout(x, rate, is_training)


def gelu(x: Tensor, kind: str) -> Tensor:
    """Return x times the share of a normal distribution below x, exactly or by tanh. Source: arXiv 1606.08415."""
    return nn.functional.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def activation(x: Tensor, mlp: str, kind: str) -> Tensor:
    """Return the nonlinearity of a feed-forward: GELU of a `kind`, SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return nn.functional.silu(x)
    return nn.functional.relu(x).square() if mlp == "relu2" else gelu(x, kind)


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


def rotate(x_BTHK: Tensor, frequency_K: np.ndarray, positions_BT: Tensor | None = None) -> Tensor:
    """Turn each pair (k, k + K/2) by position * frequency. Source: RoFormer, arXiv 2104.09864, eq. 34.

    Positions are 0 to T - 1, or `positions_BT`.
    """
    angle_TK = np.arange(x_BTHK.shape[1])[:, None] * frequency_K
    cos, sin = (torch.tensor(f(angle_TK)[None, :, None, :], dtype=torch.float32) for f in (np.cos, np.sin))
    cos, sin = cos.to(x_BTHK.device), sin.to(x_BTHK.device)
    if positions_BT is not None:
        cos, sin = cos[0][positions_BT], sin[0][positions_BT]
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def future(T: int, device: torch.device) -> Tensor:
    """Return which positions are after each, [1, T, T]."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(diagonal=1)[None]


def restarting(segments_BT: Tensor) -> Tensor:
    """Return where in its document each position is, [B, T]."""
    index_BT = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand(segments_BT.shape)
    is_first_BT = segments_BT != nn.functional.pad(segments_BT, (1, 0), value=-1)[:, :-1]
    return index_BT - torch.where(is_first_BT, index_BT, 0).cummax(dim=1).values


def hidden(mask: Mask, T: int, device: torch.device) -> Tensor | None:
    """Return which keys are hidden from each of T queries for another reason than being pads, [B or 1, T, T]."""
    is_hidden_BTS = None
    if mask.is_causal:
        is_hidden_BTS = future(T, device)
    if mask.segments_BT is not None:
        is_other_BTS = mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :]
        is_hidden_BTS = is_other_BTS if is_hidden_BTS is None else is_hidden_BTS | is_other_BTS
    if mask.window:
        queries_BT = torch.arange(T, device=device)[None]
        is_far_BTS = abs(queries_BT[:, None, :] - queries_BT[:, :, None]) > mask.window
        is_hidden_BTS = is_far_BTS if is_hidden_BTS is None else is_hidden_BTS | is_far_BTS
    return is_hidden_BTS


def attend(
    q_BTHK: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    drop: Callable[[Tensor], Tensor] = lambda weights_BHTS: weights_BHTS,
) -> Tensor:
    """Return what each of T positions takes from S values, [B, T, H, K].

    Keys and values are [B, S, H, K], or of fewer heads: key head g is of the H / G queries from g H / G on. `drop` gets
    the weights [B, H, T, S], and may change them.
    """
    H = q_BTHK.shape[2]
    if H != k.shape[2]:
        k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))

    def multiply(subscripts: str, a: Tensor, b: Tensor) -> Tensor:
        product = torch.einsum(subscripts, a, b)
        return product.to(torch.promote_types(product.dtype, torch.float32))

    scores_BHTS = multiply("BTHK,BSHK->BHTS", q_BTHK, k) / q_BTHK.shape[-1] ** 0.5
    # Pads mask keys only: a query at a pad position still attends, and a row of pads stays finite.
    if mask.is_pad_BS is not None:
        scores_BHTS = torch.where(mask.is_pad_BS[:, None, None, :], -1e9, scores_BHTS)
    is_hidden_BTS = hidden(mask, q_BTHK.shape[1], q_BTHK.device)
    if is_hidden_BTS is not None:
        scores_BHTS = torch.where(is_hidden_BTS[:, None], -torch.inf, scores_BHTS)
    return multiply("BHTS,BSHK->BTHK", drop(scores_BHTS.softmax(dim=-1)), v)


class Embedding(nn.Module):
    """Token table plus positions, norm, dropout. The row of `pad_id` starts at zero and gets no gradient."""

    table_TD: Tensor

    def __init__(self, config: ModelConfig, rngs: torch.Generator):
        super().__init__()
        self.config = config
        # A tied table is also the output layer, whose start values are small (GPT-2 does the same). Where a norm takes
        # away its scale, a small one lets the same steps move it further (BERT does the same).
        is_small = config.tied_embedding or config.embedding_norm or config.initialization != "original"
        pad_id = config.pad_id if config.pad_id >= 0 else None
        self.token = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.d_model, padding_idx=pad_id)
        start(self.token.weight, config, rngs, 0.02 if is_small else 1.0)
        if pad_id is not None:
            nn.init.zeros_(self.token.weight[pad_id])
        if config.positions == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(config.seq_len, config.d_model, generator=rngs))
        elif config.positions == "fixed":
            table_TD = torch.from_numpy(fixed_positions(config.seq_len, config.d_model))
            self.register_buffer("table_TD", table_TD, persistent=False)
        if config.embedding_norm:
            self.layernorm = norm(config)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Return [B, T, D]; positions are 0 to T - 1, or `positions_BT`."""
        T = tokens_BT.shape[1]
        x_BTD = self.token(tokens_BT)
        if self.config.positions == "fixed":
            x_BTD = x_BTD + (self.table_TD[None, :T] if positions_BT is None else self.table_TD[positions_BT])
        elif self.config.positions == "learned":
            x_BTD = x_BTD + (self.position[None, :T] if positions_BT is None else self.position[positions_BT])
        if self.config.embedding_norm:
            x_BTD = self.layernorm(x_BTD)
        return dropout(x_BTD, self.config.dropout, self.training)


class Attention(nn.Module):
    """Self-attention of H queries to G keys and values (arXiv 2305.13245); `is_causal` also masks the future."""

    def __init__(self, config: ModelConfig, is_causal: bool, rngs: torch.Generator):
        super().__init__()
        self.config, self.is_causal = config, is_causal
        D, K, has_bias = config.d_model, config.head_size, config.biases in ("all", "attention")
        self.query = linear(config, D, config.n_heads * K, rngs, has_bias)
        self.key = linear(config, D, config.kv_heads * K, rngs, has_bias)
        self.value = linear(config, D, config.kv_heads * K, rngs, has_bias)
        self.output = linear(config, config.n_heads * K, D, rngs, has_bias, residual_std(config))
        if config.qk_norm:
            self.query_norm, self.key_norm = norm(config, K), norm(config, K)

    def forward(self, x_BTD: Tensor, places: Places, layer: int = 0) -> Tensor:
        """Return [B, T, D]. `layer` is the number of the block."""
        (B, T, _), K = x_BTD.shape, self.config.head_size
        q_BTHK, k_BTGK, v_BTGK = (f(x_BTD).reshape(B, T, -1, K) for f in (self.query, self.key, self.value))
        if self.config.qk_norm:
            wide = torch.promote_types(q_BTHK.dtype, torch.float32)
            q_BTHK, k_BTGK = self.query_norm(q_BTHK.to(wide)), self.key_norm(k_BTGK.to(wide))
        window = self.config.window_of(layer)
        if self.config.positions == "rotary":
            frequency_K = frequencies(self.config, window > 0)
            q_BTHK, k_BTGK = (rotate(x, frequency_K, places.positions_BT) for x in (q_BTHK, k_BTGK))
        mask = Mask(places.is_pad_BT, places.segments_BT, self.is_causal, window)
        x_BTHK = attend(
            *(q_BTHK, k_BTGK, v_BTGK, mask),
            lambda weights_BHTT: dropout(weights_BHTT, self.config.dropout, self.training),
        )
        return dropout(self.output(x_BTHK.reshape(B, T, -1)), self.config.dropout, self.training)


class FeedForward(nn.Module):
    """D -> F, activation, dropout, F -> D; a gated one (arXiv 2002.05202) multiplies the activation by a second D -> F.

    `fc1`, `up` and `fc2` are Llama's gate_proj, up_proj and down_proj.
    """

    def __init__(self, config: ModelConfig, rngs: torch.Generator):
        super().__init__()
        self.config = config
        D, F, has_bias = config.d_model, config.n_hidden, config.biases in ("all", "feed_forward")
        self.fc1 = linear(config, D, F, rngs, has_bias)
        if config.mlp in GATED:
            self.up = linear(config, D, F, rngs, has_bias)
        self.fc2 = linear(config, F, D, rngs, has_bias, residual_std(config))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTF = activation(self.fc1(x_BTD), self.config.mlp, self.config.gelu)
        if self.config.mlp in GATED:
            x_BTF = x_BTF * self.up(x_BTD)
        return self.fc2(dropout(x_BTF, self.config.dropout, self.training))


class Block(nn.Module):
    """Attention and feed-forward, each on a residual; a norm before each, or with `post_norm` after each sum."""

    def __init__(self, config: ModelConfig, is_causal: bool, rngs: torch.Generator, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        if config.first_norm or layer > 0:
            self.layernorm1 = norm(config)
        self.attention = Attention(config, is_causal, rngs)
        self.layernorm2 = norm(config)
        self.feed_forward = FeedForward(config, rngs)

    def forward(self, x_BTD: Tensor, places: Places) -> Tensor:
        if self.config.post_norm:
            x_BTD = self.layernorm1(x_BTD + self.attention(x_BTD, places, self.layer))
            return self.layernorm2(x_BTD + self.feed_forward(x_BTD))
        has_norm = self.config.first_norm or self.layer > 0
        x_BTD = x_BTD + self.attention(self.layernorm1(x_BTD) if has_norm else x_BTD, places, self.layer)
        return x_BTD + self.feed_forward(self.layernorm2(x_BTD))


class Transformer(nn.Module):
    """Token ids [B, T] to hidden states float32 [B, T, D]; `segments_BT` says which document of a row each token is of.

    The blocks are n_layers modules in a list, run by a loop.
    """

    def __init__(self, config: ModelConfig, is_causal: bool, rngs: torch.Generator):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, rngs)
        self.blocks = nn.ModuleList([Block(config, is_causal, rngs, i) for i in range(config.n_layers)])
        add_adapters(self.blocks, config, rngs)
        if config.final_norm:
            self.final_norm = norm(config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(config, f"base.{name}"))

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        is_pad_BT = tokens_BT == self.config.pad_id if self.config.pad_id >= 0 else None
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else restarting(segments_BT))
        x_BTD = self.embedding(tokens_BT, places.positions_BT)
        run_block: Any = nn.Module.__call__
        if self.config.remat != "none" and torch.is_grad_enabled():
            kept = functools.partial(create_selective_checkpoint_contexts, REMAT[self.config.remat])
            run_block = functools.partial(checkpoint, use_reentrant=False, context_fn=kept)
        for block in self.blocks:
            x_BTD = run_block(block, x_BTD, places)
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
