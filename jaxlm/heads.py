"""Output layers, and models: LanguageModel and Classifier put them on a Transformer, BaseModel has none.

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
from jaxlm.ops.layers import Linear, norm, residual_std, start
from jaxlm.parallel import BATCH, constrain, is_one_device


def head_linear(
    config: ModelConfig,
    n_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    has_bias: bool = True,
    is_classifier: bool = False,
) -> Linear:
    """Return a linear layer of hidden states that starts with zero bias; the original's weights are normal(0, 0.02)."""
    std = 0.02
    if config.initialization == "modernbert":
        std = config.d_model**-0.5 if is_classifier else residual_std(config)
    return Linear(
        config.d_model,
        n_out,
        use_bias=has_bias,
        kernel_init=start(config, std),
        dtype=dtype,
        preferred_element_type=matmul.sum_dtype(dtype),  # logits are not rounded
        rngs=rngs,
    )


def soft_capped(logits: Array, cap: float) -> Array:
    """Return logits held between -cap and cap by a tanh (Gemma 2, arXiv 2408.00118, section 2); 0: as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


class LanguageModelHead(nnx.Module):
    """Hidden states to vocabulary logits; a norm first if `has_norm` (mlm), before it the dense layer of BERT."""

    def __init__(self, config: ModelConfig, has_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.is_tied, self.has_norm, self.dtype = config, config.tied_embedding, has_norm, dtype
        self.has_dense = has_norm and config.head_dense != "none"
        if self.has_dense:
            self.dense = head_linear(config, config.d_model, dtype, rngs, config.biases == "all")
        if has_norm:
            self.layernorm = norm(config, rngs)
        if self.is_tied:
            self.bias = nnx.Param(jnp.zeros(config.vocab_size))
        else:
            self.linear = head_linear(config, config.vocab_size, dtype, rngs, config.output_bias)

    @jax.named_scope("output layer")
    def __call__(self, x_BTD: Array, table_VD: Array | None) -> Array:
        if self.has_dense:
            x_BTD = gelu(self.dense(x_BTD), self.config.gelu)
        if self.has_norm:
            x_BTD = self.layernorm(x_BTD)
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
        self.head = LanguageModelHead(config, not is_causal, dtype, rngs)

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


class ClassifierHead(nnx.Module):
    """Hidden state of one position, 0 ([CLS]) or `positions`, to class logits [B, C]; BERT's dense layer is between.

    With `positions` [B, N], those of packed rows, to logits [B, N, C].
    """

    def __init__(self, config: ModelConfig, n_outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        if config.head_dense != "none":
            self.dense = head_linear(config, config.d_model, dtype, rngs, config.biases == "all")
        self.linear = head_linear(config, n_outputs, dtype, rngs, is_classifier=True)

    @jax.named_scope("output layer")
    def __call__(self, x_BTD: Array, positions: Array | None) -> Array:
        if positions is None:
            x_BD = x_BTD[:, 0]
        elif positions.ndim == 1:
            x_BD = jnp.take_along_axis(x_BTD, positions[:, None, None], axis=1).squeeze(1)
        else:
            x_BD = _at(x_BTD, positions)
        if self.config.head_dense != "none":
            activation = jnp.tanh if self.config.head_dense == "bert" else jax.nn.relu
            x_BD = activation(self.dense(x_BD))
        return self.linear(x_BD)


class Classifier(nnx.Module):
    """Token ids to class logits [B, C]: bidirectional and read at the first token, or causal and read at the last."""

    def __init__(self, config: ModelConfig, n_labels: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.is_causal = config.pooling == "last"
        self.base = Transformer(config, self.is_causal, dtype, rngs)
        n_outputs = config.vocab_size if config.head_outputs == "vocabulary" else n_labels
        self.head = ClassifierHead(config, n_outputs, dtype, rngs)

    def __call__(
        self,
        tokens_BT: Array,
        key: Array | None = None,
        positions: Array | None = None,
        with_hidden: bool = False,
        segments_BT: Array | None = None,
    ) -> Any:
        """Return logits; a causal model needs the `positions` [B] of the last token of each text.

        With `with_hidden`, return them and the hidden states [B, T, D]. With `segments_BT`, the texts of packed rows,
        `positions` [B, N] are of the token of each text that is read, and logits are [B, N, C].
        """
        has_several = positions is not None and positions.ndim == 2
        assert has_several or self.is_causal == (positions is not None), "the last tokens go with model.pooling=last"
        x_BTD = self.base(tokens_BT, key, segments_BT)
        logits = self.head(x_BTD, positions)
        return (logits, x_BTD) if with_hidden else logits


class BaseModel(nnx.Module):
    """Token ids to hidden states [B, T, D]: a bidirectional Transformer without an output layer."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.base = Transformer(config, False, dtype, rngs)

    def __call__(self, tokens_BT: Array, key: Array | None = None) -> Array:
        return self.base(tokens_BT, key)


def _at(x_BTD: Array, positions_BM: Array | None) -> Array:
    if positions_BM is not None:
        x_BTD = jnp.take_along_axis(x_BTD, positions_BM[:, :, None], axis=1)
    return x_BTD
