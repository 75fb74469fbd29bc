"""Recorded models of transformers with the modern block, small and random: a batch, and 12 AdamW updates.

    python -m parity_tests.families    # records family_cases/ anew, with transformers 5

`family_cases/NAME.npz` has `start/NAME` and `final/NAME` weights, `batches/NAME`, `losses`, and `logits` and
`gradients/NAME` of batch 0, all under torchlm's names and in float64 but for the start. The checks read it without
transformers.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.params.names import Arrays
from jaxlm.weights import huggingface
from jaxlm.weights.formats import StoredFile
from parity_tests import references, trajectory
from parity_tests.compare.tolerances import FLOAT32
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES
from parity_tests.plan import Plan, random_batch, random_plan
from parity_tests.trajectory import First, Row
from torchlm import schedule

FOLDER = Path(__file__).parent / "family_cases"
N_UPDATES = 12
_SIZES = {"model.vocab_size": 17, "model.d_model": 12, "model.n_heads": 4, "model.seq_len": 11, "model.d_ff": 10}
_LLAMA = {
    **{"model.positions": "rotary", "model.norm": "rmsnorm", "model.mlp": "swiglu", "model.biases": "none"},
    **{"model.final_norm": True, "model.output_bias": False, "model.pad_id": -1, "model.n_kv_heads": 2},
    **{"model.n_layers": 2, "model.head_dim": 6},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": _LLAMA | {"model.rotary_base": 100.0, "model.rotary_scaling": 8.0, "model.rotary_scaling_len": 8},
    "Qwen3": _LLAMA | {"model.qk_norm": True, "model.tied_embedding": True},
    "ModernBERT": {
        **{
            "model.positions": "rotary",
            "model.norm": "layernorm_no_bias",
            "model.mlp": "geglu",
            "model.biases": "none",
        },
        **{"model.final_norm": True, "model.tied_embedding": True, "model.embedding_norm": True, "model.n_layers": 5},
        **{"model.first_norm": False, "model.head_dense": "bert", "model.window": 2, "model.global_every": 3},
        **{"model.rotary_base": 1000.0, "model.rotary_base_local": 50.0, "model.n_heads": 2},
    },
}

_OURS: dict[str, Any] = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 2}
_OURS |= {"max_position_embeddings": 11, "pad_token_id": 0, "attn_implementation": "eager"}
_NONE = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
_KV = _OURS | {"num_hidden_layers": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
_LOCAL = _OURS | {"num_hidden_layers": 4, "local_attention": 4}
_BASES = {"full_attention": {"rope_theta": 1000.0}, "sliding_attention": {"rope_theta": 50.0}}
_SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# The class and the settings of random models of transformers whose folders are read.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _KV | {"rope_parameters": _SCALED | {"original_max_position_embeddings": 8}}),
    "Qwen3": ("Qwen3ForCausalLM", _KV | {"head_dim": 8, "tie_word_embeddings": True}),
    "ModernBERT": ("ModernBertForMaskedLM", _LOCAL | _NONE | {"rope_parameters": _BASES}),
    "ModernBERT that classifies": (
        "ModernBertForSequenceClassification",
        _LOCAL | _NONE | {"classifier_pooling": "mean", "num_labels": 3},
    ),
    "Ettin's decoder": ("ModernBertDecoderForCausalLM", _LOCAL | dict.fromkeys(_NONE, 0) | {"rope_parameters": _BASES}),
    "EuroBERT": ("EuroBertForMaskedLM", _KV),
    "EuroBERT that classifies": ("EuroBertForSequenceClassification", _KV | {"num_labels": 3}),
    "UltraBERT": (
        "UltrabertForMaskedLM",
        _KV | {"num_hidden_layers": 4, "sliding_window": 2, "prediction_head_size": 6},
    ),
}


@dataclass(frozen=True)
class Recorded:
    """What a model of transformers made of a plan."""

    first: First  # of batch 0 at the start
    losses: np.ndarray
    final: Arrays


def family(name: str) -> list[Row]:
    """Return how far both packages are from a recorded model: logits, gradients of a batch, updates, final weights.

    In float64 but for their sines and cosines, whose float32 ours differ from by a rounding.
    """
    plan, want = load(name)
    rows = []
    for package in PACKAGES:
        run = trajectory.run(package, plan, "float64")
        added = trajectory._Rows(plan.name, package.name, plan.config)
        added.rows += trajectory.compare_first(plan.name, package.name, plan.config, run.first, want.first, FLOAT32)
        added.add_updates("losses", run.losses, want.losses, want.losses, FLOAT32.losses)
        added.add_weights("final weights", run.final, want.final, plan.start, float(np.sum(run.rates)), FLOAT32)
        rows += added.rows
    return rows


def folder(name: str) -> list[Row]:
    """Return how far both packages are from transformers with the weights and settings that are read from its folder.

    Its gradients are read as its weights are, from a folder that has them in their place.
    """
    import transformers

    class_name, sizes = FOLDERS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**sizes)).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape, generator=random) + (x.ndim == 1) * x)
    read = _read(model)
    config = configs.build(read.info["config"])
    # Without pads, as in `record`; and a pad has no gradient there.
    batch = random_batch(config, np.random.default_rng(0), batch_size=3, pad_share=0.0)
    batch["tokens"] = np.maximum(batch["tokens"], 1)
    model.double()
    logits = model(input_ids=torch.from_numpy(np.int64(batch["tokens"]))).logits
    loss = references._mean_loss(logits, batch)
    loss.backward()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(x.grad)
    want = First(logits.detach().numpy(), float(loss.detach()), _read(model.float()).weights)
    rows = []
    for package in PACKAGES:
        got = trajectory.first(package(config, read.weights, "float64"), batch)
        rows += trajectory.compare_first(f"folder of {name}", package.name, config, got, want, FLOAT32, "the batch")
    return rows


def _read(model: Any) -> StoredFile:
    with tempfile.TemporaryDirectory() as target:
        model.save_pretrained(target)
        return huggingface.load(Path(target))


def load(name: str) -> tuple[Plan, Recorded]:
    """Return what was to be done, and what transformers' model made of it."""
    config = settings(name)
    with np.load(FOLDER / f"{name.lower()}.npz") as file:
        arrays = dict(file)

    def named(kind: str) -> Arrays:
        return {x.removeprefix(f"{kind}/"): y for x, y in arrays.items() if x.startswith(f"{kind}/")}

    batches = [{key: x[i] for key, x in named("batches").items()} for i in range(N_UPDATES)]
    evaluated = {key: x[0] for key, x in batches[-1].items()}
    first = First(arrays["logits"], float(arrays["losses"][0]), named("gradients"))
    plan = Plan(f"transformers' {name}", config, named("start"), batches, evaluated)
    return plan, Recorded(first, arrays["losses"], named("final"))


def record(name: str, folder: Path = FOLDER) -> None:
    """Write what transformers' model makes of random weights and batches, as FOLDER has it."""
    config = settings(name)
    # Without pads: theirs has NaN at pads that are farther than the window from all tokens.
    plan = random_plan(name, config, seed=10, pad_share=0.0)
    model, names = _model(name, config), _names(name, config)
    state = {theirs: torch.tensor(np.concatenate([plan.start[x] for x in ours])) for theirs, ours in names.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [x for x in missing if x not in ("lm_head.weight", "decoder.weight")], missing
    found = _trained(model.double().eval(), plan, names)
    batches = {key: np.stack([batch[key] for batch in plan.batches]) for key in plan.batches[0]}
    groups = {
        "start": plan.start,
        "batches": batches,
        "gradients": found.first.gradients,
        "final": found.final,
    }
    arrays: dict[str, Any] = {f"{kind}/{key}": x for kind, group in groups.items() for key, x in group.items()}
    np.savez_compressed(folder / f"{name.lower()}.npz", logits=found.first.logits, losses=found.losses, **arrays)


def settings(name: str) -> Config:
    """Return the settings of a recorded model and its training."""
    train = {"train.max_steps": N_UPDATES, "train.accumulate": 1, "train.warmup_steps": 2, "train.decay_steps": 10}
    return config_of("mlm" if name == "ModernBERT" else "gpt", **(_SIZES | SETTINGS[name] | train))


def _trained(model: nn.Module, plan: Plan, names: dict[str, list[str]]) -> Recorded:
    """Return what a model makes of a plan, with PyTorch's AdamW."""
    train, parameters = plan.config.train, dict(model.named_parameters())
    groups = [
        {"params": [x for x in parameters.values() if (x.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon)
    rate = schedule.learning_rate(train)
    firsts, losses = [], []
    for i, accumulated in enumerate(plan.batches):
        batch = {key: x[0] for key, x in accumulated.items()}
        tokens = torch.from_numpy(np.int64(batch["tokens"]))
        mask = (tokens != plan.config.model.pad_id).long()
        logits = model(input_ids=tokens, attention_mask=mask).logits
        loss = references._mean_loss(logits, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        if i == 0:
            gradients = _split({name: x.grad for name, x in parameters.items()}, names, plan.start)
            firsts.append(First(logits.detach().numpy(), losses[0], gradients))
        nn.utils.clip_grad_norm_(parameters.values(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rate(i))
        optimizer.step()
        optimizer.zero_grad()
    return Recorded(firsts[0], np.array(losses), _split(parameters, names, plan.start))


def _split(tensors: Any, names: dict[str, list[str]], like: Arrays) -> Arrays:
    """Return tensors of theirs under our names."""
    result: Arrays = {}
    for theirs, ours in names.items():
        sizes = [len(like[name]) for name in ours]
        parts = torch.split(tensors[theirs].detach().clone(), sizes)
        result |= {name: x.numpy() for name, x in zip(ours, parts, strict=True)}
    return result


def _model(name: str, config: Config) -> Any:
    import transformers

    model = config.model
    sizes: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.n_hidden,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "max_position_embeddings": model.seq_len,
        "tie_word_embeddings": model.tied_embedding,
        "attn_implementation": "eager",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")),
    }
    if name == "ModernBERT":
        sizes |= {"pad_token_id": 0, "local_attention": 2 * model.window, "global_attn_every_n_layers": 3}
        ropes: dict[str, Any] = {"global_rope_theta": model.rotary_base, "local_rope_theta": model.rotary_base_local}
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes, **ropes))
    sizes |= {"num_key_value_heads": model.n_kv_heads, "head_dim": model.head_size, "rms_norm_eps": model.norm_epsilon}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if name == "Qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, rope_parameters=rope))
    rope |= {"rope_type": "llama3", "factor": model.rotary_scaling, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = model.rotary_scaling_len
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope))


def _names(name: str, config: Config) -> dict[str, list[str]]:
    """Return the name of each tensor there, and of those here that are in it, one behind the other."""
    if name == "ModernBERT":
        outer = {
            "model.embeddings.tok_embeddings": "base.embedding.token",
            "model.embeddings.norm": "base.embedding.layernorm",
            "model.final_norm": "base.final_norm",
            "head.dense": "head.dense",
            "head.norm": "head.layernorm",
        }
        inner = {
            "attn_norm": ["layernorm1"],
            "attn.Wqkv": ["attention.query", "attention.key", "attention.value"],
            "attn.Wo": ["attention.output"],
            "mlp_norm": ["layernorm2"],
            "mlp.Wi": ["feed_forward.fc1", "feed_forward.up"],
            "mlp.Wo": ["feed_forward.fc2"],
        }
    else:
        outer = {"model.embed_tokens": "base.embedding.token", "model.norm": "base.final_norm"}
        outer |= {} if config.model.tied_embedding else {"lm_head": "head.linear"}
        pairs = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
        inner = {f"self_attn.{theirs}_proj": [f"attention.{ours}"] for theirs, ours in pairs}
        if config.model.qk_norm:
            inner |= {f"self_attn.{x}_norm": [f"attention.{y}_norm"] for x, y in pairs[:2]}
        products = (("gate", "fc1"), ("up", "up"), ("down", "fc2"))
        inner |= {f"mlp.{theirs}_proj": [f"feed_forward.{ours}"] for theirs, ours in products}
        inner |= {"input_layernorm": ["layernorm1"], "post_attention_layernorm": ["layernorm2"]}
    names = {f"{theirs}.weight": [f"{ours}.weight"] for theirs, ours in outer.items()}
    for i in range(config.model.n_layers):
        for theirs, ours in inner.items():
            if theirs != "attn_norm" or i > 0:
                names[f"model.layers.{i}.{theirs}.weight"] = [f"base.blocks.{i}.{x}.weight" for x in ours]
    return names | ({"decoder.bias": ["head.bias"]} if name == "ModernBERT" else {})


if __name__ == "__main__":
    for family_name in SETTINGS:
        record(family_name)
