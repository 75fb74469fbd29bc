"""Text and sentences that need no download: for demonstrations, not benchmarks."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator

from jaxlm.config import DataConfig
from jaxlm.data import grammar
from jaxlm.data.sources import Article, Source, hash_of, pair, sentence


def python_reference(config: DataConfig) -> Source:
    """Return the language reference that ships inside Python itself, one article a topic, split by hash."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    total = sum(_n_bytes(text) for text in texts)
    # Some articles quote whole paragraphs of others: they go to the same part. And a few are a tenth of all: each part
    # takes, in the order of a hash, groups that fit into its share; those above a quarter of it only if the others do
    # not fill it, so that no single one makes the score.
    groups = sorted(_groups(texts), key=lambda group: hash_of(group[0], config.split_seed))
    splits = dict.fromkeys(texts, "train")
    for split, share in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        room = share * total
        for most in (room / 4, room):
            for group in groups:
                size = sum(_n_bytes(text) for text in group)
                if splits[group[0]] == "train" and size <= min(room, most):
                    splits |= dict.fromkeys(group, split)
                    room -= size

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    description = f"the language reference inside Python {version} ({len(topics)} articles, {total / 1e6:.1f} MB)"
    return _source(description, lambda: (Article(splits[text], text, -1) for text in texts), total)


def _n_bytes(text: str) -> int:
    return len(text.encode())


def _groups(texts: list[str]) -> list[list[str]]:
    """Return the texts in groups: those that share a paragraph of more than 100 characters, or are equal, together."""
    group_of: dict[str, list[str]] = {}  # by paragraph
    for text in dict.fromkeys(texts):
        paragraphs = [part for part in (text, *text.split("\n\n")) if part == text or len(part) > 100]
        group = [text]
        for other in {id(group_of[part]): group_of[part] for part in paragraphs if part in group_of}.values():
            group += other
        group_of |= dict.fromkeys((part for part in group_of if group_of[part][0] in group), group)
        group_of |= dict.fromkeys(paragraphs, group)
    return list({id(group): group for group in group_of.values()}.values())


def sentences(task: str) -> Source:
    """Return what the project's grammar has for `task`: sentences for sst2 or cola, prompts and answers for pairs."""
    splits = grammar.sentences(task)

    def articles() -> Iterator[Article]:
        for split, rows in splits.items():
            for text, label in rows:
                if task == "embed":
                    yield from (Article(split, one, -1) for one in (text, label))
                else:
                    yield from pair(split, text, label) if task == "pairs" else [Article(split, text, label)]

    n_bytes = sum(_n_bytes(article.text) for article in articles())
    pairs = {"pairs": "prompts and answers", "embed": "pairs of sentences that mean the same"}
    what, whose = (pairs[task], "") if task in pairs else ("sentences", f" for {task}")
    n = sum(map(len, splits.values()))
    return _source(f"{n} {what} of the project's own grammar{whose}", articles, n_bytes)


def tagged_sentences() -> Source:
    """Return sentences of the project's grammar with names of people, places and firms, whose words have BIO tags."""
    splits = grammar.sentences("tag")
    classes = ("O", *(f"{prefix}-{kind}" for kind in sorted(grammar.NAMED) for prefix in "BI"))

    def articles() -> Iterator[Article]:
        for split, rows in splits.items():
            for text, tags in rows:
                yield from sentence(split, zip(text.split(), map(classes.index, tags), strict=True))

    n_bytes = sum(_n_bytes(article.text) for article in articles())
    n = sum(map(len, splits.values()))
    source = _source(f"{n} sentences with names of the project's own grammar", articles, n_bytes)
    return dataclasses.replace(source, classes=classes)


def _source(description: str, articles: Callable[[], Iterator[Article]], n_bytes: int) -> Source:
    content = hashlib.sha256()
    for article in articles():
        content.update(repr(article).encode())
    return Source(description, content.hexdigest(), articles, n_bytes)
