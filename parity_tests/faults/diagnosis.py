"""`python -m parity_tests.faults.diagnosis [--only TEXT] [--package NAME] [--json FILE]`: does the tool name a fault?

Each fault is planted in one package, both do the same plan with a recorder on, and compare.runs says where they part
first and why. All faults take an hour or two. `--shard I/N --json FILE` takes a part of them, in several processes, on
several machines, or later; `table FILE...` prints the table of such files.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from jaxlm import optim as jax_optim
from jaxlm.config import Config
from jaxlm.errors import UserError, reported
from jaxlm.training.teacher import Teacher
from parity_tests import compare, drift, faults, inputs, packed, randomness, record, references, trajectory
from parity_tests.compare import Verdict
from parity_tests.compare.pairing import Names, Pair, View
from parity_tests.compare.verdict import sentence
from parity_tests.faults import expected
from parity_tests.faults.checks import recorded
from parity_tests.faults.planting import Fault
from parity_tests.packages import PACKAGES, Jaxlm, Package, Torchlm
from parity_tests.plan import Batch, Plan, random_plan, random_weights
from parity_tests.record.files import Record


class _Recorded:
    """What records a package while trajectory.run uses it."""

    recorders: list[Any] = []
    has_teacher = False  # then only updates are recorded: without a teacher, the packages call the head otherwise

    def __init__(self, config: Config, weights: Any, precision: Any, seed: int = 0):
        super().__init__(config, weights, precision, seed)  # type: ignore[call-arg]
        self.recorder: Any = None
        self.n_forward = int(self.has_teacher)
        if not self.has_teacher:
            self._record()

    def _record(self) -> None:
        self.recorder = self._open().__enter__()  # type: ignore[attr-defined]
        self.recorders.append(self.recorder)

    def start(self, *args: Any) -> None:
        if self.has_teacher:
            self._record()
        super().start(*args)  # type: ignore[misc]

    def forward(self, batch: Batch) -> Any:
        if self.n_forward:  # the evaluation at the end
            return super().forward(batch)  # type: ignore[misc]
        self.n_forward += 1
        self.recorder.batch(**batch)
        result = super().forward(batch)  # type: ignore[misc]
        self._totals(result[0], self.recorder.update)
        return result

    def _totals(self, totals: Any, update: int) -> None:
        now, self.recorder.update = self.recorder.update, update
        for name, x in (("loss", np.float64(totals["loss"]) / totals["count"]), ("correct", totals.get("correct"))):
            if x is not None:
                self.recorder.add("loss", name, np.float64(x))
        if "grad_norm" in totals:
            self.recorder.add("loss", "grad_norm", np.float64(totals["grad_norm"]))
        self.recorder.update = now

    def update(self, batches: Batch) -> Any:
        for i in range(len(next(iter(batches.values())))):
            self.recorder.batch(**{name: x[i] for name, x in batches.items()})
        update = self.recorder.update
        self.recorder.is_loss_given = True
        metrics = super().update(batches)  # type: ignore[misc]
        self._end(metrics)  # type: ignore[attr-defined]
        self._totals(metrics, update)
        return metrics


class RecordedTorchlm(_Recorded, Torchlm):
    def _open(self) -> Any:
        return record.torch(self.model)

    def start(self, *args: Any) -> None:
        super().start(*args)
        self.recorder.watch(self.state.optimizer)

    def forward(self, batch: Batch) -> Any:
        if self.n_forward:
            return super().forward(batch)
        self.recorder.is_loss_given = True
        result = super().forward(batch)
        self.recorder.losses.clear()
        return result

    def _end(self, metrics: Any) -> None:
        pass


class RecordedJaxlm(_Recorded, Jaxlm):
    def _open(self) -> Any:
        from flax import nnx

        return record.jax(nnx.merge(self.graphdef, self.params), params=self.params)

    def set_rate(self, rate: Any) -> None:
        adamw = jax_optim.make_optimizer
        with mock.patch.object(jax_optim, "make_optimizer", lambda *args: self.recorder.optimizer(adamw(*args))):
            super().set_rate(rate)

    def _end(self, metrics: Any) -> None:
        train = self.config.train
        info = {"b1": train.beta1, "b2": train.beta2, "eps": train.epsilon, "weight_decay": train.weight_decay}
        state = self.state.opt_state
        self.recorder.step(params=self.params, state=state, rate=np.float64(metrics["rate"]), **info)


_RECORDED: dict[str, Any] = {"jaxlm": RecordedJaxlm, "torchlm": RecordedTorchlm}


def run(package: type[Package], plan: Plan, precision: Any = "float64") -> Record:
    """Return the record of what a package computes of a plan."""
    _Recorded.recorders.clear()
    _Recorded.has_teacher = plan.teacher is not None
    try:
        with jax.disable_jit(len(plan.batches) < 4):  # compiling pays for more updates
            trajectory.run(_RECORDED[package.name], plan, precision)
    except KeyError:  # of parameters that a fault leaves without a moment, after the last update
        if not _Recorded.recorders or not _Recorded.recorders[0].update:
            raise
    finally:
        for recorder in _Recorded.recorders:
            recorder.__exit__()
    # Stacks of gradients and moments have only the layers that are trained, so that their numbers are others.
    kinds = ("parameter", "rate", "batch", "input", "activation", "loss") if plan.config.model.frozen_layers else ()
    return _kept(_Recorded.recorders[0], kinds)


def _kept(recorder: Any, kinds: tuple[str, ...] = ()) -> Record:
    found = recorder.read()
    for entry in found.entries:  # they are numbered
        entry.line["kind"] = entry.kind if entry.kind in kinds or not kinds else "left out"
    found.recorder = recorder  # whose folder is there as long as it is
    return found


# The plans that show each fault, by the check that catches it.


def _option(task: str, name: str, changes: dict[str, Any] | None = None) -> Plan:
    sizes = {"train.max_steps": 2, "train.warmup_steps": 1, "model.n_heads": 2, "train.accumulate": 1}
    config = drift.config_of(task, **(sizes | (inputs.OPTIONS[name] if name else {}) | (changes or {})))
    return random_plan(f"{task}, {name}", config, seed=6)


def _recorded(name: str, n: int = 3) -> Plan:
    plan = recorded(name).plan()
    return dataclasses.replace(plan, batches=plan.batches[:n], evaluated_weights=None)


def _bert() -> Plan:
    return _option("mlm", "parts of BERT", {**references.TIED, "model.post_norm": True})


def _gpt2(task: str) -> Plan:
    changes = {"model.final_norm": True, "model.pad_id": -1, "model.gelu": "tanh", "model.output_bias": False}
    plan = _option(task, "", {**references.TIED, **changes, "model.pooling": "last"})
    if task == "pairs":
        batch, _ = references._pairs(plan.config)
        plan = dataclasses.replace(plan, batches=[{key: x[None] for key, x in batch.items()}], evaluated=batch)
    return plan


def _edges() -> Plan:
    plan = _recorded("mlm", 1)
    batch = {key: x.copy() for key, x in plan.batches[0].items()}
    batch["tokens"][:, 0] = 0  # a row of pads
    return dataclasses.replace(plan, batches=[batch])


def _adamw() -> Plan:
    changes = {"train.max_steps": 12, "train.warmup_steps": 4, "train.decay_steps": 9, "train.accumulate": 1}
    config = drift.config_of("gpt", **changes, **{"train.weight_decay": 0.3, "train.learning_rate": 0.02})
    return random_plan("AdamW", config, seed=10)


def _accumulated() -> Plan:
    changes = {"train.max_steps": 3, "train.warmup_steps": 1}
    return random_plan("gpt, accumulated", drift.config_of("gpt", **changes), seed=2)


def _dropped(n_updates: int = 1) -> Plan:
    changes = {"train.max_steps": n_updates, "train.warmup_steps": 0, "model.dropout": 0.2, "train.accumulate": 1}
    return random_plan("gpt with dropout", drift.config_of("gpt", **changes), seed=2)


def _distilled() -> Plan:
    with mock.patch.object(inputs, "_apart", lambda plan, precision: plan):
        plan: Any = inputs.distilled("mlm", 2)
    return plan


def _packed(task: str, positions: str = "fixed", is_distilled: bool = False) -> Plan:
    config = drift.config_of(task, **packed.SIZES, **{"model.positions": positions})
    batch = packed.batch_of(config, is_packed=True)
    teacher = Teacher(config, random_weights(config, seed=9), "") if is_distilled else None
    batches = [{name: x[None] for name, x in batch.items()}]
    return Plan(f"{task}, packed", config, random_weights(config, seed=3), batches, batch, teacher=teacher)


MUON = {
    "model.frozen_layers": 0,
    "model.tied_embedding": False,
    "train.muon_scale": "spectral",
    "train.muon_coefficients": "polar_express",
}
PLANS: dict[str, Callable[[], Plan]] = {
    "batch 0 of mlm": lambda: _recorded("mlm"),
    "batch 0 of gpt": lambda: _recorded("gpt"),
    "batch 0 of cola": lambda: _recorded("cola"),
    "blocks of PyTorch's attention": lambda: _option("gpt", ""),
    "BERT of transformers": _bert,
    "GPT-2 of transformers": lambda: _gpt2("gpt"),
    "GPT-2 of transformers that classifies": lambda: _gpt2("sst2"),
    "GPT-2 of transformers that answers": lambda: _gpt2("pairs"),
    "inputs at the edges": _edges,
    "AdamW of NumPy and PyTorch": _adamw,
    **dict.fromkeys(("Muon of NumPy", "Muon of layers"), lambda: _option("gpt", "Muon", MUON)),
    "gpt in float64": _accumulated,
    "distillation": _distilled,
    "LoRA": lambda: _option("gpt", "LoRA"),
    "frozen layers and layer decay": lambda: _option("gpt", "layer decay, frozen"),
    "head of DistilBERT": lambda: _option("sst2", "parts of DistilBERT"),
    "rotary positions": lambda: _option("gpt", "rotary positions"),
    **{
        name: functools.partial(_option, "gpt", name)
        for name in (
            *("RMSNorm", "GEGLU", "SwiGLU", "squared ReLU", "soft cap", "z-loss"),
            *("grouped heads", "norm of queries and keys", "scaled rotary positions"),
            *("window", "window in blocks", "global and local layers", "no first norm"),
        )
    },
    "window to both sides": lambda: _option("mlm", "window"),
    "two texts": lambda: _option("classify", "two texts"),
    "several labels": lambda: _option("multilabel", "two texts"),
    "smoothed and weighted classes": lambda: _option("classify", "smoothed, weighted"),
    "a number for two texts": lambda: _option("regress", "two texts, the last token"),
    "mean of ModernBERT": lambda: _option("sst2", "parts of ModernBERT"),
    "mean of EuroBERT": lambda: _option("sst2", "parts of EuroBERT"),
    "head of UltraBERT": lambda: _option("mlm", "parts of UltraBERT"),
    "head of Ettin's decoder": lambda: _option("gpt", "parts of ModernBERT"),
    "BERT of transformers that tags": lambda: _option("tag", "parts of BERT", {"data.n_labels": 5}),
    "packed mlm": lambda: _packed("mlm", "rotary"),
    "packed gpt": lambda: _packed("gpt", "learned"),
    "packed sst2": lambda: _packed("sst2"),
    "packed and distilled mlm": lambda: _packed("mlm", is_distilled=True),
    **{f"replay of {name}": functools.partial(_recorded, name, 99) for name in ("mlm_cycle", "gpt_resume", "cola")},
    "dropout with the same masks": _dropped,
    "statistics of dropout": _dropped,  # with the same masks, too: others differ everywhere
    "masks of updates": lambda: _dropped(2),
}
STARTS = {
    "start values": ("mlm", ""),
    "start values of GPT-2": ("gpt", "gpt2"),
    "start values of ModernBERT": ("mlm", "modernbert"),
}


def recorded_by(package: type[Package], check: str) -> Record:
    """Return the record of a package that shows what a check is about."""
    if check in STARTS:
        return _start(package, *STARTS[check])
    plan = PLANS[check]()
    if plan.config.model.dropout and package is Torchlm:
        with drift.injected(drift.jaxlm_masks(plan, "float64")):
            return run(package, plan)
    return run(package, plan)


def _start(package: type[Package], task: str, initialization: str) -> Record:
    changes: dict[str, Any] = {"model.d_model": 48, "model.n_heads": 4, "model.vocab_size": 101}
    changes |= {"model.initialization": initialization} if initialization else {}
    start = randomness._start(package, drift.config_of(task, **changes))
    recorder = record.torch(torch.nn.Module())
    with recorder:
        for name, x in start.items():
            recorder.add("parameter", name, x)
    return _kept(recorder)


@functools.cache
def reference(check: str, package: str) -> Record:
    """Return what the other package computes, in which no fault is."""
    (other,) = (x for x in PACKAGES if x.name != package)
    return recorded_by(other, check)


def diagnose(fault: Fault) -> Verdict:
    """Plant a fault, and compare the package that has it with the other one."""
    (package,) = (x for x in PACKAGES if x.name == fault.package)
    a = reference(fault.check, fault.package)
    with fault.plant():
        b = recorded_by(package, fault.check)
    is_start = fault.check in STARTS
    same = Names([Pair(View(e.name), View(e.name)) for e in a.entries if e.kind == "parameter"], {})
    return compare.runs(a, b, same if is_start else "auto")


@dataclasses.dataclass(frozen=True)
class Result:
    """What the tool says of a fault, and whether it is right."""

    name: str
    package: str
    subject: str
    first: str  # where the runs part
    stage: str
    causes: list[str]
    expected: str
    is_cause_right: bool
    is_module_right: bool | None  # None: no activation is changed


def judged(fault: Fault) -> Result:
    """Diagnose a fault, and score what the tool says by what the fault declares."""
    if fault.check not in PLANS | STARTS:
        nothing = "not recorded: no plan here shows it"
        return Result(fault.name, fault.package, subject(fault), nothing, "", [], expected.cause(fault), False, None)
    try:
        verdict = diagnose(fault)
    except Exception as error:  # a fault may end a run, which the tool then cannot compare
        raised = f"raises {type(error).__name__}: {error}"
        return Result(fault.name, fault.package, subject(fault), raised, "", [], expected.cause(fault), False, None)
    first, module = verdict.first, expected.module(fault)
    kinds = [cause.kind for cause in verdict.causes[:3]]
    is_right = expected.is_in(module, first.name.partition("#")[0]) if first and first.stage == "forward" else None
    return Result(
        fault.name,
        fault.package,
        subject(fault),
        sentence(first) if first else "passes",
        first.stage if first else "",
        [f"{cause.kind}: {cause.text}" for cause in verdict.causes[:3]],
        expected.cause(fault),
        expected.cause(fault) in kinds,
        is_right,
    )


def subject(fault: Fault) -> str:
    """Return the file that has a fault."""
    (name,) = {s.__name__.rpartition(".")[2] for s in faults.SUBJECTS if fault in s.FAULTS}
    return name


def summary(results: list[Result]) -> str:
    """Return the table of the page: by subject, how often cause and module are right; and what is missed."""

    def row(name: str, own: list[Result]) -> str:
        causes = sum(x.is_cause_right for x in own)
        modules = [x.is_module_right for x in own if x.is_module_right is not None]
        return f"| {name} | {causes} of {len(own)} | {sum(modules)} of {len(modules)} |"

    lines = ["| faults of | cause among the first three | first module |", "| --- | --- | --- |"]
    for name in dict.fromkeys(x.subject for x in results):
        lines.append(row(name, [x for x in results if x.subject == name]))
    lines += [row("all", results), "", "| missed cause | in | said instead |", "| --- | --- | --- |"]
    for x in results:
        if not x.is_cause_right:
            said = ", ".join(cause.partition(":")[0] for cause in x.causes) or x.first.partition(":")[0]
            lines.append(f"| {x.name} ({x.expected}) | {x.package} | {said} |")
    return "\n".join(lines)


def read_results(paths: list[str]) -> list[Result]:
    """Return the results in files of `--json`, of each fault the one in the last file, in the order of FAULTS.

    Raises UserError if a file has none.
    """
    found: dict[tuple[str, str], Result] = {}
    for path in paths:
        try:
            results = [Result(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: no file of python -m parity_tests.faults.diagnosis --json: {error}") from error
        found |= {(result.name, result.package): result for result in results}
    places = {(fault.name, fault.package): i for i, fault in enumerate(faults.FAULTS)}
    known = sorted(found.keys() & places.keys(), key=lambda key: places[key])
    print(f"{len(known)} of {len(places)} faults")
    return [found[key] for key in known]


def main(argv: list[str]) -> int:
    """Diagnose the faults of a command line; print what is said of each, and the table of the page."""
    if argv[:1] == ["table"]:
        with reported(debug=False):
            print(summary(read_results(argv[1:])))
        return 0
    planted, file = faults.command("python -m parity_tests.faults.diagnosis", "Diagnose planted faults.", argv)
    results = []
    with faults.operation_by_operation():
        for fault in planted:
            result = judged(fault)
            results.append(result)
            print(f"{fault.name} ({fault.package}): {result.first}", flush=True)
            print("".join(f"    {i}. {cause}\n" for i, cause in enumerate(result.causes, start=1)), end="", flush=True)
            if file:
                file.write_text(json.dumps([dataclasses.asdict(x) for x in results], indent=1), encoding="utf-8")
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
