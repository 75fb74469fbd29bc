"""Faults of a tagger: which token of a word has its label, and which spans count as right."""

from parity_tests.faults.planting import mirrored
from parity_tests.faults.targets import tag_totals, tagged_rows

BERT, SPANS = "BERT of transformers that tags", "spans of seqeval"

FAULTS = [
    *mirrored(
        "label on the last piece: the tag of a word is read at its last token",
        BERT,
        tagged_rows,
        ("_starts[_word] - _begin + self.n_start", "self.split.offsets[self.words + 1][_word] - _begin"),
    ),
    *mirrored(
        "labels a word late: each word has the tag of the word before",
        BERT,
        tagged_rows,
        ("self.split.labels[self.words[_word]]", "self.split.labels[self.words[np.maximum(_word - 1, 0)]]"),
    ),
    *mirrored(
        "words without labels: what is no word counts as a span",
        SPANS,
        tag_totals,
        ("labels_BN >= 0", "labels_BN >= -1"),
    ),
    *mirrored(
        "span off by one: a span that ends a word later counts as right",
        SPANS,
        tag_totals,
        ("_labelled[2] == _predicted[2]", "abs(_labelled[2] - _predicted[2]) <= 1"),
    ),
    *mirrored(
        "B is I: neighbours of one type are one span",
        SPANS,
        tag_totals,
        ("_start[_tags] | (_kind != _before)", "_kind != _before"),
    ),
    *mirrored(
        "another type goes on: a type changes within a span",
        SPANS,
        tag_totals,
        ("_start[_tags] | (_kind != _before)", "_start[_tags]"),
    ),
    *mirrored(
        "any type is right: spans of another type count",
        SPANS,
        tag_totals,
        (
            "_labelled[1] & _predicted[1] & (_labelled[0] == _predicted[0]) & _same",
            "_labelled[1] & _predicted[1] & _same",
        ),
    ),
]
