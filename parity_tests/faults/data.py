"""Faults of the inputs: which tokens of a prompt and its answer are labels."""

from parity_tests.faults.planting import mirrored
from parity_tests.faults.targets import pairs

ANSWERS = "GPT-2 of transformers that answers"
IS_LABEL = "(_place >= _middle) & (_place <= _end)"

FAULTS = [
    *mirrored("prompt in the loss: prompts are learned as well", ANSWERS, pairs, (IS_LABEL, "_place <= _end")),
    *mirrored(
        "answer without its end: that an answer ends is not learned",
        ANSWERS,
        pairs,
        (IS_LABEL, "(_place >= _middle) & (_place < _end)"),
    ),
    *mirrored(
        "answer a token late: the first token of an answer is not learned",
        ANSWERS,
        pairs,
        (IS_LABEL, "(_place > _middle) & (_place <= _end)"),
    ),
    *mirrored(
        "labels are inputs: each token is to be guessed from itself", ANSWERS, pairs, ("_y[:, 1:]", "_y[:, :-1]")
    ),
]
