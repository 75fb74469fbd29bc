"""What a source is made of: parts, which are files or splits of a data set of the hub, and the columns used of each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.config import DataConfig
from jaxlm.errors import UserError, nearest

SPLITS = ("train", "validation", "test")
STEMS = {"train": "train", "in_domain_train": "train"}  # file name before its first dot -> split
STEMS |= dict.fromkeys(("validation", "valid", "val", "dev", "in_domain_dev"), "validation")
STEMS |= dict.fromkeys(("test", "out_of_domain_dev"), "test")
# As the publishers of GLUE name them. MNLI has two validation parts: the mismatched one is scored as the test part.
STEMS |= {"msr_paraphrase_train": "train", "msr_paraphrase_test": "test"}
STEMS |= {"sts-train": "train", "sts-dev": "validation", "sts-test": "test"}
STEMS |= dict.fromkeys(("dev_matched", "validation_matched"), "validation")
STEMS |= dict.fromkeys(("dev_mismatched", "validation_mismatched"), "test")
MOST_COLUMNS = 10_000
AUTO = "auto"  # data.pair_column: by a usual name
WHOLE = ("file", "blank_line")  # data.documents that divide any text, whatever its lines are
# Settings of the columns that are used, and their usual names in order of preference.
ARTICLES = (
    ("text_column", ("text", "sentence", "content", "document", "article", "review")),
    ("label_column", ("label", "labels", "acceptability", "target")),
)
TAGS = (("text_column", ("tokens", "words", "text")), ("label_column", ("tags", "ner_tags", "labels", "ner", "label")))
SENTENCES = (  # two texts with a label
    ("text_column", ("sentence1", "premise", "question1", "#1 string", "text1", "text_a", "question", "text")),
    ("label_column", ("label", "labels", "gold_label", "quality", "is_duplicate", "score", "similarity", "target")),
    ("pair_column", ("sentence2", "hypothesis", "question2", "#2 string", "text2", "text_b", "sentence")),
)
COUPLES = (
    ("text_column", ("text", "anchor", "query", "sentence1", "premise", "question1", "question", "sentence")),
    ("pair_column", ("pair", "positive", "sentence2", "hypothesis", "question2", "document", "answer")),
)
PAIRS = (
    ("prompt_column", ("prompt", "question", "instruction", "input")),
    ("answer_column", ("answer", "completion", "response", "output", "reply")),
)

# What a task reads from a source: texts; texts with a class, a set of classes, or a number; prompts and answers; words
# with tags; pairs of texts.
Reads = Literal["text", "labels", "sets", "values", "pairs", "tags", "couples"]
OF_TWO = ("pairs", "couples")
WITH_CLASSES = ("labels", "sets", "tags")
LABELLED = ("labels", "sets", "values")  # rows with labels
ANNOTATED = (*LABELLED, "tags")  # tasks whose evaluations score all samples
Row = tuple[Any, ...]  # its number, then text and label, or prompt and answer, as found; a second text is last


@dataclass(frozen=True)
class Table:
    """How the rows of a part are read."""

    rows: Callable[[], Iterator[Row]]
    columns: tuple[Any, ...] = (None, None, False)  # text or prompt, label or answer (None: there is none), has header
    names: tuple[str, ...] = ()  # of the classes, where labels are declared as numbers of names
    pair: Any = None  # column of the second text


@dataclass(frozen=True)
class Part:
    """A file, or a split of a data set of the hub."""

    name: str
    split: str
    format: str
    content: str  # hash
    size: int  # bytes, decompressed
    table: Table
    is_remote: bool = False  # it is fetched each time that it is read

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises UserError where the libraries that read them raise anything."""
        if self.format == "hub":
            mend = "run again, which continues where this ended, or use a local file with --data.path FILE"
            return guarded(self.table.rows, f"{self.name}: cannot be read", mend)
        return guarded(self.table.rows, f"{self.name}: cannot be read as {self.format}")

    def place(self, number: int) -> str:
        return f"{self.name}, {'row' if self.format in ('parquet', 'hub') else 'line'} {number}"

    def bad(self, number: int, what: str) -> UserError:
        """Return the error for a row."""
        return UserError(f"{self.place(number)}: {what}")


def guarded(
    rows: Callable[[], Iterator[Any]], failure: str, mend: str = "mend the file or set data.format"
) -> Iterator[Any]:
    """Yield `rows()`. Raises UserError, of `failure` and `mend`, where that raises anything else."""
    try:
        yield from rows()
    except UserError:
        raise
    except Exception as error:  # the libraries pass on errors of pyarrow and the system, of many types
        reason = " ".join(str(error).split())
        raise UserError(f"{failure}: {reason[:200]}; {mend}") from error


@dataclass(frozen=True)
class Wanted:
    """How to read a part: the settings of the data, the columns to use, and the split of the part."""

    config: DataConfig
    reads: Reads
    split: str

    @property
    def choices(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """The setting, its value ("": by a usual name) and the usual names of each column."""
        columns: Any = {"pairs": PAIRS, "tags": TAGS, "couples": COUPLES}.get(self.reads, ARTICLES)
        if self.reads in LABELLED and self.config.pair_column:
            columns = SENTENCES
        if self.reads == "values":
            more = {"label_column": ("score", "similarity", "value")}
            columns = [(name, (*usual, *more.get(name, ()))) for name, usual in columns]
        values = [(setting, getattr(self.config, setting), usual) for setting, usual in columns]
        return [(setting, "" if value == AUTO else value, usual) for setting, value, usual in values]

    def is_header(self, cells: Iterable[str]) -> bool:
        """Return whether cells, in lower case, may be names of columns, by that of the text."""
        _, value, usual = self.choices[0]
        names = {value.lower()} if value and not value.isdecimal() else {*usual}
        return not names.isdisjoint(cell.strip().lower() for cell in cells)

    def columns(
        self, name: str, names: Sequence[str], usual: Sequence[tuple[str, ...]] | None = None, shown: Sequence[str] = ()
    ) -> tuple[int, int | None, int | None]:
        """Return which of the columns `names` are used: of the text, the label and the second text.

        None: the label is not wanted or, in test, not there; there is no second text.

        `usual` replaces the usual names, and `shown` the names in messages. Raises UserError for a column that is not
        there, or there twice.
        """
        there = f"there are {', '.join((shown or names)[:20])}"
        if len(shown) == 1:
            there = (
                f"there is {shown[0]} alone: the first line has to be a row, its columns separated by , ; | or a tab"
            )
        keys = [key.strip() for key in names]

        def choose(setting: str, value: str, usual: Iterable[str]) -> int:
            known, choices = (keys, [value.strip()]) if value else ([key.lower() for key in keys], usual)
            numbers = next(([i for i, key in enumerate(known) if key == one] for one in choices if one in known), [])
            if not numbers and value.isdecimal() and int(value) < len(names):
                return int(value)
            if not numbers and value:
                mend = nearest(value, names) or f"; set data.{setting} to one of them"
                raise UserError(f"data.{setting}={value}: no such column in {name}{mend}; {there}")
            if not numbers:
                raise UserError(f"{name}: no column has a usual name; set data.{setting}; {there}")
            if len(numbers) > 1:
                both = " and ".join(f"{i} ({names[i]})" for i in numbers[:5])
                raise UserError(f"{name}: columns {both} have the same name; set data.{setting} to the number of one")
            return numbers[0]

        first, second, *others = (
            (setting, value, usual[i] if usual else known) for i, (setting, value, known) in enumerate(self.choices)
        )
        is_only = len(names) == 1 and self.reads not in OF_TWO and not first[1]
        text = 0 if is_only else choose(*first)
        # GLUE publishes test files without labels.
        has_label = second[1] or not {key.lower() for key in keys}.isdisjoint(second[2])
        is_hidden = self.reads in LABELLED and self.split == "test" and not has_label
        label = None if self.reads == "text" or is_hidden else choose(*second)
        pair = choose(*others[0]) if others else None
        used = [(column, setting) for column, (setting, _, _) in zip((text, label, pair), self.choices, strict=False)]
        for i, (column, setting) in enumerate(used):
            same = [other for number, other in used[:i] if number == column]
            if column is not None and same:
                both = f"data.{same[0]} and data.{setting}"
                raise UserError(f"{name}: {both} are both column {names[column]}; set each to its own; {there}")
        return text, label, pair


def check_width(name: str, names: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{name}: has {len(names):,} columns or more, but {MOST_COLUMNS:,} can be read; leave some out")


def no_article(name: str) -> UserError:
    return UserError(f"{name}: no article in it; give a file with text")
