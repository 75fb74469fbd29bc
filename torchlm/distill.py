"""The loss of a student that learns from a teacher. Source: DistilBERT, arXiv 1910.01108, section 2.

Letters as in model.py; N positions that have labels, or samples. Logits are computed only at these.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.training.teacher import Teacher
from torchlm.loss import Totals
from torchlm.parallel import Mesh


def model_of(teacher: Teacher, task: Any, mesh: Mesh) -> nn.Module:
    """Return the model of a teacher on the device; its matmuls compute in the task's type."""
    own = copy.copy(task)
    own.config = dataclasses.replace(task.config, model=teacher.config.model)
    model = own.build_model(torch.Generator())
    model.load_state_dict({name: torch.tensor(x) for name, x in teacher.weights.items()})
    return model.requires_grad_(False).to(mesh.device)


def loss(task: Any, student: Any, teacher: Any, batch: dict[str, Tensor], key: None) -> Totals:
    """Return the task's totals for the student, with the training loss as `loss`, a weighted sum of three:

    the cross-entropy with the labels, the KL divergence from the teacher, and 1 - cosine of the last hidden states. The
    teacher has no dropout.
    """
    settings, positions = task.config.distill, batch.get("positions", batch.get("last"))
    segments_BT, types = batch.get("segments"), (batch["types"],) if "types" in batch else ()
    logits, x_BTD = student(batch["tokens"], key, positions, True, segments_BT, *types)
    with torch.no_grad():
        target_logits, target_BTD = teacher.eval()(batch["tokens"], None, positions, True, segments_BT, *types)
    totals = task.totals(logits, batch["labels"])
    is_pad_BT = batch["tokens"] == task.config.model.pad_id
    if segments_BT is not None:
        is_pad_BT = is_pad_BT | (segments_BT == 0)
    sums = {
        "soft": soft_loss(logits, target_logits, batch["labels"], settings.temperature),
        "hard": totals["loss"],
        "cosine": cosine_loss(x_BTD, target_BTD, is_pad_BT, batch["labels"], positions, segments_BT)
        if settings.cosine_weight
        else 0.0,
    }
    return {**totals, "loss": sum(getattr(settings, f"{name}_weight") * x for name, x in sums.items())}


def soft_loss(logits: Tensor, target_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the sum of KL(teacher || student) at a temperature, times its square.

    logits [..., V], labels [...]; negative labels are ignored. The square keeps gradients at the scale of those of the
    labels (arXiv 1503.02531, section 2).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = ((x.to(dtype) / temperature).log_softmax(dim=-1) for x in (target_logits, logits))
    divergences = torch.sum(torch.exp(log_p) * (log_p - log_q), dim=-1)
    return temperature**2 * torch.sum(torch.where(labels >= 0, divergences, 0))


def cosine_loss(
    x_BTD: Tensor,
    target_BTD: Tensor,
    is_pad_BT: Tensor,
    labels: Tensor,
    positions_BM: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """Return the sum over samples of the mean of 1 - cosine over their tokens, times their number of labels.

    labels [B] or [B, M]. Divided by the number of all labels, this is a mean that does not depend on how a batch is
    split. In packed rows, samples are the documents, and labels are at `positions_BM`.
    """
    norms_BT = torch.sqrt(torch.sum(x_BTD**2, dim=-1) * torch.sum(target_BTD**2, dim=-1))
    apart_BT = 1 - torch.sum(x_BTD * target_BTD, dim=-1) / norms_BT.clamp(min=1e-8)
    apart_BT = torch.where(is_pad_BT, 0, apart_BT)
    if segments_BT is not None and positions_BM is not None:
        of_labels_BM = torch.where(labels >= 0, segments_BT.take_along_dim(positions_BM, dim=1), -1)
        of_tokens_BT = torch.where(is_pad_BT, -1, segments_BT)
        n_BT, n_labels_BT = (
            torch.sum(segments_BT[:, :, None] == x[:, None, :], dim=2) for x in (of_tokens_BT, of_labels_BM)
        )
        return torch.sum(apart_BT * n_labels_BT / n_BT.clamp(min=1))
    n_B = torch.sum(~is_pad_BT, dim=1).clamp(min=1)
    mean_B = torch.sum(apart_BT, dim=1) / n_B
    return torch.sum(mean_B * torch.sum(labels.reshape(len(labels), -1) >= 0, dim=1))
