"""Packed rows against the same documents one to a row: an update of each package, and what it learns from."""

from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data import packing
from jaxlm.data.cache import Split
from jaxlm.tasks import TASKS
from jaxlm.training.teacher import Teacher
from parity_tests.compare.rows import Row
from parity_tests.compare.tolerances import FLOAT64
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES, Package, Scalars
from parity_tests.plan import Batch, random_weights
from parity_tests.trajectory import _Rows

SPECIALS = {"pad": 0, "mask": 1, "start": 2, "end": 3, "article": 4}
N_DOCUMENTS, LONGEST = 24, 13
SIZES = {"model.seq_len": 28, "train.warmup_steps": 0, "train.accumulate": 1, "data.pack": "documents"}


def packed(task: str, is_distilled: bool = False, **changes: Any) -> list[Row]:
    """Return how far an update from packed rows is from one of the same documents unpacked, and from the other package.

    Losses, counts, and first moments, which are a share of the gradients; in float64.
    """
    config = config_of(task, **SIZES, **changes)
    batches = [batch_of(config, is_packed) for is_packed in (False, True)]
    assert len(batches[1]["tokens"]) < 0.7 * len(batches[0]["tokens"])
    teacher = Teacher(config, random_weights(config, seed=9), "") if is_distilled else None
    name, found = f"{task}, packed", []
    rows = []
    for package in PACKAGES:
        want, got = (_updated(package, config, batch, teacher) for batch in batches)
        rows += _apart(name, package.name, config, got, want)
        found.append(got)
    return rows + (_apart(name, "jaxlm, torchlm", config, *found) if len(found) > 1 else [])


def batch_of(config: Config, is_packed: bool) -> Batch:
    """Return all of some random documents as one batch."""
    random = np.random.default_rng(1)
    sizes = random.integers(1, LONGEST, N_DOCUMENTS)
    tokens = random.integers(len(SPECIALS), config.model.vocab_size, sizes.sum())
    labels = random.integers(0, config.data.n_classes, N_DOCUMENTS)
    split = Split(tokens, np.concatenate([[0], np.cumsum(sizes)]), labels, sizes)
    samples = packing.samples_of(TASKS[config.task].samples, split, config, SPECIALS, config.model.vocab_size)
    samples = samples if is_packed else samples.unpacked
    indices = np.arange(len(samples))
    return samples.batch(indices, np.zeros_like(indices))


def _updated(
    package: type[Package], config: Config, batch: Batch, teacher: Teacher | None
) -> tuple[Scalars, dict[str, np.ndarray]]:
    state = package(config, random_weights(config, seed=3), "float64")
    state.start(package.schedule.learning_rate(config.train), teacher=teacher)
    metrics = state.update({name: x[None] for name, x in batch.items()})
    return metrics, state.moments()[0]


def _apart(name: str, package: str, config: Config, got: Any, want: Any) -> list[Row]:
    rows = _Rows(name, package, config)
    for key in ("count", "correct"):
        rows.add(f"{key} of labels", abs(int(got[0][key]) - int(want[0][key])), 1, 0)
    rows.add("loss", abs(got[0]["loss"] - want[0]["loss"]), want[0]["loss"], FLOAT64.loss)
    rows.add_tensors("first moments", got[1], want[1], FLOAT64.moments, FLOAT64.moments_of_key_biases)
    return rows.rows
