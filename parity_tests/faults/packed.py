"""Faults of packed rows: documents that see each other, positions, labels and texts of another document."""

from parity_tests.faults.planting import mirrored
from parity_tests.faults.targets import (
    classifier_head,
    cosine_loss,
    distilled,
    document_positions,
    gpt_loss,
    hidden,
    mlm_loss,
    packed_rows,
)

MLM, GPT, SST2, TAUGHT = "packed mlm", "packed gpt", "packed sst2", "packed and distilled mlm"
OTHERS, WHOLE = "_s[:, :, None] != _s[:, None, :]", ("batch.get('segments')", "None")
LABELS = (
    "_rows | {'labels': _join(_alone['labels'], *_rest)}",
    "_rows | {'labels': np.where(np.roll(_rows['segments'], -1, 1) > 0, np.roll(_rows['tokens'], -1, 1), -1)}",
)

FAULTS = [
    *mirrored("documents seen: all documents of a row see each other", MLM, hidden, ("_s is not None", "False")),
    *mirrored(
        "documents before: a document sees those before it in its row",
        GPT,
        hidden,
        (OTHERS, "_s[:, :, None] < _s[:, None, :]"),
    ),
    *mirrored(
        "next document seen: a document sees the one behind it",
        SST2,
        hidden,
        (OTHERS, "(_s[:, :, None] - _s[:, None, :] + 1) * (_s[:, :, None] - _s[:, None, :]) != 0"),
    ),
    *mirrored("segments dropped: the loss of mlm does not pass them on", MLM, mlm_loss, WHOLE),
    *mirrored("segments dropped for gpt: the loss of gpt does not pass them on", GPT, gpt_loss, WHOLE),
    *mirrored(
        "positions go on: those of a document follow the one before", GPT, document_positions, ("_at - _begin", "_at")
    ),
    *mirrored(
        "positions from one in packed rows: each document begins at position 1",
        GPT,
        document_positions,
        ("_at - _begin", "_at - _begin + 1"),
    ),
    *mirrored(
        "label across a border: a document's last token is to guess the next one's first",
        GPT,
        packed_rows,
        LABELS,
    ),
    *mirrored(
        "masks of the first document: masked positions of all documents are counted from the row's begin",
        MLM,
        packed_rows,
        ("(_places + _begins).astype(np.int32)", "_places"),
    ),
    *mirrored(
        "text of the wrong segment: the label of each text is that of the next",
        SST2,
        packed_rows,
        ("(_places + _begins).astype(np.int32)", "np.roll(_places + _begins, 1, axis=0)"),
    ),
    *mirrored(
        "one text a row: all labels of a row are of its first text",
        SST2,
        classifier_head,
        ("_at(x_BTD, positions)", "_at(x_BTD, 0 * positions)"),
    ),
    *mirrored(
        "one number for two: documents of a row have the same segment", MLM, packed_rows, ("1 + _n", "1 + 0 * _n")
    ),
    *mirrored(
        "teacher without segments: the teacher sees rows as one document",
        TAUGHT,
        distilled,
        (
            "_teacher(_tokens, None, _positions, True, _segments, *_x)",
            "_teacher(_tokens, None, _positions, True, None, *_x)",
        ),
    ),
    *mirrored(
        "cosine of rows: a row is one sample, not each of its documents",
        TAUGHT,
        cosine_loss,
        ("segments_BT is not None and positions_BM is not None", "False"),
    ),
]
