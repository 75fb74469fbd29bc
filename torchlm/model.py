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
The parts are in ops/: layers.py (linear layers, initialization, adapters, norms), plain_attention.py,
token_positions.py, activations.py, and stacks.py (rematerialization).

Array names end in their shape: B batch, T positions, D d_model, H heads, G heads of keys and values, K head size,
F hidden units, V vocabulary.
`train()` turns dropout on, `eval()` turns it off.
Parameters are float32. Matmuls compute in bfloat16 inside `torch.autocast`, which the models of heads.py enter.
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
from torchlm.ops.layers import add_adapters, initial_weights, linear, norm, residual_std
from torchlm.ops.plain_attention import Mask
from torchlm.ops.stacks import rematerialized
from torchlm.ops.token_positions import document_positions, rotate


class Places(NamedTuple):
    """Pads, documents and positions in a batch. A field of None means: no pads; one document a row; 0 to T - 1."""

    is_pad_BT: Tensor | None = None
    segments_BT: Tensor | None = None  # number of the document at each position; documents follow each other in a row
    positions_BT: Tensor | None = None  # index of each position in its document


class Embedding(nn.Module):
    """Embeddings of tokens, positions and token types, added up; norm; dropout. The pad's row stays zero."""

    table_TD: Tensor

    def __init__(self, config: ModelConfig, rngs: torch.Generator):
        super().__init__()
        self.config = config
        # A tied table is also the output layer, which needs small initial values (as in GPT-2). Before a norm, which
        # cancels the table's scale, Adam's updates, of a fixed size, change a small table more (as in BERT).
        is_small = config.tied_embedding or config.embedding_norm or config.initialization != "original"
        pad_id = config.pad_id if config.pad_id >= 0 else None
        self.token = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.d_model, padding_idx=pad_id)
        initial_weights(self.token.weight, config, rngs, 0.02 if is_small else 1.0)
        if pad_id is not None:
            nn.init.zeros_(self.token.weight[pad_id])
        if config.positions == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(config.seq_len, config.d_model, generator=rngs))
        elif config.positions == "fixed":
            table_TD = torch.from_numpy(fixed_positions(config.seq_len, config.d_model))
            self.register_buffer("table_TD", table_TD, persistent=False)
        if config.segments:  # token types, as BERT's segments; not the documents of a packed row
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
    """Self-attention with H query heads, and G heads of keys and values (grouped-query attention, arXiv 2305.13245)."""

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
        """Return [B, T, D]. `layer` is the index of the block, from 0."""
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
    """fc2(dropout(activation(fc1(x)))); with a gate, fc2(dropout(activation(fc1(x)) * up(x))) (arXiv 2002.05202).

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
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with `post_norm`, norm(x + sublayer(x)) instead."""

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

    `segments_BT` has the number of each token's document in a packed row. `types_BT` has its token type: 0 or 1 for
    the first or second text of a pair. `model.segments` is the number of token types, not of documents.

    `blocks` is a list of n_layers modules; a loop runs them.
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
        places = Places(is_pad_BT, segments_BT, None if segments_BT is None else document_positions(segments_BT))
        x_BTD = self.embedding(tokens_BT, places.positions_BT, types_BT)
        run_block = rematerialized(self.config, nn.Module.__call__)
        for block in self.blocks:
            x_BTD = run_block(block, x_BTD, places)
        return self.final_norm(x_BTD) if self.config.final_norm else x_BTD
