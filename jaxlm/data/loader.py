"""The order of samples and the batches made of them, ahead of the device, with grain."""

from collections.abc import Iterator

import grain
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.data import position as positions
from jaxlm.data.position import Position
from jaxlm.data.samples import Batch, Samples

START = Position()


def training_batches(
    samples: Samples, train: TrainConfig, position: Position = START, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield the batches of each update from a position on, without end: arrays [A, B, ...].

    `rows` are those of each batch that this process needs, all by default: no other is read.

    Each epoch is a new permutation of all samples. Which samples an update uses is a function of the position alone,
    so that there is no other state, and no process or device has a say in it.
    """
    n, B = len(samples), train.batch_size
    rows = np.arange(B) if rows is None else rows
    # shuffle permutes each pass over the range anew.
    order = grain.MapDataset.range(n).seed(train.seed).shuffle().repeat()

    def load(step: int) -> Batch:
        first, n_batches = position.first(step, train), positions.n_batches(step, train)
        places = (first + B * np.arange(n_batches)[:, None] + rows).ravel()
        indices = np.array([order[int(place)] for place in places])
        batch = samples.batch(indices, places // n)
        return {name: x.reshape(n_batches, len(rows), *x.shape[1:]) for name, x in batch.items()}

    most = np.iinfo(np.int64).max // (2 * train.accumulate * B)
    steps = grain.MapDataset.range(position.step, most).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluation_batches(samples: Samples, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """Yield batches [B, ...] with every sample once, in order; the last is filled up with rows that count nothing.

    `rows` as in training_batches.
    """
    rows = np.arange(batch_size) if rows is None else rows
    for start in range(0, len(samples), batch_size):
        indices = np.minimum(start + rows, len(samples) - 1)
        batch = samples.batch(indices, np.zeros_like(indices))
        batch["labels"][start + rows >= len(samples)] = -1
        yield batch
