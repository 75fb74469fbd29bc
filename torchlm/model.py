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
ops/ has the parts: layers.py (linear layers, start values, adapters, norms), plain_attention.py, token_positions.py,
activations.py, and stacks.py (rematerialization).

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
The mode of a module turns dropout on (`train()`) or off (`eval()`).
Parameters are float32; products compute in bfloat16 inside `torch.autocast`, which the models of heads.py open.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jaxlm.config import GATED, ModelConfig
from jaxlm.ops.position_tables import fixed_positions, frequencies
from jaxlm.params.names import is_trained
from torchlm.ops import plain_attention
from torchlm.ops.activations import activation
from torchlm.ops.dropout import dropout
from torchlm.ops.layers import add_adapters, linear, norm, residual_std, start
from torchlm.ops.plain_attention import Mask
from torchlm.ops.stacks import rematerialized
from torchlm.ops.token_positions import restarting, rotate


class Places(NamedTuple):
    """What is known of positions. None: there are no pads, a row is one document, positions are 0 to T - 1."""

    is_pad_BT: Tensor | None = None
    segments_BT: Tensor | None = None  # the document that each position is of; one follows the other in a row
    positions_BT: Tensor | None = None  # where in its document each position is


class Embedding(nn.Module):
    """Token table plus positions and types, norm, dropout. The row of `pad_id` starts at zero and gets no gradient."""

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
        if config.segments:
            self.segment = nn.Parameter(0.02 * torch.randn(config.segments, config.d_model, generator=rngs))
        if config.embedding_norm:
            self.layernorm = norm(config)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Tensor:
        """Return [B, T, D]; positions are 0 to T - 1, or `positions_BT`; token types are 0, or `types_BT`."""
        T = tokens_BT.shape[1]
        x_BTD = self.token(tokens_BT)
        if self.config.positions == "fixed":
            x_BTD = x_BTD + (self.table_TD[None, :T] if positions_BT is None else self.table_TD[positions_BT])
        elif self.config.positions == "learned":
            x_BTD = x_BTD + (self.position[None, :T] if positions_BT is None else self.position[positions_BT])
        if self.config.segments:
            x_BTD = x_BTD + (self.segment[None, :1] if types_BT is None else self.segment[types_BT])
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

    def forward(self, x_BTD: Tensor, places: Places, layer: int) -> Tensor:
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
        x_BTHK = plain_attention.attend(
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

    def __init__(self, config: ModelConfig, is_causal: bool, rngs: torch.Generator, layer: int):
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
    """Token ids [B, T] to hidden states float32 [B, T, D].

    `segments_BT` says which document of a row each token is of, and `types_BT` which of two texts (model.segments).

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

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Tensor:
        is_pad_BT = tokens_BT == self.config.pad_id if self.config.pad_id >= 0 else None
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else restarting(segments_BT))
        x_BTD = self.embedding(tokens_BT, places.positions_BT, types_BT)
        run_block = rematerialized(self.config, nn.Module.__call__)
        for block in self.blocks:
            x_BTD = run_block(block, x_BTD, places)
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
