"""Output layers, and models: LanguageModel and Classifier put them on a Transformer, Embedder and BaseModel have none.

Each model has the parts `base` and `head`, so that a base can be restored alone. `dtype` is what products compute in.
Letters as in model.py; M masked positions per sample, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from jaxlm.params.names import has_head_bias, head_layers
from torchlm.model import Transformer
from torchlm.ops.activations import gelu
from torchlm.ops.layers import initial_weights, norm, residual_std

# Start value of the scale of a causal model's last norm before a tied output layer, whose logits would grow too slowly
# from 1 on (measured in configs/RESULTS.md).
TIED_SCALE = 4.0


def head_linear(
    config: ModelConfig,
    n_out: int,
    rngs: torch.Generator,
    has_bias: bool = True,
    is_classifier: bool = False,
    n_in: int = 0,
) -> nn.Linear:
    """Return a linear layer of `n_in` or d_model numbers, with zero bias at first.

    The original's weights are normal(0, 0.02).
    """
    std = 0.02
    if config.initialization == "modernbert":
        std = config.d_model**-0.5 if is_classifier else residual_std(config)
    layer = nn.utils.skip_init(nn.Linear, n_in or config.d_model, n_out, bias=has_bias)
    initial_weights(layer.weight, config, rngs, std)
    if has_bias:
        nn.init.zeros_(layer.bias)
    return layer


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Return logits held between -cap and cap by a tanh (Gemma 2, arXiv 2408.00118, section 2); 0: as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Head(nn.Module):
    """The layers before an output that model.head_dense has for a kind of model (params/names.py)."""

    def __init__(self, config: ModelConfig, kind: str, rngs: torch.Generator):
        super().__init__()
        self.config, self.kind = config, kind
        for name, (n_in, n_out) in head_layers(config, kind).items():
            if name == "layernorm":
                self.layernorm = norm(config)
            else:
                setattr(self, name, head_linear(config, n_out, rngs, has_head_bias(config), n_in=n_in))

    def prepared(self, x: Tensor) -> Tensor:
        """Return hidden states as the output layer reads them."""
        for name in head_layers(self.config, self.kind):
            x = self.layernorm(x) if name == "layernorm" else self.activation(getattr(self, name)(x))
        return x

    def activation(self, x: Tensor) -> Tensor:
        if self.kind != "classifier" or self.config.head_dense in ("modernbert", "eurobert"):
            return gelu(x, self.config.gelu)
        return torch.tanh(x) if self.config.head_dense == "bert" else torch.relu(x)


class LanguageModelHead(Head):
    """Hidden states to vocabulary logits."""

    def __init__(self, config: ModelConfig, kind: str, rngs: torch.Generator):
        super().__init__(config, kind, rngs)
        self.is_tied = config.tied_embedding
        if self.is_tied:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.linear = head_linear(config, config.vocab_size, rngs, config.output_bias)

    def forward(self, x_BTD: Tensor, table_VD: Tensor) -> Tensor:
        x_BTD = self.prepared(x_BTD)
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
        self.head = LanguageModelHead(config, "causal" if is_causal else "masked", rngs)
        scale = getattr(self.base.final_norm, "weight", None) if is_causal and config.final_norm else None
        if config.tied_embedding and config.initialization != "original" and scale is not None:
            nn.init.constant_(scale, TIED_SCALE)

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


class ClassifierHead(Head):
    """Hidden state of one position, 0 ([CLS]) or `positions`, or the mean over a text, to class logits [B, C].

    With `positions` [B, N], those of packed rows, to logits [B, N, C]. `shares` [B, T], or of such rows [B, N, T], are
    the parts of positions in the mean of a text (model.pooling: mean, late).
    """

    def __init__(self, config: ModelConfig, n_outputs: int, rngs: torch.Generator, kind: str = "classifier"):
        super().__init__(config, kind, rngs)
        has_bias = config.classifier_bias or kind == "tagger"
        self.linear = head_linear(config, n_outputs, rngs, has_bias, is_classifier=True)

    def forward(self, x_BTD: Tensor, positions: Tensor | None, shares: Tensor | None = None) -> Tensor:
        if shares is not None and self.config.pooling == "late":
            return _mean(self.linear(self.prepared(x_BTD)), shares)
        if shares is not None:
            x_BD = _mean(x_BTD, shares)
        elif positions is None:
            x_BD = x_BTD[:, 0]
        elif positions.ndim == 1:
            x_BD = x_BTD.take_along_dim(positions[:, None, None], dim=1).squeeze(1)
        else:
            x_BD = _at(x_BTD, positions)
        return self.linear(self.prepared(x_BD))


class Classifier(nn.Module):
    """Token ids to class logits [B, C]: bidirectional and read at the first token or all, or causal, at the last."""

    def __init__(
        self, config: ModelConfig, n_labels: int, dtype: torch.dtype, rngs: torch.Generator, kind: str = "classifier"
    ):
        super().__init__()
        self.dtype = dtype
        self.is_causal = config.pooling == "last"
        self.is_mean = config.pooling in ("mean", "late") and kind == "classifier"
        self.base = Transformer(config, self.is_causal, rngs)
        n_outputs = config.vocab_size if config.head_outputs == "vocabulary" else n_labels
        self.head = ClassifierHead(config, n_outputs, rngs, kind)

    def forward(
        self,
        tokens_BT: Tensor,
        key: None = None,
        positions: Tensor | None = None,
        with_hidden: bool = False,
        segments_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
    ) -> Any:
        """Return logits; a causal model needs the `positions` [B] of the last token of each text.

        With `with_hidden`, return them and the hidden states [B, T, D]. With `segments_BT`, the texts of packed rows,
        `positions` [B, N] are of the token of each text that is read, and logits are [B, N, C]. `types_BT` says which
        of two texts each token is of.
        """
        has_several = positions is not None and positions.ndim == 2
        assert has_several or self.is_causal == (positions is not None), "the last tokens go with model.pooling=last"
        with _autocast(tokens_BT.device, self.dtype):
            x_BTD = self.base(tokens_BT, segments_BT, types_BT)
            shares = self._shares(tokens_BT, positions, segments_BT) if self.is_mean else None
            logits = self.head(x_BTD, positions, shares)
        return (logits, x_BTD) if with_hidden else logits

    def _shares(self, tokens_BT: Tensor, positions: Tensor | None, segments_BT: Tensor | None) -> Tensor:
        """Return the part of each position in the mean of its text, [B, T], or of packed rows [B, N, T]."""
        is_text = tokens_BT != self.base.config.pad_id
        if segments_BT is not None:
            assert positions is not None, "they say which texts there are"
            text_BN = segments_BT.take_along_dim(positions, dim=1)
            is_text = is_text[:, None] & (segments_BT[:, None] == text_BN[..., None])
        shares = is_text.to(self.base.embedding.token.weight.dtype)
        return shares / shares.sum(dim=-1, keepdim=True).clamp(min=1)


class Embedder(nn.Module):
    """Token ids to embeddings of texts [B, D]: a Transformer without an output layer, causal if read at the last."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, rngs: torch.Generator):
        super().__init__()
        self.dtype, self.pooling = dtype, config.pooling
        self.base = Transformer(config, config.pooling == "last", rngs)

    def forward(self, tokens_BT: Tensor, key: None, last_B: Tensor) -> Tensor:
        with _autocast(tokens_BT.device, self.dtype):
            x_BTD = self.base(tokens_BT)
        return embeddings(x_BTD, last_B, self.pooling)


def embeddings(x_BTD: Tensor, last_B: Tensor, pooling: str) -> Tensor:
    """Return vectors of length 1, [B, D]: hidden states of the first or last token of each text, or their mean.

    `last_B` are the positions of the last tokens; all up to there count, special tokens as well.
    """
    x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    places_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
    if pooling == "mean":
        weights_BT = (places_BT <= last_B[:, None]).to(x_BTD.dtype) / (last_B[:, None] + 1)
    else:
        weights_BT = places_BT == (last_B[:, None] if pooling == "last" else 0)
    return nn.functional.normalize(torch.sum(x_BTD * weights_BT[..., None], dim=1), dim=1)


class BaseModel(nn.Module):
    """Token ids to hidden states [B, T, D]: a Transformer without an output layer, causal with model.pooling=last."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, rngs: torch.Generator):
        super().__init__()
        self.dtype = dtype
        self.base = Transformer(config, config.pooling == "last", rngs)

    def forward(self, tokens_BT: Tensor, key: None = None) -> Tensor:
        with _autocast(tokens_BT.device, self.dtype):
            return self.base(tokens_BT)


def _mean(x_BTD: Tensor, shares: Tensor) -> Tensor:
    """Return the mean [B, D], or [B, N, D], of positions with such shares."""
    if shares.ndim == 2:
        return torch.sum(x_BTD * shares[..., None], dim=1)
    return torch.einsum("BNT,BTD->BND", shares, x_BTD)


def _at(x_BTD: Tensor, positions_BM: Tensor | None) -> Tensor:
    if positions_BM is not None:
        x_BTD = x_BTD.take_along_dim(positions_BM[:, :, None], dim=1)
    return x_BTD


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which products compute in `dtype`, where that is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
