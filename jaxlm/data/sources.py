"""From settings to a stream of articles, out of local files or a data set of the hub. Imports neither jax nor torch.

Files are streamed, and never held in memory as a whole: a line, row or article of more than utf8.LONGEST characters is
refused. The cells of a CSV file are text: nothing guesses types, which would make "2020-01-01" a date.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.errors import UserError, nearest
from jaxlm.io import utf8

SPLITS = ("train", "validation", "test")
STEMS = {"train": "train", "in_domain_train": "train"}  # file name before its first dot -> part
STEMS |= dict.fromkeys(("validation", "valid", "val", "dev", "in_domain_dev"), "validation")
STEMS |= dict.fromkeys(("test", "out_of_domain_dev"), "test")
PARQUET = b"PAR1"  # how such a file begins
FORMATS = {"txt": "text", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}
TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "review")
LABEL_COLUMNS = ("label", "labels", "acceptability", "target")
PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
ANSWER_COLUMNS = ("answer", "completion", "response", "output", "reply")
DELIMITERS = {"tsv": "\t,;|", "csv": ",;\t|"}  # the first, unless only another makes columns
EXCEL = re.compile(r'"?sep=.?"?[\r\n]')  # a first line that only says what the delimiter is
MOST_COLUMNS = 10_000
MOST_HEAD = 1 << 23  # characters in which the first row of a table ends
TITLE = re.compile(r"\s*= [^=].* =\s*")  # a full line; "= = Section = =" has "=" where a title has a word
CHECK_LIMIT = 200_000_000  # bytes; rows of a larger file are checked as they are used, not at the start
PROBE_S = 2  # that the hub has to answer; bad input is told within 5
BATCH = 1000  # rows
BATCH_BYTES = 1 << 30  # of a column in one batch, at most, if a row is no larger
PROMPT_END = "\n"  # between a prompt and its answer
CSV_END = "\0end of file\0"  # a line behind the last one, by which a quote that is still open is noticed
TWICE = ()  # value of a key that a JSON object has more than once; JSON has no tuples
HIDDEN = "-1"  # label of all rows of a test part whose labels are not published
INTEGER = re.compile(r"[+-]?[0-9]{1,400}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|[0-9]*\.[0-9]+|[0-9]+(?=e[+-]))(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
MANY, MOST_CLASSES = 20, 100_000  # classes that may have one article each, and of any kind, unless data.n_labels is set


Reads = Literal["text", "labels", "pairs"]  # what of a source is used: texts, these with labels, or prompts and answers


class Article(NamedTuple):
    split: str  # one of SPLITS
    text: str
    label: int  # number of its class, -1: none


@dataclass(frozen=True)
class Source:
    description: str  # for people
    fingerprint: str  # of the contents and of every setting that changes what articles() yields
    articles: Callable[[], Iterator[Article]]  # a new pass over all parts; raises UserError for a bad row
    n_bytes: int  # of the decompressed files or the text, about
    notes: tuple[str, ...] = ()  # lines to show at the start
    test_refusal: str = ""  # why there can be no test score, else ""
    place: Callable[[str], str] = lambda text: ""  # file and line of an article, for people; a pass over the source
    classes: tuple[str, ...] = ()  # their names by number; (): there are no labels, or they are such numbers


@dataclass(frozen=True)
class _Part:
    """A file, or a split of a hub set. `rows` yields (number, text, label), or (number, prompt, answer), as found."""

    name: str
    split: str
    format: str
    content: str  # hash
    size: int  # bytes, decompressed
    columns: tuple[Any, ...]  # text or prompt, label or answer (None: there is none), is there a header
    rows: Callable[[], Iterator[tuple[int, Any, Any]]]
    names: tuple[str, ...] = ()  # of the classes, where labels are declared as numbers of names

    def place(self, number: int) -> str:
        return f"{self.name}, {'row' if self.format in ('parquet', 'hub') else 'line'} {number}"


def open_source(config: DataConfig, reads: Reads, classes: Sequence[str] = ()) -> Source:
    """Return the source that `config.path` or `config.hub` names; files of up to CHECK_LIMIT bytes are checked in full.

    `classes` are those of the model that the labels are for; (): they are found in the training part, all of which is
    read for that. Raises UserError for what cannot be found, read or understood, and for a label of no class.
    """
    assert config.path or config.hub, "the embedded data is not a source"
    root, files, notes = _files(config)
    parts = _hub_parts(config, reads, {split for split, _ in files}, notes) if config.hub else []
    parts += [_file_part(path, split, config, reads) for split, path in files]
    parts.sort(key=lambda part: SPLITS.index(part.split))
    given = {part.split for part in parts}
    if "train" not in given:
        raise UserError(f"{root}: no train part, only {', '.join(sorted(given))}; choose a source that has one")
    shares = _shares(config, given)
    for split, share in shares.items():
        notes.append(f"no {split} part: {100 * share:g} % of articles split off by hash (data.{split}_fraction)")
    own = [split for split in SPLITS[1:] if split in given and not getattr(config, f"{split}_path")]
    unused = [f"{split}_fraction" for split in own] + ([] if shares else ["split_seed"])
    if any(part.format == "text" for part in parts):
        notes.append("each line of a text file is a document of its own")
    notes += [f"{part.name}: its columns are separated by {part.columns[3]!r}" for part in parts if part.columns[3:]]
    for name in unused:
        if getattr(config, name) != getattr(DataConfig(), name):
            notes.append(f"data.{name}={getattr(config, name)} has no effect: the source has parts of its own")
    refusal, classes, ids = _check_rows(parts, config, reads, shares, classes, notes)
    contents = [(p.split, p.format, p.columns, p.content) for p in parts]
    settings: list[Any] = [config.hub, config.hub_config, reads == "labels", config.split_seed if shares else 0]
    settings += [shares, contents]
    # Labels that are such numbers already were all that could be read once, and token caches of them are kept.
    numbers = {name: i for part in parts for i, name in enumerate(part.names)}
    if other := {name: i for name, i in ids.items() if str(numbers.get(name, name)) != str(i)}:
        settings.append(other)
    kinds = {part.format for part in parts}
    kind = f"{kinds.pop()} " if len(kinds) == 1 else ""
    size = f"{len(parts)} {kind}{'files' if len(parts) > 1 else 'file'}, {sum(p.size for p in parts) / 1e6:.1f} MB"
    if config.hub:
        size = ", ".join(dict.fromkeys(part.split for part in parts))
    return Source(
        description=f"{root} ({size})",
        fingerprint=hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        articles=partial(_articles, parts, config, reads, shares, ids),
        n_bytes=sum(part.size for part in parts),
        notes=tuple(notes),
        test_refusal=refusal,
        place=partial(_place, parts),
        classes=tuple(classes),
    )


def numbered(n: int) -> tuple[str, ...]:
    """Return the names of classes that are called by their numbers."""
    return tuple(map(str, range(n)))


def split_of(text: str, config: DataConfig, given: Iterable[str] = ()) -> str:
    """Return the part an article falls into, by a hash of its text, where the parts in `given` come from elsewhere."""
    return _hash_split(text, config.split_seed, _shares(config, given))


def _shares(config: DataConfig, given: Iterable[str]) -> dict[str, float]:
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    return {split: share for split, share in shares.items() if split not in given}


def _hash_split(text: str, seed: int, shares: dict[str, float]) -> str:
    # By content, never by position: an article keeps its part when lines move, and equal articles share one.
    u = hash_of(text, seed)
    for split, share in shares.items():
        if u < share:
            return split
        u -= share
    return "train"


def hash_of(text: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# Rows to articles


def _articles(
    parts: list[_Part], config: DataConfig, reads: Reads, shares: dict[str, float], ids: Mapping[str, int]
) -> Iterator[Article]:
    """Yield the articles of all parts; `ids` are the numbers of labels. Raises UserError for a bad row."""
    if reads == "pairs":
        yield from _pairs(parts, config, shares)
        return
    for part in parts:
        hidden_at = 0  # number of the first row of a test part, if its label is hidden; then all must be
        for index, (number, split, text, label) in enumerate(_rows(part, config, reads, shares)):
            if index == 0 and part.split == "test" and label == HIDDEN and HIDDEN not in ids:
                hidden_at = number
            if hidden_at and label != HIDDEN:
                rule = f"label {HIDDEN} hides a label, but line or row {number} has {label!r}"
                raise UserError(f"{part.place(hidden_at)}: {rule}; hide all labels of the part or none")
            if label and not hidden_at and label not in ids:
                raise _unknown(part.place(number), label, ids)
            yield Article(split, text, ids[label] if label and not hidden_at else -1)


def _rows(
    part: _Part, config: DataConfig, reads: Reads, shares: dict[str, float]
) -> Iterator[tuple[int, str, str, str]]:
    """Yield number, split, text and label of each row; "": there are no labels. Raises UserError for a bad row."""
    for number, text, label in part.rows():
        text = "" if text is None else text
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"{part.place(number)}: the text is of type {kind}, not a string; set data.text_column")
        if reads == "text" and not text.strip():
            continue  # a blank line; a labelled row counts in the score, so it is kept
        split = part.split if part.split != "train" else _hash_split(text, config.split_seed, shares)
        is_labelled = reads == "labels" and part.columns[1] is not None
        yield number, split, text, _label(part, number, label) if is_labelled else ""


def _pairs(parts: list[_Part], config: DataConfig, shares: dict[str, float]) -> Iterator[Article]:
    """Yield a prompt and its answer in turn. Raises UserError for one that is none."""
    for part in parts:
        for number, *texts in part.rows():
            for name, text in zip(("prompt", "answer"), texts, strict=True):
                if not isinstance(text, str):
                    what = "missing" if text is None else f"of type {type(text).__name__}, not a string"
                    raise UserError(f"{part.place(number)}: the {name} is {what}; mend it or set data.{name}_column")
                if not text.strip():
                    raise UserError(f"{part.place(number)}: the {name} is empty; write one, or leave the row out")
            prompt, answer = texts
            # By the prompt alone: one that has several answers is in one part only.
            split = part.split if part.split != "train" else _hash_split(prompt, config.split_seed, shares)
            yield from pair(split, prompt, answer)


def _place(parts: list[_Part], text: str) -> str:
    for part in parts:
        for number, *texts in part.rows():
            if text in texts or text.removesuffix(PROMPT_END) in texts:
                return part.place(number)
    return ""


def pair(split: str, prompt: str, answer: str) -> tuple[Article, Article]:
    """Return the two articles that a pair is."""
    return Article(split, prompt + PROMPT_END, -1), Article(split, answer, -1)


def _check_rows(
    parts: list[_Part],
    config: DataConfig,
    reads: Reads,
    shares: dict[str, float],
    known: Sequence[str],
    notes: list[str],
) -> tuple[str, Sequence[str], dict[str, int]]:
    """Return why there can be no test score, or "", the names of the classes, and the number of each label.

    Notes parts without articles. Raises UserError for bad rows.
    """
    counts: Counter[str] = Counter()
    ids: dict[str, int] = {}
    hidden, classes = "", known
    if reads == "labels":
        train = [part for part in parts if part.split == "train"]
        classes, ids = _classes(train, config, shares, known, counts, notes)
    for part in parts:
        if reads == "labels" and part.split == "train":
            continue  # all of it has been read for its classes
        articles = _articles([part], config, reads, shares, ids)
        n_before = counts.total()
        for article in articles if part.size <= CHECK_LIMIT else islice(articles, 1):
            counts[article.split] += 1
            if reads == "labels" and article.label == -1:
                hidden = f"the test labels of {part.name} are hidden (-1)"
                hidden = hidden if part.columns[1] is not None else f"{part.name} has no label column"
        if counts.total() == n_before:
            raise _no_article(part)
    if sum(part.size for part in parts) <= CHECK_LIMIT:
        if not counts["train"]:
            raise _none_to_train(parts[0], counts)
        notes += [
            f"no article fell into the {split} part" for split, share in shares.items() if share and not counts[split]
        ]
    refusal = hidden and f"{hidden}: no test score; use --data.test-path with a labelled file"
    return refusal, classes, ids


def _no_article(part: _Part) -> UserError:
    return UserError(f"{part.name}: no article in it; give a file with text")


def _none_to_train(part: _Part, counts: Counter[str]) -> UserError:
    fall = f"its {counts.total()} articles all fall into other parts by hash"
    mend = "name other text with data.validation_path and set data.test_fraction=0, or give more articles"
    return UserError(f"{part.name}: {fall}; {mend}")


# Labels to classes


def _label(part: _Part, number: int, value: Any) -> str:
    """Return the class that a label names, in one spelling whatever the format of the file.

    Raises UserError for what names no class.
    """
    if isinstance(value, bool | int) and 0 <= value < len(part.names):
        return part.names[value]
    if value is not None and not isinstance(value, bool | int | float | Decimal | str):
        kind = type(value).__name__
        rule = f"the label is of type {kind}, not one word or number a row"
        raise UserError(f"{part.place(number)}: {rule}; write the class as text, or set data.label_column")
    # NaN is how tables of numbers have a missing one.
    name = "" if value is None or value != value else _spelled(str(value))
    if not name:
        mend = "write one, leave the row out, or set data.label_column"
        raise UserError(f"{part.place(number)}: the label is missing; {mend}")
    if DECIMAL.fullmatch(name) or re.fullmatch(r"[+-]?(inf|infinity|nan)", name.lower()):
        rule = "is no class: classes are words, true and false, or whole numbers"
        mend = "write words or whole numbers (a task as in jaxlm/tasks/README.md predicts these as numbers)"
        raise UserError(f"{part.place(number)}: label {value!r} {rule}; {mend}, or set data.label_column")
    return name


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


def _classes(
    train: list[_Part],
    config: DataConfig,
    shares: dict[str, float],
    known: Sequence[str],
    counts: Counter[str],
    notes: list[str],
) -> tuple[Sequence[str], dict[str, int]]:
    """Return the names of the classes and the number of each label, from all labels of the training files.

    Adds the articles of each split to `counts`. Raises UserError for labels that make no classes, and for one outside
    of train that train lacks.
    """
    labels: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    places: dict[tuple[str, str], str] = {}  # where a split has a label first
    for part in train:
        n_before, first = counts.total(), ("", "")
        for number, split, _, label in _rows(part, config, "labels", shares):
            counts[split] += 1
            labels[split][label] += 1
            if (split, label) not in places:
                places[split, label] = part.place(number)
                if len(labels["train"]) > MOST_CLASSES and not config.n_labels and not known:
                    raise _too_many(labels["train"], part)
            first = first if first[0] else (label, part.place(number))
        if counts.total() == n_before:
            raise _no_article(part)
        if part.format in ("csv", "tsv") and not part.columns[2] and config.header == "auto":
            _check_first(*first, labels, known)
    if not counts["train"]:
        raise _none_to_train(train[0], counts)
    if known:
        ids = _known_ids(labels, places, known, train[0].names, notes)
    else:
        known = _new_classes(labels["train"], places, train, config, notes)
        ids = {name: i for i, name in enumerate(known)}
    for (_, label), place in places.items():
        if label not in ids:
            raise _unknown(place, label, ids)
    return known, ids


def _known_ids(
    labels: Mapping[str, Counter[str]],
    places: Mapping[tuple[str, str], str],
    known: Sequence[str],
    declared: Sequence[str],
    notes: list[str],
) -> dict[str, int]:
    """Return the number of each label among the classes of a model. Raises UserError for one that it has not."""
    all_labels = set().union(*labels.values())
    ids = {name: i for i, name in enumerate(known)}
    if all_labels <= ids.keys():
        return ids
    spelled = {_spelled(name): i for i, name in enumerate(known)}
    if len(spelled) == len(known) and all_labels <= spelled.keys():
        return spelled
    folded = {_folded(name): i for i, name in enumerate(known)}
    if len(folded) == len(known) and all(_folded(label) in folded for label in all_labels):
        notes.append(f"labels are matched with the classes {listed(known)} whatever their case and blanks")
        return ids | {label: folded[_folded(label)] for label in all_labels}
    if tuple(known) == numbered(2) and all_labels <= {"false", "true"}:
        notes.append("labels are taken as numbers: false is the class 0, true the class 1")
        return {"false": 0, "true": 1}
    are_numbers = any(INTEGER.fullmatch(name) for name in known)
    for prefix in ("LABEL_", *([] if are_numbers else [""])):  # transformers makes up LABEL_0 and on
        by_number = {f"{prefix}{i}": i for i in range(len(known))}
        if all_labels <= by_number.keys():
            notes.append(f"labels are taken as the numbers, from 0, of the classes {listed(known)}")
            return by_number
    if tuple(known) == numbered(len(declared)) and all_labels <= set(declared):
        return {name: i for i, name in enumerate(declared)}
    place, label = next((place, label) for (_, label), place in places.items() if label not in ids)
    mend = " (--train.switch-training true begins with a new output layer)"
    raise UserError(f"{_unknown(place, label, known)}{mend}")


def _new_classes(
    labels: Counter[str],
    places: Mapping[tuple[str, str], str],
    train: list[_Part],
    config: DataConfig,
    notes: list[str],
) -> Sequence[str]:
    """Return the classes, in order, that the labels of the training part make. Raises UserError for fewer than two."""
    n = config.n_labels
    if set(labels) <= set(train[0].names) and (not n or n == len(train[0].names)):
        return train[0].names
    if n > 1 and set(labels) <= set(numbered(n)):
        return numbered(n)
    words = [name for name in labels if not INTEGER.fullmatch(name)]
    classes = sorted(labels, key=None if words else int)
    rarest = min(classes, key=labels.__getitem__)
    if len(classes) == 1:
        rule = f"all labels of the training part are {listed(classes)}, and a classifier needs two classes or more"
        raise UserError(f"{train[0].name}: {rule}; add rows with other labels, or set data.label_column")
    if n and n != len(classes):
        mend = f"correct the labels, or leave data.n_labels out; the rarest, {listed([rarest])}, is first in"
        raise UserError(
            f"data.n_labels={n}, but the labels make {len(classes)} classes, {listed(classes)}; "
            f"{mend} {places['train', rarest]}"
        )
    if not n and 0 < len(words) < len(classes):
        raise UserError(
            f"{places['train', words[0]]}: label {words[0]!r} is a word, but others are numbers ({listed(classes)}); "
            f"correct it, or set data.n_labels={len(classes)} if all of them are classes"
        )
    if not n and len(classes) > MANY and 2 * len(classes) > labels.total():
        raise _too_many(labels, train[0])
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(_folded(name), []).append(name)
    notes += [
        f"the classes {' and '.join(map(repr, some))} look alike: they differ in case, blanks or codes of letters only"
        for some in alike.values()
        if len(some) > 1
    ]
    if labels[rarest] == 1:
        n_single = sum(count == 1 for count in labels.values())
        notes.append(
            f"{n_single} of {len(classes)} classes have one article to learn from, such as {listed([rarest])} "
            f"({places['train', rarest]})"
        )
    return classes


def _check_first(label: str, place: str, labels: Mapping[str, Counter[str]], known: Sequence[str]) -> None:
    """Raise UserError if the label of the first row of a table without a header looks like the name of a column."""
    counts: Counter[str] = sum(labels.values(), Counter())
    others = [other for other in counts if other != label]
    if others and counts[label] == 1 and label not in known and not INTEGER.fullmatch(label):
        is_among_classes = len(others) > 1 and all(counts[other] > 1 for other in others)
        if known or is_among_classes or all(INTEGER.fullmatch(other) for other in others):
            raise UserError(
                f"{place}: label {label!r} is in no other row; set data.header=yes if this line names the columns, or "
                "data.header=no if it does not"
            )


def _too_many(labels: Counter[str], part: _Part) -> UserError:
    n, some = len(labels), listed(list(labels), 3)
    return UserError(
        f"{part.name}: its {labels.total()} labels make {n} or more classes ({some}): is its column that of the label? "
        "Set data.label_column, or data.n_labels to the number of classes"
    )


def _unknown(place: str, label: str, classes: Iterable[str]) -> UserError:
    classes = list(classes)
    return UserError(
        f"{place}: label {label!r} is none of the classes {listed(classes)}{nearest(label, classes)}; "
        "correct it, leave the row out, or train with rows that have it"
    )


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first of some names for a person, and how many more there are."""
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most]]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([name if name.isprintable() else repr(name) for name in shown] + more)


# Local files: which


def _files(config: DataConfig) -> tuple[str, list[tuple[str, Path]], list[str]]:
    """Return the name of the source, its (part, file) pairs and notes. Raises UserError for files that do not fit."""
    found: dict[str, list[Path]] = {}
    notes: list[str] = []
    folder = Path()
    if config.path:
        path = _existing("data.path", config.path, Path())
        folder = path if path.is_dir() else path.parent
        found = _folder_files(path, config, notes) if path.is_dir() else {"train": [path]}
    named = {
        split: _existing(f"data.{split}_path", value, folder)
        for split, value in (("validation", config.validation_path), ("test", config.test_path))
        if value
    }
    for split, path in named.items():
        if path.is_dir():
            raise UserError(f"data.{split}_path={path}: is a folder; name a file in it")
        # What is named wins over what the folder says: such a file is this part only.
        found = {other: [file for file in files if not file.samefile(path)] for other, files in found.items()}
        found[split] = []
    if len(named) == 2 and named["validation"].samefile(named["test"]):
        raise UserError(f"data.validation_path and data.test_path are both {named['test']}; leave one of them out")
    found |= {split: [path] for split, path in named.items()}
    if config.path and not found.get("train"):
        others = [str(file) for split in SPLITS for file in found.get(split, [])]
        mend = (
            f"name a file, such as --data.path {others[0]}, and other files as data.validation_path and data.test_path"
        )
        raise UserError(f"data.path={config.path}: no train part (train.*), only {', '.join(others)}; {mend}")
    pairs = [(split, file) for split in SPLITS for file in found.get(split, [])]
    return config.path or " ".join(filter(None, (config.hub, config.hub_config))), pairs, notes


def _existing(setting: str, value: str, beside: Path) -> Path:
    """Return the path `value`, from here or from the folder `beside`. Raises UserError if it is not there."""
    path = Path(value if os.path.lexists(value) else os.path.expanduser(value))
    try:
        if not path.exists() and (beside / path).exists():
            path = beside / path
        if path.exists():
            return path
        hint = "; its folder does not exist"
        if path.parent.is_dir():
            hint = nearest(path.name, [file.name for file in path.parent.iterdir()])
    except OSError as error:
        raise UserError(
            f"{setting}={value}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    raise UserError(f"{setting}={value}: no such file or folder{hint or '; check the name'}")


def _folder_files(folder: Path, config: DataConfig, notes: list[str]) -> dict[str, list[Path]]:
    """Return {part: files} by the names of the files in a folder; all are for training where no name says a part.

    If no name tells a format, all files that have text are used.
    """
    try:
        children = sorted(folder.iterdir())
        files = [f for f in children if f.is_file()]
        visible = [f for f in files if not f.name.startswith(".")]
        wanted = "text" if config.format == "wikitext" else config.format
        usable = [f for f in visible if (_suffix_format(f) if wanted == "auto" else _suffix_format(f) == wanted)]
        unused = sorted({*visible} - {*usable})
        if not usable:
            usable = visible if wanted != "auto" else [f for f in visible if _has_text(f)]
            unused = sorted({*files} - {*usable})
    except OSError as error:
        raise UserError(
            f"data.path={folder}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    if not usable:
        names = _some(children) or "nothing"
        raise UserError(f"data.path={folder}: no file of text in it, only {names}; name a folder or file with text")
    if unused and wanted == "auto":
        why = "the format of others is told by their names" if _suffix_format(usable[0]) else "hidden, binary or empty"
        notes.append(f"not used ({why}): {_some(unused)}")
    found: dict[str, list[Path]] = {}
    for file in usable:
        found.setdefault(STEMS.get(file.name.partition(".")[0].lower(), ""), []).append(file)
    unnamed = found.pop("", [])
    if not found:
        return {"train": unnamed}
    for split, files in found.items():
        if len(files) > 1:
            raise UserError(
                f"data.path={folder}: {_some(files, ' and ')} are each the {split} part; move all but one elsewhere"
            )
    unnamed = [f for f in unnamed if f.name not in (Path(config.validation_path).name, Path(config.test_path).name)]
    if unnamed:
        notes.append(f"not used, as the name says no part: {_some(unnamed)}")
    return found


def _some(files: list[Path], between: str = ", ", most: int = 5) -> str:
    """Return the names of the first files, and how many more there are."""
    more = [f"{len(files) - most} more"] if len(files) > most else []
    return between.join([file.name for file in files[:most]] + more)


def _has_text(path: Path) -> bool:
    """Return whether a file is neither empty nor binary; of text in another encoding, reading it tells."""
    with contextlib.suppress(*utf8.DAMAGED), utf8.opened(path) as stream:
        start = stream.read(utf8.START)
        return bool(start.strip()) and (start.startswith(PARQUET) or not utf8.is_binary(start))
    return False


def _suffix_format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    return FORMATS.get(name.rpartition(".")[2], "") if "." in name else ""


# Local files: reading


def _file_part(path: Path, split: str, config: DataConfig, reads: Reads) -> _Part:
    """Return the part that a file is. Raises UserError for a file that cannot be read or lacks a wanted column."""
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; write its content to one, and name that")
    kind = config.format if config.format != "auto" else _content_format(path) or _suffix_format(path)
    content, size, head = _scan(path, kind)
    if not kind or (kind == "text" and reads != "text" and config.format == "auto"):
        kind = _table_format(head, config, reads) or "text"
    if config.format == "auto" and kind == "text" and any(TITLE.fullmatch(line) for line in head.splitlines()[:50]):
        kind = "wikitext"
    if reads != "text" and kind in ("text", "wikitext"):
        needed = "a label column" if reads == "labels" else "a column of prompts and one of answers"
        raise UserError(f"{path}: a {kind} file has no {reads}; give a table (csv, tsv, jsonl, parquet) with {needed}")
    failure = f"{path}: cannot be read as {kind}"
    rows: Any
    text: Any = None
    label: Any = None
    more: tuple[Any, ...] = (False,)
    class_names: tuple[str, ...] = ()
    if kind in ("csv", "tsv"):
        dialect, n_columns, is_header, text, label = _csv_columns(path, kind, head, split, config, reads)
        rows = partial(_csv_rows, path, dialect, n_columns, is_header, text, label)
        more = (is_header, *(dialect["delimiter"] if dialect["delimiter"] != DELIMITERS[kind][0] else ()))
    elif kind in ("jsonl", "parquet"):
        names: list[str] = next(
            iter(_guarded(partial(_json_names if kind == "jsonl" else _parquet_names, path), failure)), []
        )
        if not names:
            raise UserError(f"{path}: no article in it; give a file with text")
        _check_width(path, names)
        text, label = _columns(str(path), names, split, config, reads)
        if len(set(names)) == len(names):  # else names do not tell columns apart
            text, label = names[text], None if label is None else names[label]
        rows = partial(_json_rows if kind == "jsonl" else _parquet_rows, path, text, label)
        if kind == "parquet":
            (class_names,) = _guarded(partial(_parquet_class_names, path, label), failure)
    else:
        rows = partial(_wikitext_rows if kind == "wikitext" else _text_rows, path)
    return _Part(
        name=str(path),
        split=split,
        format=kind,
        content=content,
        size=size,
        columns=(text, label, *more),
        rows=partial(_guarded, rows, failure),
        names=class_names,
    )


def _content_format(path: Path) -> str:
    """Return "parquet" if a file begins as one, else "": its text tells more."""
    try:
        with utf8.opened(path) as stream:
            start = stream.read(utf8.START)
            return "parquet" if start.startswith(PARQUET) and b"\0" in start else ""
    except (OSError, *utf8.DAMAGED):
        return ""  # reported when the file is read


def _table_format(head: str, config: DataConfig, reads: Reads) -> str:
    """Return the format of a table whose name does not tell it, by its first rows; "" where they leave a doubt."""
    lines = [line for line in head.split("\n")[:100] if line.strip()]
    usual = _usual(config, reads)
    with contextlib.suppress(ValueError):
        rows = [utf8.from_json(line) for line in lines if line.startswith("{")]
        if len(rows) == len(lines) and (reads != "text" or not usual.isdisjoint(key.lower() for key in rows[0])):
            return "jsonl"
    for kind, delimiters in DELIMITERS.items():
        tables = [_even_rows(head, _dialect(kind, delimiter)) for delimiter in delimiters]
        if any(len(rows) > 1 and not usual.isdisjoint(cell.strip().lower() for cell in rows[0]) for rows in tables):
            return kind
    return ""


def _scan(path: Path, kind: str) -> tuple[str, int, str]:
    """Return the hash and the bytes of a file, decompressed, and its start as text; reads it once, in blocks.

    The start is a megabyte, or more where the first line is longer.

    Raises UserError for a file that is unreadable, damaged or empty, or that should be text and is not UTF-8.
    """
    digest, size, head, n_open = hashlib.sha256(), 0, "", 0

    def blocks(stream: IO[bytes]) -> Iterator[bytes]:
        nonlocal size
        for block in iter(partial(stream.read, 1 << 20), b""):
            digest.update(block)
            size += len(block)
            yield block

    try:
        with open(path, "rb") as file:
            start = file.read(utf8.START)
        is_plain_text = kind in ("", "text", "wikitext") and path.suffix.lower() not in (".gz", ".xz")
        if start and not is_plain_text and (why := utf8.stand_in(start)):
            raise ValueError(why)
        with utf8.opened(path) as stream:
            for block in blocks(stream) if kind == "parquet" else utf8.decoded(blocks(stream)):
                if isinstance(block, str):
                    if not head or (len(head) < MOST_HEAD and "\n" not in head and "\r" not in head):
                        head += block
                    end = max(block.rfind("\n"), block.rfind("\r"))
                    n_open = len(block) - end - 1 + (n_open if end < 0 else 0)
                    if n_open > utf8.LONGEST:  # where the rest would be read for nothing
                        raise UserError(f"{path}: has a line {utf8.TOO_LONG}")
    except utf8.DAMAGED as error:
        mend = "fetch or compress it again, or rename it if it is not compressed"
        raise UserError(f"{path}: the compressed file is damaged ({error}); {mend}") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: is {error}") from error
    if not size:
        raise UserError(f"{path}: is empty; give a file with text")
    return digest.hexdigest(), size, head


def _guarded(rows: Callable[[], Iterator[Any]], failure: str) -> Iterator[Any]:
    """Yield `rows()`. Raises UserError where the libraries that read the file raise anything."""
    try:
        yield from rows()
    except UserError:
        raise
    except Exception as error:  # the builders pass on errors of pandas, pyarrow and the system, of many types
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"{failure}: {reason[:200]}; mend the file or set data.format") from error


def _datasets() -> Any:
    """Return the library `datasets` with bars, log lines and use counts off; imported late because that takes 0.8 s."""
    import datasets
    import huggingface_hub

    # Else each call for a local file reports its use to the hub, and waits seconds for the answer without a network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # Else a stream imports torch where it is installed: seconds and 200 MB for nothing.
    datasets.config.TORCH_AVAILABLE = False
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def _lines(path: Path, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file and their numbers. Raises UserError for one that is too long."""
    for number, line in enumerate(utf8.lines(utf8.opened(path), keep_ends=keep_ends), start=1):
        if len(line) > utf8.LONGEST:
            raise UserError(f"{path}, line {number}: is {utf8.TOO_LONG}")
        yield number, line


def _text_rows(path: Path) -> Iterator[tuple[int, str, None]]:
    return ((number, line, None) for number, line in _lines(path))


def _wikitext_rows(path: Path) -> Iterator[tuple[int, str, None]]:
    return _grouped(_text_rows(path))


def _grouped(lines: Iterable[tuple[int, str, Any]]) -> Iterator[tuple[int, str, None]]:
    """Join the lines from a title to the next into one row. Raises ValueError for one that is too long."""
    article: list[str] = []
    start, size = 1, 0
    for number, line, _ in lines:
        line = line.removesuffix("\n")
        if article and TITLE.fullmatch(line):
            yield start, "\n".join(article), None
            article.clear()
            size = 0
        start = start if article else number
        article.append(line)
        size += len(line) + 1
        if size > utf8.LONGEST:
            raise ValueError(f"the article at line {start} is {utf8.TOO_LONG} with titles")
    yield start, "\n".join(article), None


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = utf8.from_json(line, _object)
        except json.JSONDecodeError as error:
            mend = "write one object a line, as with jq -c . OLD > NEW"
            if line.lstrip()[:1] not in ("{", "["):
                mend = "write one object a line, or set data.format=text to read lines as they are"
            raise UserError(f"{path}, line {number}: not JSON: {error}; {mend}") from error
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            mend = "write one a line" + (", as with jq -c '.[]' OLD > NEW" if isinstance(row, list) else "")
            raise UserError(f"{path}, line {number}: {line.strip()[:20]!r} is not a JSON object; {mend}")
        yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        row |= {key: TWICE for key, count in Counter(key for key, _ in pairs).items() if count > 1}
    return row


def _json_names(path: Path) -> Iterator[list[str]]:
    return (list(row) for _, row in _json_objects(path))


def _json_rows(path: Path, text: str, label: str | None) -> Iterator[tuple[int, Any, Any]]:
    for number, row in _json_objects(path):
        for column in filter(None, (text, label)):
            if column not in row:
                raise UserError(f"{path}, line {number}: the object has no {column!r}; add it")
            if row[column] is TWICE:
                raise UserError(f"{path}, line {number}: the object has {column!r} more than once; keep one of them")
        yield number, row[text], row[label] if label else None


def _csv_rows(
    path: Path, dialect: dict[str, Any], n_columns: int, is_header: bool, text: int, label: int | None
) -> Iterator[tuple[int, str, str | None]]:
    start, size = 1, 0  # of the row that is being read: its first line, and its characters so far

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(path, keep_ends=True):
            size += len(line)
            if size > utf8.LONGEST:
                raise UserError(f"{path}, line {start}: the row is {utf8.TOO_LONG}; is its last quote missing?")
            yield line
        yield CSV_END

    csv.field_size_limit(utf8.LONGEST)  # of all readers, 131,072 by default
    reader = csv.reader(lines(), **dialect)
    for row in reader:
        if row == [CSV_END]:
            return
        if row and row[-1].endswith(CSV_END):
            raise UserError(f"{path}, line {start}: a quote opens a cell that never ends; close it, or double it")
        if len(row) > n_columns:
            rule = f"the row has {len(row):,} columns, but the first one has {n_columns}"
            delimiter = {"\t": "tab"}.get(dialect["delimiter"], dialect["delimiter"])
            quote = f"put a cell with {delimiter} in it into quotes" if dialect["quoting"] != csv.QUOTE_NONE else ""
            raise UserError(f"{path}, line {start}: {rule}; {quote or f'take the {delimiter} out of a cell'}")
        if any(cell and not cell.isspace() for cell in row):
            if not is_header:
                row += [""] * (n_columns - len(row))
                yield start, row[text], None if label is None else row[label]
            is_header = False
        start, size = reader.line_num + 1, 0


def _dialect(kind: str, delimiter: str) -> dict[str, Any]:
    """Return the settings of csv.reader; in a TSV file that has tabs, a quote is a character like any other."""
    is_plain = kind == "tsv" and delimiter == "\t"
    return {"delimiter": delimiter, "quoting": csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL}


def _first_rows(head: str, dialect: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    csv.field_size_limit(utf8.LONGEST)
    with contextlib.suppress(csv.Error):  # a damaged row is found, with its line, when rows are checked
        lines = csv.reader(io.StringIO(head, newline=""), **dialect)
        rows += islice((row for row in lines if any(cell.strip() for cell in row)), 100)
    return rows


def _even_rows(head: str, dialect: dict[str, Any]) -> list[list[str]]:
    """Return the first rows if all have as many columns, of two or more, else none."""
    rows = _first_rows(head, dialect)
    rows = rows[:-1] if 1 < len(rows) < 100 and not head.endswith("\n") and len(head) > 1 << 16 else rows  # cut
    return rows if rows and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1 else []


def _usual(config: DataConfig, reads: Reads) -> set[str]:
    """Return the names, in lower case, by which the column of the text is known."""
    name = config.prompt_column if reads == "pairs" else config.text_column
    if name and not name.isdecimal():
        return {name.lower()}
    return set(PROMPT_COLUMNS if reads == "pairs" else TEXT_COLUMNS)


def _csv_dialect(head: str, kind: str, config: DataConfig, reads: Reads) -> dict[str, Any]:
    """Return how a table is written: with its usual delimiter, unless only another one makes columns."""
    first, *others = (_dialect(kind, delimiter) for delimiter in DELIMITERS[kind])
    rows = _first_rows(head, first)
    if rows and len(rows[0]) > 1 and all(len(row) <= len(rows[0]) for row in rows):
        return first
    for dialect in others:
        if even := _even_rows(head, dialect):
            if reads != "text" or not _usual(config, reads).isdisjoint(cell.strip().lower() for cell in even[0]):
                return dialect
    return first


def _csv_columns(
    path: Path, kind: str, head: str, split: str, config: DataConfig, reads: Reads
) -> tuple[dict[str, Any], int, bool, int, int | None]:
    """Return the dialect, the number of columns, whether a header names them, and the text and label columns."""
    if line := EXCEL.match(head):
        raise UserError(f"{path}, line 1: {line[0].strip()} is for Excel alone; remove this line")
    dialect = _csv_dialect(head, kind, config, reads)
    rows = _first_rows(head, dialect)
    if not rows:
        raise UserError(f"{path}: no article in it; give a file with text")
    first = rows[0]
    _check_width(path, first)
    wanted = (config.text_column, config.label_column)
    wanted = (config.prompt_column, config.answer_column) if reads == "pairs" else wanted
    given = {name for name in wanted if name} | set(PROMPT_COLUMNS if reads == "pairs" else TEXT_COLUMNS)
    given = {name for name in given if not name.isdecimal()}
    cells = [cell.strip() for cell in first]
    is_header = not given.isdisjoint(cells) or not given.isdisjoint(cell.lower() for cell in cells)
    is_header = is_header if config.header == "auto" else config.header == "yes"
    names = first if is_header else [str(column) for column in range(len(first))]
    shown = names if is_header else [f"{column} ({cell[:30]})" for column, cell in enumerate(first)]
    # The raw release of CoLA: source, label, mark, text.
    is_cola = reads != "pairs" and all(len(row) == 4 and row[1] in ("0", "1") for row in rows)
    usual = None if is_header else (("3",), ("1",)) if is_cola else ((), ())
    return dialect, len(first), is_header, *_columns(str(path), names, split, config, reads, usual, shown)


def _check_width(path: Path, names: list[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{path}: has {len(names):,} columns or more, but {MOST_COLUMNS:,} can be read; leave some out")


def _parquet_names(path: Path) -> Iterator[list[str]]:
    import pyarrow.parquet

    with _plain_file(path) as plain:
        yield list(pyarrow.parquet.read_schema(plain).names)


def _parquet_class_names(path: Path, label: str | int | None) -> Iterator[tuple[str, ...]]:
    import pyarrow.parquet

    with _plain_file(path) as plain:
        stored = (pyarrow.parquet.read_schema(plain).metadata or {}).get(b"huggingface")
    features = json.loads(stored)["info"]["features"] if stored else {}
    yield tuple(features.get(label, {}).get("names") or ())


def _parquet_rows(path: Path, text: str | int, label: str | int | None) -> Iterator[tuple[int, Any, Any]]:
    import pyarrow.parquet

    with _plain_file(path) as plain:
        # Not by the builder of `datasets`, which does not take categories, as pandas writes them.
        with pyarrow.parquet.ParquetFile(plain, buffer_size=1 << 20) as file:
            columns = [column for column in (text, label) if column is not None]
            by_name = [column for column in columns if isinstance(column, str)]
            # A value that is written once may be repeated in many rows, so that a small file can make a huge batch.
            size = min(BATCH, max(1, BATCH_BYTES // max(1, _largest_chunk(file.metadata, by_name))))
            batches = file.iter_batches(size, columns=by_name if by_name == columns else None)
            yield from _table_rows((_lists(batch, columns) for batch in batches), text, label)


def _largest_chunk(metadata: Any, names: list[str]) -> int:
    """Return the bytes, decompressed, of the largest piece of a column; `names` are those that count, if any."""
    chunks = (
        metadata.row_group(i).column(j) for i in range(metadata.num_row_groups) for j in range(metadata.num_columns)
    )
    used = (chunk for chunk in chunks if not names or chunk.path_in_schema.partition(".")[0] in names)
    return max((chunk.total_uncompressed_size for chunk in used), default=0)


def _lists(batch: Any, columns: list[Any]) -> dict[Any, list[Any]]:
    return {column: batch.column(column).to_pylist() for column in columns}


def _table_rows(batches: Iterable[dict[Any, list[Any]]], text: Any, label: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield number, text and label of each row. Raises ValueError for a text that is too long."""
    number = 0
    for batch in batches:
        for row in zip(batch[text], batch[text if label is None else label], strict=True):
            number += 1
            if isinstance(row[0], str) and len(row[0]) > utf8.LONGEST:
                raise ValueError(f"row {number}: the text is {utf8.TOO_LONG}")
            yield number, *row


@contextlib.contextmanager
def _plain_file(path: Path) -> Iterator[Path]:
    """Give the path of a file or, as Parquet is not read from front to back, of a decompressed copy on disk."""
    with utf8.opened(path) as stream:
        if isinstance(stream, io.BufferedReader):  # not decompressed
            yield path
            return
        with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
            shutil.copyfileobj(stream, plain)
            plain.flush()
            yield Path(plain.name)


def _columns(
    name: str,
    names: list[str],
    split: str,
    config: DataConfig,
    reads: Reads,
    usual: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    shown: list[str] | None = None,
) -> tuple[int, int | None]:
    """Return which of the columns `names` hold the text and the label; None: it is not wanted or, in test, not there.

    Of pairs, they are prompt and answer. Raises UserError for a column that is not there, or there twice.
    """
    there = f"there are {', '.join((shown or names)[:20])}"
    if shown and len(shown) == 1:
        there = f"there is {shown[0]} alone: the first line has to be a row, its columns separated by , ; | or a tab"
    keys = [key.strip() for key in names]

    def choose(setting: str, wanted: str, usual: tuple[str, ...]) -> int:
        if wanted:
            numbers = [i for i, key in enumerate(keys) if key == wanted.strip()]
            if not numbers and wanted.isdecimal() and int(wanted) < len(names):
                return int(wanted)
            if not numbers:
                mend = nearest(wanted, names) or f"; set data.{setting} to one of them"
                raise UserError(f"data.{setting}={wanted}: no such column in {name}{mend}; {there}")
        else:
            lower = [key.lower() for key in keys]
            numbers = next(([i for i, key in enumerate(lower) if key == one] for one in usual if one in lower), [])
            if not numbers:
                raise UserError(f"{name}: no column has a usual name; set data.{setting}; {there}")
        if len(numbers) > 1:
            both = " and ".join(f"{i} ({names[i]})" for i in numbers[:5])
            raise UserError(f"{name}: columns {both} have the same name; set data.{setting} to the number of one")
        return numbers[0]

    if reads == "pairs":
        usual = usual or (PROMPT_COLUMNS, ANSWER_COLUMNS)
        prompt = choose("prompt_column", config.prompt_column, usual[0])
        return prompt, choose("answer_column", config.answer_column, usual[1])
    usual = usual or (TEXT_COLUMNS, LABEL_COLUMNS)
    is_only = len(names) == 1 and not config.text_column
    text = 0 if is_only else choose("text_column", config.text_column, usual[0])
    # GLUE publishes test files without labels.
    is_hidden = split == "test" and not config.label_column and not {key.lower() for key in keys} & set(usual[1])
    if reads == "text" or is_hidden:
        return text, None
    return text, choose("label_column", config.label_column, usual[1])


# Data sets of the hub


def _hub_parts(config: DataConfig, reads: Reads, named: set[str], notes: list[str]) -> list[_Part]:
    """Return the parts of a hub set but those in `named`. Raises UserError for one that cannot be had."""
    name = " ".join(filter(None, (config.hub, config.hub_config)))
    is_local = Path(config.hub).is_dir()
    why_not = probe_hub(name) if not is_local else str  # under way while `datasets` is loaded
    datasets = _datasets()
    failure = "HF_HUB_OFFLINE is set" if not is_local and datasets.config.HF_HUB_OFFLINE else why_not()
    try:
        with warnings.catch_warnings(action="ignore"), _offline() if failure else contextlib.nullcontext():
            data = datasets.load_dataset(config.hub, config.hub_config or None)
    except Exception as error:  # of the library, of the hub's client, of the builders: of many types
        reason = " ".join(str(error).split())[:300]
        if "LocalEntryNotFoundError" in reason:  # something answered, such as the log-in page of a network
            failure = "what answers is not the hub"
        if not failure:
            raise UserError(f"data.hub={name}: {reason}; check data.hub and data.hub_config") from error
        cache = reason if isinstance(error, ValueError) else "it is not in the cache"
        mend = "use a local file with --data.path FILE"
        raise UserError(f"data.hub={name}: the hub cannot be reached ({failure}) and {cache}; {mend}") from error
    is_wikitext = reads == "text" and (config.hub_config or Path(config.hub).name).startswith("wikitext")
    parts = []
    for key, rows in data.items():
        split = STEMS.get(str(key).lower(), "")
        if not split:
            notes.append(f"not used, as the name says no part: {key}")
        if not split or split in named:
            continue
        part = f"{name}, {key}"
        names = rows.column_names
        at_text, at_label = _columns(part, names, split, config, reads)
        text, label = names[at_text], None if at_label is None else names[at_label]
        parts.append(
            _Part(
                name=part,
                split=split,
                format="hub",
                content=rows._fingerprint,
                size=rows.data.nbytes,
                columns=(text, label, is_wikitext),
                rows=partial(_guarded, partial(_hub_rows, rows, text, label, is_wikitext), f"{part}: cannot be read"),
                names=_names_of(rows.features, label),
            )
        )
    return parts


def _names_of(features: Any, label: str | None) -> tuple[str, ...]:
    """Return the names that a column of `datasets` has for its numbers, if it has any."""
    return tuple(getattr(features[label], "names", None) or ()) if label else ()


def _hub_rows(rows: Any, text: str, label: str | None, is_wikitext: bool) -> Iterator[tuple[int, Any, Any]]:
    columns = list(dict.fromkeys(filter(None, (text, label))))
    tables = rows.select_columns(columns).with_format("arrow").iter(batch_size=BATCH)
    found = _table_rows((table.to_pydict() for table in tables), text, label)
    return _grouped(found) if is_wikitext else found


def probe_hub(name: str) -> Callable[[], str]:
    """Ask whether the hub is there; the returned function waits for the answer and tells why not, "" if it is.

    It is "" as well where the hub is not to be asked.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        return str
    failure = f"no answer for {name} in {PROBE_S} seconds"
    until_s = time.monotonic() + PROBE_S

    def probe() -> None:
        nonlocal failure
        try:
            # Whoever waits gives up before.
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=2 * PROBE_S)
            failure = ""
        except Exception as error:  # the client's own and those of the system
            failure = " ".join(str(error).split())[:100] or type(error).__name__

    # A thread, because the look-up of a name heeds no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()

    def answer() -> str:
        thread.join(max(until_s - time.monotonic(), 0))
        return failure

    return answer


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` go to its cache at once: it would try an unreachable hub many times."""
    import datasets
    import huggingface_hub

    settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value
