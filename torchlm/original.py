"""The original's checkpoint file, version 1.2: its names of tensors and settings, its counters, its optimizer.

Its tensors are laid out as torchlm's. `bert.encoder_blocks.0.self_multihead.query.weight` in the file is
`base.blocks.0.attention.query.weight` here. Nothing in this module imports PyTorch.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.config import TrainConfig
from jaxlm.errors import UserError
from jaxlm.params import muon, names
from jaxlm.params.names import Prefixes, Shapes
from jaxlm.tasks import parameters

# Settings by their names in the file, which has all of these.
SETTINGS = {
    "model": {"seq_len": "seq_len", "d_model": "d_model", "n_layers": "n_layers", "heads": "n_heads"},
    "train": {
        "max_iters": "max_steps",
        "learning_rate": "learning_rate",
        "min_learning_rate": "min_learning_rate",
        "warmup_iters": "warmup_steps",
        "lr_decay_iters": "decay_steps",
        "weight_decay": "weight_decay",
        "batch_size": "batch_size",
    },
}
_WORDS = {"blocks": "encoder_blocks", "attention": "self_multihead", "layernorm": "normlayer"}  # for modules
_BUFFERS = ("embedding.position.pe", "self_multihead.bias")  # in its state dict, but no parameters
_MOMENTS = ("exp_avg", "exp_avg_sq")


def to_original(state: Mapping[str, Any], prefixes: Prefixes) -> dict[str, Any]:
    """Return torchlm's state dict under the original's names, without its two kinds of buffers."""
    result = {}
    for name, tensor in state.items():
        part, *path = name.split(".")
        words = _words(prefixes, part == "head")
        if path == ["embedding", "position"]:  # `position.pe` is the original's table, which is fixed
            path.append("weight")
        result[".".join([prefixes[part == "head"], *(words.get(word, word) for word in path)])] = tensor
    return result


def from_original(state: Mapping[str, Any], prefixes: Prefixes) -> dict[str, Any]:
    """Return a state dict of the original under torchlm's names; what is no parameter is left out.

    A name that the original has not stays as it is, for `names.check` to name it.
    """
    result = {}
    for name, tensor in state.items():
        part, *path = name.split(".")
        if part in prefixes:
            part = "head" if part == prefixes[1] else "base"
            words = {theirs: ours for ours, theirs in _words(prefixes, part == "head").items()}
            if path == ["embedding", "position", "weight"]:
                path.pop()
            path = [words.get(word, word) for word in path]
        if not name.endswith(_BUFFERS):
            result[".".join([part, *path])] = tensor
    return result


def _words(prefixes: Prefixes, is_head: bool) -> dict[str, str]:
    """Return the original's words by torchlm's, for one part of a name."""
    if is_head:
        return _WORDS if prefixes[1] == "mask_lm" else _WORDS | {"linear": "classifier"}
    return _WORDS | {"output": "output_linear"}


def settings_for(task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the original knows, under its names; `settings` are jaxlm's by dotted name."""
    known = {
        section: {theirs: settings[f"{section}.{ours}"] for theirs, ours in words.items()}
        for section, words in SETTINGS.items()
    }
    known["train"]["lr_decay_iters"] = settings["train.decay_steps"] or settings["train.max_steps"]
    return known | {"model": {"task_type": task} | known["model"]}


def info(checkpoint: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint tells of itself, with the keys of `info` in jaxlm's checkpoints.

    Of the settings, the original stores a few; others are seen in the optimizer and in the weights, by torchlm's names.
    """
    config, task = checkpoint["config"], checkpoint["task_type"]
    result = {
        "format": checkpoint["version"],
        "step": int(checkpoint["iter"]),
        "task": task,
        "rate": float(checkpoint["lr"]),
        "sample_iter": int(checkpoint["sample_iter"]),
        "val_loss": float(checkpoint["val_loss"]) if math.isfinite(checkpoint["val_loss"]) else None,
    }
    if "torchlm" in config:
        return result | {"config": config["torchlm"]["settings"], **config["torchlm"]["info"]}
    settings = {
        f"{section}.{ours}": config[section][theirs]
        for section, words in SETTINGS.items()
        for theirs, ours in words.items()
    }
    group = checkpoint["optimizer"]["param_groups"][0]
    settings |= {"train.beta1": group["betas"][0], "train.beta2": group["betas"][1], "train.epsilon": group["eps"]}
    settings |= {"task": task, "model.vocab_size": len(weights["base.embedding.token.weight"])}
    if parameters.model_kind(task) == "classifier" and "head.linear.bias" in weights:
        settings["data.n_labels"] = len(weights["head.linear.bias"])
        if settings["data.n_labels"] == settings["model.vocab_size"]:  # a slip of the original
            settings |= {"model.head_outputs": "vocabulary", "data.n_labels": 2}
    return result | {"tokenizer": None, "config": settings, "original_config": config}


def moments(
    optimizer: dict[str, Any], train: TrainConfig, shapes: Shapes, source: str
) -> tuple[list[dict[str, Any]], int]:
    """Return the first and second moments in the state dict of torchlm's optimizer, and how many updates they are of.

    There are none before the first update. `shapes` are those of what is trained; PyTorch numbers its tensors group by
    group. Raises UserError, which begins with `source`, for another optimizer than that of `train`.
    """
    state, groups = optimizer["state"], names.decay_groups(shapes)
    if not state:
        return [], 0
    numbers = [group["params"] for group in optimizer["param_groups"]]
    sizes, expected = [len(group) for group in numbers], [len(group) for group in groups]
    # With layer_decay or Muon, a group of ours is several.
    if sizes != expected and (len(sizes) <= len(expected) or sum(sizes) != sum(expected)):
        raise UserError(
            f"{source}: its optimizer has groups of {sizes} tensors, but the model {expected}, decayed first"
        )
    entries = {name: state.get(i, {}) for name, i in zip(sum(groups, []), sum(numbers, []), strict=True)}
    for name, entry in entries.items():
        kind, keys = ("Muon", _MOMENTS[:1]) if muon.updates(train, name) else ("AdamW", _MOMENTS)
        if sorted(entry) != [*keys, "step"]:
            raise UserError(f"{source}: its optimizer has {sorted(entry)} for {name}, but {kind} has {[*keys, 'step']}")
    counts = {int(entry["step"]) for entry in entries.values()}
    if len(counts) > 1:
        raise UserError(f"{source}: its optimizer has counted {sorted(counts)} updates; only one count can be kept")
    tensors = [{name: entry[key] for name, entry in entries.items() if key in entry} for key in _MOMENTS]
    return tensors, counts.pop()
