"""From labels as files have them to the numbers of classes."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from jaxlm.data.parts import SPLITS, Part, no_article
from jaxlm.errors import UserError, nearest

INTEGER = re.compile(r"[+-]?[0-9]{1,400}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|[0-9]*\.[0-9]+|[0-9]+(?=e[+-]))(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
MANY, MOST_CLASSES = 20, 100_000  # classes that may have one article each, and of any kind, unless data.n_labels is set


def numbered(n: int) -> tuple[str, ...]:
    """Return the names of classes that are called by their numbers."""
    return tuple(map(str, range(n)))


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first of some names for a person, and how many more there are."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most]]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([name if name.isprintable() else repr(name) for name in shown] + more)


def label_of(part: Part, number: int, value: Any) -> str:
    """Return the class that a label names, in one spelling whatever the format of the file.

    Raises UserError for what names no class.
    """
    if isinstance(value, bool | int) and 0 <= value < len(part.table.names):
        return part.table.names[value]
    if value is not None and not isinstance(value, bool | int | float | Decimal | str):
        rule = f"the label is of type {type(value).__name__}, not one word or number a row"
        raise part.bad(number, f"{rule}; write the class as text, or set data.label_column")
    # NaN is how tables of numbers have a missing one.
    name = "" if value is None or value != value else _spelled(str(value))
    if not name:
        raise part.bad(number, "the label is missing; write one, leave the row out, or set data.label_column")
    if DECIMAL.fullmatch(name) or re.fullmatch(r"[+-]?(inf|infinity|nan)", name.lower()):
        rule = f"label {value!r} is no class: classes are words, true and false, or whole numbers"
        mend = "write words or whole numbers (--task regress predicts numbers)"
        raise part.bad(number, f"{rule}; {mend}, or set data.label_column")
    return name


def set_of(part: Part, number: int, value: Any) -> tuple[str, ...]:
    """Return the classes of a text that may have several: those of a list, or of a text with , ; or | between them."""
    if value is None or value != value:
        return ()
    parts = (
        re.split("[,;|]", value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    return tuple(dict.fromkeys(label_of(part, number, x) for x in parts if not isinstance(x, str) or x.strip()))


def classes_of_sets(part: Part, rows: Iterable[tuple[Any, ...]], n: int) -> Sequence[str]:
    """Return the names of the classes that rows for training have; `n` is data.n_labels. Raises UserError."""
    found = {name for _, split, _, names, *_ in rows if split == "train" for name in names}
    known = part.table.names or numbered(n)
    if found and found <= set(known) and n in (0, len(known)):
        return known
    if len(found) < 2 or n and n != len(found):
        rule = f"the labels make {len(found)} classes, {listed(sorted(found))}" + (
            f", not data.n_labels={n}" if n else ""
        )
        raise UserError(f"{part.name}: {rule}; correct the labels, or set data.label_column or data.n_labels")
    return sorted(found, key=int if all(map(INTEGER.fullmatch, found)) else None)


def value_of(part: Part, number: int, value: Any) -> str:
    """Return a number to predict, as text. Raises UserError for what is not a finite number."""
    text = "" if value is None else str(value).strip()
    try:
        is_finite = math.isfinite(float(text))
    except ValueError:
        is_finite = False
    if not is_finite or isinstance(value, bool):
        rule = f"the label {value!r} is not a finite number" if text else "the label is missing"
        raise part.bad(number, f"{rule}; correct it, leave the row out, or set data.label_column")
    return "-1" if float(text) == -1 else text  # in one spelling: all rows of a test part with it are hidden


def _spelled(label: str) -> str:
    """Return a label in one spelling: 1.0, 1.00e+00 and 01 are "1", and TRUE is "true"."""
    name = label.strip()
    if DECIMAL.fullmatch(name) and (x := Decimal(name)) == x.to_integral_value():
        name = str(int(x))
    if INTEGER.fullmatch(name):
        return str(int(name))
    return name.lower() if name.lower() in ("true", "false") else name


def _folded(label: str) -> str:
    """Return what labels have in common that look alike: that differ in case, blanks or the form of their letters."""
    return "".join(unicodedata.normalize("NFKC", _spelled(label)).casefold().split())


@dataclass
class Labels:
    """The labels of the parts for training, counted by the split that each article falls into."""

    parts: list[Part]
    n_labels: int  # data.n_labels
    known: Sequence[str]  # classes of a model that the labels are for; (): they make the classes
    notes: list[str]
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    places: dict[tuple[str, str], str] = field(default_factory=dict)  # where a split has a label first

    def read(self, part: Part, rows: Iterable[tuple[Any, ...]], has_doubtful_header: bool) -> None:
        """Count the labels of a part's (number, split, text, label, ...). Raises UserError for too many classes."""
        first = ("", "")
        for number, split, _, label, *_ in rows:
            self.counts[split][label] += 1
            first = first if first[1] else (label, part.place(number))
            if (split, label) not in self.places:
                self.places[split, label] = part.place(number)
                if len(self.counts["train"]) > MOST_CLASSES and not self.n_labels and not self.known:
                    raise self._too_many(part)
        if not first[1]:
            raise no_article(part.name)
        if has_doubtful_header:
            self._check_first(*first)

    def classes(self) -> tuple[Sequence[str], dict[str, int]]:
        """Return the names of the classes, and the number of each label.

        Raises UserError for labels that make no classes, and for one outside of train that train lacks.
        """
        classes = self.known or self._new_classes()
        ids = self._known_ids() if self.known else {name: i for i, name in enumerate(classes)}
        for (_, label), place in self.places.items():
            if label not in ids:
                raise unknown(place, label, ids)
        return classes, ids

    def _check_first(self, label: str, place: str) -> None:
        """Raise UserError if the label of the first row of a table looks like the name of a column."""
        counts: Counter[str] = sum(self.counts.values(), Counter())
        others = [other for other in counts if other != label]
        if others and counts[label] == 1 and label not in self.known and not INTEGER.fullmatch(label):
            is_among_classes = len(others) > 1 and all(counts[other] > 1 for other in others)
            if self.known or is_among_classes or all(INTEGER.fullmatch(other) for other in others):
                mend = "set data.header=yes if this line names the columns, or data.header=no if it does not"
                raise UserError(f"{place}: label {label!r} is in no other row; {mend}")

    def _known_ids(self) -> dict[str, int]:
        """Return the number of each label among the classes of a model. Raises UserError for one that it has not."""
        labels = {label for _, label in self.places}
        for ids, note in self._matches(labels):
            if labels <= ids.keys():
                self.notes += [note] if note else []
                return ids
        place, label = next((place, label) for (_, label), place in self.places.items() if label not in self.known)
        mend = " (--train.switch-training true begins with a new output layer)"
        raise UserError(f"{unknown(place, label, self.known)}{mend}")

    def _matches(self, labels: Iterable[str]) -> Iterator[tuple[dict[str, int], str]]:
        """Yield the ways to take labels as the known classes, with a note on each, the closest first."""
        known, declared = self.known, self.parts[0].table.names
        ids = {name: i for i, name in enumerate(known)}
        yield ids, ""
        spelled, folded = ({key(name): i for name, i in ids.items()} for key in (_spelled, _folded))
        if len(spelled) == len(known):
            yield spelled, ""
        if len(folded) == len(known):
            alike = {label: folded[_folded(label)] for label in labels if _folded(label) in folded}
            yield ids | alike, f"labels are matched with the classes {listed(known)} whatever their case and blanks"
        if tuple(known) == numbered(2):
            yield {"false": 0, "true": 1}, "labels are taken as numbers: false is the class 0, true the class 1"
        are_numbers = any(INTEGER.fullmatch(name) for name in known)
        for prefix in ("LABEL_", *([] if are_numbers else [""])):  # transformers makes up LABEL_0 and on
            by_number = {f"{prefix}{i}": i for i in range(len(known))}
            yield by_number, f"labels are taken as the numbers, from 0, of the classes {listed(known)}"
        if tuple(known) == numbered(len(declared)):
            yield {name: i for i, name in enumerate(declared)}, ""

    def _new_classes(self) -> Sequence[str]:
        """Return the classes, in order, that the labels make. Raises UserError for fewer than two."""
        labels, part, n = self.counts["train"], self.parts[0], self.n_labels
        if set(labels) <= set(part.table.names) and (not n or n == len(part.table.names)):
            return part.table.names
        if n > 1 and set(labels) <= set(numbered(n)):
            return numbered(n)
        words = [name for name in labels if not INTEGER.fullmatch(name)]
        classes = sorted(labels, key=None if words else int)
        rarest = min(classes, key=labels.__getitem__)
        if len(classes) == 1:
            rule = f"all labels of the training part are {listed(classes)}, and a classifier needs two classes or more"
            raise UserError(f"{part.name}: {rule}; add rows with other labels, or set data.label_column")
        if n and n != len(classes):
            rule = f"data.n_labels={n}, but the labels make {len(classes)} classes, {listed(classes)}"
            mend = f"correct the labels, or leave data.n_labels out; the rarest, {listed([rarest])}, is first in"
            raise UserError(f"{rule}; {mend} {self.places['train', rarest]}")
        if not n and 0 < len(words) < len(classes):
            rule = f"label {words[0]!r} is a word, but others are numbers ({listed(classes)})"
            mend = f"correct it, or set data.n_labels={len(classes)} if all of them are classes"
            raise UserError(f"{self.places['train', words[0]]}: {rule}; {mend}")
        if not n and len(classes) > MANY and 2 * len(classes) > labels.total():
            raise self._too_many(part)
        self._note_doubtful(classes, rarest)
        return classes

    def _note_doubtful(self, classes: Sequence[str], rarest: str) -> None:
        """Note classes that are much alike or have one article only."""
        alike: dict[str, list[str]] = {}
        for name in classes:
            alike.setdefault(_folded(name), []).append(name)
        difference = "look alike: they differ in case, blanks or codes of letters only"
        self.notes += [
            f"the classes {' and '.join(map(repr, some))} {difference}" for some in alike.values() if len(some) > 1
        ]
        if n_single := sum(count == 1 for count in self.counts["train"].values()):
            which = f"such as {listed([rarest])} ({self.places['train', rarest]})"
            self.notes.append(f"{n_single} of {len(classes)} classes have one article to learn from, {which}")

    def _too_many(self, part: Part) -> UserError:
        labels = self.counts["train"]
        n, some = len(labels), listed(list(labels), 3)
        return UserError(
            f"{part.name}: its {labels.total()} labels make {n} or more classes ({some}): is its column that of the "
            "label? Set data.label_column, or data.n_labels to the number of classes"
        )


def weights(text: str, classes: Sequence[str], counts: Sequence[int]) -> tuple[float, ...]:
    """Return the weight of each class by train.class_weights; `counts` are the texts of each in the training part.

    If they are balanced, all classes weigh the same together, and a text weighs 1 on average. Raises UserError.
    """
    n_used, total = sum(n > 0 for n in counts), sum(counts)
    if text == "balanced":
        return tuple(total / (n_used * n) if n else 1.0 for n in counts)
    found, rule = dict.fromkeys(classes, 1.0), f"train.class_weights={text}"
    parts = text.split(",")
    named = all("=" in part for part in parts)
    if not named and len(parts) != len(classes):
        raise UserError(
            f"{rule}: there are {len(classes)} classes, {listed(classes)}; write NAME=WEIGHT,... or balanced"
        )
    for part, own in zip(parts, parts if named else classes, strict=True):
        name, weight = (part.rpartition("=")[0].strip(), part.rpartition("=")[2]) if named else (own, part)
        if name not in found:
            raise UserError(f"{rule}: {name!r} is none of the classes {listed(classes)}{nearest(name, classes)}")
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < math.inf:
            raise UserError(f"{rule}: the weight of {name}, {weight!r}, is no number of 0 or more; correct it")
    if not any(weight for weight, n in zip(found.values(), counts, strict=True) if n):
        raise UserError(f"{rule}: all weights are 0, for the classes of the training texts; raise one")
    return tuple(found.values())


def unknown(place: str, label: str, classes: Iterable[str]) -> UserError:
    """Return the error for a label that is no class."""
    classes = list(classes)
    what = f"label {label!r} is none of the classes {listed(classes)}{nearest(label, classes)}"
    return UserError(f"{place}: {what}; correct it, leave the row out, or train with rows that have it")
