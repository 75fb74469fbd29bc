"""What real shells offer for a command line that was begun, with the scripts of `jaxlm completion`."""

import contextlib
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import __main__ as commands
from jaxlm import completion

BASH = """
source {script}
COMP_WORDS=({words} "$1") COMP_CWORD={n}
_shtab_jaxlm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
LINES = [
    ("jaxlm", "", sorted(commands.COMMANDS)),
    ("jaxlm", "pre", ["predict"]),
    ("jaxlm train", "--train.prec", ["--train.precision"]),
    ("jaxlm train --train.precision", "", ["bfloat16", "float32"]),
    ("jaxlm train --task", "", ["cola", "embed", "gpt", "mlm", "pairs", "sst2", "tag"]),
    ("jaxlm train --model.final-norm", "", ["false", "true"]),
    ("jaxlm train --config", "tiny", ["tiny.toml"]),
    ("jaxlm plan --topology v5e:4x4 --mesh.f", "", []),
    ("jaxlm plan --topology v5e:4x4", "--mesh.f", ["--mesh.fsdp"]),
    ("jaxlm evaluate --split", "", ["test", "validation"]),
    ("jaxlm evaluate --checkpoint run", "--data.he", ["--data.header"]),
    ("jaxlm predict --checkpoint", "ru", ["run"]),
    ("jaxlm runs", "", ["clean", "compare", "list", "show", "verify"]),
    ("jaxlm runs clean", "--y", ["--yes"]),
    ("jaxlm cache", "", ["clean", "list", "verify"]),
    ("jaxlm convert", "tin", ["tiny.toml"]),
    ("jaxlm convert run out --as", "gp", ["gpt2"]),
    ("jaxlm completion", "", ["bash", "fish", "zsh"]),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell, as the command prints them, and files to complete."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        with open(folder / f"jaxlm.{shell}", "w") as file, contextlib.redirect_stdout(file):
            completion.main([shell])
    (folder / "run").mkdir()
    (folder / "tiny.toml").touch()
    return folder


@pytest.mark.parametrize(("words", "begun", "expected"), LINES)
def test_bash_completes(scripts: Path, words: str, begun: str, expected: list[str]) -> None:
    program = BASH.format(script=scripts / "jaxlm.bash", words=words, n=len(words.split()))
    done = subprocess.run(["bash", "-c", program, "bash", begun], cwd=scripts, capture_output=True, text=True)
    assert (sorted(done.stdout.split()), done.stderr) == (expected, "")


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(("words", "begun", "expected"), LINES)
def test_fish_completes(scripts: Path, words: str, begun: str, expected: list[str]) -> None:
    program = f"source {scripts}/jaxlm.fish; complete --do-complete '{words} {begun}'"
    done = subprocess.run(["fish", "--no-config", "-c", program], cwd=scripts, capture_output=True, text=True)
    offered = [line.partition("\t")[0].rstrip("/") for line in done.stdout.splitlines()]
    assert (sorted(offered), done.stderr) == (expected, "")


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes(scripts: Path) -> None:
    (scripts / "_jaxlm").write_text((scripts / "jaxlm.zsh").read_text())
    # A process of its own makes the terminal: one that has JAX's threads must not fork.
    command = [sys.executable, "-c", "import pty; pty.spawn(['zsh', '-f', '-i'])"]
    env = os.environ | {"TERM": "dumb", "PS1": ""}
    shell = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def type_until(typed: str, expected: str) -> None:
        shell.stdin.write(typed.encode())
        written = ""
        while expected not in written:
            assert select.select([shell.stdout], [], [], 60)[0], f"{written!r} has no {expected!r}"
            written += os.read(shell.stdout.fileno(), 4096).decode()

    with shell:
        type_until(f"cd {scripts}; fpath=($PWD $fpath); autoload -U compinit; compinit -D -u; echo rea''dy\n", "ready")
        type_until("jaxlm train --train.prec\t", "--train.precision ")
        type_until("bf\t", "bfloat16 ")
        type_until("--init-from r\t", "run")
        shell.kill()  # which takes the terminal away from zsh
