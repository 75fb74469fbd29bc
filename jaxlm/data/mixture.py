"""Several sources in one endless order of samples: the source of each, and its number there, follow from its place.

The order is made of stretches, in which the rates of the sources stay the same. One ends where weights change
(data.weights_after), where a source has had all its epochs, or where a run resumed with
other sources or weights. A checkpoint has the stretch that it is in, and how many samples of each source are used.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data.position import Position
from jaxlm.data.samples import Batch, Samples
from jaxlm.data.sources import Source
from jaxlm.errors import UserError

RATES = 1 << 20  # what the rates of a stretch sum to
SPREAD = 1 << 20  # samples, at most, whose lengths stand for those of all
Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # places to sources, and numbers of samples there


class MixedSamples:
    """The samples of several sources, one source after another, as any other samples are; `parts` are by name."""

    def __init__(self, parts: Mapping[str, Samples]):
        self.parts, first = dict(parts), next(iter(parts.values()))
        self.ends = np.cumsum([len(part) for part in parts.values()])
        self.begins = self.ends - [len(part) for part in parts.values()]
        self.reads, self.seq_len, self.cut, self.n_tokens = first.reads, first.seq_len, first.cut, first.n_tokens
        self.constants = {
            name: sum(part.constants[name] for part in parts.values() if len(part)) for name in first.constants
        }

    @property
    def unpacked(self) -> "MixedSamples":
        return MixedSamples({name: getattr(part, "unpacked", part) for name, part in self.parts.items()})

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        batch: Batch = {}
        for rows, part, inside in self._by_part(indices):
            for name, x in part.batch(inside, epochs[rows]).items():
                batch.setdefault(name, np.empty((len(indices), *x.shape[1:]), x.dtype))[rows] = x
        return batch

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(indices), np.int64)
        for rows, part, inside in self._by_part(indices):
            lengths[rows] = part.lengths(inside)
        return lengths

    def _by_part(self, indices: np.ndarray) -> list[tuple[np.ndarray, Samples, np.ndarray]]:
        """Return for each part the rows of `indices` that are of it, the part, and their indices in it."""
        of = np.searchsorted(self.ends, indices, side="right")
        rows = [(np.flatnonzero(of == i), i, part) for i, part in enumerate(self.parts.values())]
        return [(at, part, indices[at] - self.begins[i]) for at, i, part in rows if len(at)]

    def counted_tokens(self) -> np.ndarray:
        parts: list[Any] = list(self.parts.values())
        counts = [part.counted_tokens() for part in parts]
        return np.sum([np.pad(x, (0, max(map(len, counts)) - len(x))) for x in counts], axis=0)


def parts_of(samples: Any) -> dict[str, Samples]:
    """Return the samples of each source by its name, which is "" for one alone."""
    return samples.parts if isinstance(samples, MixedSamples) else {"": samples}


@dataclass(frozen=True)
class Stretch:
    """Part of the order of samples, from `place` on, when `before` samples of each source are used."""

    place: int
    before: np.ndarray  # [S], int64
    rates: np.ndarray  # [S], int64, of the sum RATES

    def counts(self, place: int) -> np.ndarray:
        """Return how many samples of each source are used before a place, [S]: at most 1 off the rates' share."""
        left, counts = place - self.place, []
        for rate, rest in zip(self.rates, np.cumsum(self.rates[::-1])[::-1], strict=True):
            counts.append(_share(left, rate, rest))
            left -= counts[-1]
        return self.before + np.array(counts, np.int64)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place, and its number among the samples that the run takes from there."""
        left, source, number = places - self.place, np.full(len(places), -1), np.zeros(len(places), np.int64)
        for i, (rate, rest) in enumerate(zip(self.rates, np.cumsum(self.rates[::-1])[::-1], strict=True)):
            first = _share(left, rate, rest)
            is_here = (source < 0) & (_share(left + 1, rate, rest) > first)
            source, number = np.where(is_here, i, source), np.where(is_here, self.before[i] + first, number)
            left = left - first
        return source, number


def _share(n: Any, rate: int, rest: int) -> Any:
    """Return how many of the first n samples are of a source, if `rate` of `rest` are."""
    return (n * rate + rest // 2) // max(rest, 1) if rate else n * 0


class Mix(MixedSamples):
    """The samples to train on, and how they are mixed. `fingerprints` are those of the sources, by name."""

    def __init__(self, parts: Mapping[str, Samples], data: DataConfig, fingerprints: Mapping[str, str]):
        super().__init__(parts)
        self.fingerprints, self.after = list(fingerprints.values()), data.weights_after
        self.limits = [int(s.get("epochs", 0) * len(x)) for s, x in zip(data.sources, parts.values(), strict=True)]
        spread = [np.linspace(0, len(x) - 1, min(len(x), SPREAD)).astype(np.int64) for x in parts.values()]
        self.tokens = np.array([x.lengths(at).mean() for x, at in zip(parts.values(), spread, strict=True)])
        self.weights = [
            np.array(
                [s.get(key, n * len(x)) for s, n, x in zip(data.sources, self.tokens, parts.values(), strict=True)]
            )
            ** (1 / data.temperature)
            for key in ("weight", "weight_after")
        ]

    def order(self, train: TrainConfig, position: Position) -> Order:
        """Return the order of sources of a run that is at `position`. Raises UserError for too few samples."""
        stretches = self.stretches(train, position)
        begins = np.array([stretch.place for stretch in stretches])

        def order(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            source, number = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
            of = np.searchsorted(begins, places, side="right") - 1
            for i in np.unique(of).tolist():
                source[of == i], number[of == i] = stretches[i].at(places[of == i])
            return source, number

        return order

    def stretches(self, train: TrainConfig, position: Position) -> list[Stretch]:
        """Return the stretches from that of `position` to the end of the run. Raises UserError for too few samples."""
        stored = position.mix.get("sources", {})
        used = np.array([stored.get(x, {}).get("used", 0) for x in self.fingerprints], np.int64)
        is_after = bool(self.after) and position.step >= self.after
        stretch = Stretch(position.sample, used, self._rates(is_after, used))
        rows = zip(self.parts, self.fingerprints, stretch.rates.tolist(), strict=True)
        if {(x, s["name"], s["rate"]) for x, s in stored.items() if s["rate"]} == {
            (x, name, n) for name, x, n in rows if n
        }:
            before = np.array([stored.get(x, {}).get("before", 0) for x in self.fingerprints], np.int64)
            stretch = Stretch(position.mix["place"], before, stretch.rates)
        end, found = position.first(max(train.max_steps, position.step), train), [stretch]
        change = position.first(self.after, train) if self.after and not is_after else end
        while True:
            place = min([end if is_after else change, *self._exhausted(stretch, end)])
            if place >= end:
                return found
            used, is_after = stretch.counts(place), is_after or place == change
            rates = self._rates(is_after, used)
            if not rates.sum():
                raise UserError(
                    f"data.sources: the epochs of all sources end after {place:,} samples, but train.max_steps="
                    f"{train.max_steps} takes {end:,}; lower it, or raise the epochs of a source"
                )
            if not np.array_equal(rates, stretch.rates):
                stretch = Stretch(place, used, rates)
                found.append(stretch)

    def state(self, train: TrainConfig, position: Position, place: int) -> dict[str, Any]:
        """Return the state of the order at a place, which a checkpoint stores to resume from there: Position.mix."""
        stretch = next(x for x in reversed(self.stretches(train, position)) if x.place <= place)
        rows = zip(self.parts, self.fingerprints, stretch.rates, stretch.before, stretch.counts(place), strict=True)
        stored = {
            fingerprint: {"name": name, "rate": int(rate), "before": int(before), "used": int(used)}
            for name, fingerprint, rate, before, used in rows
        }
        # Those that are left out in this phase may come back in the next.
        others = {x: s | {"rate": 0} for x, s in position.mix.get("sources", {}).items() if x not in stored}
        return {"place": stretch.place, "sources": stored | others}

    def describe(self, train: TrainConfig, position: Position) -> list[str]:
        """Return a line on each source: its share of the tokens, and how often a run passes over it."""
        stretches = self.stretches(train, position)
        n = stretches[-1].counts(position.first(max(train.max_steps, position.step), train))
        shares = [stretch.rates * self.tokens / np.sum(stretch.rates * self.tokens) for stretch in stretches]
        return [
            f"{name}: {', then '.join(f'{share[i]:.1%}' for share in shares)} of the tokens, "
            f"{n[i] / len(part):.2f} epochs of {len(part):,} samples in all"
            for i, (name, part) in enumerate(self.parts.items())
        ]

    def _rates(self, is_after: bool, used: np.ndarray) -> np.ndarray:
        """Return the rates of samples by which tokens have the weights of their sources, without exhausted ones."""
        is_left = np.array([not limit or n < limit for limit, n in zip(self.limits, used, strict=True)])
        rates = self.weights[int(is_after)] * is_left / self.tokens
        if not rates.sum():
            return np.zeros(len(rates), np.int64)
        whole = np.maximum(np.rint(rates / rates.sum() * RATES).astype(np.int64), rates > 0)
        whole[np.argmax(whole)] += RATES - whole.sum()
        return whole

    def _exhausted(self, stretch: Stretch, end: int) -> list[int]:
        """Return the places before `end` at which sources of a stretch have had all their epochs."""
        places = []
        for i, limit in enumerate(self.limits):
            if limit and stretch.rates[i] and stretch.counts(end)[i] >= limit:
                low, high = stretch.place, end  # used: below the limit, and at least the limit
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if stretch.counts(middle)[i] < limit else (low, middle)
                places.append(high)
        return places


def state_of(samples: Any, train: TrainConfig, position: Position, place: int) -> dict[str, Any]:
    """Return Position.mix of a run at a place; {} for a single source."""
    return samples.state(train, position, place) if isinstance(samples, Mix) else {}


def joined(sources: Mapping[str, Source]) -> Source:
    """Return several sources as one."""
    all_of = list(sources.values())
    return dataclasses.replace(
        all_of[0],
        description="; ".join(f"{name}: {source.description}" for name, source in sources.items()),
        fingerprint=" ".join(source.fingerprint for source in all_of),
        articles=lambda: (article for source in all_of for article in source.articles()),
        n_bytes=sum(source.n_bytes for source in all_of),
        notes=tuple(f"{name}: {note}" for name, source in sources.items() for note in source.notes),
        test_refusal="",
        place=functools.partial(_place, all_of),
    )


def _place(sources: Sequence[Source], text: str) -> str:
    return next(filter(None, (source.place(text) for source in sources)), "")
