"""What is wrong outside the program, variables and memory above all: one line that names it, in real processes."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import errors
from jaxlm.config import Config
from jaxlm.errors import UserError, reported
from jaxlm.runtime import backend
from jaxlm.testing import tiny_runs

TINY = (
    "--task sst2 --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.seq-len 16 --train.max-steps 2 "
    "--train.batch-size 4 --train.warmup-steps 1 --tokenizer.vocab-size 300 --run.dir run"
)


def line_of(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end, reported(debug=False):
        raise error
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_too_little_memory_is_told_with_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MemoryError) as error:
        np.zeros(2**55)
    assert "too little memory (Unable to allocate" in (line := line_of(error.value, capsys))
    assert "train.batch_size" in line and "model.remat" in line
    texts = [
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
        "CUDA out of memory. Tried",
    ]
    for text in texts:
        assert f"too little memory ({text}" in line_of(RuntimeError(text), capsys)
    line = line_of(RuntimeError("can't start new thread"), capsys)
    assert "cannot start threads" in line and "memory" not in line


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "JAX_PLATFORM_NAME"])
def test_a_device_that_is_not_there_is_told_with_the_variable(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "nonsense")
    with pytest.raises(RuntimeError) as error:
        jax.devices("nonsense")
    assert f"error: {name}=nonsense in the environment: there is no such device here" in line_of(error.value, capsys)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="no cause that is known"), reported(debug=False):
        raise ValueError("no cause that is known")


@pytest.mark.parametrize(
    ("context", "variable"),
    [
        (jax.disable_jit(), "JAX_DISABLE_JIT=True"),
        (jax.numpy_dtype_promotion("strict"), "JAX_NUMPY_DTYPE_PROMOTION="),
        (jax.transfer_guard("disallow"), "JAX_TRANSFER_GUARD"),
        (jax.transfer_guard_host_to_device("disallow_explicit"), "JAX_TRANSFER_GUARD_HOST_TO_DEVICE=disallow_explicit"),
    ],
)
def test_settings_of_jax_with_which_no_step_runs_are_refused(
    context: contextlib.AbstractContextManager[None], variable: str
) -> None:
    with context, pytest.raises(UserError, match=f"{variable}.* in the environment: .*; unset it"):
        backend.configure(Config())


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    outcome: list[str] = []

    def run() -> None:
        with errors.interruptible(), errors.signals(lambda number: None):
            outcome.append("ran")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcome == ["ran"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_PLATFORMS", "cuda"),
        ("JAX_PLATFORMS", "nonsense"),
        ("JAX_DISABLE_JIT", "1"),
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_NUM_CPU_DEVICES", "0"),
    ],
)
def test_a_real_process_ends_with_one_line(variable: str, value: str, tmp_path: Path) -> None:
    if value == "cuda" and jax.default_backend() != "cpu":
        pytest.skip("there may be one here")
    env = {name: x for name, x in os.environ.items() if name not in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
    command = [sys.executable, "-m", "jaxlm.train", *TINY.split()]
    env |= {variable: value, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    named = (
        f"unset {variable}" if variable == "JAX_NUM_CPU_DEVICES" else f"error: {variable}={value} in the environment: "
    )
    assert named in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jaxlm", "torchlm"])
def test_training_runs_in_another_thread(package: str, tmp_path: Path) -> None:
    program = f"""
import threading
from {package} import train
status = []
thread = threading.Thread(target=lambda: status.append(train.main({TINY.split()!r})))
thread.start()
thread.join()
assert status == [0], status
"""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished after" in done.stdout and (tmp_path / "run" / "checkpoints").is_dir()


def one_line(tmp_path: Path, *command: str, **variables: str) -> str:
    """Return the last line on stderr of a command that ends with status 2, without a traceback."""
    env = {name: x for name, x in os.environ.items() if name not in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}
    command = (sys.executable, "-m", *command)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.slow
def test_commands_without_a_training_name_the_variable(tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "gpt")
    commands = [
        ["jaxlm.predict", "--checkpoint", str(run), "--text", "the"],
        ["jaxlm.convert", str(run), "new.safetensors"],
        ["jaxlm.schedule", "--config", "mlm"],
        ["jaxlm.plan"],
        ["jaxlm.plan", "--sweep", "mesh"],
    ]
    for command in commands:
        line = one_line(tmp_path, *command, JAX_PLATFORMS="nonsense")
        assert line.startswith("error: JAX_PLATFORMS=nonsense in the environment: there is no such device"), command
    line = one_line(tmp_path, "jaxlm.plan", JAX_ENABLE_X64="maybe")
    assert line.startswith("error: JAX_ENABLE_X64=maybe in the environment: ")
    assert "see the variables TORCH_*" in one_line(tmp_path, "torchlm.train", TORCH_LOGS="nonsense")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jaxlm", "torchlm"])
@pytest.mark.parametrize("sizes", ["--model.d-model 65536", "--model.seq-len 32768"])  # of weights, of the first update
def test_a_model_that_memory_cannot_hold_ends_with_one_line(package: str, sizes: str, tmp_path: Path) -> None:
    command = f"ulimit -v 6000000; exec {sys.executable} -m {package}.train {TINY} {sizes}"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith(("note:", "warning:")) and not line.endswith("...")
    ]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: too little memory ("), done.stderr
    assert not (tmp_path / "run").exists()
