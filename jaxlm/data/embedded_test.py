"""The embedded data: article boundaries, parts of the asked size that share nothing, the same in every process."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import embedded, grammar
from jaxlm.data.sources import SPLITS, Source


def by_split(source: Source) -> dict[str, list[str]]:
    articles = list(source.articles())
    return {split: [a.text for a in articles if a.split == split] for split in SPLITS}


def test_each_topic_is_one_article_in_one_part():
    source = embedded.python_reference(DataConfig())
    articles = list(source.articles())
    assert sorted(article.text for article in articles) == sorted(topics.values())
    assert {article.label for article in articles} == {-1} and len(articles) > 70
    parts = by_split(source)
    assert all(set(parts[a]).isdisjoint(parts[b]) for a in SPLITS for b in SPLITS if a < b)
    assert list(source.articles()) == articles
    # The bytes are those of the progress bar; Python says one of its shorter texts twice.
    assert source.n_bytes == pytest.approx(sum(len(text.encode()) for text in topics.values()), rel=0.01)
    assert f"{len(topics)} articles" in source.description


@pytest.mark.parametrize("seed", range(4))
def test_parts_have_the_share_of_the_text_that_is_asked(seed):
    config = DataConfig(split_seed=seed, validation_fraction=0.1, test_fraction=0.2)
    sizes = {
        split: sum(len(text.encode()) for text in texts)
        for split, texts in by_split(embedded.python_reference(config)).items()
    }
    total = sum(sizes.values())
    assert 0.08 < sizes["validation"] / total < 0.102 and 0.18 < sizes["test"] / total < 0.202


def test_parts_follow_the_settings():
    nothing = by_split(embedded.python_reference(DataConfig(validation_fraction=0.0, test_fraction=0.0)))
    assert nothing["validation"] == nothing["test"] == [] and len(nothing["train"]) == len(topics)
    first, other = (embedded.python_reference(DataConfig(split_seed=seed)) for seed in (0, 1))
    assert by_split(first)["test"] != by_split(other)["test"]
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint == embedded.python_reference(DataConfig()).fingerprint


@pytest.mark.parametrize("task", ["sst2", "cola"])
def test_sentences_are_those_of_the_grammar(task):
    source = embedded.sentences(task)
    expected = [(split, *row) for split, rows in grammar.sentences(task).items() for row in rows]
    assert [tuple(article) for article in source.articles()] == expected
    assert source.n_bytes == sum(len(text.encode()) for _, text, _ in expected)
    assert f"{len(expected)} sentences" in source.description and task in source.description


CODE = """
import sys
from jaxlm.config import DataConfig
from jaxlm.data import embedded
print(embedded.python_reference(DataConfig()).fingerprint)
print(embedded.sentences("sst2").fingerprint, embedded.sentences("cola").fingerprint)
print([name for name in ("jax", "torch", "datasets") if name in sys.modules])
"""


def test_embedded_data_is_the_same_in_every_process():
    def run(seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        root = Path(embedded.__file__).parents[2]
        command = [sys.executable, "-c", CODE]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout

    out = run("1")
    assert len(out.splitlines()) == 3 and out.endswith("[]\n")
    assert run("2") == out


def test_parts_of_the_reference_share_no_paragraph():
    parts = by_split(embedded.python_reference(DataConfig()))
    paragraphs = [
        {part for text in texts for part in (text, *text.split("\n\n")) if len(part) > 100} for texts in parts.values()
    ]
    assert all(paragraphs)
    for one, other in itertools.combinations(paragraphs, 2):
        assert not one & other
