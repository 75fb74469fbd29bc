"""As much of Slurm, for tests, as train.sbatch uses: sbatch, srun, scancel and scontrol, by the name it is called with.

The nodes are this machine, and sbatch waits for the end of the job. $FAKE_SLURM is its folder: calls.txt has what was
asked, tasks.txt the processes of the step. The file `limit` has a pattern for each start of the job: its time is up
when as many files match as there are tasks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", "/nonexistent"))
JOB = "4711"
OPTIONS = {  # those that are used, of sbatch 24.05
    *("job-name", "chdir", "output", "partition", "account", "nodes", "ntasks-per-node", "gpus-per-node"),
    *("cpus-per-task", "time", "signal", "requeue", "open-mode"),
}


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the leading options of a command line, and what comes after."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, found[name] = words[0][2:].partition("=")
        words = words[1:]
    return found, words


def sbatch(words: list[str]) -> int:
    given, (script, *arguments) = options(words)
    lines = [x.split()[1] for x in Path(script).read_text().splitlines() if x.startswith("#SBATCH ")]
    found = options(lines)[0] | given
    if unknown := found.keys() - OPTIONS:
        print(f"sbatch: unrecognized option '--{min(unknown)}'", file=sys.stderr)
        return 1
    print(f"Submitted batch job {JOB}", flush=True)
    shell, number = found["signal"].partition("@")[0].split(":")
    assert shell == "B"
    limits = json.loads((FOLDER / "limit").read_text()) if (FOLDER / "limit").exists() else []
    variables = {**os.environ, "SLURM_JOB_ID": JOB}
    variables["SLURM_NTASKS"] = str(int(found["nodes"]) * int(found["ntasks-per-node"]))
    with open(found["output"], "a" if found["open-mode"] == "append" else "w") as output:
        while True:
            job = subprocess.Popen(
                ["bash", script, *arguments], cwd=found["chdir"], env=variables, stdout=output, stderr=subprocess.STDOUT
            )
            if limits:
                pattern = limits.pop(0)
                while len(list(FOLDER.glob(pattern))) < int(variables["SLURM_NTASKS"]):
                    time.sleep(0.02)
                job.send_signal(signal.Signals[f"SIG{number}"])
            (FOLDER / "status").write_text(str(job.wait()))
            if not (FOLDER / "requeued").exists() or "requeue" not in found:
                return 0
            (FOLDER / "requeued").unlink()


def srun(words: list[str]) -> int:
    given, command = options(words)
    assert given == {"kill-on-bad-exit": "0"}
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        tasks.append(subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank)}, process_group=0))
    (FOLDER / "tasks.txt").write_text(" ".join(str(task.pid) for task in tasks))

    def end(number: int, frame: object) -> None:
        print("srun: forcing job termination", file=sys.stderr)
        for task in tasks:
            task.kill()

    signal.signal(signal.SIGTERM, end)
    return max(x if x >= 0 else 128 - x for x in [task.wait() for task in tasks])


def scancel(words: list[str]) -> int:
    given, jobs = options(words)
    assert given == {"signal": "TERM"} and jobs == [JOB]
    for task in (FOLDER / "tasks.txt").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    return 0


def scontrol(words: list[str]) -> int:
    assert words == ["requeue", JOB]
    (FOLDER / "requeued").touch()
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    with open(FOLDER / "calls.txt", "a") as file:
        file.write(json.dumps([name, *sys.argv[1:]]) + "\n")
    sys.exit({"sbatch": sbatch, "srun": srun, "scancel": scancel, "scontrol": scontrol}[name](sys.argv[1:]))
