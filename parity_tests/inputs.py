"""Inputs and models at their edges: long, all but entirely pad, ids at both ends, and every setting of the model."""

import dataclasses
from typing import Any

import numpy as np
import torch

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.params import names
from jaxlm.tasks import parameters
from jaxlm.training.teacher import Teacher
from parity_tests import original, rounding, trajectory
from parity_tests.compare.rows import Row
from parity_tests.compare.tolerances import FLOAT32, FLOAT64, LONGEST_SUM
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES, Precision
from parity_tests.plan import Batch, Plan, random_batch, random_plan, random_weights
from parity_tests.trajectory import First
from torchlm.original import from_original, to_original


def long(task: str, seq_len: int) -> list[Row]:
    """Return how far both packages are from the recorder of cases on inputs of `seq_len` positions."""
    sizes = {"model.d_model": 8, "model.n_heads": 2, "model.n_layers": 1, "model.vocab_size": 23}
    changes = {"model.seq_len": seq_len, "model.head_outputs": "vocabulary"}
    config = config_of(task, **sizes, **changes)
    batch = random_batch(config, np.random.default_rng(0), batch_size=1)
    if task == "mlm":  # the recorder has logits at all positions
        labels = np.full_like(batch["tokens"], -1)
        np.put_along_axis(labels, batch["positions"], batch["labels"], axis=1)
        batch |= {"labels": labels, "positions": np.arange(seq_len, dtype=np.int32)[None]}
    name = f"{task}, {seq_len} positions"
    want = of_original(config, random_weights(config, 0), batch)
    # A gradient of key biases is the rounding of a sum over positions alone: it grows as the root of their number.
    rounded = FLOAT32.gradients_of_key_biases * max(1, seq_len / LONGEST_SUM) ** 0.5
    bounds = dataclasses.replace(FLOAT32, gradients_of_key_biases=rounded)
    rows = []
    for package in PACKAGES:
        got = trajectory.first(package(config, random_weights(config, 0), "float32"), batch)
        rows += trajectory.compare_first(name, package.name, config, got, want, bounds, "the batch")
    return rows


def of_original(config: Config, weights: names.Arrays, batch: Batch) -> First:
    """Return what the recorder's model makes of a batch, in float64."""
    model, task = config.model, config.task
    sizes = {"vocab_size": model.vocab_size, "d_model": model.d_model, "n_layers": model.n_layers}
    reference = original.Original(
        {"task": task, "heads": model.n_heads, "seq_len": model.seq_len, **sizes}  # the settings that a model has
    )
    state = {name: torch.from_numpy(x) for name, x in to_original(weights, parameters.prefixes(task)).items()}
    reference.load_state_dict(state, strict=False)  # buffers are not among the weights
    reference = reference.double()
    tokens, labels = (torch.from_numpy(np.int64(batch[key])) for key in ("tokens", "labels"))
    logits = reference(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-1)
    loss.backward()
    gradients = {name: x.grad.numpy() for name, x in reference.named_parameters() if x.grad is not None}
    return First(logits.detach().numpy(), float(loss.detach()), from_original(gradients, parameters.prefixes(task)))


def edges(task: str, precision: Precision = "float64") -> list[Row]:
    """Return how far the packages are apart where rows are all but entirely pad, and ids the first and the last."""
    config = config_of(task)
    T, V = config.model.seq_len, config.model.vocab_size
    tokens = np.zeros((4, T), np.int32)
    tokens[0, 0] = V - 1  # one token, then pads
    tokens[1] = [1, V - 1] * (T // 2) + [1] * (T % 2)
    tokens[2, -1] = 1  # pads, then one token; row 3 has only pads
    batch: Batch = {"tokens": tokens, "labels": np.array([0, 1, 1, 0], np.int32)}
    if parameters.model_kind(task) != "classifier":
        labels = np.full((4, T), -1, np.int32)
        labels[0, 0], labels[1], labels[2, -1] = V - 1, [0, V - 1] * (T // 2) + [0] * (T % 2), 0
        batch["labels"] = labels
    if task == "mlm":
        batch["positions"] = np.broadcast_to(np.arange(T, dtype=np.int32), (4, T))
    weights, bounds = random_weights(config, 5), FLOAT64 if precision == "float64" else FLOAT32
    jaxlm, torchlm = (trajectory.first(package(config, weights, precision), batch) for package in PACKAGES)
    return trajectory.compare_first(
        f"{task} at the edges", "jaxlm, torchlm", config, jaxlm, torchlm, bounds, "the batch"
    )


# Each optional setting of the model, and sets of them that go together.
OPTIONS: dict[str, dict[str, Any]] = {
    "learned positions": {"model.positions": "learned"},
    "rotary positions": {"model.positions": "rotary"},
    "tied embedding": {"model.tied_embedding": True},
    "final norm": {"model.final_norm": True},
    "post norm": {"model.post_norm": True},
    "no pad": {"model.pad_id": -1},
    "another pad": {"model.pad_id": 3},
    "outputs of the vocabulary": {"model.head_outputs": "vocabulary"},
    "three labels": {"data.n_labels": 3},
    "as GPT-2": {"model.positions": "learned", "model.tied_embedding": True, "model.final_norm": True},
    "as BERT": {"model.positions": "learned", "model.tied_embedding": True, "model.post_norm": True},
    "the last token": {"model.pooling": "last", "model.pad_id": -1},
    "parts of BERT": {"model.embedding_norm": True, "model.norm_epsilon": 1e-12, "model.head_dense": "bert"},
    "parts of DistilBERT": {"model.embedding_norm": True, "model.head_dense": "distilbert"},
    "parts of ModernBERT": {"model.head_dense": "modernbert", "model.pooling": "mean"},
    "parts of EuroBERT": {"model.head_dense": "eurobert", "model.pooling": "late", "model.biases": "none"},
    "parts of UltraBERT": {"model.head_dense": "ultrabert", "model.head_hidden": 5, "model.classifier_bias": False},
    "parts of GPT-2": {"model.tied_embedding": True, "model.gelu": "tanh", "model.output_bias": False},
    "rotary, no pad": {"model.positions": "rotary", "model.final_norm": True, "model.pad_id": -1},
    "RMSNorm": {"model.norm": "rmsnorm", "model.final_norm": True},
    "RMSNorm without scale": {"model.norm": "rmsnorm_no_scale", "model.embedding_norm": True},
    "LayerNorm without bias": {"model.norm": "layernorm_no_bias", "model.final_norm": True},
    "GEGLU": {"model.mlp": "geglu", "model.gelu": "tanh"},
    "SwiGLU": {"model.mlp": "swiglu", "model.d_ff": 20},
    "squared ReLU": {"model.mlp": "relu2", "model.d_ff": 5},
    "no biases": {"model.biases": "none", "model.mlp": "geglu", "model.head_dense": "bert", "model.output_bias": False},
    "biases of attention": {"model.biases": "attention"},
    "biases of the feed-forward": {"model.biases": "feed_forward", "model.mlp": "swiglu"},
    "soft cap": {"model.logit_softcap": 0.7},
    "grouped heads": {"model.n_heads": 4, "model.n_kv_heads": 2, "model.head_dim": 5},
    "one key head": {"model.n_heads": 3, "model.n_kv_heads": 1, "model.positions": "rotary", "model.head_dim": 6},
    "norm of queries and keys": {"model.qk_norm": True, "model.norm": "rmsnorm", "model.positions": "rotary"},
    "window": {"model.window": 3, "model.positions": "learned"},
    "window in blocks": {"model.window": 1, "model.positions": "learned"},
    "scaled rotary positions": {
        **{"model.positions": "rotary", "model.rotary_base": 50.0, "model.rotary_scaling": 8.0},
        **{"model.rotary_scaling_len": 12, "model.head_dim": 12, "model.pad_id": -1},
    },
    "no first norm": {"model.first_norm": False, "model.n_layers": 3},
    "global and local layers": {
        **{"model.window": 2, "model.global_every": 3, "model.n_layers": 5, "model.positions": "rotary"},
        **{"model.rotary_base": 100.0, "model.rotary_base_local": 5.0, "model.first_norm": False},
    },
    "local and global layers": {
        **{"model.window": 1, "model.global_every": 2, "model.n_layers": 4, "model.positions": "rotary"},
        **{"model.rotary_base_local": 7.0, "model.global_first": False, "model.seq_len": 13, "model.pad_id": 2},
    },
    "two texts": {"data.pair_column": "auto", "model.segments": 2, "model.embedding_norm": True},
    "two texts, the last token": {
        **{"data.pair_column": "auto", "model.segments": 3, "model.positions": "learned"},
        **{"model.pooling": "last", "model.pad_id": -1},
    },
    "smoothed, weighted": {"train.label_smoothing": 0.2, "train.class_weights": "0.5,3,1", "data.n_labels": 3},
    "z-loss": {"model.z_loss": 0.05, "model.tied_embedding": True},
}
# Settings that train a part.
PARTS: dict[str, dict[str, Any]] = {
    "frozen embedding": {"model.frozen_embedding": True, "model.positions": "learned", "model.final_norm": True},
    "frozen layers": {"model.n_layers": 3, "model.frozen_layers": 2},
    "frozen base": {"model.frozen_embedding": True, "model.frozen_layers": 2},
    "layer decay": {"model.n_layers": 3, "train.layer_decay": 0.6, "model.final_norm": True},
    "layer decay, frozen": {
        **{"model.n_layers": 3, "model.frozen_layers": 1, "model.frozen_embedding": True},
        **{"train.layer_decay": 0.6, "model.tied_embedding": True},
    },
    "Muon": {
        **{"train.optimizer": "muon", "train.muon_rate": 3.0, "train.layer_decay": 0.6, "model.n_layers": 3},
        **{"model.n_kv_heads": 1, "model.frozen_layers": 1, "model.tied_embedding": True, "model.mlp": "geglu"},
    },
    "LoRA": {"model.lora_rank": 2, "model.lora_alpha": 3.0},
    "LoRA of rank 1 everywhere": {
        **{"model.lora_rank": 1, "model.lora_alpha": 1.0, "model.lora_products": "query,key,value,output,fc1,fc2"},
        **{"model.n_layers": 3, "model.frozen_layers": 1, "train.layer_decay": 0.6, "model.positions": "rotary"},
        "model.final_norm": True,
    },
    "LoRA, tied": {
        **{"model.lora_rank": 3, "model.lora_alpha": 1.0, "model.lora_products": "output,fc1,fc2"},
        "model.tied_embedding": True,
    },
    "frozen layers without a first norm": {
        **{"model.n_layers": 5, "model.frozen_layers": 2, "model.first_norm": False, "model.window": 1},
        **{"model.global_every": 2, "model.frozen_embedding": True, "train.layer_decay": 0.7},
    },
    "LoRA, gated": {
        **{"model.n_kv_heads": 1, "model.head_dim": 4, "model.qk_norm": True, "model.first_norm": False},
        **{"model.lora_rank": 2, "model.lora_products": "up,fc2", "model.mlp": "swiglu", "model.biases": "none"},
        "model.d_ff": 9,
    },
}
OPTIONS |= PARTS


def option(task: str, name: str, n_updates: int = 5, precision: Precision = "float64") -> list[Row]:
    """Return how far the packages are apart with an optional setting."""
    sizes = {"train.max_steps": n_updates, "train.warmup_steps": 1, "model.n_heads": 2, "train.accumulate": 1}
    config = config_of(task, **(sizes | OPTIONS[name]))
    plan = random_plan(f"{task}, {name}", config, seed=6)
    return _apart(plan, precision)


def distilled(task: str, n_updates: int = 5, precision: Precision = "float64") -> list[Row]:
    """Return how far the packages are apart in updates of a student with a teacher of twice its layers."""
    sizes = {"train.max_steps": n_updates, "train.warmup_steps": 1, "model.n_heads": 2, "train.accumulate": 2}
    weights = {"distill.soft_weight": 1.5, "distill.hard_weight": 0.5, "distill.cosine_weight": 2.0}
    config = config_of(task, **sizes, **weights, **{"distill.temperature": 3.0})
    own = configs.replace(config, "model.n_layers", 2 * config.model.n_layers)
    teacher = Teacher(own, random_weights(own, seed=9), "")
    plan = dataclasses.replace(random_plan(f"{task}, distilled", config, seed=8), teacher=teacher)
    return _apart(plan, precision)


def _apart(plan: Plan, precision: Precision) -> list[Row]:
    jaxlm, torchlm = (trajectory.run(package, plan, precision) for package in PACKAGES)
    bounds = FLOAT64 if precision == "float64" else rounding.bounds(plan, torchlm)
    return trajectory.compare(plan.name, "jaxlm, torchlm", jaxlm, torchlm, bounds)
