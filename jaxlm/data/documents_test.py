"""What separates documents in plain text: what is taken and why, whole files, blocks, and the splits of a lone one."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import documents
from jaxlm.data.sources import Source, open_source
from jaxlm.errors import UserError

# Verses in speeches, as in plays; a paragraph of several lines each, as in books.
BOOK = "".join(f"Speaker {i}:\n" + f"The {i}th verse is here,\nand it goes on.\n" * 3 + "\n" for i in range(400))
ONE_A_LINE = "".join(f"Sentence {i} is short, and its line is all of it.\n" for i in range(400))


def source_of(path: Path, **settings: object) -> Source:
    return open_source(DataConfig(path=str(path), **settings), "text")  # type: ignore[arg-type]


def texts(source: Source, split: str = "train") -> list[str]:
    return [article.text for article in source.articles() if article.split == split]


def written(path: Path, text: str = BOOK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_lone_book_is_one_document_with_its_line_breaks_in_blocks_with_gaps(tmp_path: Path) -> None:
    source = source_of(written(tmp_path / "input.txt"))
    train, validation, test = list(source.articles())
    assert [article.split for article in (train, validation, test)] == ["train", "validation", "test"]
    assert source.documents == "file" and BOOK.startswith(train.text) and BOOK[:-1].endswith(test.text)
    for before, after in ((train, validation), (validation, test)):
        start = BOOK.index(after.text)
        gap = start - BOOK.index(before.text) - len(before.text)
        assert 20 <= gap <= 20 + 2 * 30  # a thousandth of the text, to the end of a line
        assert BOOK[start - 1] == "\n" and before.text.endswith("\n")
    assert [len(x.text) / len(BOOK) for x in (train, validation, test)] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert any(
        "19% of" not in note and "as in a book" in note and "data.documents=file" in note for note in source.notes
    )
    assert any(note.startswith("of the document, the first 80% for training, then 10% for") for note in source.notes)
    assert not any("by hash (" in note for note in source.notes)
    whole = source_of(tmp_path / "input.txt", validation_fraction=0.0, test_fraction=0.0)
    assert texts(whole) == [BOOK[:-1]]


def test_a_document_without_lines_is_divided_at_words(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(5000))
    train, validation = list(source_of(written(tmp_path / "a.txt", words), test_fraction=0.0).articles())
    assert validation.split == "validation" and validation.text.startswith("word") and train.text.endswith(" ")
    assert words == train.text + words[len(train.text) : -len(validation.text)] + validation.text


def test_own_parts_leave_a_book_whole(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a.txt"), written(tmp_path / "b.txt", BOOK[:500])
    source = source_of(path, validation_path=str(other), test_path=str(written(tmp_path / "c.txt", BOOK[:700])))
    assert [(x.split, len(x.text)) for x in source.articles()] == [
        ("train", len(BOOK) - 1),
        ("validation", len(BOOK[:500].rstrip("\n"))),
        ("test", len(BOOK[:700].rstrip("\n"))),
    ]


def test_a_corpus_of_lines_stays_one(tmp_path: Path) -> None:
    source = source_of(written(tmp_path / "a.txt", ONE_A_LINE))
    assert source.documents == "line"
    assert sorted(x.text for x in source.articles()) == sorted(ONE_A_LINE.splitlines())
    few = source_of(written(tmp_path / "b.txt", "a\n\nb\n\nc\n"), validation_fraction=0.0, test_fraction=0.0)
    assert texts(few) == ["a", "b", "c"]  # too little to tell


def test_many_files_are_a_document_each_in_any_folder_with_any_ending(tmp_path: Path) -> None:
    folders, endings = ("", "sub/", "sub/deeper/"), ("", ".md", ".rs")
    names = [f"{folder}page{i}{end}" for folder in folders for i, end in enumerate(endings)]
    for i, name in enumerate(names):
        written(tmp_path / name, f"{name}\n\n" + "line\n" * i)
    written(tmp_path / ".git" / "config", "hidden\n")
    written(tmp_path / "sub" / ".cache", "hidden\n")
    (tmp_path / "sub" / "picture.md").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    written(tmp_path / "empty.txt", "")
    source = source_of(tmp_path, validation_fraction=0.0, test_fraction=0.0)
    assert [text.split("\n")[0] for text in texts(source)] == sorted(names, key=lambda name: (name.count("/"), name))
    assert source.documents == "file"
    (left_out,) = (note for note in source.notes if note.startswith("not used"))
    assert all(name in left_out for name in (".git", ".cache", "picture.md", "empty.txt"))
    again = source_of(tmp_path, validation_fraction=0.0, test_fraction=0.0, documents="file")
    assert again.fingerprint == source.fingerprint  # as a run that resumes has it

    for i in range(documents.MANY):
        written(tmp_path / f"more{i}.txt", f"more {i}\nof it\n")
    found = list(source_of(tmp_path).articles())
    assert {x.split for x in found} == {"train", "validation", "test"}  # by hash, each file whole
    assert sorted(x.text for x in found if "more" in x.text) == sorted(
        f"more {i}\nof it" for i in range(documents.MANY)
    )


def test_shards_of_lines_stay_so(tmp_path: Path) -> None:
    for i in range(3):
        written(tmp_path / f"part{i}.txt", "".join(f"{i} {line}\n" for line in ONE_A_LINE.splitlines()))
    source = source_of(tmp_path)
    assert source.documents == "line" and len(list(source.articles())) == 1200


def test_a_folder_with_named_parts_is_read_by_them(tmp_path: Path) -> None:
    written(tmp_path / "train.txt")
    written(tmp_path / "valid.txt", BOOK[:600])
    written(tmp_path / "notes.md", "not of it\n")
    source = source_of(tmp_path, test_fraction=0.0)
    assert [(x.split, x.text) for x in source.articles()] == [
        ("train", BOOK[:-1]),
        ("validation", BOOK[:600].rstrip("\n")),
    ]


def test_blank_lines_separate_documents_on_request(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\n\none\n  two\n\n \n\nthree\n\n")
    source = source_of(path, documents="blank_line", validation_fraction=0.0, test_fraction=0.0)
    assert texts(source) == ["one\n  two", "three"]


@pytest.mark.parametrize(("settings", "expected"), [({}, 2), ({"documents": "line"}, 2), ({"format": "text"}, 5)])
def test_wikitext_has_an_article_a_title(settings: dict, expected: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", " = One = \n text\n more\n = Two = \n text\n")
    source = source_of(path, validation_fraction=0.0, test_fraction=0.0, **settings)
    assert len(texts(source)) == expected


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"data.documents=column: .*a.txt is plain text; give a table"):
        source_of(text, documents="column")
    table = written(tmp_path / "b.csv", "text,other\n" + "one,1\n" * 30)
    notes = source_of(table, documents="file").notes
    assert any(note.startswith("data.documents=file has no effect: a table has a document a row") for note in notes)
    monkeypatch.setattr("jaxlm.io.utf8.LONGEST", 1000)
    with pytest.raises(UserError, match="the document at line 1 is longer than .* with --data.documents line"):
        source_of(text, documents="file")
    assert source_of(text).documents == "line"  # what is too long for one document is taken for none


def test_a_line_that_fills_the_start_is_not_the_only_one(tmp_path: Path) -> None:
    book = "word " * 60_000
    assert (
        source_of(
            written(tmp_path / "books.txt", f"{book}\n{book}\n"), validation_fraction=0, test_fraction=0
        ).documents
        == "line"
    )
    assert source_of(written(tmp_path / "book.txt", f"{book}\n\n")).documents == "file"


def test_a_damaged_file_of_a_folder_is_not_left_out(tmp_path: Path) -> None:
    for i in range(24):
        (tmp_path / f"a{i}.txt.gz").write_bytes(gzip.compress(f"the cat {i}\n".encode() * 30))
    assert len(list(source_of(tmp_path).articles())) == 24
    (tmp_path / "a7.txt.gz").write_bytes((tmp_path / "a7.txt.gz").read_bytes()[:20])
    with pytest.raises(UserError, match="a7.txt.gz"):
        source_of(tmp_path)


@pytest.mark.parametrize("size", [3_000, 10_000, 100_000])
def test_a_border_at_the_end_of_a_long_line_takes_little_of_a_split(size: int) -> None:
    random, lines = np.random.default_rng(0), []
    while sum(map(len, lines)) < size:
        lines.append("x" * int(random.integers(100, 900)) + "\n")
    parts = dict(documents.divided("".join(lines), {"validation": 0.1, "test": 0.1}))
    assert list(parts) == ["train", "validation", "test"]
    assert min(map(len, parts.values())) > 0.04 * size


def test_what_old_runs_read_has_the_fingerprint_that_it_had(tmp_path: Path) -> None:
    """A run from before data.documents resumes with "line" (configs.BEFORE), whatever a look would say today."""
    path = written(tmp_path / "a.txt")
    old = source_of(path, documents="line")
    assert [x.text for x in old.articles()] == [line for line in BOOK.splitlines() if line]
    assert old.fingerprint != source_of(path).fingerprint
    titled = written(tmp_path / "b.txt", " = One = \n text\n")
    assert source_of(titled, documents="line").fingerprint == source_of(titled).fingerprint
    table = written(tmp_path / "c.csv", "text\n" + "one\n" * 30)
    assert source_of(table, documents="line").fingerprint == source_of(table).fingerprint
