"""Output layers, and models: LanguageModel and Classifier put them on a Transformer, BaseModel has none.

Each model has the parts `base` and `head`, so that a base can be restored alone. `dtype` is what products compute in.
Letters as in model.py; M masked positions per sample, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from torchlm.model import Transformer
from torchlm.ops.activations import gelu
from torchlm.ops.layers import norm, residual_std, start


def head_linear(
    config: ModelConfig, n_out: int, rngs: torch.Generator, has_bias: bool = True, is_classifier: bool = False
) -> nn.Linear:
    """Return a linear layer of hidden states that starts with zero bias; the original's weights are normal(0, 0.02)."""
    std = 0.02
    if config.initialization == "modernbert":
        std = config.d_model**-0.5 if is_classifier else residual_std(config)
    layer = nn.utils.skip_init(nn.Linear, config.d_model, n_out, bias=has_bias)
    start(layer.weight, config, rngs, std)
    if has_bias:
        nn.init.zeros_(layer.bias)
    return layer


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Return logits held between -cap and cap by a tanh (Gemma 2, arXiv 2408.00118, section 2); 0: as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


class LanguageModelHead(nn.Module):
    """Hidden states to vocabulary logits; a norm first if `has_norm` (mlm), before it the dense layer of BERT."""

    def __init__(self, config: ModelConfig, has_norm: bool, rngs: torch.Generator):
        super().__init__()
        self.config, self.is_tied, self.has_norm = config, config.tied_embedding, has_norm
        self.has_dense = has_norm and config.head_dense != "none"
        if self.has_dense:
            self.dense = head_linear(config, config.d_model, rngs, config.biases == "all")
        if has_norm:
            self.layernorm = norm(config)
        if self.is_tied:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.linear = head_linear(config, config.vocab_size, rngs, config.output_bias)

    def forward(self, x_BTD: Tensor, table_VD: Tensor) -> Tensor:
        if self.has_dense:
            x_BTD = gelu(self.dense(x_BTD), self.config.gelu)
        if self.has_norm:
            x_BTD = self.layernorm(x_BTD)
        if self.is_tied:
            bias_V = self.bias * self.config.output_bias
            logits_BTV = nn.functional.linear(x_BTD, table_VD, bias_V)
        else:
            logits_BTV = self.linear(x_BTD)
        return soft_capped(logits_BTV, self.config.logit_softcap)


class LanguageModel(nn.Module):
    """Token ids to vocabulary logits: bidirectional with a norm before the output (mlm), or causal (gpt)."""

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: torch.dtype, rngs: torch.Generator):
        super().__init__()
        self.dtype = dtype
        self.base = Transformer(config, is_causal, rngs)
        self.head = LanguageModelHead(config, not is_causal, rngs)

    def forward(
        self,
        tokens_BT: Tensor,
        key: None = None,
        positions_BM: Tensor | None = None,
        with_hidden: bool = False,
        segments_BT: Tensor | None = None,
    ) -> Any:
        """Return logits [B, T, V], or with `positions_BM` only those at the given positions, [B, M, V].

        With `with_hidden`, return them and the hidden states [B, T, D]. `segments_BT` are the documents of packed rows.
        """
        with _autocast(tokens_BT.device, self.dtype):
            x_BTD = self.base(tokens_BT, segments_BT)
            logits = self.head(_at(x_BTD, positions_BM), self.base.embedding.token.weight)
        return (logits, x_BTD) if with_hidden else logits


class ClassifierHead(nn.Module):
    """Hidden state of one position, 0 ([CLS]) or `positions`, to class logits [B, C]; BERT's dense layer is between.

    With `positions` [B, N], those of packed rows, to logits [B, N, C].
    """

    def __init__(self, config: ModelConfig, n_outputs: int, rngs: torch.Generator):
        super().__init__()
        self.config = config
        if config.head_dense != "none":
            self.dense = head_linear(config, config.d_model, rngs, config.biases == "all")
        self.linear = head_linear(config, n_outputs, rngs, is_classifier=True)

    def forward(self, x_BTD: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            x_BD = x_BTD[:, 0]
        elif positions.ndim == 1:
            x_BD = x_BTD.take_along_dim(positions[:, None, None], dim=1).squeeze(1)
        else:
            x_BD = _at(x_BTD, positions)
        if self.config.head_dense != "none":
            activation = torch.tanh if self.config.head_dense == "bert" else torch.relu
            x_BD = activation(self.dense(x_BD))
        return self.linear(x_BD)


class Classifier(nn.Module):
    """Token ids to class logits [B, C]: bidirectional and read at the first token, or causal and read at the last."""

    def __init__(self, config: ModelConfig, n_labels: int, dtype: torch.dtype, rngs: torch.Generator):
        super().__init__()
        self.dtype = dtype
        self.is_causal = config.pooling == "last"
        self.base = Transformer(config, self.is_causal, rngs)
        n_outputs = config.vocab_size if config.head_outputs == "vocabulary" else n_labels
        self.head = ClassifierHead(config, n_outputs, rngs)

    def forward(
        self,
        tokens_BT: Tensor,
        key: None = None,
        positions: Tensor | None = None,
        with_hidden: bool = False,
        segments_BT: Tensor | None = None,
    ) -> Any:
        """Return logits; a causal model needs the `positions` [B] of the last token of each text.

        With `with_hidden`, return them and the hidden states [B, T, D]. With `segments_BT`, the texts of packed rows,
        `positions` [B, N] are of the token of each text that is read, and logits are [B, N, C].
        """
        has_several = positions is not None and positions.ndim == 2
        assert has_several or self.is_causal == (positions is not None), "the last tokens go with model.pooling=last"
        with _autocast(tokens_BT.device, self.dtype):
            x_BTD = self.base(tokens_BT, segments_BT)
            logits = self.head(x_BTD, positions)
        return (logits, x_BTD) if with_hidden else logits


class BaseModel(nn.Module):
    """Token ids to hidden states [B, T, D]: a bidirectional Transformer without an output layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, rngs: torch.Generator):
        super().__init__()
        self.dtype = dtype
        self.base = Transformer(config, False, rngs)

    def forward(self, tokens_BT: Tensor, key: None = None) -> Tensor:
        with _autocast(tokens_BT.device, self.dtype):
            return self.base(tokens_BT)


def _at(x_BTD: Tensor, positions_BM: Tensor | None) -> Tensor:
    if positions_BM is not None:
        x_BTD = x_BTD.take_along_dim(positions_BM[:, :, None], dim=1)
    return x_BTD


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which products compute in `dtype`, where that is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
