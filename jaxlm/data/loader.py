"""The order of samples and the batches made of them, ahead of the device, with grain."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from jaxlm.config import TrainConfig
from jaxlm.data import mixture
from jaxlm.data import position as positions
from jaxlm.data.mixture import Mix
from jaxlm.data.position import Position
from jaxlm.data.samples import IGNORED, Batch, Samples, uniform

Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # places to samples and their epochs
START = Position()
GROUP = 64  # updates whose samples are sorted by length, with train.group_by_length


def training_batches(
    samples: Samples, train: TrainConfig, position: Position = START, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield the batches of each update from a position on, without end: arrays [A, B, ...].

    `rows` are those of each batch that this process needs, all by default: no other is read.

    Each epoch is a new permutation of all samples. Which samples an update uses is a function of the position alone,
    so that there is no other state, and no process or device has a say in it.

    With train.group_by_length the samples of some updates in a row are dealt out to them anew, those of like length to
    one, and the arrays of an update are cut to its longest sample.
    """
    B = train.batch_size
    rows = np.arange(B) if rows is None else rows
    at = order_of(samples, train, position)
    regrouped = _by_length(samples, at, train)

    def load(step: int) -> Batch:
        first, n_batches = position.first(step, train), positions.n_batches(step, train)
        places = (first + np.arange(n_batches * B)).reshape(n_batches, B)
        if train.group_by_length:
            places = regrouped(places)
        batch = samples.batch(*at(places[:, rows].ravel()))
        if train.group_by_length:
            batch = samples.cut(batch, _shape(samples, at(places.ravel())[0]))
        return {name: x.reshape(n_batches, len(rows), *x.shape[1:]) for name, x in batch.items()}

    most = np.iinfo(np.int64).max // (2 * train.accumulate * B)
    steps = grain.MapDataset.range(position.step, most).map(load)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def order_of(samples: Samples, train: TrainConfig, position: Position = START) -> Order:
    """Return which sample is at each of some places of the endless order, and in which epoch that is."""
    parts = list(mixture.parts_of(samples).values())
    sizes = np.array([len(part) for part in parts])
    # shuffle permutes each pass over the range anew.
    shuffled = [grain.MapDataset.range(n).seed(train.seed).shuffle().repeat() for n in sizes.tolist()]
    sources = samples.order(train, position) if isinstance(samples, Mix) else lambda places: (0 * places, places)

    if train.sampling == "weighted":
        n, ends = len(samples), np.cumsum(np.array(train.weights)[samples.labels.astype(int)])

        def drawn(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            random = uniform(train.seed, places // n, places % n, 1)[:, 0]
            return np.searchsorted(ends, random * ends[-1], side="right"), places // n

        return drawn

    def order(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, number = sources(places)
        inside = np.array([shuffled[i][n] for i, n in zip(source.tolist(), number.tolist(), strict=True)])
        return (np.cumsum(sizes) - sizes)[source] + inside, number // sizes[source]

    return order


@dataclass(frozen=True)
class Chosen:
    """The samples of a split that an evaluation scores."""

    split: str
    indices: np.ndarray  # ascending
    n_tokens: int
    share: float  # of all tokens of the split; 1.0: every sample is chosen

    def constants(self, samples: Samples) -> dict[str, float]:
        """Return the constants of the samples, such as bytes, in the proportion of the tokens that are scored."""
        return {name: x if self.share == 1 else x * self.share for name, x in samples.constants.items()}


def choose(samples: Samples, split: str, numbers: Sequence[int], seed: int) -> list[Chosen]:
    """Return samples of each of some numbers of tokens, or a little more, drawn at random; all for 0 or if fewer.

    They depend on the samples and the seed alone, so that they are the same in each process and after a resume.
    """
    indices = np.arange(len(samples))
    lengths = samples.lengths(indices)
    total, found = int(lengths.sum()), []
    for n_tokens in numbers:
        chosen = indices
        if 0 < n_tokens < total:
            order = np.argsort(uniform(seed, np.zeros_like(indices), indices, 1)[:, 0], kind="stable")
            n = int(np.searchsorted(np.cumsum(lengths[order]), n_tokens)) + 1
            chosen = np.sort(order[:n])
        n_chosen = int(lengths[chosen].sum())
        found.append(Chosen(split, chosen, n_chosen, n_chosen / total if len(chosen) < len(indices) else 1.0))
    return found


def evaluation_batches(
    samples: Samples,
    batch_size: int,
    rows: np.ndarray | None = None,
    are_cut: bool = False,
    chosen: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yield batches [B, ...] with every sample once, in order; the last is filled up with rows that count nothing.

    `rows` as in training_batches. If they `are_cut`, each has no more positions than its longest sample needs.
    `chosen` are the indices of the samples, all by default.
    """
    rows = np.arange(batch_size) if rows is None else rows
    chosen = np.arange(len(samples)) if chosen is None else chosen
    for start in range(0, len(chosen), batch_size):
        indices = chosen[np.minimum(start + rows, len(chosen) - 1)]
        batch = samples.batch(indices, np.zeros_like(indices))
        batch["labels"][start + rows >= len(chosen)] = ignored(batch["labels"])
        if are_cut:
            batch = samples.cut(batch, _shape(samples, chosen[start : start + batch_size]))
        yield batch


def ignored(labels: np.ndarray) -> float:
    """Return the label that counts nothing: NaN where labels are numbers to predict, -1 where they are classes."""
    return np.nan if np.issubdtype(labels.dtype, np.floating) else IGNORED


def _by_length(samples: Samples, at: Order, train: TrainConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Return a permutation of places in the order of samples, within groups of updates, that sorts them by length."""
    size = GROUP * train.accumulate * train.batch_size

    @functools.lru_cache(maxsize=2)
    def group(number: int) -> np.ndarray:
        places = np.arange(number * size, (number + 1) * size)
        sorted_places = places[np.argsort(samples.lengths(at(places)[0]), kind="stable")]
        shuffled = np.argsort(uniform(train.seed, np.full(GROUP, number), np.arange(GROUP), 1)[:, 0])
        return sorted_places.reshape(GROUP, -1)[shuffled].ravel()

    def regrouped(places: np.ndarray) -> np.ndarray:
        numbers = places // size
        found = np.zeros_like(places)
        for number in np.unique(numbers).tolist():
            found = np.where(numbers == number, group(number)[places % size], found)
        return found

    return regrouped


def _shape(samples: Samples, indices: np.ndarray) -> int:
    """Return how many positions a batch of these samples gets: few different numbers, as each compiles a step."""
    longest = int(samples.lengths(indices).max())
    step = max(8, 2 ** (longest - 1).bit_length() // 4)  # at most 4 between a power of two and the next
    return min(-(-longest // step) * step, samples.seq_len)
