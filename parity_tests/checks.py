"""Every check by its name: a function without arguments that returns rows. The tests assert that all of them pass."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jaxlm.tasks import parameters
from parity_tests import case as cases
from parity_tests import drift, families, inputs, mixture, original, packed, references, replay, trajectory
from parity_tests.compare.rows import Row
from parity_tests.compare.tolerances import FLOAT32

# Cases of the form of the recorded ones, of other sizes, seeds and settings.
FURTHER: dict[str, dict[str, Any]] = {
    "gpt, three layers, resume in its cycle": {
        "task": "gpt",
        "vocab_size": 101,
        "d_model": 40,
        "n_layers": 3,
        "heads": 5,
        "seq_len": 11,
        "batch_size": 5,
        "steps": 9,
        "cycle_len": 2,
        "warmup_iters": 3,
        "resume_at": 5,
        "resume_warmup_iters": 3,
        "after_resume": {"learning_rate": 5e-3, "min_learning_rate": 1e-3, "lr_decay_iters": 12},
    },
    "mlm, other settings of the optimizer": {
        "task": "mlm",
        "weight_decay": 0.3,
        "betas": [0.8, 0.95],
        "eps": 1e-5,
        "clip": 0.4,
        "warmup_iters": 0,
        "cycle_len": 2,
        "lr_decay_iters": 5,
    },
    "sst2, one head, one layer": {
        "task": "sst2",
        "heads": 1,
        "n_layers": 1,
        "d_model": 18,
        "batch_size": 2,
        "steps": 5,
    },
    "cola, a resume that ends the decay": {
        "task": "cola",
        "heads": 2,
        "resume_at": 3,
        "resume_warmup_iters": 9,
        "after_resume": {"lr_decay_iters": 4},
    },
    "mlm, four layers, forty updates": {
        "task": "mlm",
        "vocab_size": 300,
        "d_model": 64,
        "heads": 8,
        "n_layers": 4,
        "seq_len": 48,
        "batch_size": 8,
        "steps": 40,
        "learning_rate": 5e-3,
        "lr_decay_iters": 35,
    },
    "sst2, fifty updates": {
        "task": "sst2",
        "vocab_size": 200,
        "d_model": 32,
        "heads": 4,
        "seq_len": 20,
        "batch_size": 8,
        "steps": 50,
        "learning_rate": 3e-3,
        "lr_decay_iters": 50,
    },
    "cola, three hundred updates": {
        "task": "cola",
        "vocab_size": 80,
        "steps": 300,
        "learning_rate": 3e-3,
        "warmup_iters": 30,
        "lr_decay_iters": 300,
    },
}


def recorded(name: str) -> list[Row]:
    """Return how far both packages are from a recorded case."""
    return replay.check(cases.load(cases.CASES / name))


def further(name: str) -> list[Row]:
    """Return how far both packages are from a case recorded on the spot."""
    with tempfile.TemporaryDirectory() as folder:
        seed = list(FURTHER).index(name)
        case = cases.load(original.record_random(Path(folder) / "case", seed, **FURTHER[name]))
        return replay.check(case)


def recorder(name: str) -> list[Row]:
    """Return how far the recorder of further cases is from a recorded one."""
    known = cases.load(cases.CASES / name)
    settings = json.loads((cases.CASES / name / "case.json").read_text())
    model = original.Original(settings)
    start = {key.removeprefix("init/"): x for key, x in known.arrays.items() if key.startswith("init/")}
    model.load_state_dict({key: torch.from_numpy(x) for key, x in start.items()})
    x, y = (torch.from_numpy(known.arrays[key]) for key in "xy")
    with tempfile.TemporaryDirectory() as folder:
        anew = cases.load(original.record(Path(folder) / name, settings, model, x, y))
        return trajectory.compare(name, "original.py", anew.trajectory(), known.trajectory(), FLOAT32)


def bfloat16(task: str) -> list[Row]:
    """Return jaxlm's drift in bfloat16 over that of PyTorch's autocast."""
    return drift.bfloat16_rows(task, drift.bfloat16(task))


RECORDED = sorted(folder.name for folder in cases.CASES.iterdir())
_BLOCKS = {
    "attention of PyTorch": (references.scaled_dot_product_attention, {}),
    "layers of PyTorch": (references.transformer_encoder_layer, {}),
    "post-norm layers of PyTorch": (references.transformer_encoder_layer, {"model.post_norm": True}),
}


# Settings that a head or its loss reads. All others are of the block, which is the same in every task: they are
# checked in one masked and one causal task.
_OF_HEADS = {
    *("data.n_labels", "model.pooling", "model.pad_id", "model.head_outputs", "model.head_dense", "model.output_bias"),
    *("model.tied_embedding", "model.logit_softcap", "model.z_loss", "model.head_hidden", "model.classifier_bias"),
}
_TASKS_OF_BLOCKS = ("mlm", "gpt")
# cola, classify and the tasks of GLUE have sst2's model and loss with other scores; regress differs in its loss alone.
_TASKS = ("mlm", "gpt", "sst2", "pairs")
_PACKED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "mlm, rotary positions": ("mlm", False, {"model.positions": "rotary"}),
    "gpt, learned positions": ("gpt", False, {"model.positions": "learned"}),
    "pairs, no pad": ("pairs", False, {"model.pad_id": -1}),
    "sst2": ("sst2", False, {}),
    "sst2, the last token": ("sst2", False, inputs.OPTIONS["the last token"]),
    "sst2, the mean": ("sst2", False, inputs.OPTIONS["parts of ModernBERT"]),
    "sst2, the mean of logits": ("sst2", False, inputs.OPTIONS["parts of EuroBERT"]),
    "mlm, distilled": ("mlm", True, {}),
    "sst2, distilled": ("sst2", True, {"data.n_labels": 3}),
}


def _checks() -> dict[str, Callable[[], list[Row]]]:
    found: dict[str, Callable[[], list[Row]]] = {}

    def add(name: str, function: Callable[..., list[Row]], *args: Any, **options: Any) -> None:
        found[name] = functools.partial(function, *args, **options)

    for name in RECORDED:
        add(f"replay: {name}", recorded, name)
        add(f"recorder: {name}", recorder, name)
    for name in FURTHER:
        add(f"further case: {name}", further, name)
    add("AdamW", references.adamw)
    add("Muon", references.muon)
    add("Muon over 200 updates", references.muon, 200)
    add("200 updates by Muon: gpt", inputs.option, "gpt", "Muon", 200)
    add("transformers: GPT-2", references.gpt2)
    add("transformers: GPT-2 that classifies", references.gpt2, "sst2")
    add("transformers: GPT-2 that answers", references.gpt2, "pairs")
    add("transformers: BERT", references.bert)
    add("transformers: BERT that tags", references.bert, "tag")
    add("transformers: BERT that embeds", references.sentence_bert)
    add("float64: embed", drift.float64, "embed")
    add("the last token: embed", inputs.option, "embed", "the last token")
    add("seqeval: spans", references.spans)
    add("float64: tag", drift.float64, "tag")
    add("distillation: tag", inputs.distilled, "tag")
    for name in ("three labels", "the last token"):
        add(f"{name}: tag", inputs.option, "tag", name)
    for name in families.SETTINGS:
        add(f"recorded from transformers: {name}", families.family, name)
    for name in families.FOLDERS:
        add(f"transformers: folder of {name}", families.folder, name)
    for name, task in (("ModernBERT", "mlm"), ("Qwen3", "gpt")):
        changes = {"model.n_heads": 4, "model.d_ff": 10} | families.SETTINGS[name]
        add(f"float64: {task} of {name}'s design", drift.float64, task, **changes)
    add("dropout statistics", drift.dropout_statistics)
    for task in _TASKS:
        for name, (layers, changes) in _BLOCKS.items():
            add(f"{name}: {task}", references.blocks, task, layers, **changes)
        add(f"finite differences: {task}", references.finite_differences, task)
        add(f"edges: {task}", inputs.edges, task)
        add(f"float64: {task}", drift.float64, task)
        add(f"dropout: {task}", drift.dropout, task)
        add(f"bfloat16: {task}", bfloat16, task)
        if parameters.model_kind(task) != "causal":
            add(f"distillation: {task}", inputs.distilled, task)
            add(f"distillation in float32: {task}", inputs.distilled, task, 10, "float32")
        for length in (1024, 4096) if task != "pairs" else ():  # which the original has not
            add(f"{length} positions: {task}", inputs.long, task, length)
        for name, changes in inputs.OPTIONS.items():
            if task in _TASKS_OF_BLOCKS or _OF_HEADS & changes.keys():
                add(f"{name}: {task}", inputs.option, task, name)
        for name in inputs.PARTS if task in _TASKS_OF_BLOCKS else ():
            add(f"{name} in float32: {task}", inputs.option, task, name, 10, "float32")
    for task in ("classify", "regress"):
        for name in ("two texts", "two texts, the last token", "rotary positions"):
            add(f"{name}: {task}", inputs.option, task, name)
    add("two texts: multilabel", inputs.option, "multilabel", "two texts")
    for task in ("classify", "tag"):
        add(f"smoothed, weighted: {task}", inputs.option, task, "smoothed, weighted")
    add("finite differences: regress", references.finite_differences, "regress")
    for name, (task, is_distilled, changes) in _PACKED.items():
        add(f"packed: {name}", packed.packed, task, is_distilled, **changes)
    add("mixture of sources", mixture.mixture)
    return found


CHECKS = _checks()

# The others are left to the slow tests. Here are all recorded cases, and of each other kind what differs most: sst2 and
# cola differ in their scores only, and transformers' models have most options.
FAST = {
    *(f"{kind}: {name}" for kind in ("replay", "recorder") for name in RECORDED),
    *("further case: mlm, other settings of the optimizer", "AdamW", "Muon", "transformers: BERT"),
    *("transformers: GPT-2", "transformers: BERT that tags", "transformers: BERT that embeds", "seqeval: spans"),
    *("attention of PyTorch: mlm", "layers of PyTorch: gpt", "post-norm layers of PyTorch: sst2"),
    *("finite differences: gpt", "edges: mlm", "4096 positions: mlm"),
    *(
        "recorded from transformers: ModernBERT",
        "float64: mlm",
        "float64: gpt",
        "dropout: gpt",
        "dropout statistics",
        "rotary, no pad: gpt",
    ),
    *("packed: mlm, rotary positions", "packed: sst2", "mixture of sources"),
    *(
        "smoothed, weighted: classify",
        "two texts: multilabel",
        "two texts: classify",
        "two texts, the last token: regress",
    ),
    *("distillation: mlm", "layer decay, frozen: gpt", "Muon: gpt", "LoRA of rank 1 everywhere: gpt"),
}
