"""Settings of the launchers: those of launch.toml, with flags on top. And how they run, or only show, commands."""

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxlm import config as configs
from jaxlm.errors import UserError, nearest, reported
from jaxlm.io import utf8

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "scripts" / "launch.toml"
OWN = {"run.dir": "run_dir", "run.checkpoint_dir": "checkpoint_dir", "resume": ""}  # what the launchers add

# What Google Cloud, Slurm and Kubernetes all take as a name.
Name = Annotated[str, Meta(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class Tpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    project: str
    zone: Text
    accelerator: Text
    runtime: Text
    queued: bool
    spot: bool
    poll_s: Seconds
    settle_s: Seconds
    max_starts: Positive
    python: Text
    setup: Text


class Slurm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    partition: str
    account: str
    nodes: Positive
    gpus_per_node: Count
    cpus_per_task: Positive
    time_limit: Annotated[str, Meta(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")]
    stop_s: Annotated[int, Meta(ge=1, le=65535)]  # the range that sbatch has
    python: Text


class JobSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    namespace: Name
    image: Text
    kind: Literal["cpu", "gpu", "tpu"]
    hosts: Positive
    chips_per_host: Positive
    tpu_accelerator: Text
    tpu_topology: Annotated[str, Meta(pattern=r"^\d+x\d+(x\d+)?$")]
    claim: str
    max_restarts: Count


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All fields are required, so that each value stands in launch.toml; units and meanings stand there, too."""

    name: Name
    train: list[str]
    run_dir: Text
    checkpoint_dir: str
    tpu: Tpu
    slurm: Slurm
    jobset: JobSet

    def training(self, python: str, run_dir: str = "") -> list[str]:
        """Return the command of one process of training, which starts or resumes a run."""
        command = [python, "-m", "jaxlm.train", *self.train, "--run.dir", run_dir or self.run_dir]
        if self.checkpoint_dir:
            command += ["--run.checkpoint-dir", self.checkpoint_dir]
        return [*command, "--resume", "auto"]


def load(flags: Sequence[str] = (), train: Sequence[str] = (), file: Path = FILE) -> Settings:
    """Return the settings of a file, with `flags` (--section.key VALUE) on top, and with `train` unless it is empty.

    Raises UserError for an unknown setting or a wrong value, also for one of jaxlm.train.
    """
    try:
        values: dict[str, Any] = utf8.from_toml(utf8.read(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as TOML: {error}") from error
    settings = _convert(values, file, strict=True)
    if flags:
        _override(values, flags)
        settings = _convert(values, "command line", strict=False)  # what stands there is text
    if train:
        settings = msgspec.structs.replace(settings, train=list(train))
    with contextlib.chdir(ROOT):
        configs.load(settings.train)  # rather here than on machines that are paid for
        given = configs.given(settings.train)
    for name in OWN.keys() & given.keys():
        mend = f"give {OWN[name]} instead" if OWN[name] else "leave it"
        raise UserError(f"train: --{name.replace('_', '-')} is added by the launchers; {mend}")
    return settings


def _override(values: dict[str, Any], flags: Sequence[str]) -> None:
    sections = {name: entries for name, entries in values.items() if isinstance(entries, dict)}
    names = [name for name in values if name not in sections]
    names += [f"{section}.{key}" for section, entries in sections.items() for key in entries]
    names.remove("train")
    words = list(flags)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in names:
            raise UserError(
                f"{flag}: unknown setting{nearest(name, names)} (launch.toml lists them; train comes after --)"
            )
        if not equals:
            if not words:
                raise UserError(f"{flag}: value is missing; write {flag} VALUE")
            value = words.pop(0)
        section, _, key = name.rpartition(".")
        (sections[section] if section else values)[key] = value


def _convert(values: dict[str, Any], origin: Path | str, strict: bool) -> Settings:
    try:
        return msgspec.convert(values, Settings, strict=strict)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        raise UserError(f"{origin}: {place.rstrip('`') + ': ' if place else ''}{what}") from error


class Shell:
    """Runs commands, each shown before as it would be typed; with `dry_run`, only shows them."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def say(self, text: str) -> None:
        """Print what is about to be done; a comment among the commands of a dry run."""
        print(f"# {text}", flush=True, file=sys.stdout if self.dry_run else sys.stderr)

    def status(self, command: list[str], stdin: str = "") -> int:
        """Run a command and return its exit status, 0 in a dry run; `stdin` is fed to it."""
        text = shlex.join(command) + (f" <<'END'\n{stdin}END" if stdin else "")
        if self.dry_run:
            print(text, flush=True)
            return 0
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        return _run(command, input=stdin or None).returncode

    def read(self, command: list[str], dry: str) -> tuple[int, str]:
        """Run a command quietly; return its exit status and what it prints, which is `dry` in a dry run."""
        if self.dry_run:
            return self.status(command), dry
        done = _run(command, capture_output=True)
        return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()


def _run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, text=True, **options)
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]}: there is no such program; install it, or see the commands by --dry-run"
        ) from error


def main(argv: list[str], doc: str, verbs: Mapping[str, Callable[[Settings, Shell], int]]) -> int:
    """Do what a command line says: VERB [--dry-run] [--section.key VALUE ...] [-- SETTINGS OF jaxlm.train]."""
    split = argv.index("--") if "--" in argv else len(argv)
    own, train = [word for word in argv[:split] if word != "--dry-run"], argv[split + 1 :]
    if {"-h", "--help"} & set(own):
        print(doc)
        return 0
    with reported(debug=False):
        if not own or own[0] not in verbs:
            raise UserError(f"{own[0] if own else 'nothing'}: no such command; give {', '.join(verbs)} (--help)")
        try:
            return verbs[own[0]](load(own[1:], train), Shell("--dry-run" in argv[:split]))
        except KeyboardInterrupt:
            return 130
    raise AssertionError("reported() exits on the errors it does not pass on")
