"""Text and sentences that need no download: for demonstrations, not benchmarks."""

import hashlib
import sys
from collections.abc import Callable, Iterator

from jaxlm.config import DataConfig
from jaxlm.data import grammar
from jaxlm.data.sources import Article, Source, hash_of


def python_reference(config: DataConfig) -> Source:
    """Return the language reference that ships inside Python itself, one article a topic, split by hash."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    sizes = {text: len(text.encode()) for text in texts}
    total = sum(sizes.values())
    # A few articles are a tenth of all: each part takes, in the order of the hash, those that fit into its share.
    order = sorted(sizes, key=lambda text: hash_of(text, config.split_seed))
    splits = dict.fromkeys(order, "train")
    for split, share in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        room = share * total
        for text in order:
            if splits[text] == "train" and sizes[text] <= room:
                splits[text] = split
                room -= sizes[text]

    def articles() -> Iterator[Article]:
        for text in texts:
            yield Article(splits[text], text, -1)

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    description = f"the language reference inside Python {version} ({len(topics)} articles, {total / 1e6:.1f} MB)"
    return _source(description, articles, total)


def sentences(task: str) -> Source:
    """Return the sentences of the project's grammar for `task`, sst2 or cola."""

    def articles() -> Iterator[Article]:
        for split, rows in splits.items():
            for text, label in rows:
                yield Article(split, text, label)

    splits = grammar.sentences(task)
    n_bytes = sum(len(text.encode()) for rows in splits.values() for text, _ in rows)
    n_sentences = sum(len(rows) for rows in splits.values())
    return _source(f"{n_sentences} sentences of the project's own grammar for {task}", articles, n_bytes)


def _source(description: str, articles: Callable[[], Iterator[Article]], n_bytes: int) -> Source:
    content = hashlib.sha256()
    for article in articles():
        content.update(repr(article).encode())
    return Source(description, content.hexdigest(), articles, n_bytes)
