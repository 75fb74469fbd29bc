"""From settings to a stream of articles, out of local files or a data set of the hub."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data import documents, files, hub, labels, remote, tags
from jaxlm.data.parts import LABELLED, OF_TWO, SPLITS, WHOLE, WITH_CLASSES, Part, Reads, Wanted, no_article
from jaxlm.errors import UserError
from jaxlm.io import temporary

CHECK_LIMIT = 200_000_000  # bytes; rows of a larger file are checked as they are used, not at the start
PROMPT_END = "\n"  # between a prompt and its answer
HIDDEN = "-1"  # label of all rows of a test part whose labels are not published


class Article(NamedTuple):
    split: str  # one of SPLITS
    text: str
    label: float  # number of its class, -1: none; or a value, NaN: none


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
    documents: str = "auto"  # what separates them, as in data.documents
    has_values: bool = False  # labels are numbers to predict, not classes
    parts: tuple[Callable[[], Iterator[Article]], ...] = ()  # the same passes, a file each
    is_unique: bool = False  # texts that are equal to one before are left out of token caches
    is_remote: bool = False  # a pass fetches the files again


def open_source(config: DataConfig, reads: Reads, classes: Sequence[str] = ()) -> Source:
    """Return the source that `config.path` or `config.hub` names; files of up to CHECK_LIMIT bytes are checked in full.

    `classes` are those of the model that the labels are for; (): they are found in the training part, all of which is
    read for that. Raises UserError for what cannot be found, read or understood, and for a label of no class.
    """
    assert config.path or config.hub, "the embedded data is not a source"
    root, why, tree = config.path or hub.name_of(config), "", files.NO_TREE
    urls = {split: path for split in SPLITS if remote.is_url(path := _path(config, split))}
    own = config
    for split in urls:
        config = dataclasses.replace(config, **dict[str, Any]({_setting(split): ""}))
    if reads == "text" and config.path:
        config, why, tree = documents.resolved(config)
    found, notes = files.find(config, tree)
    found = [(split, path) for split, path in found if split not in urls]
    named = {split for split, _ in found} | urls.keys()
    cache_dir = temporary.user_cache_dir(config.cache_dir)
    parts = hub.open_parts(config, reads, named, notes, cache_dir) if config.hub else []
    parts += [files.open_part(path, Wanted(config, reads, split)) for split, path in found]
    parts += remote.open_parts(own, reads, urls, cache_dir) if urls else []
    parts.sort(key=lambda part: SPLITS.index(part.split))
    given = {part.split for part in parts}
    if "train" not in given:
        raise UserError(f"{root}: no train part, only {', '.join(sorted(given))}; choose a source that has one")
    if config.documents == "line" and any(part.format == "wikitext" for part in parts):
        why = why or "data.documents=line divides files without titles; data.format=text divides these, too"
    shares = _shares(config, given)
    are_divided = documents.are_divided(parts, shares)
    notes += _notes(config, parts, shares, are_divided)
    notes += documents.notes(parts, why, shares)
    if config.folds and ("validation" in given or are_divided):
        why = "its documents are divided" if are_divided else "it has a validation part"
        raise UserError(f"{root}: {why}, but data.folds={config.folds} splits texts by hash; leave it out")
    reading = _Reading(reads, shares, config.split_seed, are_divided=are_divided, fold=config.fold)
    counts: Counter[str] = Counter()
    if reads == "labels":
        classes, reading.ids = _classes(reading, parts, config, classes, counts, notes)
    elif reads in WITH_CLASSES:
        train = [part for part in parts if part.split == "train"]
        rows = (row for part in train for row in reading.rows(part)) if reads == "sets" and not classes else ()
        new = labels.classes_of_sets(train[0], rows, config.n_labels) if rows else classes
        classes = new or tags.classes(parts, notes)
        reading.ids = {name: i for i, name in enumerate(classes)}
    refusal = _check(reading, parts, counts, notes)
    n_bytes = sum(part.size for part in parts)
    kinds = {"text" if part.format in WHOLE else part.format for part in parts}
    kind = f"{kinds.pop()} " if len(kinds) == 1 else ""
    size = f"{len(parts)} {kind}{'files' if len(parts) > 1 else 'file'}, {n_bytes / 1e6:.1f} MB"
    if config.hub:
        size = ", ".join(dict.fromkeys(part.split for part in parts))
    return Source(
        description=f"{root} ({size})",
        fingerprint=_fingerprint(config, parts, reading),
        articles=lambda: (article for part in parts for article in reading.articles(part)),
        parts=tuple(partial(reading.articles, part) for part in parts),
        is_unique=config.unique and reads == "text",
        is_remote=any(part.is_remote for part in parts),
        n_bytes=n_bytes,
        notes=tuple(notes),
        test_refusal=refusal,
        place=partial(_place, parts),
        classes=tuple(classes),
        documents=config.documents,
        has_values=reads == "values",
    )


def _setting(split: str) -> str:
    return "path" if split == "train" else f"{split}_path"


def _path(config: DataConfig, split: str) -> str:
    path: str = getattr(config, _setting(split))
    return path


def _fingerprint(config: DataConfig, parts: list[Part], reading: "_Reading") -> str:
    """Return a hash by which token caches are found: what it is of must not change."""
    seed = config.split_seed if reading.shares else 0
    contents = [(part.split, part.format, part.table.columns, part.content) for part in parts]
    if config.hub:  # the same whether a split is read whole or by its shards
        contents = [x for i, x in enumerate(contents) if x not in contents[:i]]
    settings: list[Any] = [
        config.hub,
        config.hub_config,
        reading.reads in ("labels", "tags"),
        seed,
        reading.shares,
        contents,
    ]
    if reading.reads in ("sets", "values"):
        settings.append(reading.reads)
    if pairs := [part.table.pair for part in parts if part.table.pair is not None]:
        settings.append(pairs)
    # Labels that are such numbers already were all that could be read once, and token caches of them are kept.
    numbers = {name: i for part in parts for i, name in enumerate(part.table.names)}
    if other := {name: i for name, i in reading.ids.items() if str(numbers.get(name, name)) != str(i)}:
        settings.append(other)
    if reading.are_divided:
        settings.append("divided")
    if config.folds:
        settings.append(["fold", config.fold])
    if config.unique and reading.reads == "text":
        settings.append("unique")
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _notes(config: DataConfig, parts: list[Part], shares: dict[str, float], are_divided: bool) -> Iterator[str]:
    """Yield what to say of the parts and the settings of their shares."""
    for split, share in shares.items() if not are_divided else ():
        name = "data.folds" if config.folds and split == "validation" else f"data.{split}_fraction"
        yield f"no {split} part: {100 * share:g} % of articles split off by hash ({name})"
    are_tables = not any(part.format in ("text", "wikitext", *WHOLE) for part in parts)
    if are_tables and config.documents in (*WHOLE, "wikitext"):
        yield f"data.documents={config.documents} has no effect: a table has a document a row (data.format=text: lines)"
    for part in parts:
        for delimiter in part.table.columns[3:]:
            yield f"{part.name}: its columns are separated by {delimiter!r}"
    own = [split for split in SPLITS[1:] if split not in shares and not getattr(config, f"{split}_path")]
    for name in [f"{split}_fraction" for split in own] + ([] if shares else ["split_seed"]):
        if getattr(config, name) != getattr(DataConfig(), name):
            yield f"data.{name}={getattr(config, name)} has no effect: the source has parts of its own"


# The split of articles


def split_of(text: str, config: DataConfig, given: Iterable[str] = ()) -> str:
    """Return the split an article falls into, by a hash of its text, where those in `given` come from elsewhere."""
    return _split(text, config.split_seed, _shares(config, given), config.fold)


def _shares(config: DataConfig, given: Iterable[str]) -> dict[str, float]:
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    if config.folds:
        shares["validation"] = (1 - ("test" not in given) * config.test_fraction) / config.folds
    return {split: share for split, share in shares.items() if split not in given}


def _split(text: str, seed: int, shares: dict[str, float], fold: int = 0) -> str:
    # By content, never by position: an article keeps its split when lines move, and equal articles share one.
    u = hash_of(text, seed)
    for split, share in shares.items():
        u -= fold * share if split == "validation" else 0.0
        if 0 <= u < share:
            return split
        u -= share
    return "train"


def hash_of(text: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# Rows to articles


@dataclass
class _Reading:
    """How the rows of parts become articles."""

    reads: Reads
    shares: dict[str, float]  # of the splits that articles for training are split off to
    seed: int
    ids: Mapping[str, int] = field(default_factory=dict)  # number of each label
    are_divided: bool = False  # documents for training into splits
    fold: int = 0  # the validation part is this one of several of its size

    def articles(self, part: Part) -> Iterator[Article]:
        """Yield the articles of a part. Raises UserError for a bad row."""
        if self.reads in OF_TWO:
            yield from self._pairs(part)
            return
        if self.reads == "tags":
            yield from self._words(part)
            return
        if self.reads == "sets":
            yield from self._sets(part)
            return
        if self.are_divided and part.split == "train":
            for _, _, text, _ in self.rows(part):
                yield from (Article(split, block, -1) for split, block in documents.divided(text, self.shares))
            return
        hidden_at = 0  # number of the first row of a test part, if its label is hidden; then all must be
        for index, (number, split, text, label, *pair) in enumerate(self.rows(part)):
            can_hide = self.reads == "labels" or part.format == "hub"  # elsewhere, -1 may be a value
            if index == 0 and part.split == "test" and label == HIDDEN and HIDDEN not in self.ids and can_hide:
                hidden_at = number
            if hidden_at and label != HIDDEN:
                rule = f"label {HIDDEN} hides a label, but line or row {number} has {label!r}"
                raise part.bad(hidden_at, f"{rule}; hide all labels of the part or none")
            is_hidden = hidden_at or not label
            value: float = -1 if self.reads != "values" else math.nan
            if not is_hidden and self.reads == "values":
                value = float(label)
            elif not is_hidden:
                if label not in self.ids:
                    raise labels.unknown(part.place(number), label, self.ids)
                value = self.ids[label]
            yield from (Article(split, one, value) for one in (text, *pair))

    def rows(self, part: Part) -> Iterator[tuple[Any, ...]]:
        """Yield number, split, text and label of each row, and its second text; "": there are no labels.

        Raises UserError for a bad row.
        """
        is_labelled = self.reads in LABELLED and part.table.columns[1] is not None
        read_label: Any = {"labels": labels.label_of, "sets": labels.set_of}.get(self.reads, labels.value_of)
        for number, *cells in part.rows():
            label = cells.pop(1)
            texts = ["" if text is None else text for text in cells]
            for text, name in zip(texts, ("text", "pair"), strict=False):
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise part.bad(number, f"the text is of type {kind}, not a string; set data.{name}_column")
            if self.reads == "text" and not texts[0].strip():
                continue  # a blank line; a labelled row counts in the score, so it is kept
            name = read_label(part, number, label) if is_labelled else ""
            # By the first text alone: one that comes with several others is in one split only.
            yield number, self._split(part, texts[0]), texts[0], name, *texts[1:]

    def _pairs(self, part: Part) -> Iterator[Article]:
        """Yield a prompt and its answer, or two texts, in turn. Raises UserError for one that is not a text."""
        names = ("prompt", "answer") if self.reads == "pairs" else ("text", "pair")
        for number, *texts in part.rows():
            for name, text in zip(names, texts, strict=True):
                if not isinstance(text, str):
                    what = "missing" if text is None else f"of type {type(text).__name__}, not a string"
                    raise part.bad(number, f"the {name} is {what}; mend it or set data.{name}_column")
                if not text.strip():
                    raise part.bad(number, f"the {name} is empty; write one, or leave the row out")
            # By the first alone: a prompt that has several answers is in one split only.
            split = self._split(part, texts[0])
            yield from pair(split, *texts) if self.reads == "pairs" else (Article(split, text, -1) for text in texts)

    def _words(self, part: Part) -> Iterator[Article]:
        """Yield each word of a sentence, with its tag as a label. Raises UserError for a tag that is no class."""
        for number, words, found in tags.sentences(part):
            bio = tags.to_bio(found)
            for tag in bio:
                if tag not in self.ids:
                    raise labels.unknown(part.place(number), tag, self.ids)
            tagged = [(word, self.ids[tag]) for word, tag in zip(words, bio, strict=True)]
            yield from sentence(self._split(part, " ".join(words)), tagged)

    def _sets(self, part: Part) -> Iterator[Article]:
        """Yield each text, or two, and behind it an empty article for each of its labels. Raises UserError."""
        for number, split, text, names, *pair in self.rows(part):
            yield from (Article(split, one, -1) for one in (text, *pair))
            for name in names:
                if name not in self.ids:
                    raise labels.unknown(part.place(number), name, self.ids)
                yield Article(split, "", self.ids[name])

    def _split(self, part: Part, text: str) -> str:
        return part.split if part.split != "train" else _split(text, self.seed, self.shares, self.fold)


def pair(split: str, prompt: str, answer: str) -> tuple[Article, Article]:
    """Return the two articles that a pair is."""
    return Article(split, prompt + PROMPT_END, -1), Article(split, answer, -1)


def sentence(split: str, words: Iterable[tuple[str, int]]) -> Iterator[Article]:
    """Yield the articles that words with the numbers of their tags are: one each, and an empty one at the end."""
    for word, tag in words:
        yield Article(split, f" {word}", tag)  # byte-level tokens of words begin with the space before
    yield Article(split, "", -1)


def _place(parts: list[Part], text: str) -> str:
    for part in parts:
        for number, *texts in part.rows():
            if text in texts or text.removesuffix(PROMPT_END) in texts:
                return part.place(number)
    return ""


# Checks at the start


def _classes(
    reading: _Reading,
    parts: list[Part],
    config: DataConfig,
    known: Sequence[str],
    counts: Counter[str],
    notes: list[str],
) -> tuple[Sequence[str], dict[str, int]]:
    """Return the names of the classes and the number of each label, from all rows of the parts for training.

    Adds the articles of each split to `counts`. Raises UserError for labels that make no classes.
    """
    train = [part for part in parts if part.split == "train"]
    found = labels.Labels(train, config.n_labels, known, notes)
    for part in train:
        is_doubtful = part.format in ("csv", "tsv") and not part.table.columns[2] and config.header == "auto"
        found.read(part, reading.rows(part), is_doubtful)
    counts.update({split: numbers.total() for split, numbers in found.counts.items()})
    if not counts["train"]:
        raise _none_to_train(parts[0], counts)
    return found.classes()


def _check(reading: _Reading, parts: list[Part], counts: Counter[str], notes: list[str]) -> str:
    """Return why there can be no test score, else ""; note splits without articles.

    `counts` are the articles of each split in the parts that have been read. Raises UserError for bad rows.
    """
    refusal = ""
    for part in parts:
        if reading.reads == "labels" and part.split == "train":
            continue  # all of it has been read for its classes
        if part.is_remote:
            continue  # it is read once, when it is tokenized
        articles, n_before = reading.articles(part), counts.total()
        for article in articles if part.size <= CHECK_LIMIT else islice(articles, 1):
            counts[article.split] += 1
            is_there = part.table.columns[1] is not None
            is_none = reading.reads != "sets" and (math.isnan(article.label) or reading.ids and article.label == -1)
            if reading.reads in LABELLED and (is_none or not is_there):
                why = (
                    f"the test labels of {part.name} are hidden (-1)"
                    if is_there
                    else f"{part.name} has no label column"
                )
                refusal = f"{why}: no test score; use --data.test-path with a labelled file"
        if counts.total() == n_before:
            raise no_article(part.name)
    if sum(part.size for part in parts) <= CHECK_LIMIT and not any(part.is_remote for part in parts):
        if not counts["train"]:
            raise _none_to_train(parts[0], counts)
        empty = [split for split, share in reading.shares.items() if share and not counts[split]]
        notes += [f"no article fell into the {split} part" for split in empty]
    return refusal


def _none_to_train(part: Part, counts: Counter[str]) -> UserError:
    fall = f"its {counts.total()} articles all fall into other parts by hash"
    mend = "name other text with data.validation_path and set data.test_fraction=0, or give more articles"
    return UserError(f"{part.name}: {fall}; {mend}")
