"""`python -m parity_tests.faults`: plant realistic porting mistakes one at a time, and show which check catches each.

A fault is a change of a few words in a function of jaxlm or torchlm, made in memory: FAULTS reads as a list of what
goes wrong in ports. Each runs the checks of this suite, with their own tolerances, until one of them fails; the table
has a row for each fault. Exit status 1 if any is missed. `--json FILE` keeps the table for parity_tests.report.
"""

import argparse
import contextlib
import functools
import inspect
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import torch
from flax import nnx

import jaxlm.tasks.gpt
import torchlm.tasks.gpt
from jaxlm import distill as jax_distill
from jaxlm import heads as jax_heads
from jaxlm import loss as jax_loss
from jaxlm import model as jax_model
from jaxlm import names
from jaxlm import optim as jax_optim
from jaxlm import schedule as jax_schedule
from jaxlm import step as jax_step
from jaxlm import tune as jax_tune
from jaxlm.data import samples
from parity_tests import case as cases
from parity_tests import drift, inputs, randomness, references, trajectory
from parity_tests.packages import PACKAGES, Package
from parity_tests.tolerances import FLOAT32
from parity_tests.trajectory import Row
from torchlm import distill as torch_distill
from torchlm import heads as torch_heads
from torchlm import loss as torch_loss
from torchlm import model as torch_model
from torchlm import optim as torch_optim
from torchlm import schedule as torch_schedule
from torchlm import step as torch_step

Patch = contextlib.AbstractContextManager
Function = Any  # with the code that a function of Python has


@dataclass(frozen=True)
class Fault:
    """A mistake, and the check that is expected to notice it; where it does not, all others are tried."""

    name: str
    description: str
    package: str
    check: str
    plant: Callable[[], Patch]


@dataclass(frozen=True)
class Result:
    """Which check caught a fault ("" if none), and by what."""

    name: str
    description: str
    package: str
    caught_by: str
    quantity: str
    difference: float
    tolerance: float
    seconds: float


# How faults are planted


@contextlib.contextmanager
def edited(function: Function, *edits: tuple[str, str]) -> Iterator[None]:
    """Replace words in the source of a function, for all who have it: what changes is its code."""
    function = inspect.unwrap(function)  # of its decorators
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        assert source.count(old) == 1, f"{function.__qualname__} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    free = function.__code__.co_freevars  # `__class__`, where a method calls super()
    outer = f"def outer({', '.join(free)}):\n{textwrap.indent(source, '    ')}\n    return {function.__name__}"
    namespace: dict[str, Any] = {}
    exec(compile(outer, f"<fault in {function.__qualname__}>", "exec"), function.__globals__, namespace)
    code = function.__code__
    function.__code__ = inspect.unwrap(namespace["outer"](*free)).__code__
    try:
        yield
    finally:
        function.__code__ = code


def edit(function: Function, *edits: tuple[str, str]) -> Callable[[], Patch]:
    return lambda: edited(function, *edits)


def replace(owner: Any, name: str, value: Any) -> Callable[[], Patch]:
    return lambda: mock.patch.object(owner, name, value)


def both(name: str, description: str, check: str, of_jaxlm: Any, of_torchlm: Any) -> list[Fault]:
    return [
        Fault(name, description, package, check, plant)
        for package, plant in (("jaxlm", of_jaxlm), ("torchlm", of_torchlm))
        if plant
    ]


def mirrored(name: str, description: str, check: str, path: str, *edits: tuple[str, str]) -> list[Fault]:
    """Return a fault that is the same in both packages; `path` is module.function or module.class."""
    module, _, rest = path.partition(".")
    functions = []
    for owner, call in ((_JAX[module], "__call__"), (_TORCH[module], "forward")):
        found = functools.reduce(getattr, rest.split("."), owner)
        functions.append(getattr(found, call) if inspect.isclass(found) else found)
    return both(name, description, check, *(edit(function, *edits) for function in functions))


_JAX = {"model": jax_model, "heads": jax_heads, "optim": jax_optim, "schedule": jax_schedule, "step": jax_step}
_JAX |= {"distill": jax_distill}
_TORCH = {"model": torch_model, "heads": torch_heads, "optim": torch_optim, "schedule": torch_schedule}
_TORCH |= {"step": torch_step, "distill": torch_distill}


def unbiased_of_jaxlm(self: Any, x: Any) -> Any:
    """Be LayerNorm with a variance over n - 1."""
    axes = tuple(range(x.ndim - 1))
    scale, bias = (jnp.expand_dims(y[...], axes) for y in (self.scale, self.bias))
    apart = x - x.mean(axis=-1, keepdims=True)
    return apart / jnp.sqrt(x.var(axis=-1, ddof=1, keepdims=True) + self.epsilon) * scale + bias


def unbiased_of_torchlm(self: Any, x: Any) -> Any:
    """Be LayerNorm with a variance over n - 1."""
    apart = x - x.mean(-1, keepdim=True)
    return apart / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def adamw_step(is_inside: bool = False, is_corrected: bool = True, is_swapped: bool = False) -> Function:
    """Return a step of PyTorch's AdamW with a mistake: epsilon inside the root, no bias correction, moments swapped."""

    @torch.no_grad()
    def step(self: torch.optim.AdamW) -> None:
        for group in self.param_groups:
            (beta1, beta2), epsilon, rate = group["betas"], group["eps"], group["lr"]
            for x in group["params"]:
                state = self.state[x]
                first, second = (state.get(name, torch.zeros_like(x)) for name in _MOMENTS[:: -1 if is_swapped else 1])
                n = int(state.get("step", 0)) + 1
                first, second = beta1 * first + (1 - beta1) * x.grad, beta2 * second + (1 - beta2) * x.grad**2
                size = second / (1 - beta2**n) if is_corrected else second
                root = (size + epsilon).sqrt() if is_inside else size.sqrt() + epsilon
                x.mul_(1 - rate * group["weight_decay"])
                x.sub_(rate * (first / (1 - beta1**n) if is_corrected else first) / root)
                state.update(
                    zip(_MOMENTS[:: -1 if is_swapped else 1], (first, second), strict=True), step=torch.tensor(float(n))
                )

    return step


_MOMENTS = ("exp_avg", "exp_avg_sq")

# The checks, by name


def first_of(name: str, package: type[Package]) -> list[Row]:
    """Return how far logits, loss and gradients of batch 0 are from what a case has recorded."""
    case = recorded(name)
    plan = case.plan()
    state = package(plan.config, plan.start, "float32")
    got = trajectory.first(state, {key: x[0] for key, x in plan.batches[0].items()})
    return trajectory.compare_first(name, package.name, plan.config, got, case.trajectory().first, FLOAT32)


def all_of(name: str, package: type[Package]) -> list[Row]:
    """Return how far all that a case has recorded is."""
    with jax.disable_jit(False):  # many updates: compiling them pays
        run = trajectory.run(package, recorded(name).plan())
    return trajectory.compare(name, package.name, run, recorded(name).trajectory(), FLOAT32)


def float64(task: str, n_updates: int) -> list[Row]:
    """Return how far the packages are apart in float64; of so few updates, all may be clipped."""
    return [row for row in drift.float64(task, n_updates) if row.quantity != "clipping on and off"]


@functools.cache
def recorded(name: str) -> cases.Case:
    return cases.load(cases.CASES / name)


def of_one(module: Any, check: Callable[[], list[Row]]) -> Callable[[type[Package]], list[Row]]:
    """Return a check of both packages as one of the package that has the fault."""

    def checked(package: type[Package]) -> list[Row]:
        with mock.patch.object(module, "PACKAGES", (package,)):
            return check()

    return checked


def of_two(check: Callable[[], list[Row]]) -> Callable[[type[Package]], list[Row]]:
    return lambda package: check()


# The cheaper first. They are apart from checks.CHECKS, which the tests run: the same functions, but there for both
# packages at once and for up to 200 updates. Here each asks for few, of the package that has the fault only, so that
# all faults take some minutes.
CHECKS: dict[str, Callable[[type[Package]], list[Row]]] = {
    "batch 0 of mlm": functools.partial(first_of, "mlm"),
    "batch 0 of gpt": functools.partial(first_of, "gpt"),
    "batch 0 of cola": functools.partial(first_of, "cola"),
    "blocks of PyTorch's attention": of_one(
        references, lambda: references.blocks("gpt", references.scaled_dot_product_attention)
    ),
    "BERT of transformers": of_one(references, references.bert),
    "GPT-2 of transformers": of_one(references, references.gpt2),
    "GPT-2 of transformers that classifies": of_one(references, lambda: references.gpt2("sst2")),
    "GPT-2 of transformers that answers": of_one(references, lambda: references.gpt2("pairs")),
    "inputs at the edges": of_two(lambda: inputs.edges("mlm")),
    "AdamW of NumPy and PyTorch": of_two(lambda: references.adamw(n_updates=8)),
    "start values": of_one(randomness, lambda: randomness.start_values("mlm")),
    "masks of updates": of_one(randomness, randomness.masks_of_updates),
    "statistics of dropout": of_one(drift, drift.dropout_statistics),
    "dropout with the same masks": of_two(lambda: drift.dropout("gpt", n_updates=2)),
    "gpt in float64": of_two(lambda: float64("gpt", n_updates=3)),
    "rotary positions": of_two(lambda: inputs.option("gpt", "rotary positions", n_updates=1)),
    "LoRA": of_two(lambda: inputs.option("gpt", "LoRA", n_updates=2)),
    "frozen layers and layer decay": of_two(lambda: inputs.option("gpt", "layer decay, frozen", n_updates=2)),
    "distillation": of_two(lambda: inputs.distilled("mlm", n_updates=2)),
    "head of DistilBERT": of_two(lambda: inputs.option("sst2", "parts of DistilBERT", n_updates=1)),
    **{f"replay of {name}": functools.partial(all_of, name) for name in ("mlm_cycle", "gpt_resume", "cola")},
}


@contextlib.contextmanager
def once(package: type[Package]) -> Iterator[None]:
    """Compute what checks ask of the other package, and of references, only once: no fault is in it.

    Runs with dropout are done anew, since masks may come from outside, which have to be used up.
    """
    (other,) = (x for x in PACKAGES if x is not package)
    run, numpy = trajectory.run, references._adamw_of_numpy
    update = getattr(references, f"_adamw_of_{other.name}")

    def remembered(asked: type[Package], plan: Any, precision: Any = "float32") -> trajectory.Trajectory:
        if asked is package or plan.config.model.dropout:
            return run(asked, plan, precision)
        key = asked, plan.name, precision, len(plan.batches)
        if key not in _RUNS:
            _RUNS[key] = run(asked, plan, precision)
        return _RUNS[key]

    def remembered_update(name: str, compute: Function) -> Function:
        def updated(*args: Any) -> Any:
            if name not in _RUNS:
                _RUNS[name] = compute(*args)
            return _RUNS[name]

        return updated

    with (
        mock.patch.object(trajectory, "run", remembered),
        mock.patch.object(references, update.__name__, remembered_update(update.__name__, update)),
        mock.patch.object(references, numpy.__name__, remembered_update(numpy.__name__, numpy)),
    ):
        yield


_RUNS: dict[Any, Any] = {}

# The mistakes


def _model() -> list[Fault]:
    mlm, gpt, cola = "batch 0 of mlm", "batch 0 of gpt", "batch 0 of cola"
    last_token, answers = "GPT-2 of transformers that classifies", "GPT-2 of transformers that answers"
    attention, attend, block = "model.Attention", "model.attend", "model.Block"
    joined = "x_BTHK.reshape(B, T, D)"
    output = f"self.output({joined})"
    table = "model.fixed_positions"
    return [
        *mirrored("no scale", "scores are not divided", mlm, attend, (" / q_BTHK.shape[-1] ** 0.5", "")),
        *mirrored(
            "scale of the width",
            "scores / sqrt(d_model), not sqrt(head size)",
            mlm,
            attend,
            ("q_BTHK.shape[-1] **", "(q_BTHK.shape[-1] * q_BTHK.shape[-2]) **"),
        ),
        *both(
            "tanh GELU",
            "GELU by its tanh approximation, not erf",
            mlm,
            edit(jax_model.gelu, ('kind == "tanh"', "True")),
            edit(torch_model.gelu, ('"none"', '"tanh"')),
        ),
        *both(
            "ReLU",
            "ReLU for GELU",
            mlm,
            edit(jax_model.gelu, ("products.elementwise(_gelu, x)", "jax.nn.relu(x)")),
            edit(torch_model.gelu, ('gelu(x, approximate="tanh" if kind == "tanh" else "none")', "relu(x)")),
        ),
        *mirrored(
            "epsilon of norms",
            "LayerNorm with epsilon 1e-6, flax's default",
            "blocks of PyTorch's attention",
            "model.layernorm",
            ("=config.norm_epsilon", "=1e-6"),
        ),
        *both(
            "unbiased variance",
            "LayerNorm with a variance over n - 1",
            mlm,
            replace(nnx.LayerNorm, "__call__", unbiased_of_jaxlm),
            replace(torch.nn.LayerNorm, "forward", unbiased_of_torchlm),
        ),
        *mirrored(
            "positions from 1", "position table off by one", mlm, table, ("arange(seq_len)", "arange(1, seq_len + 1)")
        ),
        *mirrored("usual exponent", "position table of the paper", mlm, table, ("2 * column /", "2 * (column // 2) /")),
        *mirrored("sine for cosine", "sine and cosine swapped", mlm, table, ("% 2 == 0", "% 2 == 1")),
        *mirrored(
            "mask on queries",
            "pad mask over queries, not keys",
            mlm,
            attend,
            ("[:, None, None, :]", "[:, None, :, None]"),
        ),
        *mirrored("no pad mask", "pads are attended to", mlm, attend, ("is_pad_BS is not None", "False")),
        *both(
            "infinite pad mask",
            "pads masked with -inf: a row of pads becomes NaN",
            "inputs at the edges",
            edit(jax_model.attend, ("-1e9", "-jnp.inf")),
            edit(torch_model.attend, ("-1e9", "-torch.inf")),
        ),
        *both(
            "future off by one",
            "each position sees the next",
            gpt,
            edit(jax_model.future, ("k=1)", "k=2)")),
            edit(torch_model.future, ("diagonal=1", "diagonal=2")),
        ),
        *mirrored(
            "no future mask",
            "the future is seen",
            gpt,
            attention,
            ("if self.is_causal else None", "if False else None"),
        ),
        *both(
            "transposed kernel",
            "a square weight applied transposed",
            mlm,
            edit(
                jax_model.Attention.__call__,
                (output, f"({joined} @ self.output.kernel[...].T + self.output.bias[...][None, None])"),
            ),
            edit(torch_model.Attention.forward, (output, f"({joined} @ self.output.weight + self.output.bias)")),
        ),
        *both(
            "no bias",
            "the bias of the attention's output is dropped",
            mlm,
            edit(jax_model.Attention.__call__, (output, f"({joined} @ self.output.kernel[...])")),
            edit(torch_model.Attention.forward, (output, f"({joined} @ self.output.weight.T)")),
        ),
        *mirrored(
            "key for query", "query and key swapped", gpt, attention, ("self.query, self.key,", "self.key, self.query,")
        ),
        *mirrored(
            "heads interleaved",
            "head h takes each H-th column, not a stretch of them",
            mlm,
            attention,
            ("reshape(B, T, H, D // H) for", "reshape(B, T, D // H, H).swapaxes(2, 3) for"),
        ),
        *mirrored(
            "heads not merged",
            "heads and positions are not swapped back before they are joined",
            mlm,
            attend,
            ("->BTHK", "->BHTK"),
        ),
        *both(
            "softmax over queries",
            "softmax over the wrong axis",
            mlm,
            edit(jax_model.attend, ("softmax(scores_BHTS)", "softmax(scores_BHTS, axis=-2)")),
            edit(torch_model.attend, ("softmax(dim=-1)", "softmax(dim=-2)")),
        ),
        *mirrored(
            "residual dropped",
            "feed-forward without its residual",
            mlm,
            block,
            ("return x_BTD + self.feed_forward(self.l", "return self.feed_forward(self.l"),
        ),
        *mirrored("post-norm", "LayerNorm after the sums", mlm, block, ("if self.config.post_norm", "if True")),
        *mirrored(
            "pre-norm for post-norm",
            "the setting post_norm is ignored",
            "BERT of transformers",
            block,
            ("if self.config.post_norm", "if False"),
        ),
        *mirrored(
            "one norm for two",
            "feed-forward behind the attention's LayerNorm",
            mlm,
            block,
            ("self.feed_forward(self.layernorm2(", "self.feed_forward(self.layernorm1("),
        ),
        *mirrored(
            "no final norm",
            "the last LayerNorm is skipped",
            "GPT-2 of transformers",
            "model.Transformer",
            ("self.final_norm(x_BTD) if self.config.final_norm else x_BTD", "x_BTD"),
        ),
        *mirrored(
            "no norm in the head",
            "mlm's output without its LayerNorm",
            mlm,
            "heads.LanguageModelHead",
            ("x_BTD = self.layernorm(x_BTD)", "pass"),
        ),
        *mirrored(
            "no norm in the embedding",
            "BERT's LayerNorm of the embedding is skipped",
            "BERT of transformers",
            "model.Embedding",
            ("x_BTD = self.layernorm(x_BTD)", "pass"),
        ),
        *mirrored(
            "exact GELU for GPT-2's",
            "the setting gelu is ignored",
            "GPT-2 of transformers",
            "model.FeedForward",
            ("self.config.gelu", '"exact"'),
        ),
        *mirrored(
            "no dense layer in the head",
            "mlm's output without BERT's dense layer",
            "BERT of transformers",
            "heads.LanguageModelHead",
            ("gelu(self.dense(x_BTD), self.config.gelu)", "x_BTD"),
        ),
        *mirrored(
            "tanh for ReLU",
            "DistilBERT's head with BERT's tanh",
            "head of DistilBERT",
            "heads.ClassifierHead",
            ('== "bert"', '!= "none"'),
        ),
        *mirrored(
            "bias for GPT-2",
            "the setting output_bias is ignored",
            "GPT-2 of transformers",
            "heads.LanguageModelHead",
            (" * self.config.output_bias", ""),
        ),
        *both(
            "embedding scaled",
            "tokens times sqrt(d_model), as in the paper",
            mlm,
            edit(
                jax_model.Embedding.__call__,
                ('"tensor")[tokens_BT]', '"tensor")[tokens_BT] * x_BTD_scale'),
                ("T = tokens_BT.shape[1]", "T, x_BTD_scale = tokens_BT.shape[1], self.config.d_model**0.5"),
            ),
            edit(
                torch_model.Embedding.forward,
                ("self.token(tokens_BT)", "self.token(tokens_BT) * self.config.d_model**0.5"),
            ),
        ),
        *both(
            "pad row trained",
            "the row of the pad gets a gradient",
            "blocks of PyTorch's attention",
            edit(jax_model.Embedding.__call__, ("jax.lax.stop_gradient(x_BTD)", "x_BTD")),
            edit(torch_model.Embedding.__init__, ("padding_idx=pad_id", "padding_idx=None")),
        ),
        *both(
            "untied",
            "the output layer gives the tied table no gradient",
            "GPT-2 of transformers",
            edit(
                jax_heads.LanguageModelHead.__call__,
                ("linear(x_BTD, table_VD,", "linear(x_BTD, jax.lax.stop_gradient(table_VD),"),
            ),
            edit(
                torch_heads.LanguageModelHead.forward,
                ("x_BTD, table_VD, bias_V", "x_BTD, table_VD.detach(), bias_V"),
            ),
        ),
        *mirrored(
            "no bias in a tied head",
            "a tied output layer without its bias",
            "BERT of transformers",
            "heads.LanguageModelHead",
            (" * self.config.output_bias", " * 0"),
        ),
        *both(
            "positions from the right",
            "learned positions counted from the end",
            "GPT-2 of transformers",
            edit(
                jax_model.Embedding.__call__, ("self.position[...][None, :T]", "self.position[...][None, :T][:, ::-1]")
            ),
            edit(torch_model.Embedding.forward, ("self.position[None, :T]", "self.position[None, :T].flip(1)")),
        ),
        *both(
            "rotary pairs interleaved",
            "pairs (2k, 2k + 1), not (k, k + K/2)",
            "rotary positions",
            edit(jax_model.rotate, ("jnp.split(x_BTHK, 2, axis=-1)", "(x_BTHK[..., ::2], x_BTHK[..., 1::2])")),
            edit(torch_model.rotate, ("x_BTHK.chunk(2, dim=-1)", "(x_BTHK[..., ::2], x_BTHK[..., 1::2])")),
        ),
        *mirrored(
            "rotary exponent",
            "rotary angles of half the exponent",
            "rotary positions",
            "model.rotate",
            ("np.arange(0, K, 2) / K", "np.arange(0, K, 2) / (2 * K)"),
        ),
        *mirrored(
            "last for first", "classifier on the last position", cola, "heads.ClassifierHead", ("[:, 0]", "[:, -1]")
        ),
        *both(
            "mean for first",
            "classifier on the mean over positions",
            cola,
            edit(jax_heads.ClassifierHead.__call__, ("x_BTD[:, 0]", "x_BTD.mean(axis=1)")),
            edit(torch_heads.ClassifierHead.forward, ("x_BTD[:, 0]", "x_BTD.mean(axis=1)")),
        ),
        *both(
            "last position for last token",
            "causal classifier on the last position, behind the text",
            last_token,
            edit(
                jax_heads.ClassifierHead.__call__,
                ("jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1).squeeze(1)", "x_BTD[:, -1]"),
            ),
            edit(
                torch_heads.ClassifierHead.forward,
                ("x_BTD.take_along_dim(last_B[:, None, None], dim=1).squeeze(1)", "x_BTD[:, -1]"),
            ),
        ),
        *mirrored(
            "one before the last token",
            "causal classifier a token early, which has not seen that the text ends",
            last_token,
            "heads.ClassifierHead",
            ("last_B[:, None, None]", "last_B[:, None, None] - 1"),
        ),
        *both(
            "causal classifier sees what follows",
            "classifier on the last token without a causal mask",
            last_token,
            edit(jax_heads.Classifier.__init__, ("Transformer(config, self.is_causal,", "Transformer(config, False,")),
            edit(
                torch_heads.Classifier.__init__, ("Transformer(config, self.is_causal,", "Transformer(config, False,")
            ),
        ),
        *(
            fault
            for name, description, *edits in (
                ("prompt in the loss", "prompts are learned as well", ("(place >= middle) & ", "")),
                ("answer without its end", "that an answer ends is not learned", ("place <= end", "place < end")),
                (
                    "answer a token late",
                    "the first token of an answer is not learned",
                    ("place >= middle", "place > middle"),
                ),
                (
                    "labels are inputs",
                    "each token is to be guessed from itself",
                    ("IGNORED)[:, 1:]", "IGNORED)[:, :-1]"),
                ),
            )
            for plant in (edit(samples.PairSamples.batch, *edits),)  # which both packages have
            for fault in both(name, description, answers, plant, plant)
        ),
        *both(
            "masked positions off by one",
            "logits of mlm taken one position to the right",
            mlm,
            *(
                edit(function, ("positions_BM[:, :, None]", "(positions_BM[:, :, None] + 1) % x_BTD.shape[1]"))
                for function in (jax_heads._at, torch_heads._at)
            ),
        ),
        *both(
            "square kernels as they are",
            "conversion transposes only weights that do not fit otherwise",
            mlm,
            edit(
                names.to_jax,
                (
                    "array.T if path[-1] in _TRANSPOSED else",
                    "array.T if path[-1] in _TRANSPOSED and len(set(array.shape)) > 1 else",
                ),
            ),
            None,
        ),
        *both(
            "blocks reversed",
            "conversion stacks the blocks from the last",
            mlm,
            edit(names.to_jax, ("for i in sorted(blocks)", "for i in sorted(blocks, reverse=True)")),
            None,
        ),
    ]


def _loss() -> list[Fault]:
    mlm = "batch 0 of mlm"
    return [
        *both(
            "mean over all positions",
            "ignored labels are in the count",
            mlm,
            edit(jax_loss.cross_entropy, ("jnp.sum(is_counted)", "is_counted.size")),
            edit(torch_loss.cross_entropy, ("is_counted.sum()", "torch.tensor(is_counted.numel())")),
        ),
        *both(
            "ignored labels guessed",
            "ignored labels are in the loss as class 0",
            mlm,
            edit(jax_loss.cross_entropy, ("jnp.where(is_counted, losses, 0)", "losses")),
            edit(torch_loss.cross_entropy, ("torch.where(is_counted, labels, -1)", "labels.clamp(min=0)")),
        ),
        *both(
            "own token as label",
            "gpt's labels are not shifted",
            "batch 0 of gpt",
            edit(jaxlm.tasks.gpt.Gpt.loss, ('batch["labels"]', 'batch["tokens"]')),
            edit(torchlm.tasks.gpt.Gpt.loss, ('batch["labels"]', 'batch["tokens"]')),
        ),
        *both(
            "accuracy as a mean of means",
            "right predictions as a share of each batch",
            "replay of cola",
            edit(jax_loss.cross_entropy, ("jnp.sum(is_counted & (", "jnp.mean(is_counted & (")),
            edit(torch_loss.cross_entropy, ("== labels)).sum()", "== labels)).float().mean()")),
        ),
        *both(
            "argmax of all",
            "the largest of all logits, not of each sample's",
            "replay of cola",
            edit(jax_loss.cross_entropy, ("products.argmax(logits, largest)", "jnp.argmax(logits)")),
            edit(torch_loss.cross_entropy, ("logits.argmax(dim=-1)", "logits.argmax()")),
        ),
        *both(
            "smoothed labels",
            "label smoothing of 0.1",
            mlm,
            edit(
                jax_loss.cross_entropy,
                ("- label_logits)", "- 0.9 * label_logits - 0.1 * jnp.mean(logits, axis=-1))"),
            ),
            edit(torch_loss.cross_entropy, ('reduction="sum"', 'reduction="sum", label_smoothing=0.1')),
        ),
    ]


_MODELS = (jax_model, torch_model)


def _part() -> list[Fault]:
    check = "frozen layers and layer decay"
    return [
        *both(
            "layer decay upside down",
            "the lowest block has the highest rate",
            check,
            edit(jax_optim.layer_shares, ("range(len(value), 0, -1)", "range(1, len(value) + 1)")),
            edit(torch_optim.layer_shares, ("n_layers - int(", "1 + int(")),
        ),
        *both(
            "layer decay from the head",
            "the top block has the rate of the head",
            check,
            edit(jax_optim.layer_shares, ("range(len(value), 0, -1)", "range(len(value) - 1, -1, -1)")),
            edit(torch_optim.layer_shares, ("n_layers - int(", "n_layers - 1 - int(")),
        ),
        *both(
            "layer decay not of decay",
            "the weight decay has the whole rate in all layers",
            check,
            edit(
                jax_optim.adamw,
                ("optax.add_decayed_weights(config.weight_decay, is_decayed),", ""),
                ("< 1 else []),", "< 1 else []), optax.add_decayed_weights(config.weight_decay, is_decayed),"),
            ),
            edit(torch_optim.adamw, ("if decays else 0.0", "/ share if decays else 0.0")),
        ),
        *both(
            "frozen weights decayed",
            "frozen layers have no gradient, but moments and decay",
            check,
            edit(jax_tune.trained, ("x[first:] if first else x", "x")),
            None,
        ),
        *both(
            "frozen weights trained",
            "what is frozen is trained as all else is",
            check,
            edit(jax_tune.trained, ("return None if", "return x if")),
            edit(torch_model.Transformer.__init__, ('is_trained(config, f"base.{name}")', "True")),
        ),
        *both(
            "LoRA without its scale",
            "adapters are not scaled by alpha / rank",
            "LoRA",
            *(edit(module.add_adapters, ("config.lora_alpha / config.lora_rank", "1.0")) for module in _MODELS),
        ),
        *both(
            "LoRA scaled by the root",
            "alpha / sqrt(rank), as rsLoRA has it",
            "LoRA",
            *(edit(module.add_adapters, ("/ config.lora_rank", "/ config.lora_rank**0.5")) for module in _MODELS),
        ),
        *both(
            "LoRA beside the base",
            "the base is trained with its adapters",
            "LoRA",
            edit(jax_tune.trained, ("return None if", "return x if")),
            edit(torch_model.Transformer.__init__, ('is_trained(config, f"base.{name}")', "True")),
        ),
        *both(
            "adapters spared from decay",
            "adapters have no weight decay",
            "LoRA",
            edit(jax_optim.is_decayed, ('"lora_a": -1, "lora_b": -1,', "")),
            edit(torch_optim.is_decayed, ("return parameter.ndim > 1", "return min(parameter.shape) > 2")),
        ),
    ]


def _optimizer() -> list[Fault]:
    adamw = "AdamW of NumPy and PyTorch"
    jax_step_function, torch_step_function = jax_step.train_step, torch_step.train_step
    clipped = "optim.clip_by_global_norm(state.model.parameters(), rule.clip_norm)"
    averaged = "grads = jax.tree.map(lambda x: x * share.astype(x.dtype), grads)"
    jax_clipped = "grads, grad_norm = optim.clip_by_global_norm(grads, rule.clip_norm)"
    return [
        *both(
            "decay on all",
            "weight decay on biases and norms",
            adamw,
            edit(jax_optim.is_decayed, ("name in rows and value.shape[rows[name]] > 1", "True")),
            edit(torch_optim.is_decayed, ("parameter.ndim > 1 and len(parameter) > 1", "True")),
        ),
        *both(
            "decay by rank",
            "stacked biases have two axes, and decay",
            adamw,
            edit(jax_optim.is_decayed, ("name in rows and value.shape[rows[name]] > 1", "value.ndim > 1")),
            None,
        ),
        *both(
            "decay coupled",
            "Adam with L2, not AdamW",
            adamw,
            edit(
                jax_optim.adamw,
                ("scale_by_adam(config.beta1, config.beta2, config.epsilon),", ""),
                ("is_decayed),", "is_decayed), scale_by_adam(config.beta1, config.beta2, config.epsilon),"),
            ),
            edit(torch_optim.adamw, ("return torch.optim.AdamW(", "return torch.optim.Adam(")),
        ),
        *both(
            "no decay",
            "weight decay is ignored",
            adamw,
            edit(jax_optim.adamw, ("config.weight_decay", "0.0")),
            edit(torch_optim.adamw, ("config.weight_decay", "0.0")),
        ),
        *both(
            "epsilon inside the root",
            "sqrt(v + epsilon), not sqrt(v) + epsilon",
            adamw,
            edit(jax_optim.scale_by_adam, ("corrections[1]) + epsilon)", "corrections[1] + epsilon))")),
            replace(torch.optim.AdamW, "step", adamw_step(is_inside=True)),
        ),
        *both(
            "no bias correction",
            "moments are not divided by 1 - beta^t",
            adamw,
            edit(jax_optim.scale_by_adam, ("if beta else 1.0", "if False else 1.0")),
            replace(torch.optim.AdamW, "step", adamw_step(is_corrected=False)),
        ),
        Fault(
            "moments swapped",
            "first and second moment are stored in each other's place",
            "jaxlm",
            adamw,
            edit(jax_optim.scale_by_adam, ("(count, first, second)", "(count, second, first)")),
        ),
        Fault(
            "moments swapped",
            "first and second moment have each other's names",
            "torchlm",
            "replay of cola",
            replace(torch.optim.AdamW, "step", adamw_step(is_swapped=True)),
        ),
        *mirrored("beta2 of 0.99", "another beta2", adamw, "optim.adamw", ("config.beta2", "0.99")),
        *mirrored("epsilon of Adam", "epsilon 1e-6, not 1e-8", adamw, "optim.adamw", ("config.epsilon", "1e-6")),
        *both(
            "clipping per tensor",
            "each gradient is clipped by its own norm",
            adamw,
            edit(
                jax_optim.clip_by_global_norm,
                ("grad * scale", "grad * jnp.minimum(1.0, max_norm / (jnp.linalg.norm(grad.ravel()) + 1e-6))"),
            ),
            edit(
                torch_optim.clip_by_global_norm,
                (
                    "return nn.utils.clip_grad_norm_(parameters, max_norm)",
                    "parameters = list(parameters); norm = nn.utils.clip_grad_norm_(parameters, torch.inf); "
                    "[nn.utils.clip_grad_norm_(x, max_norm) for x in parameters]; return norm",
                ),
            ),
        ),
        *both(
            "clipping by value",
            "each element is clipped",
            adamw,
            edit(jax_optim.clip_by_global_norm, ("grad * scale", "jnp.clip(grad, -max_norm, max_norm)")),
            edit(
                torch_optim.clip_by_global_norm,
                (
                    "return nn.utils.clip_grad_norm_(parameters, max_norm)",
                    "parameters = list(parameters); norm = nn.utils.clip_grad_norm_(parameters, torch.inf); "
                    "nn.utils.clip_grad_value_(parameters, max_norm); return norm",
                ),
            ),
        ),
        *both(
            "no clipping",
            "the norm is only reported",
            adamw,
            edit(jax_optim.clip_by_global_norm, ("grad * scale", "grad")),
            edit(torch_optim.clip_by_global_norm, ("(parameters, max_norm)", "(parameters, torch.inf)")),
        ),
        *both(
            "clipping after the update",
            "what is clipped is not the gradient that is used",
            adamw,
            edit(
                jax_step_function,
                (jax_clipped, jax_clipped.replace("grads,", "_,", 1)),
                (
                    "params = tune.with_trained(",
                    "updates, _ = optim.clip_by_global_norm(updates, rule.clip_norm)\n    params = tune.with_trained(",
                ),
            ),
            edit(
                torch_step_function,
                (f"grad_norm = {clipped}", "pass"),
                ("state.optimizer.step()", f"state.optimizer.step(); grad_norm = {clipped}"),
            ),
        ),
        *both(
            "clipping before averaging",
            "sums of gradients are clipped, then divided",
            "gpt in float64",
            edit(jax_step_function, (averaged, "pass"), (jax_clipped, f"{jax_clipped}; {averaged}")),
            edit(
                torch_step_function,
                ("    for grad in", f"    grad_norm = {clipped}\n    for grad in"),
                (f"    grad_norm = {clipped}\n    rate", "    rate"),
            ),
        ),
        *both(
            "norm after clipping",
            "the norm that is reported is at most the bound",
            "gpt in float64",
            edit(jax_optim.clip_by_global_norm, ("grads), norm", "grads), norm * scale")),
            edit(torch_optim.clip_by_global_norm, ("max_norm)", "max_norm).clamp(max=max_norm)")),
        ),
        *both(
            "gradients of the sum",
            "the loss is not divided by what it counts",
            "gpt in float64",
            edit(jax_step_function, (averaged, "pass")),
            edit(torch_step_function, ('grad.div_(totals["count"].clamp(min=1))', "pass")),
        ),
        *both(
            "accumulation of means",
            "accumulated batches weigh alike, whatever they count",
            "gpt in float64",
            edit(
                jax_step_function,
                ('return totals["loss"], totals', 'return totals["loss"] / totals["count"], totals'),
                ('jnp.maximum(totals["count"], 1)', "jnp.asarray(n_batches)"),
            ),
            edit(
                torch_step_function,
                ('batch_totals["loss"] * parallel.n_processes()', 'batch_totals["loss"] / batch_totals["count"]'),
                ('totals["count"].clamp(min=1)', "n_batches"),
            ),
        ),
        *both(
            "accumulation divided twice",
            "by the count, and by the number of batches",
            "gpt in float64",
            edit(jax_step_function, ('jnp.maximum(totals["count"], 1)', '(n_batches * totals["count"])')),
            edit(torch_step_function, ('totals["count"].clamp(min=1)', 'n_batches * totals["count"]')),
        ),
        *both(
            "last batch only",
            "an accumulated batch replaces those before it",
            "gpt in float64",
            edit(
                jax_step_function,
                (
                    "jax.tree.map(jnp.add, sums, grad(trained, *batch_and_key))",
                    "grad(trained, *batch_and_key)",
                ),
            ),
            edit(
                torch_step_function, ("batch_totals = loss_fn(", "state.optimizer.zero_grad(); batch_totals = loss_fn(")
            ),
        ),
        *both(
            "gradients kept",
            "gradients are not reset after an update",
            adamw,
            None,
            edit(torch_step_function, ("state.optimizer.zero_grad()", "pass")),
        ),
        *both(
            "rate of the next update",
            "the optimizer is a step ahead of the schedule",
            adamw,
            edit(jax_optim.adamw, ("scale_by_learning_rate(rate)", "scale_by_learning_rate(lambda i: rate(i + 1))")),
            edit(torch_step_function, ("rule.schedule(state.step)", "rule.schedule(state.step + 1)")),
        ),
    ]


def _schedule() -> list[Fault]:
    adamw, resume, cycle = "AdamW of NumPy and PyTorch", "replay of gpt_resume", "replay of mlm_cycle"
    rate, rewarmup, cycled = "schedule.warmed_up", "schedule.rewarmup", "schedule.cycled"
    cosine = "minimum + 0.5 * (1 + math.cos(math.pi * done / decay_steps)) * (peak - minimum)"
    optax_cosine = "optax.cosine_decay_schedule(peak, decay_steps, alpha=minimum / peak if peak else 0.0)"
    return [
        *both(
            "warmup from 1",
            "the first update of a warmup has a rate",
            adamw,
            edit(
                jax_schedule.warmed_up,
                (
                    "return lambda i: rate(jnp.asarray(i, float))",
                    "return lambda i: rate(jnp.asarray(i + 1.0 * (i < warmup_steps), float))",
                ),
            ),
            edit(torch_schedule.warmed_up, ("return i * peak", "return (i + 1) * peak")),
        ),
        *both(
            "schedule off by one",
            "update i has the rate of update i + 1",
            adamw,
            edit(jax_schedule.warmed_up, ("jnp.asarray(i, float)", "jnp.asarray(i + 1, float)")),
            edit(
                torch_schedule.warmed_up,
                ("def rate(i: int) -> float:", "def rate(i: int) -> float:\n        i += 1"),
            ),
        ),
        *both(
            "no warmup",
            "the peak from the first update on",
            adamw,
            edit(jax_schedule.warmed_up, ("linear_schedule(0.0, peak", "linear_schedule(peak, peak")),
            edit(torch_schedule.warmed_up, ("return i * peak / warmup_steps", "return peak")),
        ),
        *mirrored(
            "decay to the last update",
            "cosine over max_steps, not over its own length",
            adamw,
            rate,
            ("(config.decay_steps or config.max_steps)", "config.max_steps"),
        ),
        *mirrored(
            "decay as long as told",
            "cosine over decay_steps after the warmup",
            adamw,
            rate,
            ("(config.decay_steps or config.max_steps) - warmup_steps", "(config.decay_steps or config.max_steps)"),
        ),
        *both(
            "minimum ignored",
            "cosine to 0",
            adamw,
            edit(jax_schedule.warmed_up, ("alpha=minimum / peak if peak else 0.0", "alpha=0.0")),
            edit(
                torch_schedule.warmed_up,
                (cosine, cosine.replace("minimum + ", "").replace("(peak - minimum)", "peak")),
            ),
        ),
        *both(
            "linear decay",
            "a line for the cosine",
            adamw,
            edit(jax_schedule.warmed_up, (optax_cosine, "optax.linear_schedule(peak, minimum, decay_steps)")),
            edit(torch_schedule.warmed_up, (cosine, "peak + (minimum - peak) * done / decay_steps")),
        ),
        *mirrored(
            "re-warmup from zero", "the stored rate is ignored", resume, rewarmup, ("(1 - asked) * stored_rate + ", "")
        ),
        *mirrored(
            "stored rate off",
            "the rate that is asked for, not the stored one",
            resume,
            rewarmup,
            ("* stored_rate", "* schedule(first_step)"),
        ),
        *both(
            "re-warmup from update 0",
            "a re-warmup that is over when it begins",
            resume,
            edit(jax_schedule.rewarmup, ("transition_begin=first_step", "transition_begin=0")),
            edit(torch_schedule.rewarmup, ("(i - first_step)", "i")),
        ),
        *mirrored(
            "another cycle", "two batches in the first of three cycles", cycle, "schedule.n_batches", ("== 2", "== 0")
        ),
        *mirrored(
            "ramp upside down", "a lower rate where one batch is used", cycle, cycled, ("1 + sign *", "1 - sign *")
        ),
        *mirrored(
            "ramp without a peak",
            "a ramp that only rises",
            cycle,
            cycled,
            ("/ cycle_steps - 1)", "/ cycle_steps / 2 - 1)"),
        ),
    ]


def _random() -> list[Fault]:
    start, masks, same = "start values", "statistics of dropout", "dropout with the same masks"
    softmax = ("jax.nn.softmax(scores_BHTS)", "scores_BHTS.softmax(dim=-1)")
    return [
        *both(
            "head of Xavier",
            "the head starts as the other layers",
            start,
            edit(jax_heads.head_linear, ("jax.nn.initializers.normal(0.02)", "jax.nn.initializers.xavier_uniform()")),
            edit(torch_heads.head_linear, ("normal_(layer.weight, std=0.02,", "xavier_uniform_(layer.weight,")),
        ),
        *both(
            "layers of normal(0.02)",
            "layers start as GPT-2's",
            start,
            edit(jax_model.linear, ("xavier_uniform()", "normal(0.02)")),
            edit(torch_model.linear, ("xavier_uniform_(layer.weight,", "normal_(layer.weight, std=0.02,")),
        ),
        *both(
            "zero biases",
            "biases start at zero, flax's default",
            start,
            edit(jax_model.linear, ("-bound, bound", "0.0, 0.0")),
            edit(torch_model.linear, ("-bound, bound", "0.0, 0.0")),
        ),
        *mirrored(
            "small embedding", "tokens of normal(0.02)", start, "model.Embedding.__init__", ("else 1.0", "else 0.02")
        ),
        *both(
            "pad row random",
            "the row of the pad does not start at zero",
            start,
            edit(jax_model.Embedding.__init__, ("if config.pad_id >= 0", "if False")),
            edit(torch_model.Embedding.__init__, ("if pad_id is not None", "if False")),
        ),
        *both(
            "dropout not scaled",
            "what is kept is not divided by its share",
            same,
            edit(jax_model.dropout, ("x / (1 - rate)", "x")),
            edit(torch_model.dropout, ("(x, rate, is_training)", "(x, rate, is_training) * (1 - rate * is_training)")),
        ),
        *both(
            "rate for share",
            "the share that is kept for the one that is dropped",
            masks,
            edit(jax_model.dropout, ("keeps(key, rate", "keeps(key, 1 - rate")),
            edit(torch_model.dropout, ("(x, rate,", "(x, 1 - rate,")),
        ),
        *both(
            "no dropout of attention",
            "attention weights are not dropped",
            same,
            edit(jax_model.attend, (f"drop({softmax[0]})", softmax[0])),
            edit(torch_model.attend, (f"drop({softmax[1]})", softmax[1])),
        ),
        *both(
            "no dropout of the embedding",
            "embedded tokens are not dropped",
            masks,
            edit(jax_model.Embedding.__call__, ("dropout(x_BTD, self.config.dropout, key)", "x_BTD")),
            edit(torch_model.Embedding.forward, ("dropout(x_BTD, self.config.dropout, self.training)", "x_BTD")),
        ),
        *both(
            "dropout after the feed-forward",
            "of its output, not of its hidden layer",
            same,
            edit(
                jax_model.FeedForward.__call__,
                (
                    "self.fc2(dropout(x_BTF, self.config.dropout, key))",
                    "dropout(self.fc2(x_BTF), self.config.dropout, key)",
                ),
            ),
            edit(
                torch_model.FeedForward.forward,
                (
                    "self.fc2(dropout(x_BTF, self.config.dropout, self.training))",
                    "dropout(self.fc2(x_BTF), self.config.dropout, self.training)",
                ),
            ),
        ),
        *both(
            "masks shared between layers",
            "each layer drops the same",
            masks,
            edit(
                jax_model.Transformer.__call__,
                ("(self.blocks, keys)", "(self.blocks, keys if keys is None else keys[jnp.zeros(len(keys), int)])"),
            ),
            edit(torch_model.dropout, ("return nn", "torch.manual_seed(0)\n    return nn")),
        ),
        *both(
            "dropout in evaluation",
            "the mode of the model is ignored",
            same,
            edit(
                jax_model.dropout,
                ("if key is None or rate == 0:", "key = jax.random.key(0) if key is None else key\n    if rate == 0:"),
            ),
            edit(torch_model.dropout, ("rate, is_training", "rate, True")),
        ),
        *both(
            "same masks in each update",
            "the seed does not depend on the update",
            "masks of updates",
            edit(jax_step.train_step, ("jax.random.fold_in(key, state.step)", "key")),
            edit(torch_step.train_step, ("hash((key, state.step))", "hash(key)")),
        ),
    ]


def _distillation() -> list[Fault]:
    check, soft = "distillation", "distill.soft_loss"
    return [
        *mirrored(
            "no square of the temperature", "soft loss not times T^2", check, soft, ("temperature**2 * ", "1.0 * ")
        ),
        *mirrored(
            "divergence from the student",
            "KL(student || teacher)",
            check,
            soft,
            ("exp(log_p) * (log_p - log_q)", "exp(log_q) * (log_q - log_p)"),
        ),
        *both(
            "divergence over the vocabulary",
            "its mean over outputs, PyTorch's default, not its sum",
            check,
            edit(jax_distill.soft_loss, ("jnp.sum(jnp.exp", "jnp.mean(jnp.exp")),
            edit(torch_distill.soft_loss, ("torch.sum(torch.exp", "torch.mean(torch.exp")),
        ),
        *mirrored(
            "cosine of pads",
            "hidden states of pads count",
            check,
            "distill.cosine_loss",
            ("(is_pad_BT, 0,", "(is_pad_BT & False, 0,"),
        ),
    ]


FAULTS = [*_model(), *_loss(), *_part(), *_distillation(), *_optimizer(), *_schedule(), *_random()]

# Running them


def check(package: type[Package], name: str) -> Row | None:
    """Return the row of a check that is farthest beyond its tolerance, or None if all pass; an exception fails, too."""
    try:
        rows = CHECKS[name](package)
    except Exception as error:
        return Row(name, package.name, f"raises {type(error).__name__}", float("inf"), 0.0)
    failed = [row for row in rows if not row.passes]
    return max(failed, key=trajectory._badness) if failed else None


def catch(fault: Fault) -> Result:
    """Plant a fault, and run checks until one notices it."""
    started_s = time.monotonic()
    (package,) = (x for x in PACKAGES if x.name == fault.package)
    rest = [name for name in CHECKS if name != fault.check]
    caught, row = "", None
    with once(package), fault.plant():
        for name in (fault.check, *rest):
            row = check(package, name)
            if row:
                caught = name
                break
    numbers = (row.quantity, float(row.difference), float(row.tolerance)) if row else ("", 0.0, 0.0)
    seconds = time.monotonic() - started_s
    return Result(fault.name, fault.description, fault.package, caught, *numbers, seconds)


def sound(package: type[Package], names: Sequence[str]) -> list[str]:
    """Return those of the checks that fail although no fault is planted."""
    with once(package):
        return [name for name in names if check(package, name)]


def operation_by_operation() -> Patch:
    """Let JAX run each operation on its own: its compiled operations outlive a fault, and nothing else is compiled."""
    return jax.disable_jit()


def chosen(only: str | None, n: int | None) -> list[Fault]:
    """Return the faults whose name contains `only`, and of these n, evenly over the whole list."""
    found = [fault for fault in FAULTS if only is None or only in fault.name]
    return found if n is None or n >= len(found) else [found[i * len(found) // n] for i in range(n)]


def main(argv: list[str]) -> int:
    """Plant the faults of a command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m parity_tests.faults", description="Plant porting mistakes.")
    parser.add_argument("--only", help="only faults with this in their name")
    parser.add_argument("--sample", type=int, help="so many of them, evenly over the list")
    parser.add_argument("--json", type=Path, help="file to keep the table in")
    args = parser.parse_args(argv)
    faults = chosen(args.only, args.sample)
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)  # tiny models take longer to compile than to run
    started_s, results = time.monotonic(), []
    width = max((len(fault.name) for fault in faults), default=0)
    with operation_by_operation():
        for fault in faults:
            result = catch(fault)
            results.append(result)
            verdict = f"{result.caught_by}: {result.quantity}" if result.caught_by else "MISSED"
            print(f"{fault.name:{width}}  {fault.package:7}  {result.seconds:5.1f} s  {verdict}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    for package in PACKAGES:
        ours = [result for result in results if result.package == package.name]
        print(f"{package.name}: {sum(bool(result.caught_by) for result in ours)} of {len(ours)} caught")
    print(f"{time.monotonic() - started_s:.0f} s")
    return 0 if all(result.caught_by for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
