"""The command `python -m jaxlm.plan`: memory, time and cost of a training before any of it, from its compiled step.

ahead.py compiles, in a process for each step, and roofline.py has the figures. PLAN.md has examples.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.config import Config
from jaxlm.cost import roofline
from jaxlm.cost.roofline import LOCAL, Plan, Step
from jaxlm.errors import UserError, nearest, outside, reported
from jaxlm.io.console import Console
from jaxlm.reporting.run_reader import size
from jaxlm.terminal import dumps

SWEPT = ("mesh", "batch", "remat")
TOO_LARGE = 1  # exit status where the step does not fit
VOCABULARIES = {"openai-community/gpt2": 50257, "google-bert/bert-base-uncased": 30522}  # not to ask the hub for


def main(argv: list[str] | None = None) -> int:
    """Print what the command line asks for; return the exit status: 1 if nothing fits, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with reported(debug="--debug" in argv):
        args, rest = _parse(argv)
        config, _ = configs.load(rest, "python -m jaxlm.plan")
        config = with_vocab_size(config)
        if args.sweep:
            return sweep(config, args)
        print(f"compiling for {args.topology} ...", file=sys.stderr)
        found = roofline.plan(config, args.topology, measure(config, args.topology), args.price)
        if args.json:
            print(dumps(dataclasses.asdict(found)))
        else:
            show(found, config)
        if found.step.missing:
            print(f"missing: {found.step.missing}", file=sys.stderr)
        if found.fits is False:
            print(_too_large(found), file=sys.stderr)
            advise(config, args.topology)
            return TOO_LARGE
        return 0
    raise AssertionError("reported() exits on the errors it does not pass on")


def measure(config: Config, topology: str) -> Step:
    """Return the step of ahead.measure, made in another process. Raises UserError also where that crashes."""
    env = dict(os.environ)
    if topology != LOCAL:
        env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    asked = json.dumps({"settings": configs.flat(config), "topology": topology})
    command = [sys.executable, "-m", "jaxlm.cost.compile_ahead"]
    done = subprocess.run(command, input=asked, env=env, text=True, capture_output=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line or "***" in line), "")
        raise UserError(
            outside(RuntimeError(last))
            or f"the step could not be compiled for {topology} (exit status {done.returncode}): "
            f"{last or 'no reason told'}"
        ) from None
    if "error" in found:
        raise UserError(found["error"])
    return roofline.of_json(found)


def sweep(config: Config, args: argparse.Namespace) -> int:
    """Print the plans of all combinations that fit, the fastest first, and write the best if asked to."""
    tried = list(candidates(config, _n_devices(args.topology), args.sweep))
    found, failed = [], []
    for candidate, step in _measured(tried, args.topology):
        if isinstance(step, UserError):
            failed.append(str(step))
        else:
            found.append((candidate, roofline.plan(candidate, args.topology, step, args.price)))
    fitting = sorted((x for x in found if x[1].fits is not False), key=lambda x: _rank(x[1]))
    for message in sorted(set(failed)):
        print(f"warning: {failed.count(message)} left out: {message}", file=sys.stderr)
    if args.json:
        print(dumps([dataclasses.asdict(plan) for _, plan in fitting]))
    else:
        _show_sweep([plan for _, plan in fitting], len(tried), len(found) - len(fitting))
    if found and found[0][1].step.missing:
        print(f"missing: {found[0][1].step.missing}", file=sys.stderr)
    if not fitting:
        print("nothing fits; use more chips, or a smaller model", file=sys.stderr)
        return TOO_LARGE
    if args.write:
        best = fitting[0][0]
        note = f"# The fastest of {len(tried)} that python -m jaxlm.plan --sweep has tried for {args.topology}.\n"
        try:
            with open(args.write, "x", encoding="utf-8") as file:
                file.write(note + configs.dump(best))
        except OSError as error:
            raise UserError(f"--write {args.write}: cannot be written ({error.strerror}); name a new file") from error
        print(f"written: {args.write}", file=sys.stderr)
    return 0


def advise(config: Config, topology: str, most: int = 2) -> None:
    """Print the nearest settings that fit: those with the fewest changes."""
    nearer, n = list(_nearer(config, _n_devices(topology))), _n_workers(topology)
    fits: list[str] = []
    for start in range(0, len(nearer), n):
        for candidate, step in _measured(nearer[start : start + n], topology):
            if not isinstance(step, UserError) and roofline.plan(candidate, topology, step).fits:
                fits.append(_changes(config, candidate))
        if len(fits) >= most:
            break
    if fits:
        print("these fit:", *fits[:most], sep="\n  ", file=sys.stderr)
    else:
        print("nothing near fits; use more chips, or a smaller model", file=sys.stderr)


def show(found: Plan, config: Config) -> None:
    """Print a plan as one table."""
    step = found.step
    table = Table(show_header=False, title=f"{found.task} on {found.n_chips} x {found.chip}", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")

    def section(name: str, rows: Iterable[tuple[str, str, str]]) -> None:
        table.add_section()
        table.add_row(Text(name, style="bold"))
        for row in rows:
            table.add_row(*row)

    chip = "chip" if found.n_chips == step.n_devices else "device"
    section(
        "settings",
        [
            ("mesh", _mesh(step), ""),
            ("batch x accumulated", f"{found.batch_size:,} x {found.accumulate:,}", "samples"),
            ("remat, precision", f"{found.remat}, {config.train.precision}", ""),
            ("parameters", f"{step.n_parameters:,}", ""),
            ("tokens of an update", f"{found.tokens:,}", ""),
        ],
    )
    section(f"bytes of a {chip}", _bytes(found))
    sent = sorted(step.sent or (), key=lambda x: -x.n_bytes)
    section(
        f"an update, of a {chip}",
        [
            ("model flops", _flops(found.model_flops / step.n_devices), "products of matrices, each once"),
            ("flops", _flops(step.flops), "with those made anew (remat)"),
            ("memory traffic", _size(step.traffic), ""),
            *(
                (f"{x.kind} over {x.axes}", _size(x.n_bytes), f"sent over {x.n_links} link{'s'[: x.n_links != 1]}")
                for x in sent
            ),
        ],
    )
    section(
        "an update takes at least",
        [
            (name, _time(value), "the bound" if name == found.bound else "")
            for name, value in (
                ("compute", found.compute_s),
                ("memory", found.memory_s),
                ("interconnect", found.interconnect_s),
            )
        ],
    )
    share = f"{found.utilization:.0%} at most" if found.utilization else "-"
    section(
        "the training",
        [
            ("model flops utilization", share, "" if found.utilization else f"no peak rate is known for {found.chip}"),
            ("updates", f"{found.n_updates:,}", ""),
            ("time to the end", _time(found.hours and found.hours * 3600), "without evaluations and stops"),
            ("chip-hours", _number(found.chip_hours), ""),
            *([("money", _number(found.money), "in the currency of the price")] if found.money is not None else []),
        ],
    )
    Console().print(table)


def _bytes(found: Plan) -> Iterator[tuple[str, str, str]]:
    step = found.step
    yield "weights", _size(step.weights), "float32"
    yield "moments", _size(step.moments), "of AdamW"
    yield "batches", _size(step.batches), "and what fills the tiles of all arguments"
    yield "activations", _size(step.activations), "that JAX keeps for gradients, at most"
    yield "temporary", _size(step.temporary), "XLA's: activations, gradients and the rest"
    yield "program", _size(step.code), ""
    yield "in all", _size(found.n_bytes), "" if step.temporary is not None else "without what XLA needs besides"
    yield f"limit of {found.chip}", _size(found.limit), {True: "fits", False: "does not fit", None: ""}[found.fits]


def _show_sweep(plans: Sequence[Plan], n_tried: int, n_dropped: int) -> None:
    table = Table("mesh", "batch", "remat", "memory", "an update", "bound", "utilization", "chip-hours")
    if any(plan.money is not None for plan in plans):
        table.add_column("money")
    for plan in plans:
        row = [_mesh(plan.step), f"{plan.batch_size:,} x {plan.accumulate:,}", plan.remat, _size(plan.n_bytes)]
        row += [_time(plan.update_s), plan.bound or "-", f"{plan.utilization:.0%}" if plan.utilization else "-"]
        table.add_row(*row, _number(plan.chip_hours), *([_number(plan.money)] if plan.money is not None else []))
    Console().print(table)
    print(f"{n_tried:,} tried, {n_dropped:,} do not fit")


def with_vocab_size(config: Config) -> Config:
    """Return the settings with the vocabulary of their tokenizer; one that is still to be trained has it at most."""
    if config.model.vocab_size:
        return config
    n = config.tokenizer.vocab_size
    if config.tokenizer.path in VOCABULARIES:
        n = VOCABULARIES[config.tokenizer.path]
    elif config.tokenizer.path:
        from jaxlm.data import tokenization

        n = tokenization.n_ids(tokenization.read(config.tokenizer))
    return configs.replace(config, "model.vocab_size", n)


def _n_devices(topology: str) -> int:
    if topology != LOCAL:
        return roofline.named(topology)[1]
    program = "from jaxlm.errors import reported\nwith reported(False):\n import jax\n print(jax.device_count())"
    counted = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if counted.returncode:
        raise UserError(counted.stderr.splitlines()[-1].removeprefix("error: "))
    return int(counted.stdout.splitlines()[-1])


def _n_workers(topology: str) -> int:
    """Return how many steps are compiled at once. A TPU of this machine belongs to one process at a time."""
    return 1 if topology == LOCAL else os.cpu_count() or 1


def candidates(config: Config, n_devices: int, swept: Sequence[str]) -> Iterator[Config]:
    """Yield the combinations of what is swept; each takes the same samples in an update."""
    n_samples = config.train.batch_size * config.train.accumulate
    none: list[dict[str, Any]] = [{}]
    meshes = list(_meshes(config, n_devices)) if "mesh" in swept else none
    batches = [_batch(n_samples, 2**i) for i in range(8) if n_samples % 2**i == 0] if "batch" in swept else none
    remats = [{"model.remat": name} for name in ("none", "dots", "full")] if "remat" in swept else none
    for parts in itertools.product(meshes, batches, remats):
        candidate = _replaced(config, *parts)
        try:
            configs.mesh_sizes(candidate, n_devices)
        except UserError:
            continue
        yield candidate


def _meshes(config: Config, n_devices: int) -> Iterator[dict[str, int]]:
    """Yield meshes of data, of fsdp in groups of 8 and over all, each with tensor 1, 2 and 4."""
    for tensor in (1, 2, 4):
        rest = n_devices // tensor
        splits = n_devices % tensor == 0 and config.model.vocab_size % tensor == 0
        for fsdp in sorted({1, min(8, rest), rest}) if splits else ():
            if rest % fsdp == 0 and config.model.d_model % fsdp == 0:
                yield {"mesh.data": rest // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def _nearer(config: Config, n_devices: int) -> Iterator[Config]:
    """Yield settings that take less memory, those with the fewest changes first."""
    n_samples, accumulate = config.train.batch_size * config.train.accumulate, config.train.accumulate
    full, fsdp = {"model.remat": "full"}, {"mesh.data": -1, "mesh.fsdp": n_devices // max(config.mesh.tensor, 1)}
    halves = [_batch(n_samples, accumulate * 2**i) for i in (1, 2, 3) if n_samples % (accumulate * 2**i) == 0]
    changes: list[tuple[dict[str, Any], ...]] = [
        ({"model.remat": "dots"},),
        (full,),
        *((half,) for half in halves[:1]),
        (fsdp,),
        (full, fsdp),
    ]
    changes += [part for half in halves for part in ((full, half), (full, fsdp, half))]
    seen = [config]
    for parts in changes:
        candidate = _replaced(config, *parts)
        if config.model.remat == "full" and parts[0] == {"model.remat": "dots"} or candidate in seen:
            continue
        seen.append(candidate)
        try:
            configs.mesh_sizes(candidate, n_devices)
        except UserError:
            continue
        yield candidate


def _batch(n_samples: int, accumulate: int) -> dict[str, int]:
    return {"train.batch_size": n_samples // accumulate, "train.accumulate": accumulate}


def _replaced(config: Config, *parts: dict[str, Any]) -> Config:
    for part in parts:
        for name, value in part.items():
            config = configs.replace(config, name, value)
    return config


def _changes(config: Config, other: Config) -> str:
    """Return how `other` is asked for where `config` is."""
    before, after = configs.flat(config), configs.flat(other)
    return " ".join(f"--{name.replace('_', '-')} {after[name]}" for name in after if after[name] != before[name])


def _measured(tried: Sequence[Config], topology: str) -> Iterator[tuple[Config, Step | UserError]]:
    """Yield each of some settings with its step as that is compiled, behind a progress bar on standard error."""

    def one(config: Config) -> Step | UserError:
        try:
            return measure(config, topology)
        except UserError as error:
            return error

    columns = (TextColumn("compiling"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(_n_workers(topology)) as pool,
    ):
        bar = progress.add_task("", total=len(tried))
        for config, step in zip(tried, pool.map(one, tried), strict=True):
            progress.advance(bar)
            yield config, step


def _rank(plan: Plan) -> tuple[float, float]:
    """Return what the best has the least of: time, then memory."""
    return plan.update_s if plan.update_s is not None else float(plan.step.flops), plan.n_bytes


def _too_large(found: Plan) -> str:
    step = found.step
    parts = {"weights": step.weights, "moments": step.moments, "activations": step.activations}
    if step.temporary is not None:
        parts = {"weights": step.weights, "moments": step.moments, "temporary": step.temporary}
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {_size(n)}" for name, n in largest)
    told = step.too_large or f"{_size(found.n_bytes)} of {_size(found.limit)}."
    return f"the step does not fit on {found.chip}: {told} The largest: {shown}"


def _mesh(step: Step) -> str:
    return " x ".join(f"{name} {n}" for name, n in step.mesh.items() if n > 1) or "one device"


def _size(n: float | None) -> str:
    return "-" if n is None else size(n)


def _flops(n: float) -> str:
    return f"{_number(n / 1e12)} T"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:,.3g}" if x < 100 else f"{x:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, n in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * n:
            return f"{seconds / n:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the words that are settings."""
    parser = Parser(
        prog="python -m jaxlm.plan",
        description="Compiles the training step of some settings for a TPU that need not be there, or for the "
        "devices of this machine, and tells memory, time and cost before anything is paid for.",
        epilog="All settings of jaxlm.train can be given, too: --config FILE, --train.batch-size 512. Exit status: 0 "
        "if the step fits, 1 if it does not, 2 for bad input.",
    )
    parser.add_argument(
        "--topology", default=LOCAL, metavar="KIND:SHAPE", help=f"such as v5e:16x16 (extra: tpu), or {LOCAL} (default)"
    )
    parser.add_argument("--price", type=float, metavar="X", help="price of one chip for an hour, in any currency")
    parser.add_argument("--sweep", metavar="mesh,batch,remat", help="try all combinations of one or more of these")
    parser.add_argument("--write", metavar="FILE", help="with --sweep: write the best as a configuration")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, rest = parser.parse_known_args(argv)
    args.sweep = args.sweep.split(",") if args.sweep is not None else None
    for name in args.sweep or ():
        if name not in SWEPT:
            raise UserError(f"--sweep: {name!r} is none of {', '.join(SWEPT)}{nearest(name, SWEPT)}")
    if args.write and not args.sweep:
        raise UserError("--write goes with --sweep, whose best it writes")
    if args.write and Path(args.write).exists():
        raise UserError(f"--write {args.write}: is there; name a new file")
    if args.price is not None and not args.price >= 0:
        raise UserError(f"--price {args.price}: has to be a number from 0 on")
    if args.topology != LOCAL:
        roofline.named(args.topology)
    return args, rest


if __name__ == "__main__":
    sys.exit(main())
