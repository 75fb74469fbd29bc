"""What separates the documents of plain text: the setting data.documents, or a look at the files."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxlm.config import DataConfig
from jaxlm.data import files
from jaxlm.data.parts import SPLITS, WHOLE, Part
from jaxlm.io import utf8

MANY = 20  # files that are a document each; of fewer documents, a hash may put all into one split
LOOKED_AT = 50  # files, at most
FEW_LINES = 20  # which say nothing about a text
SHORT = 200  # characters of a line, at most, that is a verse, or of a paragraph of several lines
GAP = 1000  # characters left out between the splits of a document, at most


def resolved(config: DataConfig) -> tuple[DataConfig, str, files.Tree]:
    """Return the settings of local files with what separates their documents in the place of auto, why, and the files.

    Raises UserError for files that are not there.
    """
    is_auto = config.documents == "auto"
    tree = files.tree(config) if is_auto or config.documents in WHOLE else files.NO_TREE
    return *_resolved(config, is_auto, tree[0]), tree


def _resolved(config: DataConfig, is_auto: bool, tree: list[Path]) -> tuple[DataConfig, str]:
    if tree and not is_auto:
        return dataclasses.replace(config, format="text"), ""
    by_line = dataclasses.replace(config, documents="line")
    if tree:
        found, why = look(tree)
        is_deep = len({path.parent for path in tree}) > 1
        if found == "file" or is_deep:
            why = why if found == "file" else "they are in several folders"
            return dataclasses.replace(config, documents="file", format="text"), why
        return by_line, why
    if not is_auto:
        return config, ""
    train = [path for split, path in files.find(by_line)[0] if split == "train"]
    kinds = {files.kind_of(path, config) for path in train}
    if kinds == {"text"}:
        found, why = look(train)
        return dataclasses.replace(config, documents=found), why
    if kinds == {"wikitext"}:
        return dataclasses.replace(config, documents="wikitext"), "it has lines such as = Title ="
    return by_line if kinds & {"text", "wikitext"} else dataclasses.replace(config, documents="column"), ""


def look(paths: Sequence[Path]) -> tuple[Literal["file", "line"], str]:
    """Return whether each of some text files is a document, "file", or each line in them, "line", and why."""
    starts = [files.start_of(path) for path in paths[:: -(-len(paths) // LOOKED_AT)]]
    are_small = statistics.median(len(start) for start in starts) < files.HEAD
    if len(paths) >= MANY and are_small:
        return "file", f"there are {len(paths):,} files, most of them small"
    lines = [line.strip() for start in starts for line in start.rstrip().split("\n")]
    written = [line for line in lines if line]
    if len(paths) == 1 and len(written) == 1 and files.is_one_line(paths[0]):
        return "file", "it has a single line"
    if any(path.stat().st_size > utf8.LONGEST for path in paths):
        return "line", "a file is longer than a document can be"
    n_blank, n_short = len(lines) - len(written), sum(len(line) <= SHORT for line in written)
    blank, short = n_blank / len(lines), n_short / max(len(written), 1)
    share = f"{short:.0%} of the lines have at most {SHORT} characters, and {blank:.0%} are blank"
    is_book = len(written) >= FEW_LINES and blank >= 0.02 and short >= 0.8
    return ("file", f"{share}, as in a book or in code") if is_book else ("line", share)


def are_divided(parts: Sequence[Part], shares: Mapping[str, float]) -> bool:
    """Return whether each document is divided into splits, since there are too few to be assigned to one each."""
    train = [part for part in parts if part.split == "train"]
    return bool(shares) and len(train) < MANY and all(part.format == "file" for part in train)


def divided(text: str, shares: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the splits of a document, each with its part: contiguous blocks, training first, with gaps between them."""
    sizes = {"train": 1 - sum(shares.values()), **{split: shares.get(split, 0.0) for split in SPLITS[1:]}}
    gap, start, end = gap_of(text), 0, 0.0
    reach = min(GAP, int(len(text) * min(size for size in sizes.values() if size) / 4))  # of a border from its place
    for split, size in sizes.items():
        end += size * len(text)
        stop = len(text) if end > len(text) - 1 else _line_end(text, int(end), reach)
        if size and text[start:stop].strip():
            yield split, text[start:stop]
            start = _line_end(text, stop + gap, reach)


def gap_of(text: str) -> int:
    return min(GAP, len(text) // 1000)


def _line_end(text: str, place: int, reach: int) -> int:
    """Return where the line, or else the word, at a place ends; the place itself if that is out of reach."""
    for end in ("\n", " "):
        if 0 <= (found := text.find(end, place, place + reach)):
            return found + 1
    return min(place, len(text))


def notes(parts: Sequence[Part], why: str, shares: Mapping[str, float]) -> Iterator[str]:
    """Yield what separates the documents, and how few of them are divided into splits."""
    kinds = {part.format for part in parts if part.split == "train"}
    what = {
        "file": "each file is a document" if len(parts) > 1 else "the file is one document, with its line breaks",
        "blank_line": "blank lines separate the documents",
        "text": "each line of a text file is a document of its own",
        "wikitext": "each title, such as = Title =, begins a document",
    }
    for kind in sorted(kinds & what.keys()):
        yield f"{what[kind]}" + (f": {why} (data.documents={_setting(kind)})" if why else "")
    if are_divided(parts, shares):
        sizes = [f"the first {1 - sum(shares.values()):.0%} for training"]
        sizes += [f"then {shares[split]:.0%} for {split}" for split in SPLITS[1:] if shares.get(split)]
        each = "a hash would put it into one split" if len(parts) == 1 else f"a hash needs more than {len(parts)}"
        of = "of the document" if len(parts) == 1 else "of each document"
        yield f"{of}, {', '.join(sizes)}, with gaps of up to {GAP:,} characters between them: {each}"


def _setting(kind: str) -> str:
    return "line" if kind == "text" else kind
