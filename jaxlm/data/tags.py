"""Tags of words: the schemes IOB1, BIO and BIOES, which are read, checked and converted to BIO; and spans.

A tag is `O`, or a prefix and a type, such as `B-PER`.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from jaxlm.data.parts import Part
from jaxlm.errors import UserError

OUTSIDE, NONE = "O", ("O", "")
SCHEMES = {"IOB1", "BIO", "BIOES"}
BILOU = {"L": "E", "U": "S"}  # prefixes that BIOES writes otherwise
WORD = re.compile(r"\w(?:[\w.,'’&/-]*\w)?|[^\w\s]")  # of a text that comes without its words, as to jaxlm.predict
Span = tuple[str, int, int]  # type, first word, and the word behind the last


def split_tag(tag: str) -> tuple[str, str]:
    """Return prefix and type of a tag, ("O", "") for no span. Raises ValueError for what is no tag."""
    prefix, dash, kind = tag.partition("-")
    prefix = BILOU.get(prefix, prefix)
    if tag == OUTSIDE or (dash and kind and prefix in ("B", "I", "E", "S")):
        return prefix, kind
    raise ValueError(f"tag {tag!r} is neither {OUTSIDE} nor B, I, E or S with a type, as in B-PER")


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans that tags of any scheme mark, as the script conlleval and seqeval's default mode read them."""
    found: list[Span] = []
    before, before_kind, start = OUTSIDE, "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        starts = prefix in ("B", "S") or before in (OUTSIDE, "E", "S") or kind != before_kind
        if before != OUTSIDE and (prefix == OUTSIDE or starts):
            found.append((before_kind, start, i))
        start = i if starts else start
        before, before_kind = prefix, kind
    return found


def to_bio(tags: Sequence[str]) -> list[str]:
    """Return tags of any scheme in BIO."""
    result = [OUTSIDE] * len(tags)
    for kind, start, end in spans(tags):
        result[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return result


def _fitting(before: tuple[str, str], now: tuple[str, str]) -> set[str]:
    """Return the schemes in which a word with `now` may follow one with `before`."""
    (prefix_before, kind_before), (prefix, kind) = before, now
    goes_on = kind == kind_before
    is_open = prefix_before in ("B", "I")  # in BIOES, such a span needs more words
    fits = {
        "IOB1": prefix in ("O", "I") or (prefix == "B" and goes_on),
        "BIO": prefix in ("O", "B") or (prefix == "I" and goes_on),
        "BIOES": (prefix in ("I", "E") and goes_on) if is_open else prefix in ("O", "B", "S"),
    }
    return {scheme for scheme, fit in fits.items() if fit}


def sentences(part: Part) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield number, words and tags, as they are, of each sentence of a part. Raises UserError for a bad row."""
    for number, words, tags in part.rows():
        if names := part.table.names:  # a list of numbers, as the library `datasets` keeps them
            tags = [names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag for tag in tags or ()]
        for name, setting, values in (("tokens", "text_column", words), ("tags", "label_column", tags)):
            if not isinstance(values, list | tuple) or not all(isinstance(x, str) for x in values):
                raise part.bad(number, f"the {name} are no list of texts; write one, or set data.{setting}")
        if len(words) != len(tags):
            raise part.bad(number, f"there are {len(words)} tokens, but {len(tags)} tags; give each token a tag")
        for i, tag in enumerate(tags):
            try:
                split_tag(tag)
            except ValueError as error:
                raise part.bad(_line(part, number, i), f"{error}; correct it, or set data.label_column") from None
        yield number, list(words), list(tags)


def classes(parts: Iterable[Part], notes: list[str]) -> tuple[str, ...]:
    """Return the tags that a model of these parts has: O, then B and I of each type in those for training.

    Notes the scheme of each part, and how many of its tags do not fit. Raises UserError for no type.
    """
    kinds: set[str] = set()
    for part in (parts := list(parts)):
        odd: dict[str, list[str]] = {scheme: [] for scheme in SCHEMES}  # places of tags that do not fit
        for number, _, tags in sentences(part):
            pairs = [split_tag(tag) for tag in tags]
            kinds |= {kind for _, kind in pairs if kind} if part.split == "train" else set()
            for i, (before, now) in enumerate(itertools.pairwise([NONE, *pairs, NONE])):
                for scheme in SCHEMES - _fitting(before, now):
                    odd[scheme].append(part.place(_line(part, number, min(i, len(tags) - 1))))
        scheme = min(sorted(SCHEMES), key=lambda name: len(odd[name]))
        if places := odd[scheme]:
            notes.append(
                f"{len(places)} tags do not fit {scheme}, the scheme of the others, such as that of {places[0]}; "
                "a span begins there where the type changes"
            )
    if not kinds:
        raise UserError(f"{parts[0].name}: all its tags are {OUTSIDE}; is the column of the tags data.label_column?")
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(kinds) for prefix in "BI"))


def _line(part: Part, number: int, i: int) -> int:
    """Return the number of the line or row that word i of a sentence is in."""
    return number + i if part.format == "conll" else number
