"""How long until the loss is good: trains the same model on the same tokens by several systems, and compares.

    python scripts/time_to_loss.py --work shakespeare --text input.txt --nanogpt NANOGPT --out FOLDER
    python scripts/time_to_loss.py --work mlm --text prose.txt --out FOLDER --plot picture.png
    python scripts/time_to_loss.py --work shakespeare --text input.txt --out FOLDER --quick    # tiny: whether it works

NANOGPT is a clone of github.com/karpathy/nanoGPT, whose train.py runs as it is, in a copy. Each system has the best of
three rates, by its loss after a tenth of the updates. Systems take turns: first all of the first rate, and so on. Each
training is a process of its own with an empty compile cache. FOLDER keeps the results; the same command continues. With
--minutes, it starts nothing more after that time, and shows the results so far.

Seconds are counted from the start of the process, compilation and evaluations included, unless a column says otherwise.
CPU seconds are those of all threads: other work on the machine changes them less.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_tables import markdown
from time_to_loss_child import POINT

from jaxlm.errors import UserError, reported

HERE = Path(__file__).parent
Record = dict[str, Any]  # rate, points: [{update, loss, seconds, cpu_s, evaluations_s}], first_update_s


@dataclass(frozen=True)
class System:
    """One way to train: `kind` is nanogpt, transformers, torchlm or jaxlm; settings are of jaxlm's."""

    name: str
    kind: str
    rates: tuple[float, float, float]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """A text, a model and a number of updates, and the systems that train it."""

    settings: dict[str, Any]
    n_updates: int
    systems: tuple[System, ...]


ORIGINAL = {"model.positions": "fixed", "model.final_norm": False, "model.tied_embedding": False}
MODERN = {
    **{"model.norm": "rmsnorm", "model.mlp": "relu2", "model.biases": "none", "model.final_norm": True},
    **{"model.qk_norm": True, "model.positions": "rotary", "train.optimizer": "muon"},
}
RATES, MUON_RATES = (5e-4, 1e-3, 2e-3), (2e-3, 4e-3, 8e-3)
OURS = (
    System("torchlm", "torchlm", RATES),
    System("jaxlm, original design", "jaxlm", RATES, ORIGINAL),
    System("jaxlm", "jaxlm", RATES),
    System("jaxlm, modern, Muon", "jaxlm", MUON_RATES, MODERN),
)
PEERS = (System("nanoGPT", "nanogpt", RATES), System("GPT-2, Trainer", "transformers", RATES))
SIZE = {
    **{"model.d_model": 256, "model.n_layers": 4, "model.n_heads": 4, "model.seq_len": 128, "model.dropout": 0.0},
    **{"train.batch_size": 16, "train.warmup_steps": 100, "train.weight_decay": 0.1, "train.beta2": 0.99},
    **{"data.test_fraction": 0.0, "data.validation_tokens": 50_000, "model.positions": "rotary"},
}
WORKS = {
    "shakespeare": Work({"config": "gpt_shakespeare"}, 2000, (*PEERS, *OURS)),
    "prose": Work(
        {"task": "gpt", **SIZE, "tokenizer.kind": "bpe", "model.pad_id": -1, "model.tied_embedding": True},
        2000,
        (*PEERS, *OURS),
    ),
    "mlm": Work({"task": "mlm", **SIZE}, 2000, (System("BERT, Trainer", "transformers", RATES), *OURS)),
}
QUICK = {
    **{"model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "model.seq_len": 16, "train.batch_size": 4},
    **{"data.validation_tokens": 2_000, "debug": True},
}


def settings_of(args: argparse.Namespace, system: System | None, rate: float, n_updates: int) -> list[str]:
    """Return the command line of a training with jaxlm, from which the others have their sizes, too."""
    changes = WORKS[args.work].settings | (QUICK if args.quick else {}) | (system.settings if system else {})
    changes |= {"data.path": args.text.absolute(), "data.cache_dir": args.out.absolute() / "cache"}
    changes |= {"train.learning_rate": rate, "train.min_learning_rate": rate / 10, "train.max_steps": n_updates}
    changes |= {"train.warmup_steps": n_updates // 20, "train.eval_interval": max(n_updates // 20, 1)}
    changes |= {"data.final_tokens": 2_000}  # after the last point, of no use here
    if system:
        changes |= {"tokenizer.path": args.out.absolute() / "tokenizer.json"}
    return [word for name, x in changes.items() for word in (f"--{name}", str(x).lower() if x in (0, 1) else str(x))]


def nanogpt_command(args: argparse.Namespace, rate: float, n_updates: int) -> tuple[list[str], Path]:
    """Return nanoGPT's command as its README has it for a CPU, and the copy of it in which it runs."""
    from jaxlm import config as configs

    copy = args.out / "nanogpt"
    if not copy.exists():
        shutil.copytree(args.nanogpt, copy, ignore=shutil.ignore_patterns(".git"))
        (copy / "data" / "ours").mkdir()
        for name in ("train.bin", "val.bin", "meta.pkl"):
            shutil.copy(args.out / name, copy / "data" / "ours" / name)
    config, _ = configs.load(settings_of(args, None, rate, n_updates))
    model, train = config.model, config.train
    options = {
        **{"dataset": "ours", "device": "cpu", "compile": False, "log_interval": 1, "out_dir": "out"},
        **{"eval_interval": train.eval_interval, "eval_iters": 20},
        **{"block_size": model.seq_len, "batch_size": train.batch_size, "n_layer": model.n_layers},
        **{"n_head": model.n_heads, "n_embd": model.d_model, "dropout": model.dropout, "max_iters": n_updates},
        **{"lr_decay_iters": n_updates, "learning_rate": rate, "min_lr": rate / 10},
        **{"warmup_iters": train.warmup_steps, "beta2": train.beta2, "weight_decay": train.weight_decay},
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *words], copy


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, all threads and ended children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(x) for x in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def train(args: argparse.Namespace, system: System, rate: float, n_updates: int) -> Record:
    """Run one training, or read it where it has run."""
    name = f"{system.name}-{rate:g}-{n_updates}".replace(", ", "_").replace(" ", "_")
    path = args.out / f"{name}.json"
    if path.exists():
        found: Record = json.loads(path.read_text())
        return found
    work = args.out / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for file in ("train.npy", "validation.npy"):
        (work / file).symlink_to((args.out / file).absolute())
    if system.kind == "nanogpt":
        command, cwd = nanogpt_command(args, rate, n_updates)
    else:
        spec = {"system": system.kind, "settings": settings_of(args, system, rate, n_updates), "folder": str(work)}
        command, cwd = [sys.executable, "-u", str(HERE / "time_to_loss_child.py"), json.dumps(spec)], Path.cwd()
    # Nothing is compiled before: each training has its own caches.
    env = os.environ | {"XDG_CACHE_HOME": str(work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    print(f"{time.strftime('%H:%M')} {name} ...", flush=True)
    record: Record = {"system": system.name, "rate": rate, "n_updates": n_updates, "points": []}
    started_s = time.monotonic()
    with (args.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        evaluations_s, before_s = 0.0, 0.0
        for line in process.stdout:
            log.write(line)
            now_s = time.monotonic() - started_s
            times = {"seconds": now_s, "cpu_s": cpu_seconds(process.pid)}
            if line.startswith(POINT):
                values = json.loads(line.removeprefix(POINT))
                if "loss" in values:
                    record["points"].append(times | values)
                else:
                    record |= values
            elif system.kind == "nanogpt" and line.startswith("step "):  # step 250: train loss 2.4, val loss 2.4
                evaluations_s += now_s - before_s
                update, loss = int(line.split()[1].rstrip(":")), float(line.split()[-1])
                record["points"].append(times | {"update": update, "loss": loss, "evaluations_s": evaluations_s})
            elif system.kind == "nanogpt" and line.startswith("number of parameters"):
                record["parameters"] = float(line.split()[-1].rstrip("M")) * 1e6
            elif system.kind == "nanogpt" and line.startswith("iter 0:"):
                record["first_update_s"] = now_s - before_s
            before_s = now_s
    if process.wait() or not record["points"]:
        raise UserError(f"{name}: failed with status {process.returncode}; its output is in {args.out / name}.log")
    record["points"] = [x for x in record["points"] if x["update"]]
    shutil.rmtree(work)
    path.write_text(json.dumps(record, indent=1))
    return record


def reached(record: Record, loss: float, key: str = "seconds") -> float | None:
    """Return the seconds after which a training first had a loss, or a lower one; None: it never had."""
    return next((x[key] for x in record["points"] if x["loss"] <= loss), None)


def summary(records: list[Record], peers: set[str]) -> str:
    """Return the tables: each system's end, and how long each takes to the final losses of the peers."""
    rows = []
    for record in records:
        last = record["points"][-1]
        without_s = last["seconds"] - last["evaluations_s"]
        cells = [record["system"], f"{record['rate']:g}", f"{last['loss']:.3f}", f"{last['seconds']:.0f}"]
        rows.append([*cells, f"{without_s:.0f}", f"{last['cpu_s']:.0f}", f"{record.get('first_update_s', 0):.1f}"])
    heads = ["system", "rate", "final loss", "seconds", "without evaluations", "CPU seconds", "first update"]
    parts = [markdown(heads, rows)]
    for peer in (record for record in records if record["system"] in peers):
        end = peer["points"][-1]
        rows = []
        for record in records:
            times = [reached(record, end["loss"], key) for key in ("seconds", "cpu_s", "update")]
            if None in times:
                rows.append([record["system"], "never", "", "", ""])
            else:
                seconds, cpu_s, update = (float(x or 0) for x in times)
                shares = f"{seconds / end['seconds']:.2f}", f"{cpu_s / end['cpu_s']:.2f}"
                rows.append([record["system"], f"{update:,.0f}", f"{seconds:.0f}", *shares])
        heads = [
            f"to {peer['system']}'s final {end['loss']:.3f}",
            "updates",
            "seconds",
            "share of its",
            "share of its CPU",
        ]
        parts.append(markdown(heads, rows))
    return "\n".join(parts)


def draw(path: Path, records: list[Record], tokens: int, title: str) -> None:
    """Draw validation loss against seconds and against tokens."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -e '.[bench]'") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for record in records:
        losses = [x["loss"] for x in record["points"]]
        style: dict[str, Any] = {"linewidth": 2.2 if record["system"].startswith("jaxlm") else 1.4}
        style |= {} if record["system"].startswith("jaxlm") else {"linestyle": "--"}
        left.plot([x["seconds"] for x in record["points"]], losses, label=record["system"], **style)
        right.plot([x["update"] * tokens / 1e6 for x in record["points"]], losses, **style)
    lowest = min(x["loss"] for record in records for x in record["points"])
    highest = sorted(record["points"][0]["loss"] for record in records)[-1]
    left.set(xlabel="seconds since the start of the process", ylabel="validation loss", ylim=(lowest - 0.05, highest))
    left.set_xscale("log")
    right.set(xlabel="million tokens")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Run what a command line asks for; return the exit status."""
    args = make_parser().parse_args(argv)
    work = WORKS[args.work]
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.text.is_file():
        raise UserError(f"--text {args.text}: there is no such file; give the text to train on")
    if args.nanogpt and not (args.nanogpt / "train.py").is_file():
        raise UserError(f"--nanogpt {args.nanogpt}: has no train.py; give a clone of github.com/karpathy/nanoGPT")
    systems = [x for x in work.systems if x.kind != "nanogpt" or args.nanogpt]
    systems = [x for x in systems if not args.only or x.name in args.only]
    if not systems:
        raise UserError(f"--only: there are {', '.join(x.name for x in work.systems)}; name some of them")
    deadline_s = time.monotonic() + 60 * args.minutes
    if not (args.out / "meta.pkl").exists():
        spec = {"system": "prepare", "settings": settings_of(args, None, 1e-3, 10), "folder": str(args.out)}
        subprocess.run([sys.executable, str(HERE / "time_to_loss_child.py"), json.dumps(spec)], check=True)
    n_updates = args.updates or (40 if args.quick else work.n_updates)
    short: dict[str, list[Record]] = {x.name: [] for x in systems}
    for i in range(args.rates):
        for system in systems:
            if time.monotonic() < deadline_s and args.rates > 1:
                short[system.name].append(train(args, system, system.rates[i], max(n_updates // 10, 1)))
    records = []
    for system in systems:
        tried = [(x["points"][-1]["loss"], x["rate"]) for x in short[system.name]]
        rate = min(tried)[1] if tried else system.rates[1]
        if time.monotonic() < deadline_s:
            records.append(train(args, system, rate, n_updates))
        else:
            print(f"{system.name}: not trained, since {args.minutes:g} minutes are over; the same command goes on")
    print(summary(records, {x.name for x in systems if x.kind in ("nanogpt", "transformers")}))
    if args.plot and records:
        from jaxlm import config as configs

        config, _ = configs.load(settings_of(args, None, 1e-3, 10))
        draw(args.plot, records, config.train.batch_size * config.model.seq_len, f"{args.work}: time to a loss")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Trains the same model by several systems, and compares their losses.")
    parser.add_argument("--work", choices=WORKS, required=True, help="what to train")
    parser.add_argument("--text", type=Path, required=True, help="text to train on")
    parser.add_argument("--nanogpt", type=Path, help="clone of nanoGPT; without it, nanoGPT is left out")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is done; the same one goes on")
    parser.add_argument("--only", action="append", help="a system; repeatable (default: all)")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--minutes", type=float, default=180, help="after so many, begin nothing new (default: 180)")
    parser.add_argument("--updates", type=int, default=0, help="updates of a training (default: the work's)")
    parser.add_argument("--rates", type=int, choices=(1, 2, 3), default=3, help="1: no search, the middle rate")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works")
    return parser


if __name__ == "__main__":
    sys.exit(main())
