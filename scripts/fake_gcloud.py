"""A gcloud for tests: TPUs whose workers are folders of this machine, for the commands that launch_tpu.py has.

It takes the flags that Google Cloud SDK 528 has, and no other, and answers and ends as that does. $FAKE_GCLOUD is its
folder: <name>.json has the state of a TPU, <name>/<worker>/ is the home of a worker, calls.txt has what was asked.

    gcloud fake preempt NAME     what Google does: its processes are killed, its disks are gone
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(os.environ.get("FAKE_GCLOUD", "/nonexistent"))
N_WAITS = 1  # so often a request is seen waiting for resources


def fail(text: str, status: int = 1) -> NoReturn:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(status)


def read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        fail(f"NOT_FOUND: Resource '{name}' was not found")
    return json.loads(path.read_text())


def write(name: str, tpu: dict[str, Any]) -> None:
    path = FOLDER / f"{name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(tpu))
    path.with_suffix(".tmp").replace(path)


def create(args: argparse.Namespace) -> int:
    if (FOLDER / f"{args.name}.json").exists():
        fail(f"ALREADY_EXISTS: Resource '{args.name}' already exists")
    is_queued = args.group == "queued-resources"
    n_workers = max(int(args.accelerator_type.rpartition("-")[2]) // 8, 1)
    for worker in range(n_workers):
        (FOLDER / args.name / str(worker)).mkdir(parents=True)
    state = "WAITING_FOR_RESOURCES" if is_queued else "READY"
    write(args.name, {"state": state, "n_workers": n_workers, "is_queued": is_queued, "n_looks": 0})
    return 0


def describe(args: argparse.Namespace) -> int:
    tpu = read(args.name)
    fields = "value(state.state)" if tpu["is_queued"] else "value(state)"
    if args.format != fields or tpu["is_queued"] != (args.group == "queued-resources"):
        fail(f"NOT_FOUND: no {args.format} of a {args.group} {args.name}")
    if tpu["state"] == "WAITING_FOR_RESOURCES":
        tpu["n_looks"] += 1
        if tpu["n_looks"] > N_WAITS:
            tpu["state"] = "ACTIVE"
        write(args.name, tpu)
    print(tpu["state"])
    return 0


def delete(args: argparse.Namespace) -> int:
    tpu = read(args.name)
    if not args.quiet:
        fail("it would ask, and there is nobody to answer")
    if tpu["is_queued"] and tpu["state"] == "ACTIVE" and not args.force:
        fail(f"FAILED_PRECONDITION: {args.name} is ACTIVE")
    kill(args.name)
    (FOLDER / f"{args.name}.json").unlink()
    return 0


def preempt(args: argparse.Namespace) -> int:
    tpu = read(args.name)
    tpu["state"] = "SUSPENDED" if tpu["is_queued"] else "PREEMPTED"
    kill(args.name)
    write(args.name, tpu)
    return 0


def kill(name: str) -> None:
    """End every process of the workers of a TPU, and remove their disks."""
    home = f"HOME={FOLDER / name}/".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(x.startswith(home) for x in (folder / "environ").read_bytes().split(b"\0")):
                os.kill(int(folder.name), signal.SIGKILL)
    time.sleep(0.05)
    shutil.rmtree(FOLDER / name, ignore_errors=True)


def workers(args: argparse.Namespace) -> list[int]:
    tpu = read(args.name)
    if tpu["state"] not in ("READY", "ACTIVE"):
        fail(f"The TPU is in state {tpu['state']!r}")
    if args.worker != "all" and int(args.worker) >= tpu["n_workers"]:
        fail(f"there is no worker {args.worker}")
    return list(range(tpu["n_workers"])) if args.worker == "all" else [int(args.worker)]


def ssh(args: argparse.Namespace) -> int:
    started = []
    for worker in workers(args):
        home = FOLDER / args.name / str(worker)
        variables = {**os.environ, "HOME": str(home)}
        started.append(subprocess.Popen(["bash", "-c", args.command], cwd=home, env=variables))
    statuses = [process.wait() for process in started]
    # That of the first worker that has failed; a lost connection is an error of gcloud's own.
    status = next((x for x in statuses if x), 0)
    return 1 if status < 0 or status == 255 else status


def scp(args: argparse.Namespace) -> int:
    *sources, target = args.paths
    args.name = next(path for path in args.paths if ":" in path).partition(":")[0]
    status = 0
    for worker in workers(args):
        home = f"{FOLDER / args.name / str(worker)}/"
        here = [path.replace(f"{args.name}:", home) for path in (*sources, target)]
        status = status or subprocess.run(["cp", *(["-r"] if args.recurse else []), *here]).returncode
    return status


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    groups = result.add_subparsers(dest="group", required=True)
    verbs = {}
    for group in ("queued-resources", "tpu-vm", "fake"):
        verbs[group] = groups.add_parser(group, allow_abbrev=False).add_subparsers(dest="verb", required=True)

    def add(group: str, function: Any, *flags: str, switches: tuple[str, ...] = (), required: int = 0) -> None:
        """Add a verb; the first `required` flags have to be given."""
        verb = verbs[group].add_parser(function.__name__, allow_abbrev=False)
        verb.set_defaults(function=function)
        verb.add_argument("paths" if function is scp else "name", nargs="+" if function is scp else None)
        for i, flag in enumerate(flags):
            verb.add_argument(flag, required=i < required)
        for flag in switches:
            verb.add_argument(flag, action="store_true")

    place = ("--zone", "--project")
    add("fake", preempt)
    create_flags = ("--zone", "--accelerator-type", "--runtime-version", "--node-id", "--project")
    add("queued-resources", create, *create_flags, switches=("--spot",), required=4)
    add("queued-resources", describe, *place, "--format", required=1)
    add("queued-resources", delete, *place, switches=("--quiet", "--force"), required=1)
    add("tpu-vm", create, "--zone", "--accelerator-type", "--version", "--project", switches=("--spot",), required=3)
    add("tpu-vm", describe, *place, "--format", required=1)
    add("tpu-vm", delete, *place, switches=("--quiet",), required=1)
    add("tpu-vm", ssh, *place, "--command", "--worker", required=1)
    add("tpu-vm", scp, *place, "--worker", switches=("--recurse",), required=1)
    return result


def main() -> int:
    words = sys.argv[1:]
    with open(FOLDER / "calls.txt", "a") as file:
        file.write(json.dumps(words) + "\n")
    if words[:2] == ["compute", "tpus"]:
        words = words[2:]
    elif words[:1] != ["fake"]:
        fail(f"Invalid choice: {words[:1]}", 2)
    args = parser().parse_args(words)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
