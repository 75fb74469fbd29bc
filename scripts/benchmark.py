"""Measures jaxlm beside torchlm, the original design, transformers and a plain GPT, on the CPU or GPU of this machine.

    python scripts/benchmark.py                          # all of it; SPEED.md says how long that takes
    python scripts/benchmark.py --only mlm --only gpt --json speed.json --plot speed.png
    python scripts/benchmark.py --compare old.json       # exit status 1 if something became slower
    python scripts/benchmark.py --gpu                    # models of BERT-base size, on the first GPU

Each system is a process of its own (bench_child.py) with its own memory and all cores, stopped while another one
runs. They take turns: a few updates each, then all again in another order, so that what else the machine does meets
all of them. Figures are of rounds after a warm-up; a ratio is the median of those of single rounds, and its range is
theirs. SPEED.md has the figures.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_systems import N_THREADS, read_data
from bench_tables import (
    Row,
    about,
    compare,
    draw,
    label,
    ratios_table,
    read_found,
    read_page,
    results_table,
    show,
    write_markdown,
)
from bench_works import (
    AS_BERT,
    BASE,
    GPU_WORKS,
    JAXLM,
    MLM,
    NOTES,
    ORIGINAL,
    SMALL,
    TARGETS,
    TIED,
    TINY,
    TRANSFORMERS,
    WORKS,
    Settings,
    System,
    Work,
)
from rich.console import Console

from jaxlm import config as configs
from jaxlm.data import embedded, tokenization
from jaxlm.data.loader import GROUP
from jaxlm.errors import UserError, reported
from jaxlm.tasks import flops
from jaxlm.training import environment

ROOT = Path(__file__).parents[1]
WARMUP = 2  # updates between the first and those that are measured
BUSY = 0.5  # load of the machine from which on others get in the way
LOSS_MARGIN = 0.05  # by which our loss may be above that of a system we are compared with; models start differently
Found = tuple[list[Row], list[Row]]


class Child:
    """A process of bench_child.py, stopped except while it answers."""

    def __init__(self, system: System, settings: Settings, folder: Path, variables: dict[str, str]):
        self.system, self.settings = system, settings
        spec = {"system": system.name, "compiled": system.compiled, "compile_cache": str(folder / "xla")}
        spec["settings"] = {**settings, "train.precision": system.precision}
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": str(N_THREADS),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "HF_HUB_OFFLINE": "1",
            **variables,
        }
        self.words = tempfile.TemporaryFile("w+")
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "bench_child.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            env=variables,
        )

    def ask(self, *command: Any) -> dict[str, Any]:
        """Return the answer to a command: see the methods of the systems."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.words.seek(0)
            last = (self.words.read().strip().splitlines() or ["not a word"])[-1]
            raise UserError(f"{self.system}: it has ended with status {self.process.wait()}: {last}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def first(self, *command: Any) -> float:
        """Return the seconds from the start of the process to its first answer."""
        self.ask(*command)
        return time.monotonic() - self.started_s

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.words):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Options:
    """How to measure: on the GPU, `quick` sizes, the folder of SST-2, and one for what is compiled meanwhile."""

    gpu: bool
    quick: bool
    sst2: Path | None
    folder: Path
    say: Callable[[str], None]

    def settings(self, settings: Settings, system: System | None = None) -> Settings:
        """Return settings of a work as these options, and the system, have them."""
        result = dict(settings)
        if system and system.name == "jaxlm tied":
            result |= TIED
        if result["task"] == "sst2":
            is_original = system and system.name == "original"
            slips = {"model.head_outputs": "vocabulary", "train.group_by_length": False}
            result |= slips if is_original else AS_BERT
            if self.sst2:
                files = {"data.path": "train.tsv", "data.validation_path": "dev.tsv"}
                result |= {name: str(self.sst2 / file) for name, file in files.items()} | {"data.test_fraction": 0.0}
                result["tokenizer.vocab_size"] = 8192
        if self.quick:
            result |= TINY
        return result

    def start(self, stack: contextlib.ExitStack, system: System, settings: Settings) -> Child:
        # Threads of PyTorch that wait do so by spinning, which on a busy machine costs a hundred times the work.
        variables = {"OMP_WAIT_POLICY": "PASSIVE"} if self.quick else {}
        if self.gpu:  # which all share
            variables |= {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        else:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        child = Child(system, self.settings(settings, system), self.folder, variables)
        stack.callback(child.close)
        return child

    def fewer(self, n: int, quick: int = 2) -> int:
        return quick if self.quick else n


def side_by_side(name: str, work: Work, options: Options) -> Found:
    """Return the results of a work by all of its systems that are installed, and the ratios to reach in it."""
    settings, command = options.settings(work.settings), work.command
    config, data = read_data(configs.build(settings))
    epoch = len(data.samples["train"]) // config.train.batch_size
    if name == "sst2":
        command = ("train", options.fewer(epoch // work.rounds))
    elif options.quick:
        command = (command[0], *(min(x, 4) for x in command[1:]))
    rows: dict[System, Row] = {}
    replies: dict[System, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:

        def begin(system: System) -> Child:
            options.say(f"{name}: {system} starts")
            child = options.start(stack, system, work.settings)
            training = command[0] == "train"
            first_s = child.first(*(("train", 1) if training else command))
            if training:
                # All shapes that batches come in are compiled by then.
                child.ask("train", options.fewer(GROUP if name == "sst2" and system in JAXLM else WARMUP))
            replies[system] = []
            rows[system] = {
                "work": name,
                "system": system.name,
                "precision": system.precision,
                "compiled": system.compiled,
                "first_update_s": first_s if training else None,
                "note": NOTES.get((system.name, config.task), ""),
            }
            return child

        systems = []
        for system in work.systems:
            if options.quick and not any(t.work == name and t.is_of(system) for t in TARGETS):
                continue
            if system.name.startswith("transformers") and not importlib.util.find_spec("transformers"):
                options.say(f"{name}: {system} is not installed: pip install -e '.[bench]'")
                continue
            systems.append(system)
        # A machine with a GPU has cores to compile for all of them at once, and its time is dear.
        with ThreadPoolExecutor(len(systems) if options.gpu else 1) as pool:
            children = list(pool.map(begin, systems))
        for i in range(options.fewer(work.rounds, 3)):
            options.say(f"{name}: round {i + 1} of {options.fewer(work.rounds, 3)}")
            first = i % len(children)
            for child in children[first:] + children[:first]:
                # Its batches are all alike, and would take most of the time.
                few = name == "sst2" and child.system == ORIGINAL
                replies[child.system].append(
                    child.ask("train", max(1, command[1] // 20)) if few else child.ask(*command)
                )
        for child in children:
            row, answers = rows[child.system], replies[child.system]
            rounds = [x["tokens"] / x["seconds"] for x in answers]
            row |= {"tokens_per_s": spread(rounds), "rounds": rounds}
            row |= {"peak_mb": answers[-1]["peak_mb"], "loss": answers[-1]["loss"]}
            if name == "sst2":
                row["accuracy"] = child.ask("evaluate")["accuracy"]
    return list(rows.values()), ratios_to_reach(name, list(rows.values()))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios_to_reach(work: str, rows: Sequence[Row]) -> list[Row]:
    """Return the ratios of a work to reach, from its results; none where one of the systems is not there."""
    found = []
    for target in TARGETS:
        ours = [row for row in rows if label(row) == target.ours]
        theirs = [row for row in rows if re.fullmatch(target.against, label(row))]
        if target.work != work or not ours or not theirs:
            continue

        def value(row: Row, name: str = target.quantity) -> float:
            return row[name]["median"] if name == "tokens_per_s" else row[name]

        other = (min if target.at_most else max)(theirs, key=value)
        if target.quantity == "tokens_per_s":
            ratios = [a / b for a, b in zip(ours[0]["rounds"], other["rounds"], strict=True)]
        else:
            ratios = [value(ours[0]) / value(other)]
        note = "" if target.ours == "jaxlm bfloat16" else f"of {target.ours}"
        row = ratio_row(work, label(other), target.quantity, ratios, target.target, target.at_most, note)
        # Without a loss, as of generation, there is nothing that could be wrong but the number of tokens.
        losses = ours[0]["loss"], other["loss"]
        if None not in losses and not losses[0] <= losses[1] * (1 + LOSS_MARGIN):
            row |= {"reached": False, "note": f"does not count: loss {losses[0]:.3f}, theirs {losses[1]:.3f}"}
        found.append(row)
    return found


def ratio_row(
    work: str, against: str, quantity: str, ratios: Sequence[float], target: float, at_most: bool, note: str = ""
) -> Row:
    ratio = statistics.median(ratios)
    return {
        "work": work,
        "against": against,
        "quantity": quantity,
        "ratio": ratio,
        "low": min(ratios),
        "high": max(ratios),
        "target": target,
        "at_most": at_most,
        "reached": ratio <= target if at_most else ratio >= target,
        "note": note,
    }


def starts(options: Options) -> Found:
    """Measure the time from the start of a process to its first update, with nothing compiled before, and again."""
    systems = [JAXLM[1], System("torchlm", "bfloat16", True), TRANSFORMERS]
    systems = [
        system for system in systems if system.name != "transformers" or importlib.util.find_spec("transformers")
    ]
    times: dict[tuple[System, str], list[float]] = {}
    read_data(configs.build(options.settings(MLM)))
    for i in range(options.fewer(3, 1)):
        for system in systems:
            for state in ("cold", "warm"):
                options.say(f"start: {system}, {state}, {i + 1}")
                if state == "cold":
                    for name in ("xla", "inductor"):
                        shutil.rmtree(options.folder / name, ignore_errors=True)
                with contextlib.ExitStack() as stack:
                    child = options.start(stack, system, MLM)
                    times.setdefault((system, state), []).append(child.first("train", 1))
    rows = []
    for (system, state), seconds in times.items():
        rows.append(
            {
                "work": f"start, {state}",
                "system": system.name,
                "precision": system.precision,
                "compiled": system.compiled,
                "tokens_per_s": None,
                "first_update_s": statistics.median(seconds),
                "peak_mb": None,
                "loss": None,
                "note": "",
            }
        )
    ours, other = systems[0], min(systems[1:], key=lambda system: statistics.median(times[system, "cold"]))
    cold = [a / b for a, b in zip(times[ours, "cold"], times[other, "cold"], strict=True)]
    return rows, [
        ratio_row("start", str(other), "first_update_s, cold", cold, 0.25, True),
        ratio_row("start", "the clock", "first_update_s, warm", times[ours, "warm"], 4.0, True, "seconds"),
    ]


def helps(options: Options) -> Found:
    """Measure the time that the help of the training command takes."""
    times = []
    for _ in range(options.fewer(5)):
        started_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "jaxlm.train", "--help"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - started_s)
    return [], [ratio_row("help", "the clock", "seconds to the help", times, 0.7, True, "seconds")]


def tokenizing(options: Options) -> Found:
    """Measure how long it takes to make a text ready, from the start of a process, and with datasets.map."""
    _, data = read_data(configs.build(options.settings(SMALL)))
    path, tokenizer = options.folder / "text.txt", options.folder / "tokenizer.json"
    tokenization.save(data.tokenizer, tokenizer)
    write_corpus(path, 10**6 if options.quick else 10**8)
    ratios = []
    for i in range(options.fewer(3, 1)):
        seconds = {}
        for name in ("data", "datasets.map"):
            options.say(f"tokenizing: {name}, {i + 1}")
            folder = options.folder / f"{name}-{i}"
            settings = {
                **SMALL,
                "data.path": str(path),
                "data.cache_dir": str(folder),
                "tokenizer.path": str(tokenizer),
            }
            with contextlib.ExitStack() as stack:
                seconds[name] = options.start(stack, System(name, "float32"), settings).first("ready")
            shutil.rmtree(folder)
        ratios.append(seconds["datasets.map"] / seconds["data"])
    note = f"{path.stat().st_size / 1e6:.0f} MB, with the start of the process"
    return [], [ratio_row("tokenizing", "datasets.map", "speed of making text ready", ratios, 1.5, False, note)]


def host(options: Options) -> Found:
    """Measure what the host does for an update, and how fast it can read batches, beside whole updates."""
    n = options.fewer(10)
    idle, pipeline = [], []
    with contextlib.ExitStack() as stack:
        child = options.start(stack, JAXLM[1], MLM)
        child.ask("train", 1 + WARMUP)
        child.ask("read_batches", 20)  # what was read ahead
        for i in range(options.fewer(5)):
            options.say(f"host: round {i + 1}")
            step_s = child.ask("train", n)["seconds"] / n
            pipeline.append(step_s / (child.ask("read_batches", 10 * n)["seconds"] / (10 * n)))
            idle.append(child.ask("null_updates", n)["seconds"] / n / step_s)
    return [], [
        ratio_row("host", "the update", "time of the host, at most idle", idle, 0.02, True, "by a null step"),
        ratio_row("host", "the update", "speed of the data", pipeline, 20.0, False),
    ]


def growth(options: Options) -> Found:
    """Measure a small model on a small and a large corpus, over many updates."""
    _, data = read_data(configs.build(options.settings(SMALL)))
    tokenization.save(data.tokenizer, options.folder / "tokenizer.json")
    sizes = {"1 MB": 10**6, "4 MB": 4 * 10**6} if options.quick else {"1 MB": 10**6, "1 GB": 10**9}
    n, rounds = options.fewer(200, 20), options.fewer(20, 4)
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, size in sizes.items():
            path = options.folder / f"{size}.txt"
            write_corpus(path, size)
            settings = {
                **SMALL,
                "data.path": str(path),
                "data.cache_dir": str(options.folder),
                "tokenizer.path": str(options.folder / "tokenizer.json"),
            }
            reader = options.start(stack, System("data", "float32"), settings)
            options.say(f"growth: {name} of text made ready in {reader.first('ready'):.0f} s")
            if not children:  # so that none of those measured keeps the memory that compiling took
                with contextlib.ExitStack() as alone:
                    options.start(alone, JAXLM[0], settings).ask("train", 1)
            children[name] = options.start(stack, JAXLM[0], settings)
            children[name].ask("train", 1 + WARMUP)
        replies: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
        for i in range(rounds):
            options.say(f"growth: round {i + 1} of {rounds}, {n} updates each")
            for name in list(sizes)[:: (-1) ** i]:
                replies[name].append(children[name].ask("train", n))
    small, large = replies.values()

    def per_token(reply: dict[str, Any]) -> float:
        return reply["seconds"] / reply["tokens"]

    quarter = rounds // 4
    time_size = [per_token(b) / per_token(a) for a, b in zip(small, large, strict=True)]
    memory_size = [b["own_mb"] / a["own_mb"] for a, b in zip(small, large, strict=True)]
    time_updates = [per_token(b) / per_token(a) for a, b in zip(small[:quarter], small[-quarter:], strict=True)]
    memory_updates = [b["own_mb"] / a["own_mb"] for a, b in zip(small[:quarter], small[-quarter:], strict=True)]
    across, updates = "{1} for {0}".format(*sizes), f"{n * rounds:,} updates, end for start"
    return [], [
        ratio_row("growth", across, "time per token, corpus", time_size, 1.1, True),
        ratio_row("growth", across, "memory, corpus", memory_size, 1.1, True, "but for pages of the mapped file"),
        ratio_row("growth", updates, "time per token, updates", time_updates, 1.1, True),
        ratio_row("growth", updates, "memory, updates", memory_updates, 1.1, True),
    ]


def write_corpus(path: Path, n_bytes: int) -> None:
    """Write a text of about that size: paragraphs of the embedded text over and over, an article a line."""
    articles = [" ".join(x.text.split()) for x in embedded.python_reference(configs.Config().data).articles()]
    lines = [article[i : i + 2000] + "\n" for article in articles for i in range(0, len(article), 2000)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < n_bytes:
            for line in lines:
                written += file.write(line)
                if written >= n_bytes:
                    break


def limit(options: Options) -> Found:
    """Measure which share of the machine's peak an update of BERT-base size reaches, and its products alone."""
    n_flops = flops.flops_per_update(configs.build(options.settings(BASE)))
    reached = []
    with contextlib.ExitStack() as stack:
        child = options.start(stack, JAXLM[1], BASE)
        others = options.start(stack, System("PyTorch", "bfloat16"), BASE)
        child.ask("train", 1 + WARMUP)
        options.say("limit: the products by themselves")
        products, others_products = child.ask("products"), others.ask("products")
        for i in range(options.fewer(5)):
            options.say(f"limit: round {i + 1}")
            reached.append(n_flops * 2 / child.ask("train", 2)["seconds"])
    peaks = {"JAX": products["peak_flops"], "PyTorch": others_products["peak_flops"]}
    by = max(peaks, key=lambda name: peaks[name])
    allowed = products["flops"] / products["seconds"] / peaks[by]
    shares = [x / peaks[by] for x in reached]
    note = f"{peaks[by] / 1e9:,.0f} GFLOP/s by {by}; the products by themselves: {allowed:.2f}"
    return [], [
        ratio_row("limit, BERT-base size", "bfloat16 products at most", "share of the peak", shares, 0.6, False, note)
    ]


OTHERS: dict[str, Callable[[Options], Found]] = {
    "start": starts,
    "help": helps,
    "tokenizing": tokenizing,
    "host": host,
    "growth": growth,
    "limit": limit,
}
NAMES = (*WORKS, *OTHERS)
ALL_WORKS = WORKS | GPU_WORKS


def measure(chosen: Sequence[str], options: Options, found: dict[str, Any], path: Path | None) -> None:
    """Measure the works in turn, and write what has been found to `path` after each."""
    load = found["machine"]["load"]
    if load and load > BUSY and not options.quick:
        options.say(f"warning: the machine is busy (load {load}); figures will be wrong")
    for name in chosen:
        began_s = time.monotonic()
        rows, ratios = side_by_side(name, ALL_WORKS[name], options) if name in ALL_WORKS else OTHERS[name](options)
        options.say(f"{name}: done in {time.monotonic() - began_s:.0f} s")
        found["results"] += rows
        found["ratios"] += ratios
        if path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def machine(is_on_gpu: bool) -> dict[str, Any]:
    """Return what the figures are of."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    described = environment.describe(0, "cpu")
    kept = {name: described[name] for name in ("started", "system", "python", "packages", "commit")}
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    found = {"processor": model[1] if model else described["system"], "threads": N_THREADS, "load": load, **kept}
    return found | ({"gpu": gpu()} if is_on_gpu else {})


def gpu() -> str:
    """Return the name of the first GPU. Raises UserError if there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    raise UserError("--gpu: nvidia-smi tells of no GPU; leave it out to measure on the CPU")


def nothing_found(args: argparse.Namespace, chosen: Sequence[str]) -> dict[str, Any]:
    """Return what the JSON has before anything is measured: with --only, what it had of other works."""
    found = {"quick": args.quick, "sst2": "real" if args.sst2 else "embedded sentences"}
    found |= {"machine": machine(args.gpu), "results": [], "ratios": []}
    if args.only and args.json and args.json.exists():
        kept = read_found("--json", args.json)
        if ("gpu" in kept["machine"]) != args.gpu:
            raise UserError(f"--json {args.json}: it is of a {'CPU' if args.gpu else 'GPU'}; name another")
        if kept["quick"] != args.quick:
            raise UserError(
                f"--json {args.json}: it was made with{'' if kept['quick'] else 'out'} --quick; name another"
            )
        for part in ("results", "ratios"):
            found[part] = [row for row in kept[part] if not row["work"].startswith(tuple(chosen))]
    return found


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(GPU_WORKS) if args.gpu else NAMES


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what would only be found out after hours."""
    names = names_of(args)
    for name in args.only or []:
        if not any(x.startswith(name) for x in names):
            raise UserError(f"--only {name}: there is no such work; there are {', '.join(names)}")
    for file in ("train.tsv", "dev.tsv") if args.sst2 else ():
        if not (args.sst2 / file).is_file():
            raise UserError(f"--sst2 {args.sst2}: it has no {file}; give the folder of SST-2 as in GLUE")
    for flag in ("json", "plot"):
        path = getattr(args, flag)
        if path and not path.parent.is_dir():
            raise UserError(f"--{flag} {path}: there is no folder {path.parent}; make it first")
    if args.markdown and not args.read:
        read_page(args.markdown, args.gpu)
    if importlib.util.find_spec("torch") is None and not args.read:
        raise UserError("torch is not installed; pip install -e '.[bench]'")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python scripts/benchmark.py", description=__doc__.partition("\n")[0])

    def file(flag: str, metavar: str, help: str) -> None:
        parser.add_argument(flag, type=Path, metavar=metavar, help=help)

    parser.add_argument("--only", action="append", metavar="NAME", help=f"{', '.join(NAMES)}; again for several")
    parser.add_argument("--gpu", action="store_true", help=f"on the GPU, these: {', '.join(GPU_WORKS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and only what ratios need: does it work?")
    file("--sst2", "FOLDER", "train.tsv and dev.tsv of SST-2; else embedded sentences")
    file("--json", "FILE", "write it after each work; with --only, rows of others stay")
    file("--read", "FILE", "measure nothing: show what --json has written")
    file("--compare", "OLD.json", "exit with 1 if a ratio became worse")
    file("--plot", "FILE", "picture of the speeds")
    file("--markdown", "FILE", "page between whose marks the tables go")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, tell and compare as the command line says; return the exit status."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 170)  # wide enough for the tables, in a file
    progress = Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not without ending the children
    with reported(debug=False), tempfile.TemporaryDirectory() as folder:
        check(args)
        old = read_found("--compare", args.compare) if args.compare else None
        if args.read:
            found = read_found("--read", args.read)
        else:
            chosen = [name for name in names_of(args) if not args.only or name.startswith(tuple(args.only))]
            found = nothing_found(args, chosen)

            def say(text: str) -> None:
                progress.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False)

            measure(chosen, Options(args.gpu, args.quick, args.sst2, Path(folder), say), found, args.json)
        console.print(about(found))
        show(console, *results_table(found["results"]))
        show(console, *ratios_table(found["ratios"]))
        if args.plot:
            draw(args.plot, found)
        if args.markdown:
            write_markdown(args.markdown, found)
        if old is None:
            return 0
        if old["quick"] != found["quick"]:
            raise UserError(f"--compare {args.compare}: one of both was made with --quick, the other was not")
        cells, is_worse = compare(old, found)
        if not cells:
            raise UserError(f"--compare {args.compare}: it has no ratio that was measured now; leave out --only")
        show(console, ["work", "quantity", "against", "before", "now", "change", "noise", ""], cells)
        return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
