"""The teacher of a distillation: checks that it fits the student, and reads its weights. distill.py has the loss."""

import dataclasses
import hashlib
from pathlib import Path

from jaxlm import config as configs
from jaxlm.config import BASE, Config
from jaxlm.errors import UserError
from jaxlm.params.names import Arrays
from jaxlm.tasks import TASKS
from jaxlm.weights import snapshots

# Settings that teacher and student must share, so that they see the same samples and have comparable outputs.
SHARED = (
    *("task", "model.seq_len", "model.vocab_size", "model.pad_id", "model.pooling", "model.head_outputs"),
    "data.n_labels",
)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model: settings, and weights under torchlm's names."""

    config: Config
    weights: Arrays
    fingerprint: str  # of the weights

    def every_layer(self, n_layers: int) -> Arrays:
        """Return the weights of a student with `n_layers` of the layers: every k-th, from the first one."""
        every, weights = self.config.model.n_layers // n_layers, {}
        for name, x in self.weights.items():
            if name.startswith("base.blocks."):
                _, _, i, rest = name.split(".", 3)
                if int(i) % every:
                    continue
                name = f"base.blocks.{int(i) // every}.{rest}"
            weights[name] = x
        return weights


def check(config: Config, teacher: Config, is_start: bool) -> None:
    """Raise UserError if a teacher with these settings does not fit; `is_start`: the student starts from its layers."""
    named = f"distill.teacher={config.distill.teacher}"
    if teacher.task == BASE:
        raise UserError(f"{named}: it has no output layer; train one with --init-from, and give that run")
    if not hasattr(TASKS[config.task], "totals"):
        raise UserError(f"{named}: task={config.task} has no distillation; use mlm, sst2, cola or a task based on one")
    for name in (*SHARED, "model.d_model") if config.distill.cosine_weight else SHARED:
        value, expected = configs.get(config, name), configs.get(teacher, name)
        if value != expected and not (name == "data.n_labels" and not value):  # 0: as many as the teacher has
            why = ", since distill.cosine_weight compares hidden states" if name == "model.d_model" else ""
            raise UserError(f"{name}={value}, but {named} has {expected}; both must be equal{why}")
    n, n_layers = teacher.model.n_layers, config.model.n_layers
    if is_start and n % n_layers:
        fits = [str(k) for k in range(1, n + 1) if n % k == 0]
        raise UserError(
            f"model.n_layers={n_layers}: the student starts from every k-th of the {n} layers of {named}; "
            f"use one of {', '.join(fits)}, or another start by --init-from"
        )


def load(path: Path, expected: str = "") -> Teacher:
    """Return the teacher in a checkpoint. Raises UserError if its weights have another fingerprint than expected."""
    snapshot = snapshots.read(path).merge_adapters()
    digest = hashlib.sha256()
    for name, x in sorted(snapshot.weights.items()):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(x.tobytes())
    if expected and expected != digest.hexdigest():
        raise UserError(
            f"{path}: its weights differ from those of the run's teacher at its start; "
            "give that teacher with --distill.teacher, or start a new run with --init-from"
        )
    return Teacher(snapshot.config, snapshot.weights, digest.hexdigest())
