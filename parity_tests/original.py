"""The original once more, from its description and with PyTorch's own parts, to record further cases.

It shares nothing with torchlm: names, masks, loss, accumulation and rates are written anew, so that a case from here
is a second opinion. `record` makes what the original wrote: case.json, arrays.npz, checkpoint.pt.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, NO_LABEL = 0, 0
SETTINGS: dict[str, Any] = {
    "task": "mlm",
    "vocab_size": 43,
    "d_model": 24,
    "n_layers": 2,
    "heads": 3,
    "seq_len": 14,
    "batch_size": 3,
    "steps": 8,
    "learning_rate": 2e-3,
    "min_learning_rate": 1e-4,
    "warmup_iters": 2,
    "lr_decay_iters": 7,
    "cycle_len": 10**9,
    "resume_at": None,
    "resume_warmup_iters": 4,
    "weight_decay": 0.01,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "clip": 1.0,
    "dropout": 0.0,
    "after_resume": None,
}


def position_table(seq_len: int, d_model: int) -> Tensor:
    table = torch.zeros(seq_len, d_model, dtype=torch.float64)
    for position in range(seq_len):
        for i in range(0, d_model, 2):
            table[position, i] = math.sin(position / 10000 ** (2 * i / d_model))
            table[position, i + 1] = math.cos(position / 10000 ** (2 * (i + 1) / d_model))
    return table


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, seq_len: int):
        super().__init__()
        self.token = nn.Embedding(vocab_size, d_model, padding_idx=PAD)
        self.position = nn.Module()
        self.position.register_buffer("pe", position_table(seq_len, d_model).float()[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position.pe


class SelfAttention(nn.Module):
    def __init__(self, d_model: int, heads: int, seq_len: int, is_causal: bool):
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        if is_causal:
            self.register_buffer("bias", torch.tril(torch.ones(1, 1, seq_len, seq_len)))
        self.query, self.key, self.value = (nn.Linear(d_model, d_model) for _ in range(3))
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, is_pad: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(is_pad[:, None, None, :], -1e9)
        if self.is_causal:
            scores = scores.masked_fill(self.bias == 0, -math.inf)
        return self.output_linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, d_model: int, heads: int, seq_len: int, is_causal: bool):
        super().__init__()
        self.layernorm1 = nn.LayerNorm(d_model)
        self.self_multihead = SelfAttention(d_model, heads, seq_len, is_causal)
        self.layernorm2 = nn.LayerNorm(d_model)
        self.feed_forward = nn.ModuleDict(
            {"fc1": nn.Linear(d_model, 4 * d_model), "fc2": nn.Linear(4 * d_model, d_model)}
        )

    def forward(self, x: Tensor, is_pad: Tensor) -> Tensor:
        x = x + self.self_multihead(self.layernorm1(x), is_pad)
        return x + self.feed_forward["fc2"](F.gelu(self.feed_forward["fc1"](self.layernorm2(x))))


class Original(nn.Module):
    """A base model, `bert` or `gpt`, and the head of the task under its name."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.task, V, D = settings["task"], settings["vocab_size"], settings["d_model"]
        shape = D, settings["heads"], settings["seq_len"], self.task == "gpt"
        base = nn.Module()
        base.embedding = Embedding(V, D, settings["seq_len"])
        base.encoder_blocks = nn.ModuleList(Block(*shape) for _ in range(settings["n_layers"]))
        for layer in base.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        output = nn.Linear(D, V)
        nn.init.normal_(output.weight, std=0.02)
        nn.init.zeros_(output.bias)
        self.base_name = "gpt" if self.task == "gpt" else "bert"
        self.head_name = {"mlm": "mask_lm", "gpt": "gen_lm"}.get(self.task, "classifier_model")
        head = nn.ModuleDict({"normlayer": nn.LayerNorm(D), "linear": output} if self.task == "mlm" else {})
        if self.task != "mlm":
            head["classifier"] = output
        self.add_module(self.base_name, base)
        self.add_module(self.head_name, head)

    def forward(self, x: Tensor) -> Tensor:
        base, head = getattr(self, self.base_name), getattr(self, self.head_name)
        is_pad, hidden = x == PAD, base.embedding(x)
        for block in base.encoder_blocks:
            hidden = block(hidden, is_pad)
        if self.task in ("sst2", "cola"):
            hidden = hidden[:, 0]
        for layer in head.values():
            hidden = layer(hidden)
        return hidden

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        ignored = NO_LABEL if self.task in ("mlm", "gpt") else -100
        return F.cross_entropy(self(x).flatten(0, -2), y.flatten(), ignore_index=ignored)


def rate_at(i: int, settings: dict[str, Any], resumed_at: int | None, stored: float) -> float:
    peak, minimum, warmup = (settings[name] for name in ("learning_rate", "min_learning_rate", "warmup_iters"))
    last = settings["lr_decay_iters"]
    if i < warmup:
        rate = i * peak / warmup
    elif i > last:
        rate = minimum
    else:
        rate = minimum + 0.5 * (1 + math.cos(math.pi * (i - warmup) / (last - warmup))) * (peak - minimum)
    if resumed_at is not None and i - resumed_at < settings["resume_warmup_iters"]:
        rate = stored + (rate - stored) * (i - resumed_at) / settings["resume_warmup_iters"]
    cycle = settings["cycle_len"]
    amplitude = [0.03, 0.03, -0.03][i // cycle % 3]
    return rate * (1 + amplitude * (1 - abs(2 * (i % cycle) / cycle - 1)))


def record(folder: Path, settings: dict[str, Any], model: Original, x: Tensor, y: Tensor) -> Path:
    """Train `model` on the batches x, y [batches, batch, ...] as `settings` say; write the case, return its folder."""
    arrays = {f"init/{name}": value.numpy().copy() for name, value in model.state_dict().items()}
    arrays |= {"x": x.numpy(), "y": y.numpy(), "logits0": model(x[0]).detach().numpy()}
    loss = model.loss(x[0], y[0])
    loss.backward()
    arrays |= {"loss0": np.float32(loss.item())}
    arrays |= {f"grad0/{name}": p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.shape[0] != 1]
    undecayed = [p for p in model.parameters() if not (p.dim() > 1 and p.shape[0] != 1)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=1.0,
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    trace: dict[str, list] = {"lr": [], "loss": [], "micro": [], "grad_norm": []}
    now, used, checkpoint = settings, 0, {}

    def snapshot(i: int) -> dict[str, Any]:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        moments = optimizer.state_dict()
        moments["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in moments["state"].items()}
        parts = [
            {name.partition(".")[2]: v for name, v in state.items() if name.startswith(f"{part}.")}
            for part in (model.base_name, model.head_name)
        ]
        return {
            "version": "1.2",
            "task_type": settings["task"],
            "iter": i,
            "sample_iter": used * settings["batch_size"],
            "base_model": parts[0],
            "lm_head": parts[1],
            "optimizer": moments,
            "lr": trace["lr"][-1],
            "val_loss": 1.0,
            "config": {},
        }

    for i in range(settings["steps"]):
        if i == settings["resume_at"]:
            checkpoint, now = snapshot(i), settings | (settings["after_resume"] or {})
        resumed_at = settings["resume_at"] if checkpoint else None
        micro = [1, 1, 2][i // now["cycle_len"] % 3]
        rate = rate_at(i, now, resumed_at, checkpoint.get("lr", 0.0))
        optimizer.zero_grad()
        total = 0.0
        for _ in range(micro):
            loss = model.loss(x[used], y[used]) / micro
            loss.backward()
            total += loss.item()
            used += 1
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, value in (("lr", rate), ("loss", total), ("micro", micro), ("grad_norm", grad_norm.item())):
            trace[name].append(value)
    checkpoint = checkpoint or snapshot(settings["steps"])
    arrays |= {f"final/{name}": value.numpy().copy() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits, labels = model(x[-1]), y[-1]
        counted = labels != NO_LABEL if settings["task"] == "mlm" else torch.ones_like(labels, dtype=torch.bool)
        right = (logits.argmax(-1) == labels) & counted
        is_counted = settings["task"] != "gpt"
        arrays |= {
            "eval_loss": np.float32(model.loss(x[-1], y[-1]).item()),
            "eval_total": np.int64(counted.sum() * is_counted),
            "eval_correct": np.int64(right.sum() * is_counted),
        }
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps({**settings, **trace}))
    np.savez(folder / "arrays.npz", **arrays)
    torch.save(checkpoint, folder / "checkpoint.pt")
    return folder


def record_random(folder: Path, seed: int, **changes: Any) -> Path:
    """Record a case of random tokens with SETTINGS and these changes."""
    settings = SETTINGS | changes
    torch.manual_seed(seed)
    n_batches = sum([1, 1, 2][i // settings["cycle_len"] % 3] for i in range(settings["steps"])) + 1
    shape = n_batches, settings["batch_size"], settings["seq_len"]
    x = torch.randint(1, settings["vocab_size"], shape)
    lengths = torch.randint(settings["seq_len"] // 2, settings["seq_len"] + 1, shape[:2])
    is_pad = torch.arange(settings["seq_len"]) >= lengths[..., None]
    if settings["task"] == "gpt":  # id 0 is a token there, in the middle of a text
        is_pad = torch.rand(shape) < 0.05
    x[is_pad] = PAD
    if settings["task"] in ("sst2", "cola"):
        y = torch.randint(0, 2, shape[:2])
    elif settings["task"] == "gpt":
        y = torch.cat([x[..., 1:], torch.randint(0, settings["vocab_size"], (*shape[:2], 1))], dim=-1)
    else:
        is_masked = (torch.rand(shape) < 0.2) & ~is_pad
        is_masked[..., 0] = ~is_pad[..., 0]  # at least one
        y = torch.where(is_masked, x, NO_LABEL)
        x[is_masked] = settings["vocab_size"] - 1
    return record(folder, settings, Original(settings), x, y)
