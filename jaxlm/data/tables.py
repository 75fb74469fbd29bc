"""The rows of local files: lines, articles with titles, CSV and TSV, JSON Lines, Parquet.

Files are streamed, and never held in memory as a whole: a line, row or article of more than utf8.LONGEST characters is
refused. The cells of a CSV file are text: nothing guesses types, which would make "2020-01-01" a date.
"""

import contextlib
import csv
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jaxlm.data.parts import MOST_COLUMNS, OF_TWO, WHOLE, Row, Table, Wanted, check_width, guarded, no_article
from jaxlm.errors import UserError
from jaxlm.io import utf8

TITLE = re.compile(r"\s*= [^=].* =\s*")  # a full line; "= = Section = =" has "=" where a title has a word
DELIMITERS = {"tsv": "\t,;|", "csv": ",;\t|"}  # the first, unless only another makes columns
EXCEL = re.compile(r'"?sep=.?"?[\r\n]')  # a first line that only says what the delimiter is
STS_SCORE = re.compile(r"[0-5]\.[0-9]{1,3}")
CSV_END = "\0end of file\0"  # a line behind the last one, by which a quote that is still open is noticed
TWICE = ()  # value of a key that a JSON object has more than once; JSON has no tuples
BATCH = 1000  # rows
DOCUMENT = "-DOCSTART-"  # first column of a line between the documents of CoNLL's files
BATCH_BYTES = 1 << 30  # of a column in one batch, at most, if a row is no larger


def open_table(path: Path, kind: str, head: str, wanted: Wanted) -> Table:
    """Return the table that a file of a format is; `head` is its start, as text. Raises UserError for a bad one."""
    if kind in ("text", "wikitext", *WHOLE):
        return Table(partial(_text_rows, path, kind))
    if kind == "conll":
        columns = (wanted.config.text_column or "0", wanted.config.label_column or "-1")
        for setting, column in zip(("text_column", "label_column"), columns, strict=True):
            if not column.removeprefix("-").isdecimal():
                raise UserError(f"data.{setting}={column}: {path} has columns without names; give a number from 0")
        return Table(partial(_conll_rows, path, *map(int, columns)), (*columns, False))
    if kind in ("csv", "tsv"):
        return _csv_table(path, kind, head, wanted)
    first = partial(_json_columns if kind == "jsonl" else _parquet_columns, path)
    names, class_names = next(guarded(first, f"{path}: cannot be read as {kind}"), ([], {}))
    check_width(str(path), names)
    if not names:
        raise no_article(str(path))
    used: list[Any] = [*wanted.columns(str(path), names)]
    if len(set(names)) == len(names):  # else names do not tell columns apart
        used = [None if column is None else names[column] for column in used]
    rows = partial(_json_rows if kind == "jsonl" else _parquet_rows, path, *used)
    return Table(rows, (*used[:2], False), class_names.get(used[1], ()), used[2])


def guess(head: str, wanted: Wanted) -> str:
    """Return the format of a table whose name does not tell it, by its first rows; "" where they leave a doubt."""
    lines = [line for line in head.split("\n")[:100] if line.strip()]
    with contextlib.suppress(ValueError):
        rows = [utf8.from_json(line) for line in lines if line.startswith("{")]
        if len(rows) == len(lines) and (wanted.reads != "text" or wanted.is_header(rows[0])):
            return "jsonl"
    for kind in DELIMITERS:
        tables = [_even_rows(head, dialect) for dialect in _dialects(kind)]
        if any(len(rows) > 1 and wanted.is_header(rows[0]) for rows in tables):
            return kind
    return ""


# Lines


def _lines(path: Path, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file and their numbers. Raises UserError for one that is too long."""
    for number, line in enumerate(utf8.lines(utf8.opened(path), keep_ends=keep_ends), start=1):
        if len(line) > utf8.LONGEST:
            raise UserError(f"{path}, line {number}: is {utf8.TOO_LONG}")
        yield number, line


def _text_rows(path: Path, kind: str) -> Iterator[Row]:
    rows = ((number, line, None) for number, line in _lines(path))
    if kind == "text":
        return rows
    return grouped(rows) if kind == "wikitext" else _blocks(path, rows, kind == "blank_line")


def _blocks(path: Path, lines: Iterable[Row], ends_at_blank_lines: bool) -> Iterator[Row]:
    """Join lines to documents, up to each blank line or to the end. Raises UserError for one that is too long."""
    block: list[str] = []
    start, size = 1, 0
    for number, line, _ in lines:
        if ends_at_blank_lines and not line.strip():
            if block:
                yield start, "\n".join(block), None
            block, size = [], 0
            continue
        start = start if block else number
        block.append(line)
        size += len(line) + 1
        if size > utf8.LONGEST:
            mend = "separate documents by lines with --data.documents line, or by more files"
            raise UserError(f"{path}: the document at line {start} is {utf8.TOO_LONG}, or {mend}")
    if block:
        yield start, "\n".join(block), None


def grouped(lines: Iterable[Row]) -> Iterator[Row]:
    """Join the lines from a title to the next into one row. Raises ValueError for one that is too long."""
    article: list[str] = []
    start, size = 1, 0
    for number, line, _ in lines:
        line = line.removesuffix("\n")
        if article and TITLE.fullmatch(line):
            yield start, "\n".join(article), None
            article, size = [], 0
        start = start if article else number
        article.append(line)
        size += len(line) + 1
        if size > utf8.LONGEST:
            raise ValueError(f"the article at line {start} is {utf8.TOO_LONG} with titles")
    yield start, "\n".join(article), None


# Words in columns


def _conll_rows(path: Path, word: int, tag: int) -> Iterator[Row]:
    """Yield the number of the first line, the words and the tags of each sentence; -1 is the last column.

    A line has a word and its columns, an empty one or -DOCSTART- ends a sentence. Raises UserError for a bad line.
    """
    words: list[str] = []
    tags: list[str] = []
    for number, line in _lines(path):
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
        if any(cells) and cells[0] != DOCUMENT:
            if len(cells) <= max(1, word, tag) or not cells[word]:
                rule = f"{line.strip()[:40]!r} has no word in column {word} or no tag behind it"
                raise UserError(f"{path}, line {number}: {rule}; write both, or set data.text_column and .label_column")
            words.append(cells[word])
            tags.append(cells[tag])
        elif words:
            yield number - len(words), words, tags
            words, tags = [], []
    if words:
        yield number - len(words) + 1, words, tags


# JSON Lines


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = utf8.from_json(line, _object)
        except json.JSONDecodeError as error:
            mend = ", as with jq -c . OLD > NEW"
            if line.lstrip()[:1] not in ("{", "["):
                mend = ", or set data.format=text to read lines as they are"
            raise UserError(f"{path}, line {number}: not JSON: {error}; write one object a line{mend}") from error
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


def _json_columns(path: Path) -> Iterator[tuple[list[str], dict[Any, tuple[str, ...]]]]:
    return ((list(row), {}) for _, row in _json_objects(path))


def _json_rows(path: Path, text: str, label: str | None, pair: str | None) -> Iterator[Row]:
    for number, row in _json_objects(path):
        for column in filter(None, (text, label, pair)):
            if column not in row:
                raise UserError(f"{path}, line {number}: the object has no {column!r}; add it")
            if row[column] is TWICE:
                raise UserError(f"{path}, line {number}: the object has {column!r} more than once; keep one of them")
        yield number, row[text], row[label] if label else None, *([row[pair]] if pair else [])


# CSV and TSV


def _csv_table(path: Path, kind: str, head: str, wanted: Wanted) -> Table:
    if line := EXCEL.match(head):
        raise UserError(f"{path}, line 1: {line[0].strip()} is for Excel alone; remove this line")
    dialect = _dialect(head, kind, wanted)
    rows = _first_rows(head, dialect)
    # That of STS-B: four columns on the source, score, two texts, and in some rows the licences of the texts.
    plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    is_sts = len(wanted.choices) == 3 and all(_is_sts(row) for row in _first_rows(head, plain))
    if is_sts:
        dialect, rows = plain, _first_rows(head, plain)
    if not rows:
        raise no_article(str(path))
    first = rows[0]
    check_width(str(path), first)
    cells = {cell.strip() for cell in first}
    given = {value for _, value, _ in wanted.choices if value and not value.isdecimal()} | {*wanted.choices[0][2]}
    is_header = not given.isdisjoint(cells | {cell.lower() for cell in cells})
    is_header = is_header if wanted.config.header == "auto" else wanted.config.header == "yes"
    names = first if is_header else [str(column) for column in range(len(first))]
    shown = names if is_header else [f"{column} ({cell[:30]})" for column, cell in enumerate(first)]
    # The raw release of CoLA: source, label, mark, text.
    is_cola = wanted.reads not in OF_TWO and all(len(row) == 4 and row[1] in ("0", "1") for row in rows)
    by_number: Any = (("3",), ("1",), ()) if is_cola else ((), (), ())
    if is_sts:
        by_number = (("5",), ("4",), ("6",))
    used = wanted.columns(str(path), names, None if is_header else by_number, shown)
    delimiter = dialect["delimiter"] if dialect["delimiter"] != DELIMITERS[kind][0] else ""
    n_columns = MOST_COLUMNS if is_sts else len(first)
    rows_of = partial(_csv_rows, path, dialect, n_columns, is_header, *used)
    return Table(rows_of, (*used[:2], is_header, *delimiter), pair=used[2])


def _csv_rows(
    path: Path, dialect: dict[str, Any], n_columns: int, is_header: bool, text: int, label: int | None, pair: int | None
) -> Iterator[Row]:
    start, size = 1, 0  # of the row that is being read: its first line, and its characters so far

    def lines() -> Iterator[str]:
        nonlocal size
        for _, line in _lines(path, keep_ends=True):
            size += len(line)
            if size > utf8.LONGEST:
                raise UserError(f"{path}, line {start}: the row is {utf8.TOO_LONG}; is its last quote missing?")
            yield line
        yield CSV_END

    reader = _reader(lines(), dialect)
    for row in reader:
        if row == [CSV_END]:
            return
        if row and row[-1].endswith(CSV_END):
            raise UserError(f"{path}, line {start}: a quote opens a cell that never ends; close it, or double it")
        if len(row) > n_columns:
            delimiter = {"\t": "tab"}.get(dialect["delimiter"], dialect["delimiter"])
            mend = f"put a cell with {delimiter} in it into quotes"
            if dialect["quoting"] == csv.QUOTE_NONE:
                mend = f"take the {delimiter} out of a cell"
            rule = f"the row has {len(row):,} columns, but the first one has {n_columns}"
            raise UserError(f"{path}, line {start}: {rule}; {mend}")
        if any(cell and not cell.isspace() for cell in row):
            if not is_header:
                row += [""] * (n_columns - len(row))
                yield start, row[text], None if label is None else row[label], *([] if pair is None else [row[pair]])
            is_header = False
        start, size = reader.line_num + 1, 0


def _is_sts(row: list[str]) -> bool:
    return len(row) > 6 and STS_SCORE.fullmatch(row[4]) is not None


def _reader(lines: Iterable[str], dialect: dict[str, Any]) -> Any:
    csv.field_size_limit(utf8.LONGEST)  # of all readers, 131,072 by default
    return csv.reader(lines, **dialect)


def _dialects(kind: str) -> Iterator[dict[str, Any]]:
    """Yield the ways to write a table; in a TSV file that has tabs, a quote is a character like any other."""
    for delimiter in DELIMITERS[kind]:
        is_plain = kind == "tsv" and delimiter == "\t"
        yield {"delimiter": delimiter, "quoting": csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL}


def _dialect(head: str, kind: str, wanted: Wanted) -> dict[str, Any]:
    """Return how a table is written: with its usual delimiter, unless only another one makes columns."""
    first, *others = _dialects(kind)
    rows = _first_rows(head, first)
    if rows and len(rows[0]) > 1 and all(len(row) <= len(rows[0]) for row in rows):
        return first
    for dialect in others:
        if (even := _even_rows(head, dialect)) and (wanted.reads != "text" or wanted.is_header(even[0])):
            return dialect
    return first


def _first_rows(head: str, dialect: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # a damaged row is found, with its line, when rows are checked
        lines = _reader(io.StringIO(head, newline=""), dialect)
        rows += islice((row for row in lines if any(cell.strip() for cell in row)), 100)
    return rows


def _even_rows(head: str, dialect: dict[str, Any]) -> list[list[str]]:
    """Return the first rows if all have as many columns, of two or more, else none."""
    rows = _first_rows(head, dialect)
    if 1 < len(rows) < 100 and not head.endswith("\n") and len(head) > 1 << 16:
        rows.pop()  # it may be cut
    return rows if rows and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1 else []


# Parquet


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a file, or, as Parquet is not read from front to back, a decompressed copy on disk."""
    import pyarrow.parquet

    with utf8.opened(path) as stream, contextlib.ExitStack() as stack:
        plain: Any = path
        if not isinstance(getattr(stream, "raw", None), io.FileIO):  # it is decompressed
            plain = stack.enter_context(tempfile.TemporaryFile(suffix=".parquet"))
            shutil.copyfileobj(stream, plain)
        # Not by the builder of `datasets`, which does not take categories, as pandas writes them.
        yield stack.enter_context(pyarrow.parquet.ParquetFile(plain, buffer_size=1 << 20))


def _parquet_columns(path: Path) -> Iterator[tuple[list[str], dict[Any, tuple[str, ...]]]]:
    """Yield the names of the columns, and the names of classes that the library `datasets` has noted."""
    with _parquet(path) as file:
        names, stored = list(file.schema_arrow.names), (file.schema_arrow.metadata or {}).get(b"huggingface")
    features = json.loads(stored)["info"]["features"] if stored else {}
    features = {name: feature.get("feature", feature) for name, feature in features.items()}  # of lists
    yield names, {name: tuple(feature["names"] or ()) for name, feature in features.items() if "names" in feature}


def _parquet_rows(path: Path, text: str | int, label: str | int | None, pair: str | int | None) -> Iterator[Row]:
    with _parquet(path) as file:
        columns = [column for column in (text, label, pair) if column is not None]
        by_name = [column for column in columns if isinstance(column, str)]
        # A value that is written once may be repeated in many rows, so that a small file can make a huge batch.
        size = min(BATCH, max(1, BATCH_BYTES // max(1, _largest_chunk(file.metadata, by_name))))
        batches = file.iter_batches(size, columns=by_name or None)
        lists = ({column: batch.column(column).to_pylist() for column in columns} for batch in batches)
        yield from batch_rows(lists, text, label, pair)


def _largest_chunk(metadata: Any, names: list[str]) -> int:
    """Return the bytes, decompressed, of the largest piece of a column; `names` are those that count, if any."""
    chunks = (
        metadata.row_group(i).column(j) for i in range(metadata.num_row_groups) for j in range(metadata.num_columns)
    )
    used = (chunk for chunk in chunks if not names or chunk.path_in_schema.partition(".")[0] in names)
    return max((chunk.total_uncompressed_size for chunk in used), default=0)


def batch_rows(batches: Iterable[dict[Any, list[Any]]], text: Any, label: Any, pair: Any = None) -> Iterator[Row]:
    """Yield number, text, label and second text of each row. Raises ValueError for a text that is too long."""
    number, columns = 0, [text, text if label is None else label, *([] if pair is None else [pair])]
    for batch in batches:
        for row in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            if any(isinstance(cell, str) and len(cell) > utf8.LONGEST for cell in (row[0], *row[2:])):
                raise ValueError(f"row {number}: the text is {utf8.TOO_LONG}")
            yield number, *row
