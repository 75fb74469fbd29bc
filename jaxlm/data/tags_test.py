"""Tags of words: schemes, spans as seqeval reads them, files of both kinds, and windows that lose no word."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import sources, tags
from jaxlm.data.cache import Split
from jaxlm.data.sources import open_source
from jaxlm.data.tagged import TaggedSamples, windows
from jaxlm.errors import UserError

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
British JJ I-NP B-MISC
lamb NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""
BIO = ["B-ORG", "O", "B-MISC", "B-MISC", "O"], ["B-PER", "I-PER"]


@pytest.mark.parametrize(
    ("written", "expected"),  # recorded from seqeval 1.2.2, get_entities
    [
        ("B-P I-P O I-P I-L B-L O", [("P", 0, 2), ("P", 3, 4), ("L", 4, 5), ("L", 5, 6)]),
        ("I-P I-P B-P I-L O I-L", [("P", 0, 2), ("P", 2, 3), ("L", 3, 4), ("L", 5, 6)]),
        ("S-P O B-P I-P E-P S-L B-L E-L", [("P", 0, 1), ("P", 2, 5), ("L", 5, 6), ("L", 6, 8)]),
        ("O O", []),
        ("B-P", [("P", 0, 1)]),
        ("I-L I-L", [("L", 0, 2)]),
    ],
)
def test_spans_are_those_of_seqeval(written: str, expected: list[tags.Span]) -> None:
    assert tags.spans(written.split()) == expected
    assert tags.spans(tags.to_bio(written.split())) == expected


def read(path: Path, **settings: Any) -> dict[str, list[list[tuple[str, str]]]]:
    """Return the sentences of a source by split, words with tags."""
    config = configs.DataConfig(path=str(path), **{"validation_fraction": 0.0, "test_fraction": 0.0, **settings})
    source = open_source(config, "tags")
    found: dict[str, list[list[tuple[str, str]]]] = {}
    sentence: list[tuple[str, str]] = []
    for article in source.articles():
        if article.label < 0:
            found.setdefault(article.split, []).append(sentence)
            sentence = []
        else:
            sentence.append((article.text, source.classes[article.label]))
    assert not sentence
    return found


def test_files_of_conll_and_json_lines_have_the_same_sentences(tmp_path: Path) -> None:
    (tmp_path / "eng.train").write_text(CONLL)
    rows = [["EU", "rejects", "German", "British", "lamb"], ["Peter", "Blackburn"]]
    bioes = ["S-ORG", "O", "S-MISC", "S-MISC", "O"], ["B-PER", "E-PER"]
    for name, found in (("bio.jsonl", BIO), ("bioes.json", bioes)):
        lines = [json.dumps({"tokens": words, "ner_tags": x}) for words, x in zip(rows, found, strict=True)]
        (tmp_path / name).write_text("\n".join(lines))
    expected = [[(f" {w}", t) for w, t in zip(*pair, strict=True)] for pair in zip(rows, BIO, strict=True)]
    for name in ("eng.train", "bio.jsonl", "bioes.json"):
        assert read(tmp_path / name) == {"train": expected}
    # Tabs, another order of columns, and no line break at the end.
    (tmp_path / "swapped.tsv").write_text("\n".join(["I-PER\tPeter", "I-PER\tBlackburn"]))
    assert read(tmp_path / "swapped.tsv", text_column="1", label_column="0") == {"train": expected[1:]}


def test_all_words_of_a_sentence_are_in_one_split(tmp_path: Path) -> None:
    lines = "".join(f"name{i} B-PER\nand O\nmore{i} O\n\n" for i in range(200))
    (tmp_path / "a.conll").write_text(lines)
    found = read(tmp_path / "a.conll", validation_fraction=0.2, test_fraction=0.2)
    assert {name: len(rows) for name, rows in found.items()}.keys() == {"train", "validation", "test"}
    assert all(len(row) == 3 for rows in found.values() for row in rows) and sum(map(len, found.values())) == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a NN\nb O\n", "line 1: tag 'NN' is neither O nor B, I, E or S with a type"),
        ("a O\nb\n", "line 2: 'b' has no word in column 0 or no tag behind it"),
        ("a O\nb O\n", "all its tags are O"),
        ('{"tokens": ["a"], "tags": ["O", "O"]}', "line 1: there are 1 tokens, but 2 tags"),
        ('{"tokens": "a b", "tags": ["O", "O"]}', "line 1: the tokens are no list of texts"),
    ],
)
def test_what_is_wrong_with_tags_is_told_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "train.txt")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (
            "a I-X\nb O\n\nd I-X\n\ne B-X\n",
            "1 tags do not fit IOB1, the scheme of the others, such as that of {path}, line 6",
        ),
        ("a B-X\nb I-Y\nc B-X\n", "1 tags do not fit BIO, the scheme of the others, such as that of {path}, line 2"),
        (
            "a S-X\nb S-X\n\nc S-X\nd B-X\n",
            "1 tags do not fit BIOES, the scheme of the others, such as that of {path}, line 5",
        ),
        ("a S-X\nb B-X\nb E-X\n", ""),
        ("a U-X\nb B-X\nb L-X\n", ""),
    ],
)
def test_tags_of_another_scheme_than_the_others_are_noted(tmp_path: Path, content: str, note: str) -> None:
    path = tmp_path / "train.txt"
    path.write_text(content)
    notes = open_source(configs.DataConfig(path=str(path), validation_fraction=0.0, test_fraction=0.0), "tags").notes
    found = [line.partition(";")[0] for line in notes if "do not fit" in line]
    assert found == ([note.format(path=path)] if note else [])


def test_a_type_that_train_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a B-X\n")
    (tmp_path / "test.txt").write_text("b O\n\nc B-Y\n")
    with pytest.raises(UserError, match=r"test\.txt, line 3: label 'B-Y' is none of the classes O, B-X, I-X"):
        read(tmp_path, validation_path=str(tmp_path / "test.txt"))


# Samples


def split_of(sentences: list[list[tuple[int, int]]]) -> Split:
    """Return a split of sentences whose words have so many tokens and a tag; each token id occurs once."""
    sizes = [size for sentence in sentences for size, _ in [*sentence, (0, -1)]]
    labels = [label for sentence in sentences for _, label in [*sentence, (0, -1)]]
    n = sum(sizes)
    return Split(np.arange(10, 10 + n), np.cumsum([0, *sizes]), np.array(labels, np.int32), np.ones(len(sizes), int))


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_each_word_is_labelled_once_at_its_first_token(pooling: str) -> None:
    config = configs.build({"task": "tag", "model.seq_len": 8, "model.pooling": pooling})
    random = np.random.default_rng(0)
    sizes = [int(n) for n in random.integers(1, 30, 40)]
    sentences = [[(int(random.integers(0, 4)), int(random.integers(0, 3))) for _ in range(n)] for n in sizes]
    sentences[3][2] = (11, 2)  # longer than a window
    split = split_of(sentences)
    samples = TaggedSamples(split, config, {"pad": 0, "start": 1, "end": 2, "article": 3}, 2000)
    indices = np.arange(len(samples))
    batch = samples.batch(indices, 0 * indices)
    found = []
    for tokens, positions, labels, length in zip(
        batch["tokens"], batch["positions"], batch["labels"], samples.lengths(indices), strict=True
    ):
        n = int(np.sum(labels >= 0))
        assert n > 0 and np.all(labels[n:] == -1)  # words first
        found += list(zip(tokens[positions[:n]].tolist(), labels[:n].tolist(), strict=True))
        first, last = (1, 2) if pooling == "first" else (3, 3)
        assert tokens[0] == first and tokens[length - 1] == last
        assert np.all(tokens[length:] == (0 if pooling == "first" else 3))
    sizes_of_words = np.diff(split.offsets)
    expected = [
        (int(split.tokens[split.offsets[i]]), int(split.labels[i]))
        for i in range(len(split))
        if split.labels[i] >= 0 and sizes_of_words[i]
    ]
    assert found == expected
    assert samples.n_tokens(batch) == samples.lengths(indices).sum()
    assert samples.n_cut == 1 and samples.n_divided == sum(sum(s for s, _ in x) > 6 for x in sentences)


def test_windows_take_as_many_whole_words_as_fit() -> None:
    assert windows([1, 2, 3, 1, 9, 1, 1], 6) == [0, 3, 4, 5]
    assert windows([6, 6], 6) == [0, 1] and windows([], 6) == [0]


def test_a_word_alone_is_an_article_and_an_empty_one_ends_the_sentence() -> None:
    found = list(sources.sentence("train", [("a", 1), ("b", 0)]))
    assert [(x.text, x.label) for x in found] == [(" a", 1), (" b", 0), ("", -1)]
