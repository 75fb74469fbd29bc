"""The loss of a student that learns from a teacher. Source: DistilBERT, arXiv 1910.01108, section 2.

Letters as in model.py; N positions that have labels, or samples. Logits are computed only at these.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxlm import parallel
from jaxlm.loss import Totals
from jaxlm.params import names
from jaxlm.training.teacher import Teacher


def model_of(teacher: Teacher, task: Any, mesh: Mesh) -> nnx.Module:
    """Return the model of a teacher on the mesh; its matmuls compute in the task's type."""
    own = copy.copy(task)
    own.config = dataclasses.replace(task.config, model=teacher.config.model)
    abstract = nnx.eval_shape(lambda: own.build_model(nnx.Rngs(0)))
    params = names.to_jax(teacher.weights)
    shardings = parallel.shardings(mesh, params, type(abstract).__name__, teacher.config.model)
    return nnx.merge(nnx.graphdef(abstract), jax.device_put(params, shardings))


def loss(task: Any, student: Any, teacher: Any, batch: dict[str, Array], key: Array | None) -> Totals:
    """Return the task's totals for the student, with the training loss as `loss`, a weighted sum of three:

    the cross-entropy with the labels, the KL divergence from the teacher, and 1 - cosine of the last hidden states. The
    teacher has no dropout.
    """
    settings, positions = task.config.distill, batch.get("positions", batch.get("last"))
    segments_BT, types = batch.get("segments"), (batch["types"],) if "types" in batch else ()
    logits, x_BTD = student(batch["tokens"], key, positions, True, segments_BT, *types)
    target_logits, target_BTD = teacher(batch["tokens"], None, positions, True, segments_BT, *types)
    totals = task.totals(logits, batch["labels"])
    is_pad_BT = batch["tokens"] == student.base.config.pad_id
    if segments_BT is not None:
        is_pad_BT |= segments_BT == 0
    sums = {
        "soft": soft_loss(logits, target_logits, batch["labels"], settings.temperature),
        "hard": totals["loss"],
        "cosine": cosine_loss(x_BTD, target_BTD, is_pad_BT, batch["labels"], positions, segments_BT)
        if settings.cosine_weight
        else 0.0,
    }
    return {**totals, "loss": sum(getattr(settings, f"{name}_weight") * x for name, x in sums.items())}


def soft_loss(logits: Array, target_logits: Array, labels: Array, temperature: float) -> Array:
    """Return the sum of KL(teacher || student) at a temperature, times its square.

    logits [..., V], labels [...]; negative labels are ignored. The square keeps gradients at the scale of those of the
    labels (arXiv 1503.02531, section 2).
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    log_p, log_q = (jax.nn.log_softmax(x.astype(dtype) / temperature) for x in (target_logits, logits))
    divergences = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return temperature**2 * jnp.sum(jnp.where(labels >= 0, divergences, 0))


def cosine_loss(
    x_BTD: Array,
    target_BTD: Array,
    is_pad_BT: Array,
    labels: Array,
    positions_BM: Array | None = None,
    segments_BT: Array | None = None,
) -> Array:
    """Return the sum over samples of the mean of 1 - cosine over their tokens, times their number of labels.

    labels [B] or [B, M]. Divided by the number of all labels, this is a mean that does not depend on how a batch is
    split. In packed rows, samples are the documents, and labels are at `positions_BM`.
    """
    norms_BT = jnp.sqrt(jnp.sum(x_BTD**2, axis=-1) * jnp.sum(target_BTD**2, axis=-1))
    apart_BT = 1 - jnp.sum(x_BTD * target_BTD, axis=-1) / jnp.maximum(norms_BT, 1e-8)
    apart_BT = jnp.where(is_pad_BT, 0, apart_BT)
    if segments_BT is not None and positions_BM is not None:
        of_labels_BM = jnp.where(labels >= 0, jnp.take_along_axis(segments_BT, positions_BM, axis=1), -1)
        of_tokens_BT = jnp.where(is_pad_BT, -1, segments_BT)
        n_BT, n_labels_BT = (
            jnp.sum(segments_BT[:, :, None] == x[:, None, :], axis=2) for x in (of_tokens_BT, of_labels_BM)
        )
        return jnp.sum(apart_BT * n_labels_BT / jnp.maximum(n_BT, 1))
    n_B = jnp.maximum(jnp.sum(~is_pad_BT, axis=1), 1)
    mean_B = jnp.sum(apart_BT, axis=1) / n_B
    return jnp.sum(mean_B * jnp.sum(labels.reshape(len(labels), -1) >= 0, axis=1))
