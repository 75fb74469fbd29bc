"""The command `jaxlm`: what it lists, that its commands are those of `python -m jaxlm.NAME`, and what they print."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import terminal
from jaxlm.__main__ import COMMANDS

# As pip makes it.
SCRIPT = """#!{python}
import sys
from jaxlm.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "jaxlm"
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return path


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    env = os.environ | {"COLUMNS": "100", "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(command, env=env, capture_output=True, text=True)


def module(*arguments: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", *arguments)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_without_a_command_all_are_listed(script: Path, arguments: tuple[str, ...]) -> None:
    for done in (run(script, *arguments), module("jaxlm", *arguments)):
        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall(r"^    (\w+)  +\w", done.stdout, re.M) == list(COMMANDS)
    assert run(script).stdout.startswith("usage: jaxlm ")


def test_the_list_and_the_version_need_no_framework(script: Path) -> None:
    blocked = "import sys; sys.modules |= dict.fromkeys(('jax', 'numpy', 'rich', 'torch', 'tyro', 'msgspec')); "
    for flag in ("--help", "--version"):
        program = f"{blocked} from jaxlm.__main__ import main; sys.argv[1:] = ['{flag}']; sys.exit(main())"
        done = run(sys.executable, "-c", program)
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"jaxlm {importlib.metadata.version('jaxlm')} (Python 3.")
    assert f"jax {importlib.metadata.version('jax')}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_help_by_both_names(script: Path, name: str) -> None:
    by_script = run(script, name, "--help", PATH=f"{script.parent}:{os.environ['PATH']}")
    by_module = module(f"jaxlm.{name}", "--help")
    assert (by_script.returncode, by_script.stderr) == (by_module.returncode, by_module.stderr) == (0, "")
    assert by_script.stdout.startswith(f"usage: jaxlm {name} ")
    # Indents differ with the name's length.
    same = by_module.stdout.replace(f"python -m jaxlm.{name}", f"jaxlm {name}")
    assert by_script.stdout.split() == same.split()


def test_no_help_imports_a_framework() -> None:
    program = """
import contextlib, sys
from jaxlm.__main__ import COMMANDS, main
for name in COMMANDS:
    sys.argv[1:] = [name, "--help"]
    with contextlib.suppress(SystemExit):
        main()
    print("loaded by", name, sorted({"jax", "flax", "optax", "orbax", "torch"} & sys.modules.keys()))
"""
    done = run(sys.executable, "-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^loaded by (.*)", done.stdout, re.M) == [f"{name} []" for name in COMMANDS]


def test_a_command_keeps_its_exit_status_and_its_error(script: Path, tmp_path: Path) -> None:
    done = run(script, "runs", "show", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(tmp_path / "none") in done.stderr
    assert done.stderr == module("jaxlm.runs", "show", str(tmp_path / "none")).stderr


def test_an_unknown_command_or_option_is_one_line(script: Path) -> None:
    done = run(script, "trian", "--task", "mlm")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: trian: no such command; did you mean train? (--help lists them)\n"
    done = run(script, "--debug", "train")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_messages_name_commands_as_they_were_called(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", str(script.parent))
    assert terminal.command("predict") == "jaxlm predict"
    monkeypatch.setenv("PATH", "/usr/bin")  # a shell would not find it
    assert terminal.command("predict") == f"{script} predict"
    monkeypatch.setattr(sys, "argv", ["/somewhere/jaxlm/train.py"])
    assert terminal.command("predict") == "python -m jaxlm.predict"
