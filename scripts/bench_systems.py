"""jaxlm and torchlm as bench_child.py has them, what other systems share with them, and the products of an update."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data import embedded, prepare
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

        from jaxlm import loop, parallel
        from jaxlm.data import loader
        from jaxlm.runtime import backend
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
        on_gpu = jax.devices()[0].memory_stats()  # none on a CPU
        peak = {"peak_mb": on_gpu["peak_bytes_in_use"] / 2**20} if on_gpu else {}
        return {"seconds": seconds, "tokens": tokens, "loss": _mean([x["loss"] / x["count"] for x in losses]), **peak}

    def evaluate(self) -> Reply:
        """Score the validation part."""
        from jaxlm import loop

        run = _run(self.config, self.data)
        started_s = time.perf_counter()
        totals: Any = loop.evaluate(run, self.compiled, self.state.params, "validation", lambda: 0)
        assert totals is not None, "no signal was given"
        return scored(totals[""], time.perf_counter() - started_s, self.data)

    def generate(self, n_rows: int, n_prompt: int, n_new: int) -> Reply:
        """Continue prompts greedily, with a cache of keys and values."""
        import jax
        from flax import nnx

        from jaxlm.inference import decode

        if not hasattr(self, "decoder"):
            model: Any = self.task.build_model(nnx.Rngs(self.config.train.seed))
            self.decoder = decode.Decoder(model, (-1,))
        prompts_BT = prompts(self.data, n_rows, n_prompt)
        started_s = time.perf_counter()
        rows = self.decoder.begin(prompts_BT.tolist(), n_new)
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


class InTorch:
    """What torchlm and the peers share. Subclasses have `update`: it returns the loss and the tokens of one."""

    update: Callable[[], tuple[Any, int]]

    def train(self, n: int) -> Reply:
        """Make n updates."""
        import torch

        started_s = time.perf_counter()
        losses, tokens = zip(*(self.update() for _ in range(n)), strict=True)
        loss = _mean(losses)  # which waits for the device
        seconds, on_gpu = time.perf_counter() - started_s, torch.cuda.max_memory_allocated()  # 0 on a CPU
        peak = {"peak_mb": on_gpu / 2**20} if on_gpu else {}
        return {"seconds": seconds, "tokens": sum(tokens), "loss": loss, **peak}


class Torchlm(InTorch):
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

    def update(self) -> tuple[Any, int]:
        from torchlm import parallel

        batch = next(self.batches)
        on_device = parallel.put_batch(self.mesh, batch)
        self.state, metrics = self.compiled.update(self.state, on_device, self.config.train.seed)
        return metrics["loss"] / metrics["count"], self.data.samples["train"].n_tokens(batch)

    def evaluate(self) -> Reply:
        """Score the validation part."""
        from torchlm import loop

        run = _run(self.config, self.data)
        started_s = time.perf_counter()
        totals: Any = loop.evaluate(run, self.compiled, self.state.model, "validation", lambda: 0)
        assert totals is not None, "no signal was given"
        return scored(totals[""], time.perf_counter() - started_s, self.data)


def _loss_everywhere(model: Any, batch: dict[str, Any], key: None) -> Any:
    """Return torchlm's loss of mlm as the original has it: logits at every position, though few have a label."""
    import torch

    from torchlm.loss import cross_entropy

    is_counted, positions = batch["labels"] >= 0, batch["positions"]
    rows = torch.arange(len(positions))[:, None].expand_as(positions)
    labels = torch.full_like(batch["tokens"], -1)
    labels[rows[is_counted], positions[is_counted]] = batch["labels"][is_counted]
    return cross_entropy(model(batch["tokens"]), labels)


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
    from jaxlm.tasks import flops

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


def prompts(data: prepare.Data, n_rows: int, n_prompt: int) -> np.ndarray:
    """Return the first tokens of samples, int64 [n_rows, n_prompt]."""
    indices = np.arange(n_rows) % len(data.samples["validation"])
    return data.samples["validation"].batch(indices, np.zeros(n_rows, int))["tokens"][:, :n_prompt].astype(np.int64)


def _run(config: Config, data: prepare.Data) -> Any:
    """Return what an evaluation of all of the validation part needs of a run."""
    from jaxlm.data import loader
    from jaxlm.training.log import RunLog

    chosen = {"validation": {"": loader.choose(data.samples["validation"], "validation", [0], 0)[0]}}
    return SimpleNamespace(data=data, config=config, chosen=chosen, log=RunLog())


def scored(totals: Any, seconds: float, data: prepare.Data) -> Reply:
    samples = data.samples["validation"]
    indices = np.arange(len(samples))
    return {
        "seconds": seconds,
        "tokens": samples.n_tokens(samples.batch(indices, np.zeros_like(indices))),
        "loss": float(totals["loss"] / totals["count"]),
        "accuracy": float(totals["correct"] / totals["count"]),
    }
