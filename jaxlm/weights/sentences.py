"""What a folder of sentence-transformers has beside a model of transformers: how hidden states become one vector."""

import json
from pathlib import Path
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError, reason
from jaxlm.io import utf8

MODULES, POOLING, LENGTH = "modules.json", "1_Pooling", "sentence_bert_config.json"
KEYS = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
PREFIX = "sentence_transformers.models."


def pooling_of(path: Path) -> str:
    """Return how a model in a folder pools, as in model.pooling; "" if no module of sentence-transformers does.

    Raises UserError for one that does something else than to pool and to normalise.
    """
    if not (path / MODULES).is_file():
        return ""
    try:
        modules = utf8.from_json(utf8.read(path / MODULES))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        places = [module["path"] for module in modules if module["type"].endswith("Pooling")]
        if not places:
            return ""
        values = utf8.read_json(path / places[0] / "config.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MODULES}: cannot be read ({reason(error)}); copy or download it again") from error
    modes = [mode for mode, key in KEYS.items() if values.get(key) or values.get("pooling_mode") == _MODES[mode]]
    others = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or set(others) - {KEYS[modes[0]]} or [x for x in kinds if x not in _KINDS]:
        rule = f"its modules are {', '.join(kinds)} with {', '.join(others) or 'no pooling'}"
        raise UserError(
            f"{path / MODULES}: {rule}: can be read with one of {', '.join(KEYS.values())} and Normalize only"
        )
    return modes[0]


def longest(path: Path, n: int) -> int:
    """Return how many tokens of a text are read, of the `n` that the model has positions for."""
    try:
        value = utf8.read_json(path / LENGTH).get("max_seq_length") or n
    except (OSError, ValueError):  # older folders do without
        return n
    return min(n, value) if isinstance(value, int) and value > 3 else n


_MODES = {"mean": "mean", "first": "cls", "last": "lasttoken"}
_KINDS = ("Transformer", "Pooling", "Normalize")


def write(path: Path, model: ModelConfig) -> None:
    """Add to a folder of transformers what makes a model of sentence-transformers of it."""
    modules = [("", "Transformer"), (POOLING, "Pooling"), ("2_Normalize", "Normalize")]
    values: dict[str, Any] = {
        MODULES: [
            {"idx": i, "name": str(i), "path": place, "type": f"{PREFIX}{kind}"}
            for i, (place, kind) in enumerate(modules)
        ],
        LENGTH: {"max_seq_length": model.seq_len, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        f"{POOLING}/config.json": {
            "word_embedding_dimension": model.d_model,
            **{key: mode == model.pooling for mode, key in KEYS.items()},
        },
    }
    for place in (POOLING, "2_Normalize"):
        (path / place).mkdir()
    for name, value in values.items():
        (path / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
