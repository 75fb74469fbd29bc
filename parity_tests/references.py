"""What neither package has made: PyTorch's layers, NumPy's AdamW and Muon, transformers, finite differences."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jaxlm import optim as jax_optim
from jaxlm import schedule as jax_schedule
from jaxlm import step as jax_step
from jaxlm.config import Config, ModelConfig
from jaxlm.data.cache import Split
from jaxlm.data.samples import PairSamples
from jaxlm.data.tagged import TaggedSamples
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.tasks import parameters
from jaxlm.tasks.parameters import model_kind
from parity_tests import trajectory
from parity_tests.compare.rows import Row, norm
from parity_tests.compare.tolerances import FLOAT64, SLOPE
from parity_tests.drift import config_of
from parity_tests.original import position_table
from parity_tests.packages import PACKAGES
from parity_tests.plan import Batch, random_batch, random_weights
from parity_tests.trajectory import First
from torchlm import optim as torch_optim
from torchlm import schedule as torch_schedule
from torchlm import step as torch_step
from torchlm import tasks as torch_tasks

Weights = dict[str, Tensor]
# layers(config, weights, hidden [B, T, D], which keys are pads [B, T]) -> hidden [B, T, D]
Layers = Callable[[Config, Weights, Tensor, Tensor], Tensor]


# PyTorch's attention and layers


def blocks(task: str, layers: Layers, **changes: Any) -> list[Row]:
    """Return how far both packages are from a model whose blocks are `layers`, in float64."""
    config = config_of(task, **changes)
    weights, batch = random_weights(config, 7), random_batch(config, np.random.default_rng(7), batch_size=3)
    tensors = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in weights.items()}
    tokens = torch.from_numpy(np.int64(batch["tokens"]))
    hidden = F.embedding(tokens, tensors["base.embedding.token.weight"], padding_idx=0)
    # Both packages have the table in float32 in any precision.
    hidden = hidden + position_table(config.model.seq_len, config.model.d_model).float().double()
    hidden = layers(config, tensors, hidden, tokens == 0)
    if task in ("sst2", "cola"):
        hidden = hidden[:, 0]
    if task == "mlm":
        norm = tensors["head.layernorm.weight"], tensors["head.layernorm.bias"]
        hidden = F.layer_norm(hidden, (config.model.d_model,), *norm)
    logits = F.linear(hidden, tensors["head.linear.weight"], tensors["head.linear.bias"])
    loss = _mean_loss(logits, batch)
    loss.backward()
    gradients = {name: x.grad.numpy() for name, x in tensors.items() if x.grad is not None}
    name = ", ".join([f"{task} on {layers.__name__}", *(key.partition(".")[2] for key in changes)])
    return _compare(name, config, weights, batch, First(logits.detach().numpy(), float(loss.detach()), gradients))


def scaled_dot_product_attention(config: Config, weights: Weights, hidden: Tensor, is_pad: Tensor) -> Tensor:
    """Run pre-norm blocks on PyTorch's attention."""
    (B, T, D), H = hidden.shape, config.model.n_heads
    mask = ~is_pad[:, None, None, :]
    if model_kind(config.task) == "causal":
        mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
    for i in range(config.model.n_layers):
        linear, norm = (functools.partial(f, _part(weights, f"base.blocks.{i}.")) for f in (_linear, _norm))
        x = norm("layernorm1", hidden)
        q, k, v = (
            linear(f"attention.{name}", x).reshape(B, T, H, D // H).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        x = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, T, D)
        hidden = hidden + linear("attention.output", x)
        x = F.gelu(linear("feed_forward.fc1", norm("layernorm2", hidden)))
        hidden = hidden + linear("feed_forward.fc2", x)
    return hidden


def transformer_encoder_layer(config: Config, weights: Weights, hidden: Tensor, is_pad: Tensor) -> Tensor:
    """Run PyTorch's layers, which have the weights of query, key and value in one matrix."""
    D, T = config.model.d_model, config.model.seq_len
    layer = nn.TransformerEncoderLayer(
        D,
        config.model.n_heads,
        4 * D,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=not config.model.post_norm,
        dtype=torch.float64,
    )
    is_future = torch.ones(T, T, dtype=torch.bool).triu(1) if model_kind(config.task) == "causal" else None
    renamed = {
        "self_attn.out_proj": "attention.output",
        "linear1": "feed_forward.fc1",
        "linear2": "feed_forward.fc2",
        "norm1": "layernorm1",
        "norm2": "layernorm2",
    }
    for i in range(config.model.n_layers):
        block = _part(weights, f"base.blocks.{i}.")
        theirs = {f"{a}.{kind}": block[f"{b}.{kind}"] for a, b in renamed.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            parts = [block[f"attention.{name}.{kind}"] for name in ("query", "key", "value")]
            theirs[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        options = {"src_mask": is_future, "src_key_padding_mask": is_pad}
        hidden = torch.func.functional_call(layer, theirs, (hidden,), options)
    return hidden


def _part(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _linear(block: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, block[f"{name}.weight"], block[f"{name}.bias"])


def _norm(block: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"])


def _mean_loss(logits: Tensor, batch: Batch) -> Tensor:
    if "positions" in batch:
        logits = logits.take_along_dim(torch.from_numpy(np.int64(batch["positions"]))[:, :, None], 1)
    labels = torch.from_numpy(np.int64(batch["labels"]))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-1)


def _compare(name: str, config: Config, weights: Arrays, batch: Batch, want: First) -> list[Row]:
    rows = []
    for package in PACKAGES:
        got = trajectory.first(package(config, weights, "float64"), batch)
        rows += trajectory.compare_first(name, package.name, config, got, want, FLOAT64, "the batch")
    return rows


# The models of transformers


TIED = {"model.positions": "learned", "model.tied_embedding": True}


def gpt2(task: str = "gpt") -> list[Row]:
    """Return how far both packages are from transformers' GPT-2, in float64."""
    import transformers

    changes = {"model.final_norm": True, "model.pad_id": -1, "model.gelu": "tanh", "model.output_bias": False}
    config = config_of(task, **TIED, **changes, **{"model.pooling": "last"})
    model, weights = config.model, random_weights(config, 8)
    is_classifier = "head.linear.bias" in weights
    if is_classifier:
        weights["head.linear.bias"][:] = 0  # GPT-2 has none
    gpt2_class: Any = transformers.GPT2ForSequenceClassification if is_classifier else transformers.GPT2LMHeadModel
    theirs = gpt2_class(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.seq_len,
            n_embd=model.d_model,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            activation_function="gelu_new",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0 if is_classifier else None,
        )
    )
    renamed = {"score.weight": "head.linear.weight"} if is_classifier else {}
    renamed |= {
        "transformer.wte.weight": "base.embedding.token.weight",
        "transformer.wpe.weight": "base.embedding.position",
    }
    renamed |= {f"transformer.ln_f.{kind}": f"base.final_norm.{kind}" for kind in ("weight", "bias")}
    for i in range(model.n_layers):
        layer, block = f"transformer.h.{i}", f"base.blocks.{i}"
        for kind in ("weight", "bias"):
            renamed |= {
                f"{layer}.ln_1.{kind}": f"{block}.layernorm1.{kind}",
                f"{layer}.ln_2.{kind}": f"{block}.layernorm2.{kind}",
                f"{layer}.attn.c_proj.{kind}": f"{block}.attention.output.{kind}",
                f"{layer}.mlp.c_fc.{kind}": f"{block}.feed_forward.fc1.{kind}",
                f"{layer}.mlp.c_proj.{kind}": f"{block}.feed_forward.fc2.{kind}",
            }
    # Its linear layers hold [in, out], query, key and value as one.
    state = {
        a: weights[b].T if a.endswith(("c_proj.weight", "c_fc.weight")) else weights[b] for a, b in renamed.items()
    }
    for i in range(model.n_layers):
        for kind in ("weight", "bias"):
            parts = [weights[f"base.blocks.{i}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"transformer.h.{i}.attn.c_attn.{kind}"] = np.concatenate(parts).T
    batch = random_batch(config, np.random.default_rng(8), batch_size=3)
    if is_classifier:  # its last token is the last that is no pad
        is_behind = np.arange(model.seq_len) > batch["last"][:, None]
        batch["tokens"] = np.where(is_behind, 0, np.maximum(batch["tokens"], 1))
    written_out = batch
    if task == "pairs":
        batch, written_out = _pairs(config)

    def back(gradients: Arrays) -> Arrays:
        result = {}
        for a, b in renamed.items():
            result[b] = gradients[a].T if a.endswith(("c_proj.weight", "c_fc.weight")) else gradients[a]
        for i in range(model.n_layers):
            for kind in ("weight", "bias"):
                parts = np.split(gradients[f"transformer.h.{i}.attn.c_attn.{kind}"].T, 3)
                for name, part in zip(("query", "key", "value"), parts, strict=True):
                    result[f"base.blocks.{i}.attention.{name}.{kind}"] = part
        return result

    want = _of_transformers(theirs, state, written_out, back)
    return _compare(f"{task} as transformers' GPT-2", config, weights, batch, want)


def _pairs(config: Config) -> tuple[Batch, Batch]:
    """Return prompts with their answers as data/samples.py makes samples of them, and written out token by token."""
    T, end = config.model.seq_len, config.model.vocab_size - 1
    random = np.random.default_rng(8)
    texts = [random.integers(0, end, n).tolist() for n in (1, 2, 3, 1, 2, 4)]  # prompt, answer, prompt, ...
    offsets = np.cumsum([0, *map(len, texts)])
    split = Split(np.concatenate(texts), offsets, np.full(len(texts), -1), np.ones(len(texts), np.int64))
    samples = PairSamples(split, config, {"article": end}, end + 1)
    batch = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
    tokens, labels = np.full((3, T), end, np.int32), np.full((3, T), -1, np.int32)
    for i, (prompt, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        n = len(prompt) + len(answer) + 1
        tokens[i, :n] = [end, *prompt, *answer]
        labels[i, :n] = [-1] * len(prompt) + [*answer, end]
    return batch, {"tokens": tokens, "labels": labels}


def bert(task: str = "mlm") -> list[Row]:
    """Return how far both packages are from transformers' BERT without its segments, in float64."""
    import transformers

    changes = {"model.post_norm": True, "model.embedding_norm": True, "model.head_dense": "bert"}
    config = config_of(task, **TIED, **changes, **{"model.norm_epsilon": 1e-12, "data.n_labels": 5})
    model, weights = config.model, random_weights(config, 9)
    undeclared: dict[str, Any] = {"num_labels": config.data.n_classes}
    bert_class: Any = transformers.BertForTokenClassification if task == "tag" else transformers.BertForMaskedLM
    theirs = bert_class(_bert_config(model, **undeclared))
    nn.init.zeros_(theirs.bert.embeddings.token_type_embeddings.weight)
    renamed = _names_of_bert(config, "bert.")
    renamed |= {"cls.predictions.bias": "head.bias"} if task == "mlm" else {}
    for kind in ("weight", "bias"):
        if task == "tag":
            renamed[f"classifier.{kind}"] = f"head.linear.{kind}"
        else:
            renamed[f"cls.predictions.transform.dense.{kind}"] = f"head.dense.{kind}"
            renamed[f"cls.predictions.transform.LayerNorm.{kind}"] = f"head.layernorm.{kind}"
    batch = written_out = random_batch(config, np.random.default_rng(9), batch_size=3)
    if task == "tag":
        batch, written_out = _tagged(config)
    state = {a: weights[b] for a, b in renamed.items()}
    want = _of_transformers(theirs, state, written_out, lambda gradients: {b: gradients[a] for a, b in renamed.items()})
    if task == "tag":  # ours has logits of words alone
        want = dataclasses.replace(
            want, logits=np.take_along_axis(want.logits, batch["positions"][..., None].astype(np.int64), axis=1)
        )
    # Its pad row, which is tied to the output as well, has the gradient of an output only, as ours has.
    return _compare(f"{task} as transformers' BERT", config, weights, batch, want)


def sentence_bert() -> list[Row]:
    """Return how far both packages are from transformers' BERT with a mean and PyTorch's loss of in-batch negatives.

    In float64. One row of the batch is no text, as those that fill up an evaluation.
    """
    import transformers

    changes = {"model.post_norm": True, "model.embedding_norm": True, "model.pooling": "mean"}
    config = config_of("embed", **TIED, **changes, **{"model.norm_epsilon": 1e-12})
    model, weights = config.model, random_weights(config, 9)
    theirs = transformers.BertModel(_bert_config(model), add_pooling_layer=False)
    nn.init.zeros_(theirs.embeddings.token_type_embeddings.weight)
    renamed = _names_of_bert(config, "")
    theirs.load_state_dict({a: torch.tensor(weights[b]) for a, b in renamed.items()}, strict=False)
    theirs = theirs.double().eval()
    batch = random_batch(config, np.random.default_rng(9), batch_size=4)
    batch["labels"][-1] = -1

    def embedded(name: str) -> Tensor:
        tokens = torch.from_numpy(np.int64(batch[name]))
        mask = (tokens != 0).long()
        hidden = theirs(input_ids=tokens, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)

    text, pair = embedded("tokens"), embedded("pair_tokens")
    cosines = F.cosine_similarity(text[:3, None], pair[None, :3], dim=-1)
    loss = F.cross_entropy(20.0 * cosines, torch.arange(3))
    loss.backward()
    found = {name: x.grad.numpy() for name, x in theirs.named_parameters() if x.grad is not None}
    want = First(text.detach().numpy(), float(loss.detach()), {b: found[a] for a, b in renamed.items()})
    return _compare("embed as transformers' BERT", config, weights, batch, want)


def _bert_config(model: ModelConfig, **undeclared: Any) -> Any:
    import transformers

    return transformers.BertConfig(
        **undeclared,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.seq_len,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        intermediate_size=4 * model.d_model,
        hidden_act="gelu",
        layer_norm_eps=model.norm_epsilon,
        pad_token_id=0,
    )


def _names_of_bert(config: Config, prefix: str) -> dict[str, str]:
    """Return our name of each parameter of the base of transformers' BERT."""
    renamed = {
        f"{prefix}embeddings.word_embeddings.weight": "base.embedding.token.weight",
        f"{prefix}embeddings.position_embeddings.weight": "base.embedding.position",
    }
    for kind in ("weight", "bias"):
        renamed[f"{prefix}embeddings.LayerNorm.{kind}"] = f"base.embedding.layernorm.{kind}"
        for i in range(config.model.n_layers):
            layer, block = f"{prefix}encoder.layer.{i}", f"base.blocks.{i}"
            renamed |= {
                f"{layer}.attention.self.{x}.{kind}": f"{block}.attention.{x}.{kind}" for x in ("query", "key", "value")
            }
            renamed |= {
                f"{layer}.attention.output.dense.{kind}": f"{block}.attention.output.{kind}",
                f"{layer}.attention.output.LayerNorm.{kind}": f"{block}.layernorm1.{kind}",
                f"{layer}.intermediate.dense.{kind}": f"{block}.feed_forward.fc1.{kind}",
                f"{layer}.output.dense.{kind}": f"{block}.feed_forward.fc2.{kind}",
                f"{layer}.output.LayerNorm.{kind}": f"{block}.layernorm2.{kind}",
            }
    return renamed


def _tagged(config: Config) -> tuple[Batch, Batch]:
    """Return sentences as data/tagged.py makes samples of them, and with a label for each token, -1 for no word's."""
    T, words = config.model.seq_len, [[[4, 5], [6], [7, 8]], [[9, 10, 11]], [[12], [13], [14], [15], [16]]]
    tags = [[1, 2, 0], [3], [3, 4, 4, 1, 0]]
    sizes = [len(ids) for sentence in words for ids in [*sentence, []]]
    labels = [tag for sentence in tags for tag in [*sentence, -1]]
    flat = np.array([i for sentence in words for ids in sentence for i in ids])
    split = Split(flat, np.cumsum([0, *sizes]), np.array(labels), np.ones(len(sizes), np.int64))
    samples = TaggedSamples(split, config, {"pad": 0, "start": 1, "end": 2}, config.model.vocab_size)
    batch = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
    tokens, of_tokens = np.zeros((3, T), np.int32), np.full((3, T), -1, np.int32)
    for i, (sentence, numbers) in enumerate(zip(words, tags, strict=True)):
        row, marks = [1], [-1]
        for ids, tag in zip(sentence, numbers, strict=True):
            row, marks = row + ids, marks + [tag] + [-1] * (len(ids) - 1)
        tokens[i, : len(row) + 1], of_tokens[i, : len(row)] = [*row, 2], marks
    return batch, {"tokens": tokens, "labels": of_tokens}


# Recorded from seqeval 1.2.2: F1, precision, recall, and the F1 of both types, of the tags that `spans` draws.
SEQEVAL = [
    (0.682926829, 0.636363636, 0.736842105, 0.636363636, 0.736842105),
    (0.723404255, 0.739130435, 0.708333333, 0.75, 0.695652174),
    (0.685714286, 0.6, 0.8, 0.727272727, 0.615384615),
    (0.705882353, 0.705882353, 0.705882353, 0.666666667, 0.75),
]


def spans() -> list[Row]:
    """Return how far the scores of spans are from those of seqeval, for random tags, many of them of no scheme."""
    rows = []
    for package in PACKAGES:
        for seed, expected in enumerate(SEQEVAL):
            random = np.random.default_rng(seed)
            labels = random.choice(5, (6, 9), p=[0.4, 0.15, 0.2, 0.1, 0.15])
            guesses = np.where(random.random((6, 9)) < 0.75, labels, random.choice(5, (6, 9)))
            labels[np.arange(9) >= random.integers(1, 10, 6)[:, None]] = -1
            config = config_of("tag", **{"data.n_labels": 5})
            state = package(config, random_weights(config, 0), "float32")
            state.task.classes = ("O", "B-X", "I-X", "B-YY", "I-YY")
            scores = list(state.task.scores(state.totals(np.eye(5, dtype=np.float32)[guesses], labels)).values())
            far = np.abs(np.array(scores[:5]) - expected)
            rows.append(Row("spans as seqeval", package.name, "scores", float(far.max()), 1e-8, f"draw {seed}"))
    return rows


def _of_transformers(model: nn.Module, state: Arrays, batch: Batch, back: Callable[[Arrays], Arrays]) -> First:
    """Return what a model makes of a batch; `back` gives its gradients our names and layouts."""
    unknown = model.load_state_dict({name: torch.tensor(x) for name, x in state.items()}, strict=False).unexpected_keys
    assert not unknown, unknown
    model = model.double().eval()
    tokens = torch.from_numpy(np.int64(batch["tokens"]))
    pad_id = getattr(model.config, "pad_token_id", None)
    mask = torch.ones_like(tokens) if pad_id is None else (tokens != pad_id).long()
    logits = model(input_ids=tokens, attention_mask=mask).logits
    loss = _mean_loss(logits, batch)
    loss.backward()
    gradients = back({name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None})
    return First(logits.detach().numpy(), float(loss.detach()), gradients)


# AdamW and Muon


def adamw(n_updates: int = 30) -> list[Row]:
    """Return how far the update steps of both packages are from NumPy's and PyTorch's, for the same gradients."""
    return _updates("AdamW", n_updates, {"NumPy": _adamw_of_numpy, "PyTorch": _adamw_of_pytorch})


def muon(n_updates: int = 20) -> list[Row]:
    """Return how far updates of Muon in both packages are from NumPy's, with each scale and polynomial."""
    heads = {"model.n_heads": 4, "model.n_kv_heads": 2, "model.mlp": "swiglu", "train.muon_rate": 3.0}
    rows = []
    for scale, coefficients in (("rms", "newton_schulz"), ("spectral", "polar_express")):
        changes = heads | {"train.muon_scale": scale, "train.muon_coefficients": coefficients}
        wanted = {"NumPy": _muon_of_numpy}
        rows += _updates(f"Muon, {scale}", n_updates, wanted, **changes, **{"train.optimizer": "muon"})
    return rows


def _updates(name: str, n_updates: int, wanted: dict[str, Callable[..., Arrays]], **changes: Any) -> list[Row]:
    """Return how far the weights are apart after some updates with the same gradients.

    The loss is linear in the weights, so that its gradients are known; their norms lie on both sides of the bound.
    """
    changes |= {"train.max_steps": n_updates, "train.warmup_steps": 5, "train.decay_steps": 20, "train.accumulate": 1}
    config = config_of("mlm", **changes, **{"train.weight_decay": 0.3, "train.learning_rate": 0.02})
    random, shapes = np.random.default_rng(10), parameters.shapes(config)
    start = {name: np.asarray(x, np.float64) for name, x in random_weights(config, 10).items()}
    gradients = [
        {name: scale * random.normal(size=shape) for name, shape in shapes.items()}
        for scale in np.geomspace(0.005, 0.5, n_updates)
    ]
    norms = [norm(gradient) for gradient in gradients]
    assert min(norms) < config.train.clip_norm < max(norms)
    found = {"jaxlm": _updated_by_jaxlm, "torchlm": _updated_by_torchlm}
    ours = {package: update(config, start, gradients) for package, update in found.items()}
    rows = []
    for reference, update in wanted.items():
        want = update(config, start, gradients)
        for package, got in ours.items():
            for tensor, x in want.items():
                apart, moved = (np.linalg.norm(x - y) for y in (got[tensor], start[tensor]))
                quantity = f"{n_updates} updates as {reference} makes them"
                rows.append(Row(name, package, quantity, float(apart / moved), FLOAT64.weights, tensor))
    return rows


def _updated_by_jaxlm(config: Config, start: Arrays, gradients: list[Arrays]) -> Arrays:
    def loss(params: Any, batch: Any, key: Any) -> Any:
        products = jax.tree.map(lambda x, gradient: (x * gradient).sum(), params, batch)
        return {"loss": sum(jax.tree.leaves(products)), "count": np.int32(1)}

    with jax.enable_x64(True):
        rate = jax_schedule.learning_rate(config.train)
        optimizer = jax_optim.make_optimizer(config.train, rate, config.model.n_layers)
        rule = jax_step.Rule(optimizer, rate, config.train.clip_norm)
        update = jax.jit(functools.partial(jax_step.train_step, rule, loss))
        state = jax_step.init_state(names.to_jax(start), optimizer)
        for gradient in gradients:
            state, _ = update(state, jax.tree.map(lambda x: x[None], names.to_jax(gradient)), jax.random.key(0))
        return names.to_torch(jax.device_get(state.params))


def _updated_by_torchlm(config: Config, start: Arrays, gradients: list[Arrays]) -> Arrays:
    def loss(model: nn.Module, batch: Any, key: Any) -> Any:
        products = [(x * batch[name]).sum() for name, x in model.named_parameters()]
        return {"loss": torch.stack(products).sum(), "count": torch.tensor(1)}

    model = torch_tasks.TASKS[config.task](config).build_model(torch.Generator()).double()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in start.items()})
    state = torch_step.init_state(model, torch_optim.make_optimizer(config.train, model))
    rate = torch_schedule.learning_rate(config.train)
    for gradient in gradients:
        batch = {name: torch.from_numpy(x)[None] for name, x in gradient.items()}
        state, _ = torch_step.train_step(torch_step.Rule(rate, config.train.clip_norm), loss, state, batch)
    return {name: x.detach().numpy() for name, x in model.named_parameters()}


def _rate(config: Config, i: int) -> float:
    train = config.train
    if i < train.warmup_steps:
        return i / train.warmup_steps * train.learning_rate
    share = min((i - train.warmup_steps) / (train.decay_steps - train.warmup_steps), 1)
    low, high = train.min_learning_rate, train.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * share)) / 2


def _adamw_of_numpy(config: Config, start: Arrays, gradients: list[Arrays]) -> Arrays:
    """Return the weights by arXiv 1711.05101, algorithm 2, with its rate in the place of the schedule multiplier."""
    train, weights = config.train, dict(start)
    first, second = ({name: np.zeros_like(x) for name, x in start.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(np.sum(x**2) for x in gradient.values()))
        for name, x in weights.items():
            g = gradient[name] * min(1, train.clip_norm / (norm + 1e-6))
            first[name] = train.beta1 * first[name] + (1 - train.beta1) * g
            second[name] = train.beta2 * second[name] + (1 - train.beta2) * g**2
            step = first[name] / (1 - train.beta1**t)
            step = step / (np.sqrt(second[name] / (1 - train.beta2**t)) + train.epsilon)
            decay = train.weight_decay if x.ndim == 2 and x.shape[0] > 1 else 0
            weights[name] = x - _rate(config, t - 1) * (step + decay * x)
    return weights


def _muon_of_numpy(config: Config, start: Arrays, gradients: list[Arrays]) -> Arrays:
    """Return the weights by Muon for the matrices of attention and feed-forwards, and by AdamW for the rest.

    By the definition: the polynomials are of the singular values, which leaves the singular vectors as they are.
    """
    train, weights = config.train, dict(_adamw_of_numpy(config, start, gradients))
    factor, polynomials = 1.0, [(3.4445, -4.7750, 2.0315)] * 5
    if train.muon_coefficients == "polar_express":  # arXiv 2505.16932, algorithm 1
        factor, polynomials = 1.01, [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS]
    hidden = [name for name, x in start.items() if x.ndim == 2 and (".attention." in name or ".feed_forward." in name)]
    for name in hidden:
        weight, momentum = start[name], np.zeros_like(start[name])
        n_out, n_in = weight.shape
        scale = 0.2 * max(n_out, n_in) ** 0.5 if train.muon_scale == "rms" else max(1, n_out / n_in) ** 0.5
        for i, gradient in enumerate(gradients):
            whole = math.sqrt(sum(np.sum(x**2) for x in gradient.values()))
            g = gradient[name] * min(1, train.clip_norm / (whole + 1e-6))
            momentum = train.muon_momentum * momentum + (1 - train.muon_momentum) * g
            left, sizes, right = np.linalg.svd(
                train.muon_momentum * momentum + (1 - train.muon_momentum) * g, full_matrices=False
            )
            sizes = sizes / np.linalg.norm(sizes) / factor
            for a, b, c in polynomials:
                sizes = a * sizes + b * sizes**3 + c * sizes**5
            step = scale * (left * sizes) @ right
            weight = weight - train.muon_rate * _rate(config, i) * (step + train.weight_decay * weight)
        weights[name] = weight
    return weights


POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def _adamw_of_pytorch(config: Config, start: Arrays, gradients: list[Arrays]) -> Arrays:
    train, tensors = config.train, {name: torch.tensor(x, requires_grad=True) for name, x in start.items()}
    groups: tuple[list, list] = ([], [])
    for x in tensors.values():
        groups[x.dim() < 2 or x.shape[0] == 1].append(x)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": train.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
    )
    for i, gradient in enumerate(gradients):
        for name, x in tensors.items():
            x.grad = torch.tensor(gradient[name])
        nn.utils.clip_grad_norm_(tensors.values(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = _rate(config, i)
        optimizer.step()
    return {name: x.detach().numpy() for name, x in tensors.items()}


# Finite differences


def finite_differences(task: str, **changes: Any) -> list[Row]:
    """Return how far the slope of the loss along each weight tensor is from that of its gradient, in float64.

    Along a random direction, by the loss at four points (error of the fifth order in the way).
    """
    config = config_of(task, **changes)
    batch, random = random_batch(config, np.random.default_rng(11), batch_size=3), np.random.default_rng(12)
    weights = {name: np.asarray(x, np.float64) for name, x in random_weights(config, 11).items()}
    pad_id = config.model.pad_id
    rows = []
    for package in PACKAGES:
        state = package(config, weights, "float64")
        gradients = trajectory.first(state, batch).gradients
        whole = norm(gradients)
        for name, x in weights.items():
            direction = random.normal(size=x.shape)
            if name == "base.embedding.token.weight" and pad_id >= 0:
                direction[pad_id] = 0  # which by design gets no gradient
            direction *= 1e-3 / np.linalg.norm(direction)
            losses = []
            for ways in (-2, -1, 1, 2):
                state.set_weights(weights | {name: x + ways * direction})
                losses.append(trajectory.first(state, batch).loss)
            slope = np.dot([1, -8, 8, -1], losses) / 12
            wanted = np.sum(gradients[name] * direction)
            rows.append(
                Row(f"{task} slopes", package.name, "gradients", abs(slope - wanted) / 1e-3 / whole, SLOPE, name)
            )
    return rows
