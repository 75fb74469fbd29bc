"""The order of samples and the batches made of them, ahead of the device, with grain."""

from collections.abc import Iterator

import grain
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.data import position as positions
from jaxlm.data.position import Position
from jaxlm.data.samples import Batch, Samples

START = Position()


def training_batches(samples: Samples, train: TrainConfig, position: Position = START) -> Iterator[Batch]:
    """Yield the batches of each update from a position on, without end: arrays [A, B, ...].

    Each epoch is a new permutation of all samples. Which samples an update uses is a function of the position alone,
    so that there is no other state, and no process or device has a say in it.
    """
    n, B = len(samples), train.batch_size
    # shuffle permutes each pass over the range anew.
    order = grain.MapDataset.range(n).seed(train.seed).shuffle().repeat()

    def load(step: int) -> Batch:
        first, n_batches = position.first(step, train), positions.n_batches(step, train)
        places = np.arange(first, first + n_batches * B)
        indices = np.array([order[int(place)] for place in places])
        batch = samples.batch(indices, places // n)
        return {name: x.reshape(n_batches, B, *x.shape[1:]) for name, x in batch.items()}

    most = np.iinfo(np.int64).max // (2 * train.accumulate * B)
    steps = grain.MapDataset.range(position.step, most).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluation_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """Yield batches [B, ...] with every sample once, in order; the last is filled up with rows that count nothing."""
    for start in range(0, len(samples), batch_size):
        indices = np.arange(start, min(start + batch_size, len(samples)))
        filled = np.pad(indices, (0, batch_size - len(indices)), mode="edge")
        batch = samples.batch(filled, np.zeros_like(filled))
        batch["labels"][len(indices) :] = -1
        yield batch
