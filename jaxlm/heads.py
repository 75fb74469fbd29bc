"""Output layers, and models: LanguageModel and Classifier put them on a Transformer, Embedder and BaseModel have none.

Each model has the parts `base` and `head`, so that a base can be restored alone.
Letters as in model.py; M masked positions per sample, C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxlm.config import ModelConfig
from jaxlm.loss import Totals, cross_entropy
from jaxlm.model import Transformer
from jaxlm.ops import matmul
from jaxlm.ops.activations import gelu
from jaxlm.ops.chunked_loss import by_chunks
from jaxlm.ops.layers import Linear, initial_weights, norm, residual_std
from jaxlm.parallel import BATCH, constrain, is_one_device
from jaxlm.params.names import has_head_bias, head_layers

# Start value of the scale of a causal model's last norm before a tied output layer, whose logits would grow too slowly
# from 1 on (measured in configs/RESULTS.md).
TIED_SCALE = 4.0


def head_linear(
    config: ModelConfig,
    n_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    has_bias: bool = True,
    is_classifier: bool = False,
    n_in: int = 0,
) -> Linear:
    """Return a linear layer of `n_in` or d_model numbers, with zero bias at first.

    The original's weights are normal(0, 0.02).
    """
    std = 0.02
    if config.initialization == "modernbert":
        std = config.d_model**-0.5 if is_classifier else residual_std(config)
    return Linear(
        n_in or config.d_model,
        n_out,
        use_bias=has_bias,
        kernel_init=initial_weights(config, std),
        dtype=dtype,
        preferred_element_type=matmul.sum_dtype(dtype),  # logits are not rounded
        rngs=rngs,
    )


def soft_capped(logits: Array, cap: float) -> Array:
    """Return logits held between -cap and cap by a tanh (Gemma 2, arXiv 2408.00118, section 2); 0: as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


class Head(nnx.Module):
    """The layers before an output that model.head_dense has for a kind of model (params/names.py)."""

    def __init__(self, config: ModelConfig, kind: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.kind, self.dtype = config, kind, dtype
        for name, (n_in, n_out) in head_layers(config, kind).items():
            if name == "layernorm":
                self.layernorm = norm(config, rngs)
            else:
                setattr(self, name, head_linear(config, n_out, dtype, rngs, has_head_bias(config), n_in=n_in))

    def prepared(self, x: Array) -> Array:
        """Return hidden states as the output layer reads them."""
        for name in head_layers(self.config, self.kind):
            x = self.layernorm(x) if name == "layernorm" else self.activation(getattr(self, name)(x))
        return x

    def activation(self, x: Array) -> Array:
        if self.kind != "classifier" or self.config.head_dense in ("modernbert", "eurobert"):
            return gelu(x, self.config.gelu)
        return jnp.tanh(x) if self.config.head_dense == "bert" else jax.nn.relu(x)


class LanguageModelHead(Head):
    """Hidden states to vocabulary logits."""

    def __init__(self, config: ModelConfig, kind: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, kind, dtype, rngs)
        self.is_tied = config.tied_embedding
        if self.is_tied:
            self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        else:
            self.linear = head_linear(config, config.vocab_size, dtype, rngs, config.output_bias)

    @jax.named_scope("output layer")
    def __call__(self, x_BTD: Array, table_VD: Array | None) -> Array:
        x_BTD = self.prepared(x_BTD)
        if self.is_tied:
            assert table_VD is not None, "it is the output layer"
            bias_V = self.bias[...] * self.config.output_bias
            logits_BTV = matmul.linear(x_BTD, table_VD, bias_V, self.dtype, 1)
        else:
            logits_BTV = self.linear(x_BTD)
        return constrain(soft_capped(logits_BTV, self.config.logit_softcap), BATCH, None, "tensor")


class LanguageModel(nnx.Module):
    """Token ids to vocabulary logits: bidirectional with a norm before the output (mlm), or causal (gpt)."""

    def __init__(self, config: ModelConfig, is_causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.base = Transformer(config, is_causal, dtype, rngs)
        self.head = LanguageModelHead(config, "causal" if is_causal else "masked", dtype, rngs)
        scale = getattr(self.base.final_norm, "scale", None) if is_causal and config.final_norm else None
        if config.tied_embedding and config.initialization != "original" and scale is not None:
            scale[...] = jnp.full_like(scale[...], TIED_SCALE)

    def __call__(
        self,
        tokens_BT: Array,
        key: Array | None = None,
        positions_BM: Array | None = None,
        with_hidden: bool = False,
        segments_BT: Array | None = None,
    ) -> Any:
        """Return logits [B, T, V], or with `positions_BM` only those at the given positions, [B, M, V].

        With `with_hidden`, return them and the hidden states [B, T, D]. `segments_BT` are the documents of packed rows.
        """
        x_BTD = self.base(tokens_BT, key, segments_BT)
        logits = self.head(_at(x_BTD, positions_BM), self.base.embedding.token.embedding[...])
        return (logits, x_BTD) if with_hidden else logits

    def loss(
        self,
        tokens_BT: Array,
        labels_BM: Array,
        key: Array | None = None,
        positions_BM: Array | None = None,
        segments_BT: Array | None = None,
    ) -> Totals:
        """Return the totals of cross_entropy; on one device the logits are never there as a whole."""
        z_loss = 0.0 if key is None else self.head.config.z_loss  # of training alone
        if not is_one_device():  # each has a part of the logits
            return cross_entropy(self(tokens_BT, key, positions_BM, False, segments_BT), labels_BM, z_loss)
        x_BMD = _at(self.base(tokens_BT, key, segments_BT), positions_BM)
        graphdef, state = nnx.split(self.head)
        table_VD = self.base.embedding.token.embedding[...] if self.head.is_tied else None

        def totals_of(weights: tuple[nnx.State, Array | None], x_ND: Array, labels_N: Array) -> Totals:
            state, table_VD = weights
            return cross_entropy(nnx.merge(graphdef, state)(x_ND[None], table_VD)[0], labels_N, z_loss)

        x_RD = x_BMD.reshape(-1, x_BMD.shape[-1])
        return by_chunks(totals_of, (state, table_VD), x_RD, labels_BM.reshape(-1))


class ClassifierHead(Head):
    """Hidden state of one position, 0 ([CLS]) or `positions`, or the mean over a text, to class logits [B, C].

    With `positions` [B, N], those of packed rows, to logits [B, N, C]. `shares` [B, T], or of such rows [B, N, T], are
    the parts of positions in the mean of a text (model.pooling: mean, late).
    """

    def __init__(self, config: ModelConfig, n_outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, kind: str = "classifier"):
        super().__init__(config, kind, dtype, rngs)
        has_bias = config.classifier_bias or kind == "tagger"
        self.linear = head_linear(config, n_outputs, dtype, rngs, has_bias, is_classifier=True)

    @jax.named_scope("output layer")
    def __call__(self, x_BTD: Array, positions: Array | None, shares: Array | None = None) -> Array:
        if shares is not None and self.config.pooling == "late":
            return _mean(self.linear(self.prepared(x_BTD)), shares)
        if shares is not None:
            x_BD = _mean(x_BTD, shares)
        elif positions is None:
            x_BD = x_BTD[:, 0]
        elif positions.ndim == 1:
            x_BD = jnp.take_along_axis(x_BTD, positions[:, None, None], axis=1).squeeze(1)
        else:
            x_BD = _at(x_BTD, positions)
        return self.linear(self.prepared(x_BD))


class Classifier(nnx.Module):
    """Token ids to class logits [B, C]: bidirectional and read at the first token or all, or causal, at the last."""

    def __init__(self, config: ModelConfig, n_labels: int, dtype: jnp.dtype, rngs: nnx.Rngs, kind: str = "classifier"):
        self.is_causal = config.pooling == "last"
        self.is_mean = config.pooling in ("mean", "late") and kind == "classifier"
        self.base = Transformer(config, self.is_causal, dtype, rngs)
        n_outputs = config.vocab_size if config.head_outputs == "vocabulary" else n_labels
        self.head = ClassifierHead(config, n_outputs, dtype, rngs, kind)

    def __call__(
        self,
        tokens_BT: Array,
        key: Array | None = None,
        positions: Array | None = None,
        with_hidden: bool = False,
        segments_BT: Array | None = None,
        types_BT: Array | None = None,
    ) -> Any:
        """Return logits; a causal model needs the `positions` [B] of the last token of each text.

        With `with_hidden`, return them and the hidden states [B, T, D]. With `segments_BT`, the texts of packed rows,
        `positions` [B, N] are of the token of each text that is read, and logits are [B, N, C]. `types_BT` says which
        of two texts each token is of.
        """
        has_several = positions is not None and positions.ndim == 2
        assert has_several or self.is_causal == (positions is not None), "the last tokens go with model.pooling=last"
        x_BTD = self.base(tokens_BT, key, segments_BT, types_BT)
        shares = self._shares(tokens_BT, positions, segments_BT) if self.is_mean else None
        logits = self.head(x_BTD, positions, shares)
        return (logits, x_BTD) if with_hidden else logits

    def _shares(self, tokens_BT: Array, positions: Array | None, segments_BT: Array | None) -> Array:
        """Return the part of each position in the mean of its text, [B, T], or of packed rows [B, N, T]."""
        is_text = tokens_BT != self.base.config.pad_id
        if segments_BT is not None:
            assert positions is not None, "they say which texts there are"
            text_BN = jnp.take_along_axis(segments_BT, positions, axis=1)
            is_text = is_text[:, None] & (segments_BT[:, None] == text_BN[..., None])
        return is_text / jnp.maximum(is_text.sum(axis=-1, keepdims=True), 1)


class Embedder(nnx.Module):
    """Token ids to embeddings of texts [B, D]: a Transformer without an output layer, causal if read at the last."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.pooling = config.pooling
        self.base = Transformer(config, config.pooling == "last", dtype, rngs)

    def __call__(self, tokens_BT: Array, key: Array | None, last_B: Array) -> Array:
        return embeddings(self.base(tokens_BT, key), last_B, self.pooling)


def embeddings(x_BTD: Array, last_B: Array, pooling: str) -> Array:
    """Return vectors of length 1, [B, D]: hidden states of the first or last token of each text, or their mean.

    `last_B` are the positions of the last tokens; all up to there count, special tokens as well.
    """
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    places_BT = jnp.arange(x_BTD.shape[1])[None]
    if pooling == "mean":
        weights_BT = (places_BT <= last_B[:, None]) / (last_B[:, None] + 1)
    else:
        weights_BT = places_BT == (last_B[:, None] if pooling == "last" else 0)
    x_BD = jnp.sum(x_BTD * weights_BT[..., None], axis=1)
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-12)


class BaseModel(nnx.Module):
    """Token ids to hidden states [B, T, D]: a Transformer without an output layer, causal with model.pooling=last."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.base = Transformer(config, config.pooling == "last", dtype, rngs)

    def __call__(self, tokens_BT: Array, key: Array | None = None) -> Array:
        return self.base(tokens_BT, key)


def _mean(x_BTD: Array, shares: Array) -> Array:
    """Return the mean [B, D], or [B, N, D], of positions with such shares."""
    if shares.ndim == 2:
        return jnp.sum(x_BTD * shares[..., None], axis=1)
    return jnp.einsum("BNT,BTD->BND", shares, x_BTD, precision=jax.lax.Precision.HIGHEST)


def _at(x_BTD: Array, positions_BM: Array | None) -> Array:
    if positions_BM is not None:
        x_BTD = jnp.take_along_axis(x_BTD, positions_BM[:, :, None], axis=1)
    return x_BTD
