"""Ends runs in all the ways that runs end, goes on with --resume auto, and compares with a run that nothing disturbed.

    python scripts/inject_faults.py [kills] [terms] [disk] [bytes] [data] [--kills 50]

kills   kill -9 at random moments of one run, resumed each time: bit for bit the same weights, moments and rows
terms   the same with SIGTERM, of jaxlm and of torchlm in two processes
disk    a disk (a small tmpfs, which needs root) with no room for a checkpoint at each save, until there is room again
bytes   each file of the newest checkpoint flipped at a byte, cut short, or gone: named, set aside, the one before used
data    a source that changes between start and resume: refused by name

Prints a table; the exit status is 1 if anything was not as it should be.
"""

import argparse
import collections
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = (
    "--task mlm --model.d-model 16 --model.n-layers 2 --model.n-heads 2 --model.seq-len 16 --model.dropout 0.2 "
    "--train.batch-size 4 --train.warmup-steps 20 --train.eval-interval 25 --train.log-interval 3 "
    "--data.validation-fraction 0.02 --data.test-fraction 0.02 "
)
random.seed(0)


def command(program: str, settings: str, n_processes: int = 1) -> list[str]:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {n_processes}" if n_processes > 1 else ""
    return [sys.executable, *shlex.split(f"{launcher} -m {program}.train {settings}")]


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, what it prints appended to a file."""
    with open(log, "a") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=ROOT, process_group=0)


def finish(arguments: list[str], log: Path) -> int:
    return start(arguments, log).wait()


def rows(run: Path) -> list[dict]:
    if not (run / "metrics.jsonl").exists():  # it was interrupted before its first update
        return []
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name != "tokens_per_s"} for line in lines]


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Return what is not the same in two runs: rows, samples, and the last checkpoint."""
    from jaxlm import checksums, convert

    found = []
    if rows(run) != rows(undisturbed):
        found.append("metrics.jsonl")
    if (run / "samples.txt").read_bytes() != (undisturbed / "samples.txt").read_bytes():
        found.append("samples.txt")
    one, other = (convert.read(checksums.finished_in(x / "checkpoints")[-1][1]) for x in (run, undisturbed))
    for snapshot in (one, other):
        snapshot.info.pop("val_loss")  # which a checkpoint lacks where a signal has ended its evaluation
    parts = {"weights": (one.weights, other.weights)}
    assert one.moments and other.moments
    for i, name in enumerate(("first moments", "second moments")):
        parts[name] = one.moments[i], other.moments[i]
    found += [name for name, (a, b) in parts.items() if any(a[key].tobytes() != b[key].tobytes() for key in a | b)]
    return found + (["counters"] if (one.n_updates, one.info) != (other.n_updates, other.info) else [])


def interrupted(
    folder: Path, program: str, number: signal.Signals, n: int, n_processes: int = 1
) -> tuple[str, list[str]]:
    """Interrupt one run n times at random moments, and finish it; return what happened, and what is not the same.

    A third of the moments lie before the first update: while a framework is loaded, data prepared, or a step compiled.
    """
    steps = 300 + 120 * n
    settings = f"{TINY} --train.max-steps {steps} --run.dir "
    started_s = time.monotonic()
    undisturbed = start(command(program, f"{settings}{folder}/undisturbed", n_processes), folder / "undisturbed.log")
    wait(
        lambda: "first update done" in (folder / "undisturbed.log").read_text(), undisturbed, folder / "undisturbed.log"
    )
    setup_s = time.monotonic() - started_s
    undisturbed.wait()
    arguments = command(program, f"{settings}{folder}/run --resume auto", n_processes)
    log, statuses = folder / "run.log", collections.Counter[int]()
    for _ in range(n):
        n_before = len(log.read_text()) if log.exists() else 0
        process = start(arguments, log)
        if random.random() < 1 / 3:
            time.sleep(random.uniform(0, setup_s))
        else:

            def is_training(n_before: int = n_before) -> bool:
                return "first update done" in log.read_text()[n_before:]

            wait(is_training, process, log)
            time.sleep(random.uniform(0, 1))
        if process.poll() is None and number == signal.SIGKILL:
            os.killpg(process.pid, number)
        elif process.poll() is None:
            process.send_signal(number)  # torchrun passes it on
        if process.wait() == 0:  # it was faster
            break
        statuses[process.returncode] += 1
    n_done = max((row["step"] for row in rows(folder / "run")), default=0)
    status = finish(arguments, log)
    text = log.read_text()
    places = len(set(re.findall(r"after ([\d,]+) updates and", text)))
    told = ", ".join(f"{count} with status {code}" for code, count in sorted(statuses.items()))
    wrong = [] if status == 0 else [f"the last run exits {status}"]
    if n_processes == 1 and "Traceback" in text:  # torchrun prints one of its own for each signal
        wrong.append("a traceback")
    n = statuses.total()
    what = (
        f"{n} interrupts of one run ({told}), resumed at {places} steps, {n_done:,} of {steps:,} updates done by then"
    )
    return what, wrong + differences(folder / "run", folder / "undisturbed")


def kills(folder: Path, n: int) -> Iterator[tuple[str, str, list[str]]]:
    yield "kill -9", *interrupted(folder, "jaxlm", signal.SIGKILL, n)


def terms(folder: Path, n: int) -> Iterator[tuple[str, str, list[str]]]:
    for name, program, n_processes in (("jaxlm", "jaxlm", 1), ("torchlm, two processes", "torchlm", 2)):
        (folder / program).mkdir()
        yield (
            f"SIGTERM: {name}",
            *interrupted(folder / program, program, signal.SIGTERM, max(n // 5, 1), n_processes),
        )


def disk(folder: Path, n: int) -> Iterator[tuple[str, str, list[str]]]:
    small = folder / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small]).returncode:
        yield "disk full", "not tried: a tmpfs needs root", []
        return
    try:
        filler = small / "filler"
        filler.write_bytes(bytes(5_200_000))
        process = start(command("jaxlm", f"{TINY} --train.max-steps 100000 --run.dir {small}/run"), folder / "log")
        log = folder / "log"
        wait(lambda: log.read_text().count("could not be saved") >= 3, process, log)
        n_failed = log.read_text().count("could not be saved")
        filler.unlink()
        wait(lambda: any((small / "run" / "checkpoints").glob("*/checksums.json")), process, log)
        process.send_signal(signal.SIGTERM)
        wrong = [] if process.wait() == 143 else ["it does not end with 143"]
        if "Traceback" in log.read_text():
            wrong.append("a traceback")
        yield "disk full", f"{n_failed} saves failed with one line each, later ones did not", wrong
    finally:
        subprocess.run(["umount", small])


def damage(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    content = path.read_bytes()
    place = random.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
    yield "flipped", lambda: write(path, flipped)
    yield "cut short", lambda: write(path, content[: len(content) // 2])
    yield "gone", path.unlink


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damaged_bytes(folder: Path, n: int) -> Iterator[tuple[str, str, list[str]]]:
    from jaxlm import formats
    from jaxlm import start as start_of

    run, whole = folder / "run", folder / "whole"
    settings = f"{TINY} --train.max-steps 50 --run.keep-checkpoints 2 --run.dir {run}"
    finish(command("jaxlm", settings), folder / "log")
    run.rename(whole)
    files = [path.relative_to(whole) for path in sorted((whole / "checkpoints" / "50").rglob("*")) if path.is_file()]
    n_tried, wrong = 0, []
    shutil.copytree(whole, run)
    for file in files:
        for what, apply in damage(run / file):
            apply()
            found = start_of.find({"resume": "auto", "run.dir": str(run)}, formats.RUN)
            n_tried += 1
            if found.path != run / "checkpoints" / "25":
                wrong.append(f"{file} {what}: {found.path}")
            shutil.copyfile(whole / file, run / file)
    (run / files[0]).unlink()
    # Once as a process: the damaged one is told and set aside, and the run ends as the undisturbed one.
    status = finish(command("jaxlm", f"{settings} --resume auto"), folder / "log2")
    if status or not list(run.glob("checkpoints/*.damaged")) or "set aside" not in (folder / "log2").read_text():
        wrong.append("not set aside")
    yield "damaged bytes", f"{n_tried} ways to damage {len(files)} files", wrong + differences(run, whole)


def data(folder: Path, n: int) -> Iterator[tuple[str, str, list[str]]]:
    text = folder / "text.txt"
    lines = [f"{i} birds sit on wire {i * 7919 % 1000} and sing of number {i * 104729 % 9973}\n" for i in range(2000)]
    text.write_text("".join(lines))
    settings = f"{TINY} --train.max-steps 10 --run.dir {folder}/run --data.path {text} --resume auto"
    finish(command("jaxlm", settings), folder / "log")
    before = {
        path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock"
    }
    text.write_text("".join(lines[1:]))
    status = finish(command("jaxlm", f"{settings} --train.max-steps 20"), folder / "log2")
    told = (folder / "log2").read_text().splitlines()[-1]
    wrong = [] if status == 2 and "the data have changed" in told and str(text) in told else [told]
    after = {path: path.read_bytes() for path in before if path.exists()}
    yield "changed data", f"refused: {told[:100]} ...", wrong + ([] if after == before else ["the run has changed"])


def wait(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    until_s = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > until_s:
            sys.exit(f"ended (status {process.poll()}), or waited for too long: {log.read_text()[-2000:]}")
        time.sleep(0.05)


FAULTS = {"kills": kills, "terms": terms, "disk": disk, "bytes": damaged_bytes, "data": data}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all unless given")
    parser.add_argument("--kills", type=int, default=50, help="how often a run is killed (a fifth of it: terms)")
    args = parser.parse_args()
    if unknown := set(args.faults) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for name in args.faults or FAULTS:
            place, started_s = Path(folder) / name, time.monotonic()
            place.mkdir()
            for fault, what, wrong in FAULTS[name](place, args.kills):
                verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "as it should be"
                print(f"{fault:32} {time.monotonic() - started_s:5.0f} s  {verdict}\n    {what}", flush=True)
                n_wrong += bool(wrong)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
