"""The systems that benchmark.py compares, each in a process of its own that does what it is told and reports.

    python scripts/bench_systems.py '{"system": "jaxlm", "settings": {"task": "mlm"}, ...}'

It reads lines of JSON [command, argument ...], the methods of the system below, and answers each with a line of JSON.
All take their sizes, rate, dropout and clipping from settings of jaxlm. jaxlm and torchlm read their own batches; the
others read the same text, made into batches as a careful user of them would: language models take one stream of
tokens cut into windows without any pad, classifiers pad a batch to its longest text.
"""

import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import cache, embedded, prepare
from jaxlm.data.samples import CausalSamples, ClassifiedSamples, MaskedSamples

Reply = dict[str, Any]
SAMPLES = {"mlm": MaskedSamples, "gpt": CausalSamples, "sst2": ClassifiedSamples}
N_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_data(config: Config) -> tuple[Config, prepare.Data]:
    """Return the samples of the settings, without a word, and the settings with the size of the vocabulary."""

    def source() -> Any:
        return embedded.sentences("sst2") if config.task == "sst2" else embedded.python_reference(config.data)

    def silent(title: str, n_bytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda n_done: None)

    return prepare.prepare(config, SAMPLES[config.task], source, silent)


class Data:
    """Nothing but the data, which this makes ready for the others."""

    def __init__(self, config: Config, spec: dict[str, Any]):
        read_data(config)

    def ready(self) -> Reply:
        return {}


class Jaxlm:
    def __init__(self, config: Config, spec: dict[str, Any]):
        import jax

        from jaxlm import backend, loop, parallel
        from jaxlm.data import loader
        from jaxlm.tasks import TASKS

        backend.configure(config)
        jax.config.update("jax_compilation_cache_dir", spec["compile_cache"])
        self.config, self.data = read_data(config)
        self.mesh = parallel.make_mesh(self.config)
        self.task = TASKS[config.task](self.config)
        fresh, self.compiled = loop.build(self.config, self.task, self.mesh)
        self.state = fresh()
        self.key = jax.random.key(config.train.seed)
        self.batches = loader.training_batches(self.data.samples["train"], self.config.train)

    def train(self, n: int) -> Reply:
        """Make n updates as the training loop does: metrics of each are read when the next is under way."""
        import jax

        from jaxlm import parallel

        losses: list[Any] = []
        tokens, before = 0, None
        started_s = time.perf_counter()
        for _ in range(n):
            batch = next(self.batches)
            on_devices = parallel.put_batch(self.mesh, batch, axis=1)
            self.state, metrics = self.compiled.update(self.state, on_devices, self.key)
            tokens += self.data.samples["train"].n_tokens(batch)
            losses += [jax.device_get(before)] if before else []
            before = metrics
        losses.append(jax.device_get(before))
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - started_s
        return {"seconds": seconds, "tokens": tokens, "loss": _mean([x["loss"] / x["count"] for x in losses])}

    def evaluate(self) -> Reply:
        """Score the validation part."""
        from jaxlm import loop

        run: Any = SimpleNamespace(data=self.data, config=self.config)
        started_s = time.perf_counter()
        totals = loop.evaluate(run, self.compiled, self.state.params, "validation", lambda: 0)
        assert totals is not None, "no signal was given"
        return _scored(totals, time.perf_counter() - started_s, self.data)

    def generate(self, n_rows: int, n_prompt: int, n_new: int) -> Reply:
        """Continue prompts greedily, with a cache of keys and values."""
        import jax
        from flax import nnx

        from jaxlm import decode

        if not hasattr(self, "decoder"):
            model: Any = self.task.build_model(nnx.Rngs(self.config.train.seed))
            self.decoder = decode.Decoder(model, stop=-1)
        prompts = _prompts(self.data, n_rows, n_prompt)
        started_s = time.perf_counter()
        rows = self.decoder.begin(prompts.tolist(), n_new)
        greedy = decode.Sampling(*([value] * n_rows for value in (0.0, 0, 1.0, 0)))
        rows = jax.block_until_ready(self.decoder.extend(rows, greedy, n_new))
        n = int(rows.n_B.sum()) - n_rows * n_prompt
        return {"seconds": time.perf_counter() - started_s, "tokens": n, "loss": None}

    def read_batches(self, n: int) -> Reply:
        """Read n batches and make nothing of them."""
        started_s = time.perf_counter()
        for _ in range(n):
            next(self.batches)
        return {"seconds": time.perf_counter() - started_s}

    def null_updates(self, n: int) -> Reply:
        """Do the host's work of n updates whose device has nothing to do, batches in hand."""
        import jax

        from jaxlm import parallel

        _, metrics = jax.eval_shape(
            self.compiled.update, self.state, parallel.put_batch(self.mesh, next(self.batches), axis=1), self.key
        )
        zeros = {name: np.zeros(x.shape, x.dtype) for name, x in metrics.items()}
        # Without the barrier, outputs would be the inputs themselves, which are handed on and not made.
        null = jax.jit(lambda state, batch, key: jax.lax.optimization_barrier((state, zeros)), donate_argnums=0)
        batches = [next(self.batches) for _ in range(n + 1)]
        self.state, before = null(self.state, parallel.put_batch(self.mesh, batches.pop(), axis=1), self.key)
        started_s = time.perf_counter()
        for batch in batches:
            on_devices = parallel.put_batch(self.mesh, batch, axis=1)
            self.state, metrics = null(self.state, on_devices, self.key)
            jax.device_get(before)
            before = metrics
        jax.block_until_ready(self.state)
        return {"seconds": time.perf_counter() - started_s}

    def products(self) -> Reply:
        """Time each product of an update by itself: float32 or bfloat16 operands, float32 sums."""
        import jax
        import jax.numpy as jnp

        times: list[tuple[float, int]] = []
        for a, b, subscripts, count in products(self.config):
            rng = np.random.default_rng(0)
            operands = [jnp.asarray(rng.normal(size=shape), self.task.dtype) for shape in (a, b)]
            product = jax.jit(functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32))
            seconds = _fastest(lambda f, *x: jax.block_until_ready(f(*x)), [product, *operands])
            times.append((count * seconds, count * flops_of(a, b, subscripts)))
        seconds, flops = (sum(column) for column in zip(*times, strict=True))
        return {"seconds": seconds, "flops": flops, "peak_flops": max(flops / seconds for seconds, flops in times)}


class _Torch:
    """What torchlm and the peers have in common. Subclasses have `update`, a step that returns the loss and tokens."""

    update: Callable[[], tuple[float, int]]

    def train(self, n: int) -> Reply:
        """Make n updates."""
        started_s = time.perf_counter()
        losses, tokens = zip(*(self.update() for _ in range(n)), strict=True)
        return {"seconds": time.perf_counter() - started_s, "tokens": sum(tokens), "loss": _mean(losses)}


class Torchlm(_Torch):
    def __init__(self, config: Config, spec: dict[str, Any]):
        import torch

        from jaxlm.data import loader
        from torchlm import loop, parallel
        from torchlm.tasks import TASKS

        torch.set_num_threads(N_THREADS)
        self.config, self.data = read_data(config)
        self.mesh = parallel.make_mesh(self.config)
        task = TASKS[config.task](self.config)
        if spec["system"] == "original" and config.task == "mlm":
            task.loss = _loss_everywhere  # type: ignore[method-assign]
        fresh, self.compiled = loop.build(self.config, task, self.mesh)
        self.state = fresh()
        if spec["compiled"]:
            self.state.model.compile()
        self.batches = loader.training_batches(self.data.samples["train"], self.config.train)

    def update(self) -> tuple[float, int]:
        from torchlm import parallel

        batch = next(self.batches)
        on_device = parallel.put_batch(self.mesh, batch)
        self.state, metrics = self.compiled.update(self.state, on_device, self.config.train.seed)
        return float(metrics["loss"] / metrics["count"]), self.data.samples["train"].n_tokens(batch)

    def evaluate(self) -> Reply:
        """Score the validation part."""
        from torchlm import loop

        run: Any = SimpleNamespace(data=self.data, config=self.config)
        started_s = time.perf_counter()
        totals = loop.evaluate(run, self.compiled, self.state.model, "validation", lambda: 0)
        assert totals is not None, "no signal was given"
        return _scored(totals, time.perf_counter() - started_s, self.data)


def _loss_everywhere(model: Any, batch: dict[str, Any], key: None) -> Any:
    """Return torchlm's loss of mlm as the original has it: logits at every position, few of which have a label."""
    import torch

    from torchlm.step import cross_entropy

    is_counted, positions = batch["labels"] >= 0, batch["positions"]
    rows = torch.arange(len(positions))[:, None].expand_as(positions)
    labels = torch.full_like(batch["tokens"], -1)
    labels[rows[is_counted], positions[is_counted]] = batch["labels"][is_counted]
    return cross_entropy(model(batch["tokens"]), labels)


class Peer(_Torch):
    """A model of transformers, or the plain GPT below, and the loop that a careful user of it would write."""

    def __init__(self, config: Config, spec: dict[str, Any]):
        import torch

        from torchlm import schedule

        torch.set_num_threads(N_THREADS)
        torch.manual_seed(config.train.seed)
        self.config, self.data = read_data(config)
        self.is_grouped = spec["system"].endswith("grouped")
        self.model = plain_gpt(self.config) if spec["system"] == "plain GPT" else transformers_model(self.config)
        self.optimizer = _adamw(self.model, config)
        self.rate = schedule.learning_rate(config.train)
        self.step = 0
        if spec["compiled"]:
            self.model.compile(dynamic=True if config.task == "sst2" else None)
        splits = cache.open_cache(
            self.data.source, self.data.tokenizer, cache.user_cache_dir(config.data.cache_dir), lambda n: None
        )
        self.splits, self.batches = splits, self._batches(splits["train"])

    def update(self) -> tuple[float, int]:
        import torch

        self.model.train()
        batch = next(self.batches)
        loss, _ = self._forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item(), _n_real(batch)

    def evaluate(self) -> Reply:
        """Score the validation part."""
        import torch

        self.model.eval()
        sums = {"loss": 0.0, "count": 0.0, "correct": 0.0}
        started_s = time.perf_counter()
        tokens = 0
        for batch in self._batches(self.splits["validation"], is_training=False):
            with torch.no_grad():
                loss, logits = self._forward(batch)
            is_counted = batch["labels"] >= 0
            count = int(is_counted.sum())
            sums["loss"] += loss.item() * count
            sums["count"] += count
            sums["correct"] += int((logits.argmax(-1) == batch["labels"])[is_counted].sum())
            tokens += _n_real(batch)
        return _scored(sums, time.perf_counter() - started_s, self.data) | {"tokens": tokens}

    def generate(self, n_rows: int, n_prompt: int, n_new: int) -> Reply:
        """Continue prompts greedily, with transformers' cache of keys and values."""
        import torch

        if self.config.train.precision == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.eval()
        prompts = torch.from_numpy(_prompts(self.data, n_rows, n_prompt))
        started_s = time.perf_counter()
        made = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        n = made.numel() - prompts.numel()
        return {"seconds": time.perf_counter() - started_s, "tokens": n, "loss": None}

    def _forward(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        is_bfloat16 = self.config.train.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            output = self.model(**batch)
        return output.loss, output.logits

    def _batches(self, split: cache.Split, is_training: bool = True) -> Iterator[dict[str, Any]]:
        import torch

        of_task = {"mlm": self._masked, "gpt": self._windows, "sst2": self._texts}[self.config.task]
        for seed in range(self.config.train.seed, sys.maxsize):
            for batch in of_task(split, np.random.default_rng(seed), is_training):
                yield {name: torch.from_numpy(x.astype(np.int64)) for name, x in batch.items()}
            if not is_training:
                return

    def _windows(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        T, B = self.config.model.seq_len, self.config.train.batch_size
        windows = split.tokens[: len(split.tokens) // T * T].reshape(-1, T)
        order = rng.permutation(len(windows)) if is_training else np.arange(len(windows))
        for start in range(0, len(order) - B + 1 if is_training else len(order), B):
            tokens = windows[order[start : start + B]].astype(np.int64)
            yield {"input_ids": tokens, "labels": tokens}

    def _masked(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        mask = self.data.tokenizer.token_to_id("[MASK]")
        for batch in self._windows(split, rng, is_training):
            tokens, draws = batch["input_ids"], rng.random(batch["input_ids"].shape)
            share = self.config.data.mask_fraction
            labels = np.where(draws < share, tokens, -100)
            kinds = draws / share
            other = rng.integers(0, self.config.model.vocab_size, tokens.shape)
            yield {
                "input_ids": np.where(kinds < 0.8, mask, np.where((kinds >= 0.8) & (kinds < 0.9), other, tokens)),
                "labels": labels,
            }

    def _texts(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        samples, B = self.data.samples["train" if is_training else "validation"], self.config.train.batch_size
        lengths, n = np.diff(split.offsets), len(split)
        order = rng.permutation(n) if is_training else np.arange(n)
        if self.is_grouped:  # by length within chunks of 50 batches, the batches in random order
            chunks = [order[i : i + 50 * B] for i in range(0, n, 50 * B)]
            order = np.concatenate([chunk[np.argsort(lengths[chunk])] for chunk in chunks])
        batches = [order[i : i + B] for i in range(0, n, B)]
        if self.is_grouped and is_training:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        for indices in batches:
            batch = samples.batch(indices, np.zeros_like(indices))
            is_real = batch["tokens"] != self.config.model.pad_id
            longest = int(is_real.sum(axis=1).max())
            tokens, is_real = batch["tokens"][:, :longest], is_real[:, :longest]
            yield {"input_ids": tokens, "attention_mask": is_real, "labels": batch["labels"]}


def _adamw(model: Any, config: Config) -> Any:
    import torch

    parameters, train = list(model.parameters()), config.train
    groups = [
        {"params": [x for x in parameters if x.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [x for x in parameters if x.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True)


def transformers_model(config: Config) -> Any:
    """Return transformers' model for the task, with start values."""
    import transformers

    model, p = config.model, config.model.dropout
    if config.task == "gpt":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=model.vocab_size,
                n_positions=model.seq_len,
                n_embd=model.d_model,
                n_layer=model.n_layers,
                n_head=model.n_heads,
                resid_pdrop=p,
                embd_pdrop=p,
                attn_pdrop=p,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    bert = transformers.BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        intermediate_size=4 * model.d_model,
        max_position_embeddings=model.seq_len,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    kinds = {"mlm": transformers.BertForMaskedLM, "sst2": transformers.BertForSequenceClassification}
    return kinds[config.task](bert)


def plain_gpt(config: Config) -> Any:
    """Return a small GPT in the manner of nanoGPT: query, key and value in one product, fused attention, tied table."""
    from torch import nn
    from torch.nn import functional as F

    c = config.model

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
            self.qkv, self.output = nn.Linear(c.d_model, 3 * c.d_model), nn.Linear(c.d_model, c.d_model)
            self.fc1, self.fc2 = nn.Linear(c.d_model, 4 * c.d_model), nn.Linear(4 * c.d_model, c.d_model)

        def forward(self, x: Any) -> Any:
            B, T, D = x.shape
            p = c.dropout if self.training else 0.0
            qkv = self.qkv(self.norm1(x)).view(B, T, 3, c.n_heads, D // c.n_heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=p, is_causal=True)
            x = x + F.dropout(self.output(y.transpose(1, 2).reshape(B, T, D)), p, self.training)
            return x + F.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))), p, self.training)

    class PlainGpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.seq_len, c.d_model)
            self.blocks = nn.ModuleList(Block() for _ in range(c.n_layers))
            self.norm = nn.LayerNorm(c.d_model)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, input_ids: Any, labels: Any) -> Any:
            x = self.token(input_ids) + self.position.weight[: input_ids.shape[1]]
            x = F.dropout(x, c.dropout, self.training)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.token.weight)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            return _Output(loss, logits)

    return PlainGpt()


class _Output:
    def __init__(self, loss: Any, logits: Any):
        self.loss, self.logits = loss, logits


class TorchProducts:
    """PyTorch's products, for the peak of the machine."""

    def __init__(self, config: Config, spec: dict[str, Any]):
        import torch

        torch.set_num_threads(N_THREADS)
        self.config = config
        self.dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32

    def products(self) -> Reply:
        import torch

        rates = []
        for a, b, subscripts, _ in products(self.config):
            x, y = (torch.randn(shape).to(self.dtype) for shape in (a, b))
            seconds = _fastest(torch.einsum, [subscripts, x, y])
            rates.append(flops_of(a, b, subscripts) / seconds)
        return {"peak_flops": max(rates)}


def products(config: Config) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], str, int]]:
    """Yield the products of an update of a language model: shapes of the operands, subscripts, and how many there are.

    Their flops are those of flops.flops_per_update.
    """
    from jaxlm import flops

    model, B = config.model, config.train.batch_size * config.train.accumulate
    T, D, H, L = model.seq_len, model.d_model, model.n_heads, model.n_layers
    positions, outputs = flops.n_logits(config)
    for n, n_in, n_out, count in (
        (B * T, D, D, 4 * L),
        (B * T, D, 4 * D, L),
        (B * T, 4 * D, D, L),
        (B * positions, D, outputs, 1),
    ):
        yield (n, n_in), (n_in, n_out), "ij,jk->ik", count
        yield (n, n_out), (n_in, n_out), "ik,jk->ij", count  # gradient of the input
        yield (n, n_in), (n, n_out), "ij,ik->jk", count  # gradient of the weight
    heads, square = (B, H, T, D // H), (B, H, T, T)
    yield heads, heads, "bhtk,bhsk->bhts", 2 * L  # scores, and the gradient of the weights
    yield square, heads, "bhts,bhsk->bhtk", 2 * L  # weighted sums, and the gradient of queries
    yield square, heads, "bhts,bhtk->bhsk", 2 * L  # gradients of keys and values


def flops_of(a: tuple[int, ...], b: tuple[int, ...], subscripts: str) -> int:
    """Return the flops of a product: an addition and a multiplication for each combination of subscripts."""
    left, _, _ = subscripts.partition("->")
    first, _, second = left.partition(",")
    sizes = dict(zip(first + second, a + b, strict=True))
    return 2 * int(np.prod([sizes[letter] for letter in sizes], dtype=np.int64))


def _fastest(function: Callable[..., Any], arguments: list[Any], seconds: float = 1.0) -> float:
    """Return the seconds of the fastest call: after one that does not count, 3 or as many as fit."""
    function(*arguments)
    times: list[float] = []
    started_s = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started_s < seconds:
        before_s = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - before_s)
    return min(times)


def _mean(values: Any) -> float:
    return float(np.mean([float(x) for x in values]))


def _n_real(batch: dict[str, Any]) -> int:
    return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())


def _prompts(data: prepare.Data, n_rows: int, n_prompt: int) -> np.ndarray:
    """Return the first tokens of samples, int64 [n_rows, n_prompt]."""
    indices = np.arange(n_rows) % len(data.samples["validation"])
    return data.samples["validation"].batch(indices, np.zeros(n_rows, int))["tokens"][:, :n_prompt].astype(np.int64)


def _scored(totals: Any, seconds: float, data: prepare.Data) -> Reply:
    samples = data.samples["validation"]
    indices = np.arange(len(samples))
    return {
        "seconds": seconds,
        "tokens": samples.n_tokens(samples.batch(indices, np.zeros_like(indices))),
        "loss": float(totals["loss"] / totals["count"]),
        "accuracy": float(totals["correct"] / totals["count"]),
    }


def memory() -> Reply:
    """Return the peak of the resident memory of this process, and what it holds now but for pages of files, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return {"peak_mb": peak_mb, "own_mb": peak_mb}
    # Not getrusage: after a fork, its peak is at least the parent's.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    peak_kb, own_kb = (int(lines[name].split()[0]) for name in ("VmHWM", "RssAnon"))
    return {"peak_mb": peak_kb / 1024, "own_mb": own_kb / 1024}


SYSTEMS: dict[str, Callable[[Config, dict[str, Any]], Any]] = {
    "data": Data,
    "jaxlm": Jaxlm,
    "jaxlm tied": Jaxlm,
    "torchlm": Torchlm,
    "original": Torchlm,
    "transformers": Peer,
    "transformers grouped": Peer,
    "plain GPT": Peer,
    "PyTorch": TorchProducts,
}


def main() -> None:
    # What libraries print goes to stderr; the answers have the pipe for themselves.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    system = SYSTEMS[spec["system"]](configs.build(spec["settings"]), spec)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(system, command)(*arguments) | memory()), file=channel, flush=True)


if __name__ == "__main__":
    main()
