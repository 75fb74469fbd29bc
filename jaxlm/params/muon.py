"""Muon's constants, for both packages: which parameters it updates, how it makes them orthogonal, and by which scale.

Sources: Keller Jordan, kellerjordan.github.io/posts/muon, and his code (KellerJordan/Muon); Moonshot's scale from
arXiv 2502.16982, section 2.2; Polar Express from arXiv 2505.16932, algorithm 1. Imports no framework.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.config import TrainConfig
from jaxlm.params import names

EPSILON = 1e-7  # least norm that a matrix is divided by
_POLAR_EXPRESS = (  # for five iterations, from singular values of 0.001 on
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
MARGIN = {"newton_schulz": 1.0, "polar_express": 1.01}  # room for rounding: the largest singular value stays below 1
# (a, b, c) of each iteration, a x + b x^3 + c x^5 of each singular value x.
COEFFICIENTS = {
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS),
}


def is_hidden(path: Sequence[str]) -> bool:
    """Return whether Muon updates a parameter, by its path in jaxlm's tree: the matrices of blocks.

    AdamW updates the others: embeddings and output layers, whose rows are one token's, norms, biases, and adapters.
    """
    return tuple(path[:2]) == ("base", "blocks") and path[-1] == "kernel"


def updates(train: TrainConfig, name: str) -> bool:
    """Return whether a run's optimizer is Muon and updates a parameter, by torchlm's name."""
    return train.optimizer == "muon" and is_hidden(names.jax_path(name)[0])


def with_second_moment(train: TrainConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a state dict, or of anything by torchlm's names, has a second moment: what AdamW updates."""
    return {name: x for name, x in arrays.items() if not updates(train, name)}


def scale(kind: str, n_in: int, n_out: int) -> float:
    """Return the factor of an orthogonal update of a matrix from `n_in` to `n_out` features.

    spectral: Jordan's, for updates of like spectral norm per feature. rms: Moonshot's, for updates whose root mean
    square is 0.2 as AdamW's usually is, so that one rate serves both.
    """
    return math.sqrt(max(1, n_out / n_in)) if kind == "spectral" else 0.2 * math.sqrt(max(n_in, n_out))
