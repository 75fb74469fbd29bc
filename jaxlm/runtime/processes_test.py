"""Runs of several real processes on this machine, of two devices each, against one process."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import grammar
from jaxlm.errors import UserError
from jaxlm.io import checksums
from jaxlm.runtime import processes
from jaxlm.weights import snapshots

SIZES = "--model.d-model 16 --model.n-layers 2 --model.n-heads 2 --model.seq-len 32 --train.batch-size 8"
STEPS = "--train.max-steps 12 --train.eval-interval 4 --train.log-interval 1 --train.warmup-steps 2"
DATA = "--data.validation-fraction 0.2 --data.test-fraction 0.2 --tokenizer.vocab-size 300"
N_TEXTS = 300
SETTINGS = f"--task mlm {SIZES} {STEPS} {DATA} --run.keep-checkpoints 9"
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

Start = Callable[..., list[subprocess.Popen]]


@pytest.fixture(scope="module")
def start(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Return a function that starts N processes of a run; `own` are further settings by process.

    The data are few, since each batch of an evaluation has the processes wait for each other.
    """
    texts = tmp_path_factory.mktemp("texts") / "sentences.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in grammar.sentences("sst2")["train"][:N_TEXTS]))

    def start(n: int, settings: str, own: Sequence[str] = (), by_variables: bool = False) -> list[subprocess.Popen]:
        cwd = tmp_path_factory.mktemp("processes")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        started = []
        for process in range(n):
            flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
            env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            place = f"--distributed.coordinator 127.0.0.1:{port} --distributed.n-processes {n}"
            place += f" --distributed.process {process}"
            if by_variables:
                env |= dict(zip(VARIABLES, ("127.0.0.1", str(port), str(n), *[str(process)] * 2, str(n)), strict=True))
            args = f"--data.path {texts} {settings} {'' if by_variables else place} {own[process] if own else ''}"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(launch(args, cwd, env, **pipes))
        return started

    return start


def ended(started: list[subprocess.Popen], within_s: float = 300) -> tuple[list[int], list[str], list[str]]:
    """Return exit statuses, outputs and errors, without the lines that say what takes long on a busy machine."""
    told = [process.communicate(timeout=within_s) for process in started]
    errors = [re.sub(r"^(waiting for .*|.* \.\.\.)\n", "", error, flags=re.M) for _, error in told]
    return [process.returncode for process in started], [out for out, _ in told], errors


def finished(started: list[subprocess.Popen]) -> str:
    statuses, outputs, errors = ended(started)
    assert statuses == [0] * len(started), errors
    assert not any(re.search("step|run ", output) for output in outputs[1:]), "one tells for all"
    return outputs[0]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "tokens_per_s"} for row in rows]


def weights(run: Path, step: int = 12) -> dict[str, np.ndarray]:
    snapshot = snapshots.read(run / "checkpoints" / str(step))
    assert snapshot.moments is not None
    parts = {"weights": snapshot.weights, "first": snapshot.moments[0], "second": snapshot.moments[1]}
    return {f"{part}/{name}": x for part, tree in parts.items() for name, x in tree.items()}


def wait_for(is_there: Callable[[], Any], started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not is_there():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def runs(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, `one`, and by two, `two`, whose parameters lie in parts on both."""
    folder = tmp_path_factory.mktemp("runs")
    one = start(1, f"{SETTINGS} --run.dir {folder}/one")
    two = start(2, f"{SETTINGS} --run.dir {folder}/two --mesh.data 1 --mesh.fsdp 4", by_variables=True)
    (folder / "two.txt").write_text(finished(two))
    assert ended(one)[0] == [0]
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_does(runs: Path) -> None:
    assert "device  4 x cpu in 2 processes (fsdp 4)" in (runs / "two.txt").read_text()
    rows = [metrics(runs / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 12 + 3 + 1
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys() and one["split"] == two["split"]
        for name in one.keys() - {"split"}:
            assert two[name] == pytest.approx(one[name], rel=2e-6), one
        if one["split"] != "train":
            assert one["accuracy"] == two["accuracy"], "counted to the last sample"
    one, two = (weights(runs / name) for name in ("one", "two"))
    for name, x in one.items():
        # Of a key's bias, gradients are nothing but roundings, which AdamW moves by.
        if ".key.bias" not in name:
            np.testing.assert_allclose(two[name], x, rtol=0, atol=2e-5 * np.abs(x).max(), err_msg=name)


def test_what_differs_between_processes_is_named(start: Start, tmp_path: Path) -> None:
    own = ["", "--train.learning-rate 0.5"]
    statuses, outputs, errors = ended(start(2, f"{SETTINGS} --run.dir {tmp_path}/run", own))
    assert statuses == [2, 2] and errors[1] == ""
    assert re.fullmatch(
        r"error: process 1 \(\S+\): train.learning_rate is 0.5 here, but 0.003 in process 0; .*\n", errors[0]
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_data_in_one_process_are_named(start: Start, tmp_path: Path) -> None:
    for name, text in (("a", "One text of many words. "), ("b", "One text of other words. ")):
        (tmp_path / f"{name}.txt").write_text("\n".join(text * 40 + str(i) for i in range(200)))
    own = [f"--data.path {tmp_path}/{name}.txt" for name in ("a", "b")]
    statuses, _, errors = ended(start(2, f"{SETTINGS} --run.dir {tmp_path}/run", own))
    assert statuses == [2, 2]
    assert re.match(r"error: process 1 \(\S+\): the data is '.*' here, but '.*' in process 0", errors[0])
    own = ["", f"--data.path {tmp_path}/none.txt"]
    statuses, _, errors = ended(start(2, f"{SETTINGS} --run.dir {tmp_path}/run", own))
    assert statuses == [2, 2] and re.fullmatch(r"error: process 1 \(\S+\): data.path=\S+: no such file.*\n", errors[0])
    assert not (tmp_path / "run").exists()


def resumed(start: Start, run: Path, n: int = 2, mesh: str = "--mesh.data 1 --mesh.fsdp 4") -> None:
    assert "resumes" in finished(start(n, f"{SETTINGS} --run.dir {run} --resume auto {mesh}"))


def check_same_run(run: Path, runs: Path) -> None:
    assert metrics(run) == metrics(runs / "two")
    for name, x in weights(runs / "two").items():
        np.testing.assert_array_equal(weights(run)[name], x, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.longest)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    killed: int, start: Start, runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = start(2, f"{SETTINGS} --run.dir {run} --mesh.data 1 --mesh.fsdp 4")
    wait_for(lambda: checksums.is_finished(run / "checkpoints" / "4"), started)
    started[killed].kill()
    statuses, _, errors = ended(started, within_s=processes.SILENT_S + 120)
    if killed:
        assert statuses == [1, -signal.SIGKILL]
        assert "error: process 1 is lost: it sends no heartbeats; resume with --resume auto" in errors[0]
    else:  # by JAX, or sooner by our own watch
        assert statuses[1] in (1, -signal.SIGABRT)
        assert "another task died" in errors[1] or "error: process 1: process 0, on 127.0.0.1:" in errors[1]
    resumed(start, run)
    check_same_run(run, runs)


@pytest.mark.slow
def test_a_save_that_one_process_does_not_end_is_none(start: Start, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = start(2, f"{SETTINGS} --run.dir {run} --mesh.data 1 --mesh.fsdp 4")
    wait_for(lambda: list(run.glob("checkpoints/8*")), started)  # begun, and not whole
    started[1].kill()
    ended(started, within_s=processes.SILENT_S + 120)
    assert [step for step, _ in checksums.finished_in(run / "checkpoints")] == [4]
    resumed(start, run)
    check_same_run(run, runs)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all_and_another_number_goes_on(
    start: Start, runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = start(4, f"{SETTINGS} --run.dir {run}")
    wait_for(lambda: checksums.is_finished(run / "checkpoints" / "4"), started)
    os.kill(started[3].pid, signal.SIGTERM)
    statuses, outputs, errors = ended(started)
    assert statuses == [143] * 4, errors
    assert "mlm interrupted after" in outputs[0]
    resumed(start, run, n=1, mesh="--mesh.fsdp 2")
    for one, other in zip(metrics(runs / "one"), metrics(run), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_packed_mix_that_is_killed_takes_the_same_samples_in_another_number_of_processes(
    start: Start, tmp_path: Path
) -> None:
    texts = [text for text, _ in grammar.sentences("sst2")["train"]]
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in texts[:300]))
    (tmp_path / "b.txt").write_text(
        "".join(f"{one} {other}\n" for one, other in zip(texts[300:400], texts[400:500], strict=True))
    )
    # The epoch of b ends within the run, between two evaluations.
    table = '[[data.sources]]\nname = "{0}"\npath = "{1}/{0}.txt"\nweight = {2}\nepochs = {3}\n'
    (tmp_path / "mix.toml").write_text(table.format("a", tmp_path, 3, 9) + table.format("b", tmp_path, 1, 0.1))
    settings = f"{SETTINGS} --data.path= --config {tmp_path}/mix.toml --data.pack documents --run.dir {tmp_path}"
    one, two = start(1, f"{settings}/one"), start(2, f"{settings}/two")
    wait_for(lambda: checksums.is_finished(tmp_path / "two" / "checkpoints" / "4"), two)
    for process in two:
        process.kill()
    ended(two)
    assert not checksums.is_finished(tmp_path / "two" / "checkpoints" / "12")
    assert ended(one)[0] == [0]
    assert "resumes" in finished(start(1, f"{settings}/two --resume auto"))
    for row, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert row.keys() == other.keys() and {"loss_a", "loss_b"} <= row.keys() or row["split"] == "train"
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    ends = [snapshots.read(tmp_path / name / "checkpoints" / "12").info for name in ("one", "two")]
    assert ends[0]["mix"] == ends[1]["mix"] and 0 < ends[0]["mix"]["place"] < 96
    used = {source["name"]: source["used"] for source in ends[0]["mix"]["sources"].values()}
    assert sum(used.values()) == 96 and 0 < used["b"] < 24, "a quarter until its epoch ended"


def test_wrong_places_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**given: Any) -> Any:
        return processes._arguments(configs.build({"task": "gpt"} | {f"distributed.{k}": x for k, x in given.items()}))

    for name in (*VARIABLES, "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert place() is None
    found = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    found["cluster_detection_method"] = "deactivate"
    assert place(coordinator="host:1", n_processes=4, process=3) == found
    for name, value in zip(VARIABLES, ("host", "1", "4", "3", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == found | {"local_device_ids": 1}
    monkeypatch.setenv("MASTER_ADDR", "fe80::1")
    assert place()["coordinator_address"] == "[fe80::1]:1"
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UserError, match="RANK='three' in the environment is not a whole number"):
        place()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() is None
    slurm = {"STEP_NUM_TASKS": 2, "JOB_ID": 1, "STEP_NODELIST": "node[7-8]", "NTASKS": 2, "PROCID": 1, "LOCALID": 0}
    for name, number in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(number))
    assert place() == found | {
        **{"coordinator_address": "node7:61441", "num_processes": 2, "process_id": 1, "local_device_ids": 0}
    }
