"""The command `python -m jaxlm.plan`: ahead-of-time compilation for TPUs you don't have: memory, time, cost.

cost/PLAN.md has examples. Here are the arguments and the tables; cost/ computes what they show.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.config import Config
from jaxlm.cost import roofline, search
from jaxlm.cost.roofline import LOCAL, Plan, Step
from jaxlm.errors import UserError, nearest, os_errors, reported, warn
from jaxlm.reporting.run_reader import size
from jaxlm.terminal import command, dumps
from jaxlm.training.log import Console

TOO_LARGE = 1  # exit status where the step does not fit


def main(argv: list[str] | None = None) -> int:
    """Print a plan or a sweep; return the exit status: 1 if nothing fits, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    with reported(debug="--debug" in argv):
        args, rest = _parse(argv)
        config = search.with_vocab_size(configs.load(rest, command("plan"))[0])
        return sweep(config, args) if args.sweep else plan(config, args)
    raise AssertionError("reported() exits on the errors it does not pass on")


def plan(config: Config, args: argparse.Namespace) -> int:
    """Print the plan of the settings; if they do not fit, suggest similar ones that do."""
    print(f"compiling for {args.topology} ...", file=sys.stderr)
    result = roofline.plan(config, args.topology, search.measure(config, args.topology), args.price)
    if args.json:
        print(dumps(dataclasses.asdict(result)))
    else:
        show(result, config)
    if result.step.missing:
        print(f"missing: {result.step.missing}", file=sys.stderr)
    if result.fits is not False:
        return 0
    print(_too_large(result), file=sys.stderr)
    advise(config, args.topology)
    return TOO_LARGE


def sweep(config: Config, args: argparse.Namespace) -> int:
    """Print the plans of all combinations that fit, the fastest first; write the best one if requested."""
    tried = list(search.candidates(config, search.n_devices(args.topology), args.sweep))
    plans, failed = [], []
    for candidate, step in _measured(tried, args.topology):
        if isinstance(step, UserError):
            failed.append(str(step))
        else:
            plans.append((candidate, roofline.plan(candidate, args.topology, step, args.price)))
    fitting = sorted((x for x in plans if x[1].fits is not False), key=lambda x: _rank(x[1]))
    for message in sorted(set(failed)):
        warn(f"{failed.count(message)} left out: {message}")
    if args.json:
        print(dumps([dataclasses.asdict(one) for _, one in fitting]))
    else:
        _show_sweep([one for _, one in fitting])
        print(f"{len(tried):,} tried, {len(plans) - len(fitting):,} do not fit")
    if plans and plans[0][1].step.missing:
        print(f"missing: {plans[0][1].step.missing}", file=sys.stderr)
    if not fitting:
        print("nothing fits; use more chips, or a smaller model", file=sys.stderr)
        return TOO_LARGE
    if args.write:
        note = f"# The fastest of {len(tried)} combinations of {command('plan')} --sweep for {args.topology}.\n"
        with os_errors(f"--write {args.write}: cannot be written", "name a new file"):
            with open(args.write, "x", encoding="utf-8") as file:
                file.write(note + configs.dump(fitting[0][0]))
        print(f"written: {args.write}", file=sys.stderr)
    return 0


def advise(config: Config, topology: str, most: int = 2) -> None:
    """Print settings that fit, with the fewest changes."""
    tried, n = list(search.nearer(config, search.n_devices(topology))), search.n_workers(topology)
    fits: list[str] = []
    for start in range(0, len(tried), n):
        for candidate, step in _measured(tried[start : start + n], topology):
            if not isinstance(step, UserError) and roofline.plan(candidate, topology, step).fits:
                fits.append(search.changes(config, candidate))
        if len(fits) >= most:
            break
    if fits:
        print("these fit:", *fits[:most], sep="\n  ", file=sys.stderr)
    else:
        print("no similar settings fit; use more chips, or a smaller model", file=sys.stderr)


def show(plan: Plan, config: Config) -> None:
    """Print a plan as a table."""
    step = plan.step
    chip = "chip" if plan.n_chips == step.n_devices else "device"
    fits = {True: "fits", False: "does not fit", None: ""}[plan.fits]
    sections = {
        "settings": [
            ("mesh", _mesh(step), ""),
            ("batch x accumulated", f"{plan.batch_size:,} x {plan.accumulate:,}", "samples"),
            ("remat, precision", f"{plan.remat}, {config.train.precision}", ""),
            ("parameters", f"{step.n_parameters:,}", ""),
            ("tokens of an update", f"{plan.tokens:,}", ""),
        ],
        f"bytes of a {chip}": [
            ("weights", _size(step.weights), "float32"),
            ("moments", _size(step.moments), "of AdamW" if config.train.optimizer == "adamw" else "of Muon and AdamW"),
            ("batches", _size(step.batches), "and padding of all arguments to tiles"),
            ("activations", _size(step.activations), "that JAX keeps for gradients, at most"),
            ("temporary", _size(step.temporary), "XLA's: activations, gradients, others"),
            ("program", _size(step.code), ""),
            ("in all", _size(plan.n_bytes), "" if step.temporary is not None else "without what XLA needs besides"),
            (f"limit of {plan.chip}", _size(plan.limit), fits),
        ],
        f"an update, of a {chip}": [
            ("model flops", _flops(plan.model_flops / step.n_devices), "matmuls, each once"),
            ("flops", _flops(step.flops), "with those that remat recomputes"),
            ("memory traffic", _size(step.traffic), ""),
        ],
        "an update takes at least": [
            (name, _time(getattr(plan, f"{name}_s")), "the bound" if name == plan.bound else "")
            for name in ("compute", "memory", "interconnect")
        ],
        "the training": [
            ("model flops utilization", *_utilization(plan)),
            ("updates", f"{plan.n_updates:,}", ""),
            ("time to the end", _time(plan.hours and plan.hours * 3600), "without evaluations and stops"),
            ("chip-hours", _number(plan.chip_hours), ""),
        ],
    }
    for x in sorted(step.sent or (), key=lambda x: -x.n_bytes):
        links = f"sent over {x.n_links} link{'s'[: x.n_links != 1]}"
        sections[f"an update, of a {chip}"].append((f"{x.kind} over {x.axes}", _size(x.n_bytes), links))
    if plan.money is not None:
        sections["the training"].append(("money", _number(plan.money), "in the currency of the price"))
    table = Table(show_header=False, title=f"{plan.task} on {plan.n_chips} x {plan.chip}", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, rows in sections.items():
        table.add_section()
        table.add_row(Text(name, style="bold"))
        for row in rows:
            table.add_row(*row)
    Console().print(table)


def _show_sweep(plans: Sequence[Plan]) -> None:
    table = Table("mesh", "batch", "remat", "memory", "an update", "bound", "utilization", "chip-hours")
    has_price = any(one.money is not None for one in plans)
    if has_price:
        table.add_column("money")
    for one in plans:
        row = [_mesh(one.step), f"{one.batch_size:,} x {one.accumulate:,}", one.remat, _size(one.n_bytes)]
        row += [_time(one.update_s), one.bound or "-", f"{one.utilization:.0%}" if one.utilization else "-"]
        table.add_row(*row, _number(one.chip_hours), *([_number(one.money)] if has_price else []))
    Console().print(table)


def _measured(tried: Sequence[Config], topology: str) -> Iterator[tuple[Config, Step | UserError]]:
    """Yield settings with their steps, with a progress bar on stderr."""
    columns = (TextColumn("compiling"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(search.measured(tried, topology), total=len(tried))


def _rank(found: Plan) -> tuple[float, float]:
    """Return the sort key of a plan: time, then memory; the best is lowest."""
    return found.update_s if found.update_s is not None else float(found.step.flops), found.n_bytes


def _too_large(found: Plan) -> str:
    step = found.step
    rest = ("activations", step.activations) if step.temporary is None else ("temporary", step.temporary)
    parts = sorted([("weights", step.weights), ("moments", step.moments), rest], key=lambda part: -part[1])
    reason = step.too_large or f"{_size(found.n_bytes)} of {_size(found.limit)}."
    largest = ", ".join(f"{name} {_size(n)}" for name, n in parts)
    return f"the step does not fit on {found.chip}: {reason} The largest: {largest}"


def _mesh(step: Step) -> str:
    return " x ".join(f"{name} {n}" for name, n in step.mesh.items() if n > 1) or "one device"


def _utilization(found: Plan) -> tuple[str, str]:
    if found.utilization:
        return f"{found.utilization:.0%} at most", ""
    return "-", f"no peak rate is known for {found.chip}"


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


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("plan"),
        description="Compiles a training step ahead of time, for TPUs you don't have or for the devices of this "
        "machine, and estimates memory, time and cost.",
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
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the words of the command line that are settings."""
    args, rest = make_parser().parse_known_args(argv)
    args.sweep = args.sweep.split(",") if args.sweep is not None else None
    for name in args.sweep or ():
        if name not in search.SWEPT:
            raise UserError(f"--sweep: {name!r} is not one of {', '.join(search.SWEPT)}{nearest(name, search.SWEPT)}")
    if args.write and not args.sweep:
        raise UserError("--write needs --sweep, whose best result it writes")
    if args.write and Path(args.write).exists():
        raise UserError(f"--write {args.write}: exists already; name a new file")
    if args.price is not None and not args.price >= 0:
        raise UserError(f"--price {args.price}: must be a number from 0")
    if args.topology != LOCAL:
        roofline.named(args.topology)
    return args, rest


if __name__ == "__main__":
    sys.exit(main())
