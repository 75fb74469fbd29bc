"""The checks that catch faults, by name, each for the package that has the fault."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from parity_tests import case as cases
from parity_tests import drift, families, inputs, mixture, packed, randomness, references, trajectory
from parity_tests.compare.rows import Row
from parity_tests.compare.tolerances import FLOAT32
from parity_tests.faults.planting import Function
from parity_tests.packages import PACKAGES, Package


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
    "BERT of transformers that tags": of_one(references, lambda: references.bert("tag")),
    "BERT of transformers that embeds": of_one(references, references.sentence_bert),
    "spans of seqeval": of_one(references, references.spans),
    "GPT-2 of transformers": of_one(references, references.gpt2),
    "GPT-2 of transformers that classifies": of_one(references, lambda: references.gpt2("sst2")),
    "GPT-2 of transformers that answers": of_one(references, lambda: references.gpt2("pairs")),
    "inputs at the edges": of_two(lambda: inputs.edges("mlm")),
    "AdamW of NumPy and PyTorch": of_two(lambda: references.adamw(n_updates=8)),
    "Muon of NumPy": of_two(lambda: references.muon(n_updates=4)),
    "start values": of_one(randomness, lambda: randomness.start_values("mlm")),
    "start values of GPT-2": of_one(randomness, lambda: randomness.start_values("gpt", initialization="gpt2")),
    "start values of ModernBERT": of_one(
        randomness, lambda: randomness.start_values("mlm", initialization="modernbert")
    ),
    "masks of updates": of_one(randomness, randomness.masks_of_updates),
    "statistics of dropout": of_one(drift, drift.dropout_statistics),
    "dropout with the same masks": of_two(lambda: drift.dropout("gpt", n_updates=2)),
    "gpt in float64": of_two(lambda: float64("gpt", n_updates=3)),
    "rotary positions": of_two(lambda: inputs.option("gpt", "rotary positions", n_updates=1)),
    **{
        name: of_two(functools.partial(inputs.option, "gpt", name, n_updates=1))
        for name in (
            *("RMSNorm", "GEGLU", "SwiGLU", "squared ReLU", "soft cap", "z-loss"),
            *("grouped heads", "norm of queries and keys", "scaled rotary positions"),
            *("window", "window in blocks", "global and local layers", "no first norm"),
        )
    },
    "window to both sides": of_two(lambda: inputs.option("mlm", "window", n_updates=1)),
    "two texts": of_two(lambda: inputs.option("classify", "two texts", n_updates=1)),
    "several labels": of_two(lambda: inputs.option("multilabel", "two texts", n_updates=1)),
    "smoothed and weighted classes": of_two(lambda: inputs.option("classify", "smoothed, weighted", n_updates=1)),
    "a number for two texts": of_two(lambda: inputs.option("regress", "two texts, the last token", n_updates=1)),
    "LoRA": of_two(lambda: inputs.option("gpt", "LoRA", n_updates=2)),
    "frozen layers and layer decay": of_two(lambda: inputs.option("gpt", "layer decay, frozen", n_updates=2)),
    "Muon of layers": of_two(lambda: inputs.option("gpt", "Muon", n_updates=2)),
    "distillation": of_two(lambda: inputs.distilled("mlm", n_updates=2)),
    "packed mlm": of_one(packed, lambda: packed.packed("mlm", False, **{"model.positions": "rotary"})),
    "packed gpt": of_one(packed, lambda: packed.packed("gpt", False, **{"model.positions": "learned"})),
    "packed sst2": of_one(packed, lambda: packed.packed("sst2")),
    "packed and distilled mlm": of_one(packed, lambda: packed.packed("mlm", is_distilled=True)),
    "mixture of sources": of_one(mixture, mixture.mixture),
    "head of DistilBERT": of_two(lambda: inputs.option("sst2", "parts of DistilBERT", n_updates=1)),
    "mean of ModernBERT": of_two(lambda: inputs.option("sst2", "parts of ModernBERT", n_updates=1)),
    "mean of EuroBERT": of_two(lambda: inputs.option("sst2", "parts of EuroBERT", n_updates=1)),
    "head of UltraBERT": of_two(lambda: inputs.option("mlm", "parts of UltraBERT", n_updates=1)),
    "head of Ettin's decoder": of_two(lambda: inputs.option("gpt", "parts of ModernBERT", n_updates=1)),
    **{
        f"folder of {name}": of_one(families, functools.partial(families.folder, name))
        for name in ("ModernBERT", "ModernBERT that classifies")
    },
    "packed mean of sst2": of_one(packed, lambda: packed.packed("sst2", False, **{"model.pooling": "mean"})),
    **{f"replay of {name}": functools.partial(all_of, name) for name in ("mlm_cycle", "gpt_resume", "cola")},
}


@contextlib.contextmanager
def once(package: type[Package]) -> Iterator[None]:
    """Compute what checks ask of the other package, and of references, only once: no fault is in it.

    Runs with dropout are done anew, since masks may come from outside, which have to be used up.
    """
    (other,) = (x for x in PACKAGES if x is not package)
    run, numpy = trajectory.run, references._adamw_of_numpy
    update = getattr(references, f"_updated_by_{other.name}")

    def remembered(asked: type[Package], plan: Any, precision: Any = "float32") -> trajectory.Trajectory:
        if asked is package or plan.config.model.dropout:
            return run(asked, plan, precision)
        key = asked, plan.name, precision, len(plan.batches)
        if key not in _RUNS:
            _RUNS[key] = run(asked, plan, precision)
        return _RUNS[key]

    def remembered_update(name: str, compute: Function) -> Function:
        def updated(*args: Any) -> Any:
            key = name, args[0]  # the settings
            if key not in _RUNS:
                _RUNS[key] = compute(*args)
            return _RUNS[key]

        return updated

    with (
        mock.patch.object(trajectory, "run", remembered),
        mock.patch.object(references, update.__name__, remembered_update(update.__name__, update)),
        mock.patch.object(references, numpy.__name__, remembered_update(numpy.__name__, numpy)),
    ):
        yield


_RUNS: dict[Any, Any] = {}
