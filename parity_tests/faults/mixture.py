"""Faults of mixtures: shares of sources, the update at which they change, their order after a resume, their losses."""

from parity_tests.faults.planting import mirrored
from parity_tests.faults.targets import mix_rates, mix_state, mix_stretches, mixed_rows, mixed_scores

MIXTURE = "mixture of sources"

FAULTS = [
    *mirrored(
        "weights of samples: a source with long samples gets more than its share of tokens",
        MIXTURE,
        mix_rates,
        ("_weights * _is_left / self.tokens", "_weights * _is_left"),
    ),
    *mirrored(
        "first weights for ever: the weights of the second phase are never used",
        MIXTURE,
        mix_rates,
        ("self.weights[int(is_after)]", "self.weights[0]"),
    ),
    *mirrored(
        "weights an update late: the second phase begins after its first update",
        MIXTURE,
        mix_stretches,
        ("position.first(self.after, train)", "position.first(self.after + 1, train)"),
    ),
    *mirrored(
        "order of the resume: the sources are mixed anew from where a run resumes",
        MIXTURE,
        mix_stretches,
        ("position.mix['place']", "position.sample"),
    ),
    *mirrored(
        "sources from the start: after a resume, each source begins again",
        MIXTURE,
        mix_state,
        (
            "{'before': int(_before), 'used': int(_used), **_rest}",
            "{'before': int(_before) * 0, 'used': int(_used) * 0, **_rest}",
        ),
    ),
    *mirrored(
        "epochs of other rows: a source gets the epochs of the first rows",
        MIXTURE,
        mixed_rows,
        ("epochs[_rows]", "epochs[: len(_rows)]"),
    ),
    *mirrored(
        "one loss for all: each source is given the loss of all together",
        MIXTURE,
        mixed_scores,
        ("_add(_summed, _x)", "_add(_summed, _x)"),
        ("self.task.scores(_x)['loss']", "self.task.scores(_summed)['loss']"),
    ),
    *mirrored(
        "loss of the last source: the loss of all is that of one",
        MIXTURE,
        mixed_scores,
        ("_add(_summed, _x)", "_summed = _x"),
    ),
]
