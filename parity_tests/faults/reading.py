"""Faults of reading folders of transformers: parts of matrices, settings of layers, output layers."""

from parity_tests.faults.planting import mirrored
from parity_tests.faults.targets import read_pooling, read_positions, read_weights

MODERNBERT, CLASSIFIER = "folder of ModernBERT", "folder of ModernBERT that classifies"

FAULTS = [
    *mirrored(
        "value, key, query: a matrix with all three is read in the wrong order",
        MODERNBERT,
        read_weights,
        ("np.split(_x, len(_ours))", "np.split(_x, len(_ours))[:: -1 if len(_ours) == 3 else 1]"),
    ),
    *mirrored(
        "up before gate: the halves of a gated feed-forward's matrix are swapped",
        MODERNBERT,
        read_weights,
        ("np.split(_x, len(_ours))", "np.split(_x, len(_ours))[:: -1 if len(_ours) == 2 else 1]"),
    ),
    *mirrored(
        "head norm unread: the scale of an output layer's norm is 1",
        MODERNBERT,
        read_weights,
        (
            "{_name: np.ascontiguousarray(_x) for _name, _x in _pairs}",
            "{_name: _x * 0 + 1 if _name == 'head.layernorm.weight' else _x for _name, _x in _pairs}",
        ),
    ),
    *mirrored(
        "one base is read: local layers have the rotary base of global ones",
        MODERNBERT,
        read_positions,
        ("float(_parts[1]['rope_theta'])", "float(_parts[0]['rope_theta'])"),
    ),
    *mirrored(
        "first token is read: classifier_pooling is ignored",
        CLASSIFIER,
        read_pooling,
        ("family.poolings.get(_named.pop(), _first)", "_first"),
    ),
]
