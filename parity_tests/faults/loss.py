"""Faults of the losses: cross-entropy, and what a student learns from its teacher."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import cosine_loss, cross_entropy, gpt_loss, label_sets, regression, soft_loss

MLM, GPT, COLA, DISTILLATION = "batch 0 of mlm", "batch 0 of gpt", "replay of cola", "distillation"
SMOOTHED = "smoothed and weighted classes"

FAULTS = [
    *both(
        "absolute errors: the error of a predicted number is not squared",
        "a number for two texts",
        edit(regression.jaxlm, ("_errors**2", "abs(_errors)")),
        edit(regression.torchlm, ("_errors.square()", "_errors.abs()")),
    ),
    *mirrored(
        "sum over labels: the loss of a text is the sum of its labels', not their mean",
        "several labels",
        label_sets,
        ("_x / labels.shape[1]", "_x"),
    ),
    *mirrored(
        "all or nothing: a text whose labels are partly right counts as right",
        "several labels",
        label_sets,
        ("_is & (_a == _b)", "_is & (_a | (_a == _b))"),
    ),
    *both(
        "mean over all positions: ignored labels are in the count",
        MLM,
        edit(cross_entropy.jaxlm, ("{'count': _n, **_rest}", "{'count': labels.size, **_rest}")),
        edit(cross_entropy.torchlm, ("{'count': _n, **_rest}", "{'count': torch.tensor(labels.numel()), **_rest}")),
    ),
    *both(
        "ignored labels guessed: ignored labels are in the loss as class 0",
        MLM,
        edit(
            cross_entropy.jaxlm,
            ("{'loss': jnp.sum(jnp.where(_is_counted, _x, 0)), **_rest}", "{'loss': jnp.sum(_x), **_rest}"),
        ),
        edit(cross_entropy.torchlm, ("torch.where(_is_counted, labels, -1)", "labels.clamp(min=0)")),
    ),
    *mirrored(
        "own token as label: gpt's labels are not shifted", GPT, gpt_loss, ("batch['labels']", "batch['tokens']")
    ),
    *both(
        "accuracy as a mean of means: right predictions as a share of each batch",
        COLA,
        edit(cross_entropy.jaxlm, ("{'correct': jnp.sum(_x), **_rest}", "{'correct': jnp.mean(_x), **_rest}")),
        edit(cross_entropy.torchlm, ("{'correct': _x.sum(), **_rest}", "{'correct': _x.float().mean(), **_rest}")),
    ),
    *both(
        "argmax of all: the largest of all logits, not of each sample's",
        COLA,
        edit(cross_entropy.jaxlm, ("_argmax(logits, _largest)", "jnp.argmax(logits)")),
        edit(cross_entropy.torchlm, ("logits.argmax(dim=-1)", "logits.argmax()")),
    ),
    *both(
        "smoothed labels: label smoothing of 0.1",
        MLM,
        edit(
            cross_entropy.jaxlm,
            ("_log_sum + (_max - _label)", "_log_sum + (_max - 0.9 * _label - 0.1 * jnp.mean(logits, axis=-1))"),
        ),
        edit(
            cross_entropy.torchlm,
            ("_f(*_args, label_smoothing=smoothing, **_rest)", "_f(*_args, label_smoothing=0.1, **_rest)"),
        ),
    ),
    *both(
        "smoothing lost: what a smoothed label gives up goes to no class",
        SMOOTHED,
        edit(cross_entropy.jaxlm, ("_x + smoothing * jnp.mean(_apart, axis=-1)", "_x")),
        None,
    ),
    *both(
        "unsmoothed: labels are not smoothed",
        SMOOTHED,
        None,
        edit(cross_entropy.torchlm, ("_f(*_args, label_smoothing=smoothing, **_rest)", "_f(*_args, **_rest)")),
    ),
    *both(
        "weights of the labels alone: what smoothing gives to a class is not weighed",
        SMOOTHED,
        edit(cross_entropy.jaxlm, ("_weights[_indices] * _x", "_x")),
        None,
    ),
    *both(
        "all classes alike: labels are not weighed",
        SMOOTHED,
        edit(cross_entropy.jaxlm, ("(1 - smoothing) * _weights[labels]", "1 - smoothing")),
        edit(cross_entropy.torchlm, ("logits.new_tensor(weights)", "logits.new_ones(len(weights))")),
    ),
    *mirrored(
        "no square of the temperature: soft loss not times T^2", DISTILLATION, soft_loss, ("temperature**2 * _x", "_x")
    ),
    *mirrored(
        "divergence from the student: KL(student || teacher)",
        DISTILLATION,
        soft_loss,
        ("_exp(_log_p) * (_log_p - _log_q)", "_exp(_log_q) * (_log_q - _log_p)"),
    ),
    *both(
        "divergence over the vocabulary: its mean over outputs, PyTorch's default, not its sum",
        DISTILLATION,
        edit(soft_loss.jaxlm, ("jnp.sum(_x, axis=-1)", "jnp.mean(_x, axis=-1)")),
        edit(soft_loss.torchlm, ("torch.sum(_x, dim=-1)", "torch.mean(_x, dim=-1)")),
    ),
    *mirrored(
        "cosine of pads: hidden states of pads count", DISTILLATION, cosine_loss, ("_where(is_pad_BT, 0, _x)", "_x")
    ),
]
