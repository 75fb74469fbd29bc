"""The order of samples and the batches made of them, ahead of the device, with grain."""

from collections.abc import Iterator

import grain
import numpy as np

from jaxlm.data.samples import Batch, Samples


def training_batches(
    samples: Samples, batch_size: int, accumulate: int, seed: int, first_step: int = 0
) -> Iterator[Batch]:
    """Yield the batches of each update from `first_step` on, without end: arrays [A, B, ...].

    Each epoch is a new permutation of all samples. Update i uses samples i * A * B and on of this endless order, so
    that the position in the data is the number of updates, and no state of its own.
    """
    per_step = batch_size * accumulate
    n = len(samples)
    # shuffle permutes each pass over the range anew.
    order = grain.MapDataset.range(n).seed(seed).shuffle().repeat()

    def load(step: int) -> Batch:
        places = np.arange(step * per_step, (step + 1) * per_step)
        indices = np.array([order[int(place)] for place in places])
        batch = samples.batch(indices, places // n)
        return {name: x.reshape(accumulate, batch_size, *x.shape[1:]) for name, x in batch.items()}

    steps = grain.MapDataset.range(first_step, np.iinfo(np.int64).max // per_step).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def evaluation_batches(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """Yield batches [B, ...] with every sample once, in order; the last is filled up with rows that count nothing."""
    for start in range(0, len(samples), batch_size):
        indices = np.arange(start, min(start + batch_size, len(samples)))
        filled = np.pad(indices, (0, batch_size - len(indices)), mode="edge")
        batch = samples.batch(filled, np.zeros_like(filled))
        batch["labels"][len(indices) :] = -1
        yield batch
