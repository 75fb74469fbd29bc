"""Trains on a Cloud TPU, by gcloud.

    python scripts/launch_tpu.py COMMAND [--dry-run] [--section.key VALUE ...] [-- SETTINGS OF jaxlm.train]

create   ask for the TPU, and wait until it is there
setup    copy the last commit to all workers and install it
run      train on all workers, and follow worker 0; the exit status is that of training
logs     follow worker 0 again, after a lost connection
stop     end training after its next update, with a checkpoint
collect  copy the run folder and train.log from worker 0 to runs/
delete   give the TPU back
loop     all of these: again with a new TPU where one was preempted, until training ends; then collect and delete

The settings are in launch.toml; LAUNCH.md is the page. --dry-run prints every command and runs none.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

from launch_settings import ROOT, Settings, Shell, main

from jaxlm.errors import UserError

READY = ("READY", "ACTIVE")  # states of a TPU VM, and of a queued resource
GOING = ("SUSPENDING", "DELETING")
GONE = ("", "PREEMPTED", "TERMINATED", "SUSPENDED")  # "": there is none; the others have to be deleted
FINAL = (0, 2, 130)  # exit statuses of training that another start would not change: done, bad input, Ctrl-C
SIGTERM = 143  # exit status of training: what a machine sends that shuts down


def gcloud(settings: Settings, *words: str) -> list[str]:
    """Return a command about TPUs; `words` begin with its group and verb."""
    project = [f"--project={settings.tpu.project}"] if settings.tpu.project else []
    return ["gcloud", "compute", "tpus", *words, f"--zone={settings.tpu.zone}", *project]


def resource(settings: Settings, verb: str, *words: str) -> list[str]:
    """Return a command about the request for the TPU, or the TPU itself where it is not queued."""
    return gcloud(settings, "queued-resources" if settings.tpu.queued else "tpu-vm", verb, settings.name, *words)


def on_workers(settings: Settings, worker: str, *words: str) -> list[str]:
    """Return a command that runs tpu_worker.sh with `words` on one worker, or on `all`."""
    command = f"bash tpu_worker.sh {shlex.join(words)}"
    return gcloud(settings, "tpu-vm", "ssh", settings.name, f"--worker={worker}", f"--command={command}")


def state(settings: Settings, shell: Shell, dry: str) -> str:
    """Return the state of the TPU, "" if there is none."""
    fields = "value(state.state)" if settings.tpu.queued else "value(state)"
    command = resource(settings, "describe", f"--format={fields}")
    status, text = shell.read(command, dry)
    if status and "NOT_FOUND" not in text:  # no network, no permission: nothing is known
        print(f"error: the state of {settings.name} cannot be told\n{text}", file=sys.stderr)
        sys.exit(status)
    return "" if status else text


def create(settings: Settings, shell: Shell) -> int:
    tpu = settings.tpu
    words = [f"--accelerator-type={tpu.accelerator}", *(["--spot"] if tpu.spot else [])]
    if tpu.queued:
        words += [f"--runtime-version={tpu.runtime}", f"--node-id={settings.name}"]
    else:
        words += [f"--version={tpu.runtime}"]
    return shell.status(resource(settings, "create", *words)) or wait(settings, shell)


def wait(settings: Settings, shell: Shell) -> int:
    shown = ""
    while (now := state(settings, shell, READY[0])) not in READY:
        if now in (*GONE, *GOING, "FAILED"):
            print(f"error: {settings.name}: {now or 'gone'} before it was there", file=sys.stderr)
            return 1
        if now != shown:
            shell.say(f"{settings.name} is {now}; looking again every {settings.tpu.poll_s:g} s")
            shown = now
        time.sleep(settings.tpu.poll_s)
    return 0


def setup(settings: Settings, shell: Shell) -> int:
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout:
        shell.say("there are changes that are not committed, which the TPU will not have")
    archive = ROOT / "build" / "jaxlm.tar.gz"
    files = [str(archive), str(ROOT / "scripts" / "tpu_worker.sh")]
    return (
        shell.status(["mkdir", "-p", str(archive.parent)])
        or shell.status([*git, "archive", f"--output={archive}", "HEAD"])
        or shell.status(gcloud(settings, "tpu-vm", "scp", *files, f"{settings.name}:", "--worker=all"))
        or shell.status(on_workers(settings, "all", "setup", settings.tpu.setup))
    )


def run(settings: Settings, shell: Shell) -> int:
    command = on_workers(settings, "all", "start", *settings.training(settings.tpu.python))
    return shell.status(command) or logs(settings, shell)


def logs(settings: Settings, shell: Shell) -> int:
    try:
        shell.status(on_workers(settings, "0", "follow"))  # whatever comes of it, the next one tells how training ended
        return shell.status(on_workers(settings, "all", "wait"))
    except KeyboardInterrupt:
        shell.say("training goes on: `logs` follows it again, `stop` ends it, `delete` gives the TPU back")
        raise


def stop(settings: Settings, shell: Shell) -> int:
    return shell.status(on_workers(settings, "0", "stop", settings.run_dir))


def collect(settings: Settings, shell: Shell) -> int:
    there = PurePosixPath("jaxlm") / settings.run_dir
    here = ROOT / "runs"

    def copy(source: PurePosixPath | str, to: Path) -> int:
        words = ("scp", "--recurse", f"{settings.name}:{source}", str(to), "--worker=0")
        return shell.status(gcloud(settings, "tpu-vm", *words))

    return shell.status(["mkdir", "-p", str(here)]) or copy(there, here) or copy("train.log", here / there.name)


def delete(settings: Settings, shell: Shell) -> int:
    # --force: with the TPU that it has; without it, only a request that waits can be deleted.
    return shell.status(resource(settings, "delete", "--quiet", *(["--force"] if settings.tpu.queued else [])))


def loop(settings: Settings, shell: Shell) -> int:
    if not settings.checkpoint_dir.startswith("gs://"):
        raise UserError(
            f"checkpoint_dir={settings.checkpoint_dir or repr('')}: a preempted TPU takes its disk along; "
            "give gs://BUCKET/FOLDER"
        )
    for n in range(1, settings.tpu.max_starts + 1):
        while (now := state(settings, shell, "")) in GOING:
            time.sleep(settings.tpu.poll_s)
        if now in (*GONE, "FAILED"):
            status = (delete(settings, shell) if now else 0) or create(settings, shell)
        else:
            status = wait(settings, shell)
        status = status or setup(settings, shell) or run(settings, shell)
        if status in FINAL or not is_preempted(settings, shell, status):
            break
        shell.say(f"status {status}, preempted; that was start {n} of at most {settings.tpu.max_starts}")
    else:
        return status
    if failure := collect(settings, shell) or delete(settings, shell):
        return failure
    if shell.dry_run:
        shell.say("after a preemption: this, and again from the top")
        delete(settings, shell)
    return status


def is_preempted(settings: Settings, shell: Shell, status: int) -> bool:
    """Return whether something failed because the TPU goes away, which processes may notice before its state tells."""
    until_s = time.monotonic() + settings.tpu.settle_s
    while status != SIGTERM and state(settings, shell, READY[0]) not in (*GOING, *GONE):
        if time.monotonic() > until_s:
            return False
        time.sleep(min(settings.tpu.poll_s, 5))
    return True


VERBS = {f.__name__: f for f in (create, setup, run, logs, stop, collect, delete, loop)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__, VERBS))
