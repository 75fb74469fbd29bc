"""Faults of the modern block: norms, gated feed-forwards, start values, soft cap, z-loss, attention."""

from typing import Any

import jax.numpy as jnp

from parity_tests.faults.planting import both, edit, instead, mirrored
from parity_tests.faults.targets import (
    activation,
    attend,
    attend_in_blocks,
    attention,
    block,
    cross_entropy,
    embedding_start,
    feed_forward,
    framework_rms_norm,
    frequencies,
    gpt_loss,
    head_linear,
    hidden,
    initial_weights,
    lm_head,
    lm_loss,
    norm,
    residual_std,
    soft_capped,
)

RMS, GEGLU, SWIGLU, RELU2, CAP, Z = "RMSNorm", "GEGLU", "SwiGLU", "squared ReLU", "soft cap", "z-loss"
GROUPED, QK, SCALED = "grouped heads", "norm of queries and keys", "scaled rotary positions"
WINDOW, LAYERS, FIRST = "window", "global and local layers", "no first norm"
BIDIRECTIONAL, BLOCKS = "window to both sides", "window in blocks"
START_GPT2, START_MODERNBERT = "start values of GPT-2", "start values of ModernBERT"


def _rms_norms(compute: Any) -> tuple[Any, Any]:
    """Return replacements of both frameworks' RMSNorm by compute(x, scale, epsilon, rms)."""

    def of_jaxlm(self: Any, x: Any) -> Any:
        def rms(x: Any, epsilon: float) -> Any:
            return jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)

        scale = jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
        return compute(x, scale, self.epsilon, rms)

    def of_torchlm(self: Any, x: Any) -> Any:
        def rms(x: Any, epsilon: float) -> Any:
            return ((x**2).mean(-1, keepdim=True) + epsilon).sqrt()

        return compute(x, self.weight, self.eps, rms)

    return instead(framework_rms_norm.jaxlm, of_jaxlm), instead(framework_rms_norm.torchlm, of_torchlm)


FAULTS = [
    # Norms
    *mirrored(
        "LayerNorm for RMSNorm: the mean is subtracted", RMS, norm, ("config.norm in ('rmsnorm', *_rest)", "False")
    ),
    *both(
        "scale before RMSNorm: the input is scaled, then divided",
        RMS,
        *_rms_norms(lambda x, scale, epsilon, rms: x * scale / rms(x * scale, epsilon)),
    ),
    *both(
        "one plus scale: RMSNorm with Gemma's 1 + scale",
        RMS,
        *_rms_norms(lambda x, scale, epsilon, rms: x / rms(x, epsilon) * (1 + scale)),
    ),
    *both(
        "epsilon outside the root: RMSNorm divides by rms + epsilon",
        RMS,
        *_rms_norms(lambda x, scale, epsilon, rms: x / (rms(x, 0.0) + epsilon) * scale),
    ),
    # Feed-forward
    *mirrored(
        "gate and up swapped: the activation is of the second product",
        SWIGLU,
        feed_forward,
        ("_activation(self.fc1(x_BTD), *_kind)", "_activation(self.up(x_BTD), *_kind)"),
        ("_x * self.up(x_BTD)", "_x * self.fc1(x_BTD)"),
    ),
    *mirrored(
        "no gate: the second product is left out", GEGLU, feed_forward, ("_x * self.up(_y)", "_x + 0 * self.up(_y)")
    ),
    *mirrored(
        "gates added: the second product is added", SWIGLU, feed_forward, ("_x * self.up(_y)", "_x + self.up(_y)")
    ),
    *mirrored("SiLU for GELU: geglu as swiglu", GEGLU, activation, ("mlp == 'swiglu'", "mlp != 'gelu'")),
    *mirrored("GELU for SiLU: swiglu as geglu", SWIGLU, activation, ("mlp == 'swiglu'", "False")),
    *mirrored("GELU for squared ReLU: relu2 as gelu", RELU2, activation, ("mlp == 'relu2'", "False")),
    *both(
        "ReLU not squared: relu2 as ReLU",
        RELU2,
        edit(
            activation.jaxlm, ("_square if mlp == 'relu2' else _gelu", "jnp.maximum(x, 0) if mlp == 'relu2' else _gelu")
        ),
        edit(activation.torchlm, ("_relu(x).square()", "_relu(x)")),
    ),
    # Output
    *mirrored("no soft cap: logits as they are", CAP, soft_capped, ("_x if cap else logits", "logits")),
    *mirrored("cap not multiplied: logits between -1 and 1", CAP, soft_capped, ("cap * _tanh(_x)", "_tanh(_x)")),
    *mirrored("cap not divided: the tanh is of the logits", CAP, soft_capped, ("logits / cap", "logits")),
    *both(
        "clipped for capped: logits are cut at the cap",
        CAP,
        edit(soft_capped.jaxlm, ("cap * jnp.tanh(_x)", "jnp.clip(logits, -cap, cap)")),
        edit(soft_capped.torchlm, ("cap * torch.tanh(_x)", "logits.clamp(-cap, cap)")),
    ),
    *both(
        "soft cap of the hidden states: it is before the output layer, not after",
        CAP,
        *(
            edit(
                function,
                (
                    "self.linear(x_BTD)",
                    f"self.linear(self.config.logit_softcap * {tanh}(x_BTD / self.config.logit_softcap))",
                ),
                ("_soft_capped(_logits, self.config.logit_softcap)", "_logits"),
            )
            for function, tanh in zip(lm_head, ("jnp.tanh", "torch.tanh"), strict=True)
        ),
    ),
    *mirrored(
        "tied head scaled: hidden states times 1 / sqrt(d_model) before a tied output layer, as T5's",
        Z,
        lm_head,
        ("_linear(x_BTD, table_VD, *_rest)", "_linear(x_BTD * self.config.d_model**-0.5, table_VD, *_rest)"),
    ),
    *mirrored(
        "z-loss subtracted: z-loss with the wrong sign", Z, cross_entropy, ("_x + z_loss * _y", "_x - z_loss * _y")
    ),
    *both(
        "z-loss not squared: the logarithm itself",
        Z,
        edit(cross_entropy.jaxlm, ("jnp.square(_x)", "_x")),
        edit(cross_entropy.torchlm, ("_x.square()", "_x")),
    ),
    *both(
        "z-loss of shifted logits: the logarithm without the largest logit",
        Z,
        edit(cross_entropy.jaxlm, ("z_loss * jnp.square(_log_sums + _largest)", "z_loss * jnp.square(_log_sums)")),
        edit(
            cross_entropy.torchlm,
            ("logits.logsumexp(dim=-1)", "(logits - logits.detach().amax(-1, keepdim=True)).logsumexp(dim=-1)"),
        ),
    ),
    *both(
        "z-loss of all positions: ignored labels are in the z-loss",
        Z,
        None,
        edit(cross_entropy.torchlm, ("torch.where(_is_counted, _z, 0)", "_z")),
    ),
    *both(
        "z-loss of evaluations: it is in the loss outside of training, too",
        Z,
        edit(lm_loss, ("0.0 if key is None else _weight", "_weight")),
        edit(gpt_loss.torchlm, ("_weight if model.training else 0.0", "_weight")),
    ),
    *both(
        "no z-loss in training: the setting is ignored",
        Z,
        edit(lm_loss, ("0.0 if key is None else _weight", "0.0")),
        edit(gpt_loss.torchlm, ("_weight if model.training else 0.0", "0.0")),
    ),
    # Start values
    *mirrored(
        "no smaller start by depth: what adds to the residual stream starts as all else",
        START_GPT2,
        residual_std,
        ("config.initialization == 'llama'", "True"),
    ),
    *mirrored(
        "depth of blocks: start values by the number of blocks, not of what adds to the stream",
        START_GPT2,
        residual_std,
        ("2 * config.n_layers", "config.n_layers"),
    ),
    *mirrored(
        "not truncated: ModernBERT's start values with all of the normal distribution",
        START_MODERNBERT,
        initial_weights,
        ("config.initialization == 'modernbert'", "False"),
    ),
    *mirrored(
        "embedding of the original: tokens start with normal(0, 1)",
        START_GPT2,
        embedding_start,
        ("_tied or _norm or config.initialization != 'original'", "_tied or _norm"),
    ),
    *mirrored(
        "head as GPT-2's: ModernBERT's output layer starts with 0.02",
        START_MODERNBERT,
        head_linear,
        ("config.initialization == 'modernbert'", "False"),
    ),
    # Attention
    *both(
        "heads repeated in turn: query head h has the keys of head h modulo G, not h G / H",
        GROUPED,
        edit(attend.jaxlm, ("jnp.repeat(_x, _n, _axis)", "jnp.concatenate([_x] * (_n), _axis)")),
        edit(attend.torchlm, ("_x.repeat_interleave(_n, _axis)", "torch.cat([_x] * (_n), _axis)")),
    ),
    *both(
        "values of the first head: all queries have the values of key head 0",
        GROUPED,
        edit(
            attend.jaxlm,
            ("_multiply(_axes, drop(_weights), v)", "_multiply(_axes, drop(_weights), v * 0 + v[:, :, :1])"),
        ),
        edit(
            attend.torchlm,
            ("_multiply(_axes, drop(_weights), v)", "_multiply(_axes, drop(_weights), v * 0 + v[:, :, :1])"),
        ),
    ),
    *mirrored(
        "scale of the width by heads: scores / sqrt(d_model / n_heads) where head_dim is another",
        GROUPED,
        attention,
        (
            "_f(x_BTD).reshape(_B, _T, -1, _K)",
            "(_f(x_BTD) * (_K * self.config.n_heads / x_BTD.shape[2]) ** 0.25).reshape(_B, _T, -1, _K)",
        ),
    ),
    *mirrored(
        "keys without a norm: only queries have it", QK, attention, ("self.key_norm(_k)", "self.key_norm(_k) * 0 + _k")
    ),
    *mirrored(
        "norms swapped: queries have the norm of keys",
        QK,
        attention,
        ("self.query_norm(_q), self.key_norm(_k)", "self.key_norm(_q), self.query_norm(_k)"),
    ),
    *both(
        "norm over positions: queries are normalized along the sequence, not along a head",
        QK,
        edit(
            attention.jaxlm,
            ("self.query_norm(_q)", "self.query_norm(_q) * 0 + _q / jnp.sqrt((_q**2).mean(1, keepdims=True) + 1e-5)"),
        ),
        edit(
            attention.torchlm,
            ("self.query_norm(_q)", "self.query_norm(_q) * 0 + _q / torch.sqrt((_q**2).mean(1, keepdim=True) + 1e-5)"),
        ),
    ),
    *mirrored(
        "norm of interleaved heads: each norm is of every H-th number of the heads",
        QK,
        attention,
        ("self.query_norm(_q)", "self.query_norm(_q.swapaxes(2, 3).reshape(_q.shape))"),
    ),
    *mirrored(
        "wide window: one position more on either side", WINDOW, hidden, ("_x > mask.window", "_x > mask.window + 1")
    ),
    *mirrored(
        "narrow window: one position less on either side", WINDOW, hidden, ("_x > mask.window", "_x >= mask.window")
    ),
    *mirrored(
        "window of the past: the future side of a window is hidden",
        BIDIRECTIONAL,
        hidden,
        ("abs(_x) > mask.window", "(abs(_x) > mask.window) | (_x > 0)"),
    ),
    *mirrored("no window: the window is ignored", WINDOW, hidden, ("_x > mask.window", "_x > 99")),
    *both(
        "narrow blocks: in blocks, one position less on either side",
        BLOCKS,
        edit(attend_in_blocks, ("abs(_x) > _window", "abs(_x) >= _window")),
        None,
    ),
    *both(
        "no edge of blocks: zeros before the first position and behind the last are attended to",
        BLOCKS,
        edit(attend_in_blocks, ("(_place < 0) | (_place >= _T)", "_place > 999")),
        None,
    ),
    *mirrored(
        "window of all layers: global layers have the window, too",
        LAYERS,
        attention,
        ("self.config.window_of(layer)", "self.config.window"),
    ),
    *mirrored(
        "layers from 1: each kind of layer one too late",
        LAYERS,
        attention,
        ("self.config.window_of(layer)", "self.config.window_of(layer + 1)"),
    ),
    *mirrored(
        "global base everywhere: local layers turn as global ones",
        LAYERS,
        frequencies,
        ("is_local and config.rotary_base_local or config.rotary_base", "config.rotary_base"),
    ),
    *mirrored(
        "bases swapped: global layers turn as local ones",
        LAYERS,
        attention,
        ("_frequencies(self.config, _window > 0)", "_frequencies(self.config, _window == 0)"),
    ),
    *mirrored(
        "scaling of all turns: fast turns are slowed, too",
        SCALED,
        frequencies,
        ("_share + (1 - _share) / config.rotary_scaling", "1 / config.rotary_scaling"),
    ),
    *mirrored(
        "scaling upside down: fast turns are slowed, slow ones are not",
        SCALED,
        frequencies,
        ("_share + (1 - _share) / config.rotary_scaling", "(1 - _share) + _share / config.rotary_scaling"),
    ),
    *mirrored("no scaling: the setting is ignored", SCALED, frequencies, ("config.rotary_scaling == 1", "True")),
    *mirrored("turns in radians: the wavelength without 2 pi", SCALED, frequencies, ("_x / (2 * np.pi)", "_x / 1.0")),
    *both(
        "no norm after the first block: all attention is without a norm",
        FIRST,
        edit(block.jaxlm, ("self.config.first_norm or layer > 0", "False")),
        edit(
            block.torchlm,
            ("self.layernorm1(_x) if _has_norm else _x", "self.layernorm1(_x) * 0 + _x if _has_norm else _x"),
        ),
    ),
    *both(
        "first norm kept: the first block has the norm of the second",
        FIRST,
        edit(block.jaxlm, ("self.config.first_norm or layer > 0", "True")),
        None,
    ),
]
