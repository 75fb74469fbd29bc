"""Ends, damages and misleads runs in every way that we know, and looks at what becomes of them.

    python scripts/torture.py [TRIAL ...] [--seed 0] [--quick] [--markdown jaxlm/training/CHECKPOINTS.md]

kills      kill -9 at random moments of one run, resumed each time: the same weights, moments and rows, bit for bit
terms      the same with SIGTERM, of jaxlm and of torchlm in two processes
disk       a disk with no room for a checkpoint until there is room again (a small tmpfs, which needs root)
end        a disk that is full to the end: the exit status and the summary say that no checkpoint was saved
bytes      each file of the newest checkpoint flipped at a byte, truncated, or removed: set aside, the one before used
data       a source that changes between start and resume: refused by name
unmounted  checkpoints in a folder that is not there, is another one, or disappears: nothing is removed
paths      folders and files whose names have every character that a file system allows
logs       metrics.jsonl and samples.txt with damaged lines: the run resumes
caches     damaged token caches and tokenizers: rebuilt, the same weights
hostile    weights, tokenizers, settings and data made to break a reader: one line, and no code of theirs runs

All random choices depend on the seed. Prints a table; the exit status is 1 if anything was wrong.
"""

import argparse
import collections
import gzip
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.weights import snapshots

ROOT = Path(__file__).parent.parent
Trial = tuple[str, str, list[str]]  # a name, what was tried, and what was wrong
REFUSED = "refused by name, nothing removed"
NO_MOUNT = "not tried: a small disk needs root"
TINY = (
    "--task mlm --model.d-model 16 --model.n-layers 2 --model.n-heads 2 --model.seq-len 16 --model.dropout 0.2 "
    "--train.batch-size 4 --train.warmup-steps 20 --train.eval-interval 25 --train.log-interval 3 "
    "--data.validation-fraction 0.02 --data.test-fraction 0.02 "
)


def command(program: str, settings: str, n_processes: int = 1) -> list[str]:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {n_processes}" if n_processes > 1 else ""
    module = program if "." in program else f"{program}.train"
    return [sys.executable, *shlex.split(f"{launcher} -m {module} {settings}")]


def start(arguments: list[str], log: Path, cwd: Path = ROOT) -> subprocess.Popen:
    """Start a command in a process group of its own, what it prints appended to a file."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "ab") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=env, process_group=0)


def finish(arguments: list[str], log: Path, cwd: Path = ROOT) -> int:
    return start(arguments, log, cwd).wait()


def rows(run: Path) -> list[dict]:
    if not (run / "metrics.jsonl").exists():  # it was interrupted before its first update
        return []
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name != "tokens_per_s"} for line in lines]


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Return what is not the same in two runs: rows, samples, and the last checkpoint."""
    from jaxlm.io import checksums

    found = []
    if rows(run) != rows(undisturbed):
        found.append("metrics.jsonl")
    if (run / "samples.txt").read_bytes() != (undisturbed / "samples.txt").read_bytes():
        found.append("samples.txt")
    one, other = (snapshots.read(checksums.finished_in(x / "checkpoints")[-1][1]) for x in (run, undisturbed))
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
    steps = 300 + 400 * n
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


def kills(folder: Path, is_quick: bool) -> Iterator[Trial]:
    yield "kill -9", *interrupted(folder, "jaxlm", signal.SIGKILL, 3 if is_quick else 50)


def terms(folder: Path, is_quick: bool) -> Iterator[Trial]:
    for name, program, n_processes in (("jaxlm", "jaxlm", 1), ("torchlm, two processes", "torchlm", 2)):
        (folder / program).mkdir()
        yield (
            f"SIGTERM: {name}",
            *interrupted(folder / program, program, signal.SIGTERM, 1 if is_quick else 10, n_processes),
        )


def disk(folder: Path, is_quick: bool) -> Iterator[Trial]:
    small = folder / "small"
    if not mounted(small, "6m"):
        yield "disk full for a while", NO_MOUNT, []
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
        yield "disk full for a while", f"{n_failed} saves failed with one line each, later ones did not", wrong
    finally:
        subprocess.run(["umount", small])


def mounted(folder: Path, size: str) -> bool:
    """Mount a small disk; return whether that is possible here."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0


def end(folder: Path, is_quick: bool) -> Iterator[Trial]:
    for program in ("jaxlm", "torchlm"):
        small, run, log = folder / f"small_{program}", folder / f"run_{program}", folder / f"{program}.log"
        if not mounted(small, "1m"):
            yield f"disk full to the end: {program}", NO_MOUNT, []
            continue
        try:
            (small / "filler").write_bytes(bytes(1_000_000))
            settings = f"{TINY} --train.max-steps 50 --run.dir {run} --run.checkpoint-dir {small}/checkpoints"
            status = finish(command(program, settings), log)
        finally:
            subprocess.run(["umount", small])
        text = log.read_text()
        wrong = [] if status == 1 else [f"status {status}"]
        wrong += [] if "scores of step" in text else ["the scores are not shown"]
        wrong += ["a traceback"] if "Traceback" in text else []
        wrong += ["it names a way to use weights that are not there"] if "jaxlm.predict" in text else []
        listed = subprocess.run(command("jaxlm.runs", f"show {run}"), capture_output=True, text=True, cwd=ROOT).stdout
        wrong += ["jaxlm.runs calls it finished"] if "finished" in listed else []
        yield f"disk full to the end: {program}", f"status {status}, scores shown, no checkpoint claimed", wrong


def damage(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    content = path.read_bytes()
    place = random.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
    yield "flipped", lambda: write(path, flipped)
    yield "cut short", lambda: write(path, content[: len(content) // 2])
    yield "gone", path.unlink


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def damaged_bytes(folder: Path, is_quick: bool) -> Iterator[Trial]:
    from jaxlm.training import resume as start_of
    from jaxlm.weights import formats

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
    # Once as a process: the damaged one is reported and set aside, and the run ends like the undisturbed one.
    status = finish(command("jaxlm", f"{settings} --resume auto"), folder / "log2")
    if status or not list(run.glob("checkpoints/*.damaged")) or "renamed to" not in (folder / "log2").read_text():
        wrong.append("not renamed")
    yield "damaged bytes", f"{n_tried} ways to damage {len(files)} files", wrong + differences(run, whole)


def data(folder: Path, is_quick: bool) -> Iterator[Trial]:
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
    yield "changed data", "refused: the data have changed", wrong + ([] if after == before else ["the run has changed"])


def wait(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until_s = time.monotonic() + 300
    while not condition():
        if process.poll() == 0:
            return  # it was faster
        if process.poll() is not None or time.monotonic() > until_s:
            sys.exit(f"ended (status {process.poll()}), or waited for too long: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def contents(folder: Path) -> dict[Path, bytes]:
    """Return all files of a folder but its lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in paths}


def unmounted(folder: Path, is_quick: bool) -> Iterator[Trial]:
    settings = f"{TINY} --train.max-steps 50 --run.keep-checkpoints 2 --resume auto"
    for program in ("jaxlm",) if is_quick else ("jaxlm", "torchlm"):
        place = folder / program
        run, disk, away = place / "run", place / "disk", place / "away"
        (place / "elsewhere").mkdir(parents=True)
        absolute = command(program, f"{settings} --run.dir {run} --run.checkpoint-dir {disk}")
        relative = command(program, f"{settings} --run.dir {run} --run.checkpoint-dir disk")
        finish(absolute, place / "log")
        undisturbed, checkpoints = contents(run), contents(disk)

        def refused(name: str, arguments: list[str], cwd: Path, place: Path = place, run: Path = run) -> list[str]:
            log, before = place / f"{name}.log", contents(run)
            status = finish(arguments, log, cwd)
            lines = log.read_text().splitlines()
            wrong = [] if status == 2 and lines and "disk" in lines[-1] else [f"status {status}: {lines[-1:]}"]
            wrong += ["a traceback"] if any("Traceback" in line for line in lines) else []
            return wrong + ([] if contents(run) == before else ["the run folder has changed"])

        disk.rename(away)
        yield f"{program}: checkpoint folder gone", REFUSED, refused("gone", absolute, ROOT)
        disk.mkdir()
        yield f"{program}: checkpoint folder empty", REFUSED, refused("empty", absolute, ROOT)
        shutil.rmtree(disk)
        wrong = refused("elsewhere", relative, place / "elsewhere")
        yield f"{program}: from another working directory", REFUSED, wrong
        away.rename(disk)
        shutil.copytree(disk, away)
        for path in [*disk.glob("*/checksums.json"), *disk.glob("*.pt")]:
            path.write_bytes(path.read_bytes()[:-9])
        yield f"{program}: all checkpoints damaged", REFUSED, refused("damaged", absolute, ROOT)
        shutil.rmtree(disk)
        away.rename(disk)
        status = finish(absolute, place / "log2")
        wrong = [] if status == 0 and contents(disk) == checkpoints else [f"status {status}, or other checkpoints"]
        same = {path for path, content in undisturbed.items() if path.name in ("metrics.jsonl", "samples.txt")}
        now = contents(run)
        wrong += [f"{path.name} has changed" for path in same if not now[path].startswith(undisturbed[path][:200])]
        yield f"{program}: the folder is back", "the run resumes from the same checkpoints", wrong

        run, disk, log = place / "run2", place / "disk2", place / "log3"
        long = f"{TINY} --train.max-steps 1000000 --run.dir {run} --run.checkpoint-dir {disk}"
        process = start(command(program, long), log)
        wait(lambda disk=disk: any([*disk.glob("*/checksums.json"), *disk.glob("*.pt")]), process, log)  # type: ignore[misc]
        time.sleep(random.uniform(0, 1))  # so that the folder goes between two saves, or during one
        disk.rename(away)
        disk.write_text("in the way")  # a folder that cannot be made again
        wait(lambda log=log: "could not be saved" in log.read_text(), process, log)  # type: ignore[misc]
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        wrong = [] if status == 143 else [f"status {status}"]
        wrong += ["a traceback"] if "Traceback" in log.read_text() else []
        yield f"{program}: the folder disappears during a run", f"saves fail with a line, status {status}", wrong


# Each is one name in a path. Together they have every kind of character that libraries take for a pattern or an escape.
ODD = (
    *(
        "b[1]",
        "a*b?",
        "{x,y}",
        "%41%2F%",
        "#1",
        "~",
        "~root",
        "$HOME",
        "`id`",
        "a&b;c|d",
        'quote\'s "two"',
        "back\\slash",
    ),
    *(
        "ü ☃ e\u0301",
        " blanks ",
        "-dash",
        "--run.dir",
        ".hidden",
        "dots...",
        "a:b",
        "gs:",
        "@x",
        "1",
        "checkpoints",
        "!x",
    ),
    *("x.orbax-checkpoint-tmp-7", "metrics.jsonl", "x" * 200, "tab\there", "line\nbreak", "esc\x1b[31m", "byte\udcff"),
)


def paths(folder: Path, is_quick: bool) -> Iterator[Trial]:
    text = "".join(f"{i} birds sit on wire {i * 7919 % 1000} and sing of number {i}\n" for i in range(400))
    names = [Path("b[1] *?{x}", "%41 #~ü☃", "quote'\"$HOME")] if is_quick else [Path(name) for name in ODD]
    names += [Path(random.choice(ODD), random.choice(ODD)) for _ in range(1 if is_quick else 10)]
    used, refused, wrong = 0, 0, []
    for i, name in enumerate(names):
        place = folder / str(i) / name
        place.mkdir(parents=True)
        (place / "text.txt").write_text(text)
        log, program = folder / f"{i}.log", ("torchlm" if i % 4 == 3 else "jaxlm")

        def do(module: str, *arguments: object, log: Path = log) -> int:
            return finish([sys.executable, "-m", module, *map(os.fspath, map(str, arguments))], log)

        settings = [*shlex.split(TINY), "--data.path", place / "text.txt", "--data.cache-dir", place / "cache"]
        settings += ["--run.dir", place / "run", "--resume", "auto"]
        settings += ["--run.checkpoint-dir", place / "disk"] if i % 2 else []
        statuses = {"train": do(f"{program}.train", *settings, "--train.max-steps", 25)}
        if statuses["train"] == 2 and not (place / "run").exists() and not (place / "disk").exists():
            refused += 1
        else:
            statuses["resume"] = do(f"{program}.train", *settings, "--train.max-steps", 50)
            statuses["verify"] = do("jaxlm.runs", "verify", place / "run")
            statuses["report"] = do("jaxlm.report", place / "run")
            statuses["convert"] = do("jaxlm.convert", place / "run", place / "out.safetensors")
            statuses["predict"] = do("jaxlm.predict", "--checkpoint", place / "run", "--text", "birds [MASK]")
            used += 1
            wrong += [f"{name}: {what} ends with {status}" for what, status in statuses.items() if status]
            if "after 25 updates" not in log.read_text(errors="replace"):
                wrong.append(f"{name}: it has not resumed")
        if "Traceback" in log.read_text(errors="replace"):
            wrong.append(f"{name}: a traceback")
    yield "odd paths", f"{len(names)} paths: {used} trained, resumed and used, {refused} refused at the start", wrong


ODD_LINES = (
    *(b"{", b"[]", b"null", b"[" * 100_000, b'{"step": 25}', b'{"split": "validation"}', b"\xff\xfe\x00", b"\x00" * 99),
    *(b'{"step": "25", "split": "validation", "loss": 1}', b'{"step": 25, "split": "validation"}'),
    *(b'{"step": true, "split": "train", "loss": 1}', b'{"step": 1e400, "split": "validation", "loss": NaN}'),
    *(b'{"step": 25, "split": "validation", "loss": "low"}', b'{"step": 25, "split": [], "loss": -Infinity}'),
    *(b'{"step": -1, "split": "validation", "loss": 1}', b"x" * 3_000_000),
)


def logs(folder: Path, is_quick: bool) -> Iterator[Trial]:
    run, whole = folder / "run", folder / "whole"
    settings = (
        f"{TINY} --run.keep-checkpoints 2 --train.decay-steps 75 --run.dir {run} --resume auto --train.max-steps "
    )
    finish(command("jaxlm", f"{settings} 50"), folder / "log")
    run.rename(whole)
    wrong, n = [], 2 if is_quick else 8
    for i in range(n):
        shutil.copytree(whole, run)
        for path in (run / "metrics.jsonl", run / "samples.txt", run / "environment.jsonl"):
            lines = path.read_bytes().splitlines()
            for line in random.sample(ODD_LINES, 8):
                lines.insert(random.randrange(len(lines) + 1), line)
            path.write_bytes(b"\n".join(lines))
        if i % 2:
            (run / "samples.txt").unlink()
            (run / "samples.txt").mkdir()
        log = folder / f"{i}.log"
        listed = finish(command("jaxlm.runs", f"show {run}"), log)
        status = finish(command("jaxlm", f"{settings} 75"), log)
        if status or listed or "Traceback" in log.read_text(errors="replace"):
            wrong.append(f"trial {i}: status {status} and {listed}: {log.read_text(errors='replace')[-300:]}")
        shutil.rmtree(run)
    yield "damaged logs", f"{n} runs with 24 damaged lines each, or a folder in the place of a log, resumed", wrong


def caches(folder: Path, is_quick: bool) -> Iterator[Trial]:
    text, cache = folder / "text.txt", folder / "cache"
    text.write_text("".join(f"{i} birds sit on wire {i * 7919 % 1000} and sing\n" for i in range(2000)))
    settings = f"{TINY} --train.max-steps 10 --data.path {text} --data.cache-dir {cache} --run.dir {folder}/"
    finish(command("jaxlm", f"{settings}undisturbed"), folder / "log")
    shutil.copytree(cache, folder / "whole")
    files = [path.relative_to(cache) for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
    trials = [(file, i) for file in files for i in range(3)]
    trials = random.sample(trials, 3) if is_quick else trials
    wrong = []
    for i, (file, way) in enumerate(trials):
        what, apply = list(damage(cache / file))[way]
        times = (cache / file).stat()
        apply()
        if (cache / file).exists():
            os.utime(cache / file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk changes a bit
        log = folder / f"{i}.log"
        status = finish(command("jaxlm", f"{settings}run{i}"), log)
        bad = [f"status {status}"] if status else differences(folder / f"run{i}", folder / "undisturbed")
        wrong += [f"{file} {what}: {', '.join(bad)}"] if bad or "Traceback" in log.read_text() else []
        shutil.rmtree(cache)
        shutil.copytree(folder / "whole", cache)
    yield "damaged caches", f"{len(trials)} ways to damage {len(files)} files, each run the same", wrong


def hostile(folder: Path, is_quick: bool) -> Iterator[Trial]:
    run, mark = folder / "run", folder / "executed"
    finish(command("jaxlm", f"{TINY} --train.max-steps 25 --run.dir {run}"), folder / "log")
    for target in ("run.pt", "run.safetensors"):
        finish(command("jaxlm.convert", f"{run} {folder / target}"), folder / "log")
    files = [*attacks(folder, mark), *mutations(folder, run, 12 if is_quick else 120)]
    if is_quick:
        files = random.sample(files, 20)
    wrong, statuses = [], collections.Counter[int]()
    for file, arguments in files:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, errors="replace", cwd=ROOT, timeout=300
        )
        statuses[done.returncode] += 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith(("warning:", str(run)))]
        if done.returncode == 2 and (len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 1000):
            wrong.append(f"{file}: {len(lines)} lines: {lines[:1]}")
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr:
            wrong.append(f"{file}: status {done.returncode}: {done.stderr[-200:]}")
    wrong += ["code of a file was executed"] if mark.exists() else []
    counts = ", ".join(f"{n} with status {status}" for status, n in sorted(statuses.items()))
    yield "hostile files", f"{len(files)} files: {counts}", wrong


class Payload:
    """What runs code when a careless reader unpickles it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def attacks(folder: Path, mark: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield files that were made to break a reader, each with the command that reads it."""
    payload = pickle.dumps(Payload(mark))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", payload)
    deep = b"[" * 200_000
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    texts = {
        "deep": deep,
        "empty": b"",
        "nul": bytes(99),
        "text": b"hello",
        "html": b"<!DOCTYPE html><html>",
        "null": b"null",
    }
    weights = {
        "pickle.pt": payload,
        "zip.pt": archive.getvalue(),
        "pickle.safetensors": payload,
        "long_header.safetensors": (1 << 62).to_bytes(8, "little") + header,
        "deep_header.safetensors": len(deep).to_bytes(8, "little") + deep,
        "short.safetensors": len(header).to_bytes(8, "little") + header + bytes(4),
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        **{f"{name}.{ending}": text for name, text in texts.items() for ending in ("pt", "safetensors")},
    }
    for name, content in weights.items():
        write(folder / name, content)
        yield name, ["jaxlm.convert", "--inspect", str(folder / name)]
    tokenizers = {"pickle": payload, **texts, "object": b"{}", "no_model": b'{"version": "1.0", "model": null}'}
    train = ["jaxlm.train", *shlex.split(TINY), "--train.max-steps", "2", "--run.dir", str(folder / "never")]
    for name, content in tokenizers.items():
        write(folder / f"{name}.json", content)
        yield f"tokenizer {name}.json", [*train, "--tokenizer.path", str(folder / f"{name}.json")]
    data = {
        "deep.jsonl": b'{"text": ' + deep,
        "pickle.parquet": payload,
        "utf16.txt": "text".encode("utf-16"),
        "bomb.txt.gz": gzip.compress(bytes(50_000_000)),
        "quote.csv": b'text\n"never closed',
    }
    for name, content in data.items():
        write(folder / name, content)
        yield f"data {name}", [*train, "--data.path", str(folder / name)]
    for name, content in texts.items():
        write(folder / f"{name}.toml", content)
        yield f"settings {name}.toml", [*train, "--config", str(folder / f"{name}.toml")]


def mutations(folder: Path, run: Path, n: int) -> Iterator[tuple[str, list[str]]]:
    """Yield copies of good files with some bytes replaced, removed or repeated, each with the command that reads it."""
    for i in range(n):
        copy = shutil.copytree(run, folder / f"copy{i}")
        step = copy / "checkpoints" / "25"
        choices = {
            folder / "run.pt": ["jaxlm.convert", "--inspect"],
            folder / "run.safetensors": ["jaxlm.convert", "--inspect"],
            copy / "config.toml": ["jaxlm.runs", "show", str(copy)],
            copy / "tokenizer.json": ["jaxlm.predict", "--text", "a [MASK]", "--checkpoint", str(copy)],
            step / "info" / "metadata": ["jaxlm.runs", "verify", str(copy)],
            step / "checksums.json": ["jaxlm.convert", "--inspect", str(copy)],
        }
        source, arguments = list(choices.items())[i % len(choices)]
        content = bytearray(source.read_bytes())
        for _ in range(random.randrange(1, 8)):
            place = random.randrange(min(len(content), 3000))  # headers are at the start
            piece = bytes(content[place : place + random.randrange(1, 9)])
            replaced = random.choice((b"", piece * 3, random.randbytes(len(piece)), b"9" * 400, b"\xff", b"[", b"-1"))
            content[place : place + len(piece)] = replaced
        if len(arguments) == 2 and arguments[1] == "--inspect":
            target = folder / f"mutated{i}{source.suffix}"
            arguments = [*arguments, str(target)]
        else:
            target = source
        write(target, bytes(content))
        yield f"{source.name}, mutation {i}", arguments


TRIALS = {
    **{"kills": kills, "terms": terms, "disk": disk, "end": end, "bytes": damaged_bytes, "data": data},
    **{"unmounted": unmounted, "paths": paths, "logs": logs, "caches": caches, "hostile": hostile},
}
BEGIN, END = "<!-- torture -->", "<!-- end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"some of {', '.join(TRIALS)} (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all random choices (0)")
    parser.add_argument("--quick", action="store_true", help="some minutes: fewer of each")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=f"write the table between {BEGIN} and {END}")
    args = parser.parse_args()
    if unknown := set(args.trials) - TRIALS.keys():
        parser.error(f"no such trial: {', '.join(sorted(unknown))}")
    table, n_wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for name in args.trials or TRIALS:
            random.seed(f"{args.seed} {name}")
            place, started_s = Path(folder) / name, time.monotonic()
            place.mkdir()
            for trial, what, wrong in TRIALS[name](place, args.quick):
                verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "as it should be"
                print(f"{trial:44} {time.monotonic() - started_s:5.0f} s  {verdict}\n    {what}", flush=True)
                table.append(f"| `{name}` | {trial} | {what} | {'**wrong**' if wrong else 'yes'} |")
                n_wrong += bool(wrong)
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8")
        before, _, rest = page.partition(f"{BEGIN}\n")
        rows = ["| | trial | what happened | as it should be |", "| --- | --- | --- | --- |", *table]
        new = "\n".join([f"{before}{BEGIN}", "", *rows, "", rest[rest.index(END) :]])
        args.markdown.write_text(new, encoding="utf-8")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
