"""Checkpoints elsewhere than in the run folder: in a local folder, and in gs:// as a fake server has it."""

import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlm import convert, train
from jaxlm.errors import UserError
from jaxlm.io import storage
from jaxlm.testing import fake_gcs
from jaxlm.testing.resume_after_kill_test import TINY, content, interrupted_at, run, texts, undisturbed  # noqa: F401
from jaxlm.training import resume
from jaxlm.weights import formats, snapshots


@pytest.mark.slow
def test_a_run_with_checkpoints_elsewhere_goes_on_alike(
    texts: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Any],  # noqa: F811
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "some" / "where"
    elsewhere.mkdir(parents=True)
    (elsewhere / "2024").mkdir()  # a folder of the user's, not of an unfinished save
    (elsewhere / "2024" / "photo").touch()
    named = f"--run.checkpoint-dir {elsewhere}"
    with interrupted_at(17, monkeypatch):
        assert run(texts, folder, f"{named} --resume auto") == 130
    (elsewhere / "7").mkdir()  # what a kill leaves
    (elsewhere / "7" / "base").mkdir()
    assert run(texts, folder, "--resume auto") == 0  # the run folder tells where they are
    assert content(folder) == undisturbed
    assert not (folder / "checkpoints").exists()
    assert {path.name for path in elsewhere.iterdir()} - {"10"} == {"15", "2024", ".lock"}  # 10, if it is the best

    with pytest.raises(SystemExit):  # another run
        run(texts, tmp_path / "other", named)
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        run(texts, folder, f"--resume auto --run.checkpoint-dir {tmp_path}/third")

    shutil.rmtree(folder)  # as when a job begins anew on another machine
    assert run(texts, folder, f"{named} --resume auto") == 0
    assert content(folder)["rows"][-1] == undisturbed["rows"][-1]  # the test part, with the best checkpoint
    assert content(folder)["weights"] == undisturbed["weights"]

    assert run(texts, tmp_path / "new", f"--resume {elsewhere}/15 --train.max-steps 16") == 0
    assert (tmp_path / "new" / "checkpoints" / "16").is_dir()


def test_other_places_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train.main(["--run.checkpoint-dir", "s3://bucket/folder", "--run.dir", "none"])
    assert "s3://bucket/folder: neither a local folder nor gs://" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--run.dir", "gs://bucket/folder"])
    assert "run.dir=gs://bucket/folder: has to be a local folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/folder: needs gcsfs, .* pip install 'jaxlm\[gcs\]'"):
        storage.path("gs://bucket/folder")
    with pytest.raises(UserError, match="run.checkpoint_dir=gs://bucket/folder: torchlm needs a local folder"):
        resume.find({"run.checkpoint_dir": "gs://bucket/folder"}, formats.CHECKPOINT_1_2)


@pytest.mark.slow
def test_a_run_killed_with_checkpoints_in_gs_goes_on_alike(
    texts: Path,  # noqa: F811
    launch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gcsfs")
    settings = f"{TINY} --data.path {texts} --data.validation-fraction 0.2 --run.keep-checkpoints 2 --run.dir"
    named = "--run.checkpoint-dir gs://bucket/some/where --resume auto"
    with fake_gcs.served() as (variables, objects):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert launch(f"{settings} undisturbed", tmp_path).wait() == 0
        for step in (5, 10):
            process = launch(f"{settings} run {named}", tmp_path)
            while not any(name.startswith(f"some/where/{step}/") for name in list(objects)):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert launch(f"{settings} run {named}", tmp_path).wait() == 0
        assert content(tmp_path / "run") == content(tmp_path / "undisturbed")

        name = next(name for name in objects if name.startswith("some/where/15/base/d/"))
        objects[name] = objects[name][0], objects[name][1][:-1] + b"?"
        assert launch(f"{settings} run {named}", tmp_path).wait() == 0
        assert any(name.startswith("some/where/15.damaged/") for name in objects)
        assert content(tmp_path / "run") == content(tmp_path / "undisturbed")

        tuned = f"--task sst2 --init-from gs://bucket/some/where/15 --tokenizer.path {tmp_path}/run/tokenizer.json"
        assert launch(f"{tuned} --train.max-steps 2 --run.dir tuned", tmp_path).wait() == 0
        assert convert.main(shlex.split(f"gs://bucket/some/where {tmp_path}/run.safetensors")) == 0
        assert snapshots.read(tmp_path / "run.safetensors").n_updates == 15
