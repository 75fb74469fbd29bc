"""Nothing that a user could want back is removed by a default: no run whose checkpoints are out of sight, no file."""

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm import runs
from jaxlm.checkpoint import Checkpoints
from jaxlm.checkpoint_test import INFO, state_at
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.io import checksums, storage
from jaxlm.reporting import run_reader
from jaxlm.testing import tiny_runs
from jaxlm.training import history, resume, run_dir
from jaxlm.training.history import SAVED
from jaxlm.training.log import RunLog
from jaxlm.training.resume import LOCK, Start
from jaxlm.weights import formats

ROW = json.dumps({"step": 6, "split": "validation", "loss": 1.5}) + "\n"


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run, with what it has logged and a file of its user."""
    monkeypatch.chdir(tmp_path)
    path = tiny_runs.write(Path("run"), "gpt", {3: 2.0, 6: 1.5})
    for name, text in ((SAVED, '{"step": 6}'), ("metrics.jsonl", ROW), ("log.txt", "log"), ("samples.txt", "samples")):
        (path / name).write_text(text)
    (path / "notes.txt").write_text("mine")
    return path


def elsewhere(run: Path, named: str, place: str = "ck") -> None:
    """Have the checkpoints in another folder, with its name as it is in config.toml."""
    (run / "checkpoints").rename(place)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('checkpoint_dir = ""', f'checkpoint_dir = "{named}"'))


def unmounted(run: Path) -> None:
    elsewhere(run, str(Path("ck").absolute()))
    Path("ck").rename("disk")
    Path("ck").mkdir()


def in_another_folder(run: Path) -> None:
    elsewhere(run, "work/ck")


def hidden_by_a_link(run: Path) -> None:
    (run / "checkpoints").rename("disk")
    (run / "checkpoints").symlink_to("gone")


def without_checksums(run: Path) -> None:
    for path in (run / "checkpoints").rglob(checksums.FILE):
        path.unlink()


def damaged(run: Path) -> None:
    for path in (run / "checkpoints").rglob("info/metadata"):
        path.write_text("{}")


def not_to_be_opened(run: Path) -> None:
    for step in ("3", "6"):
        (run / "checkpoints" / step / "base" / "manifest.ocdbt").unlink()
        (run / "checkpoints" / step / checksums.FILE).unlink()
        checksums.write(run / "checkpoints" / step)


def removed(run: Path) -> None:
    (run / "checkpoints").rename("disk")


def of_an_earlier_version(run: Path) -> None:
    removed(run)
    (run / SAVED).unlink()


def with_a_damaged_record(run: Path) -> None:
    removed(run)
    (run / SAVED).write_text("")


HIDDEN = (
    *(unmounted, in_another_folder, hidden_by_a_link, without_checksums, damaged, not_to_be_opened, removed),
    *(of_an_earlier_version, with_a_damaged_record),
)


@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
@pytest.mark.parametrize("hide", HIDDEN)
def test_a_run_whose_checkpoints_are_out_of_sight_does_not_begin_anew(
    hide: Callable[[Path], None], program: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    hide(run)
    before = content(Path())
    named = ("--run.checkpoint-dir", str(Path("ck").absolute())) if hide is unmounted else ()
    argv = ("--task", "gpt", "--run.dir", str(run), "--resume", "auto", *named)
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(f"{program}.train").main(list(argv))
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = {unmounted: "ck", in_another_folder: "work/ck"}.get(hide, "run/checkpoints")
    assert f"run.dir=run: it cannot resume from a checkpoint in {Path(place).absolute()}: " in line
    assert ("none can be used" if hide in (damaged, not_to_be_opened) else "one of step 6 was saved") in line
    assert line.endswith(
        "start a new run with a new --run.dir" + (" and --run.checkpoint-dir" if "ck" in place[-3:] else "")
    )
    assert content(Path()) == before
    assert resume.find({"resume": "auto", "run.dir": "new"}, formats.RUN) == Start(is_retry=True)  # the mend


@pytest.mark.parametrize("named", ["disk", "ck"])
def test_checkpoints_at_a_new_place_go_on(named: str, run: Path) -> None:
    unmounted(run)
    if named == "ck":  # mounted again
        Path("ck").rmdir()
        Path("disk").rename("ck")
    found = resume.find({"resume": "auto", "run.dir": "run", "run.checkpoint_dir": named}, formats.RUN)
    assert (found.kind, found.info["step"]) == ("resume", 6)


def test_the_folder_of_checkpoints_is_stored_absolute(run: Path) -> None:
    config, _, _ = resume.load(["--run.checkpoint-dir", "ck", "--run.dir", "new"], "", formats.RUN)
    assert config.run.checkpoint_dir == str(Path("ck").absolute())


def test_checkpoints_of_another_run_are_not_taken(run: Path) -> None:
    with pytest.raises(UserError, match="run.checkpoint_dir=run/checkpoints: these checkpoints are of the run run; "):
        resume.find({"resume": "auto", "run.dir": "new", "run.checkpoint_dir": "run/checkpoints"}, formats.RUN)
    shutil.rmtree("run/checkpoints/6")
    elsewhere(run, str(Path("ck").absolute()))
    shutil.rmtree(run)  # lost, but for its checkpoints
    found = resume.find({"resume": "auto", "run.dir": "new", "run.checkpoint_dir": "ck"}, formats.RUN)
    assert found.info["step"] == 3


def before_its_first_save(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / SAVED).write_text('{"step": 0}')


def test_a_run_that_was_stopped_before_its_first_save_begins_anew(run: Path) -> None:
    before_its_first_save(run)
    assert resume.find({"resume": "auto", "run.dir": "run"}, formats.RUN) == Start(is_retry=True)
    run_dir.empty(run)
    assert {path.name for path in run.iterdir()} == {LOCK, "notes.txt"}


def test_what_an_earlier_try_has_logged_stays_if_the_next_one_cannot_start(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    before_its_first_save(run)
    before = content(run)
    train = importlib.import_module("torchlm.train").main
    with pytest.raises(SystemExit):
        train(["--task", "gpt", "--run.dir", "run", "--resume", "auto", "--data.path", "missing.txt"])
    assert "missing.txt: no such file" in capsys.readouterr().err
    assert content(run) | {LOCK: b""} == before | {LOCK: b""}


@pytest.mark.parametrize("was_there", [True, False])
def test_files_that_a_run_did_not_write_stay(was_there: bool, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    if was_there:
        path.mkdir(parents=True)
    config = configs.replace(Config(), "run.dir", str(path))
    _, made = run_dir.make(config, Start())
    for name in ("config.toml", "letter.txt"):
        (path / name).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "events").touch()
    (path / "tensorboard").symlink_to(tmp_path / "mine")
    run_dir.remove(path, made)
    assert content(tmp_path) == {"a/b/letter.txt": b"", "mine/events": b""}


USERS = ("2024/photo", "7/base/photo", "7/info/letter", "7.old/photo", "7/", "frozen/photo", "7.tmp/photo", "7.pt.old")


@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
@pytest.mark.parametrize("name", USERS)
def test_folders_of_a_user_stay_among_checkpoints(name: str, program: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    if program == "jaxlm":
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.wait()
    else:
        importlib.import_module("torchlm.checkpoint").Checkpoints(tmp_path)
    assert (tmp_path / name).exists()
    assert not run_reader.RunRecord(tmp_path, {}, []).checkpoints


@pytest.mark.parametrize(
    "left", ["7/base/manifest.ocdbt", "7.orbax-checkpoint-tmp/", "7/info/metadata", "7.removed/base/d/x"]
)
def test_what_a_killed_save_or_removal_has_left_goes(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).mkdir() if left.endswith("/") else (tmp_path / left).touch()
    Checkpoints(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["7/photo", "7/base/photo", "7"])
def test_a_save_replaces_nothing_of_a_user(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    failures = list[str]()
    with Checkpoints(tmp_path, warn=failures.append) as checkpoints:
        checkpoints.save(state_at(7), INFO, {})
    assert "step 7 could not be saved" in failures[0] and "exists and is not a checkpoint" in failures[0]
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_of_another_run_in_the_folder_stay(tmp_path: Path) -> None:
    failures = list[str]()
    with Checkpoints(tmp_path, warn=failures.append) as mine, Checkpoints(tmp_path) as other:
        other.save(state_at(3), INFO | {"step": 3}, {})
        other.wait()
        for step in (3, 5, 7):
            mine.save(state_at(step), INFO | {"step": step}, {})
            mine.wait()
        assert (other.steps(), mine.steps()) == ([3], [7])
    assert len(failures) == 1 and "3 belongs to another run; use one folder per run" in failures[0]


def test_a_checkpoint_that_is_a_link_is_removed_as_a_link(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "ck") as checkpoints:
        checkpoints.save(state_at(3), INFO | {"step": 3}, {})
        checkpoints.wait()
        (tmp_path / "ck" / "3").rename(tmp_path / "archive")
        (tmp_path / "ck" / "3").symlink_to(tmp_path / "archive")
        before = content(tmp_path / "archive")
        checkpoints.save(state_at(7), INFO, {})
    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["7"]
    assert content(tmp_path / "archive") == before


@pytest.mark.skipif(storage.device(Path("/dev/shm")) == storage.device(Path.cwd()), reason="needs two file systems")
@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
def test_a_mount_that_vanishes_takes_no_save(program: str, tmp_path: Path) -> None:
    disk = Path("/dev/shm", f"jaxlm-{os.getpid()}")
    disk.mkdir()
    place, failures = tmp_path / "ck", list[str]()
    place.symlink_to(disk)
    checkpoints: Any
    if program == "jaxlm":
        checkpoints = Checkpoints(place, 9, failures.append)
        states = {step: (state_at(step), INFO | {"step": step}) for step in (3, 7, 9)}
    else:
        tests: Any = importlib.import_module("torchlm.checkpoint_test")
        checkpoints = importlib.import_module("torchlm.checkpoint").Checkpoints(place, 9, failures.append)
        config = tests.config_of()
        states = {step: (tests.start(config), tests.info_of(config, step)) for step in (3, 7, 9)}
        for step, (state, _) in states.items():
            state.step = step
    try:
        checkpoints.save(*states[3], {})
        checkpoints.wait()
        place.unlink()
        place.mkdir()  # the mount point, without the disk
        checkpoints.save(*states[7], {})
        checkpoints.wait()
        assert "step 7 could not be saved" in failures[0] and "is on another disk now" in failures[0]
        assert list(place.iterdir()) == []
        place.rmdir()
        place.symlink_to(disk)  # mounted again
        checkpoints.save(*states[9], {})
        checkpoints.close()
        assert {path.name.removesuffix(".pt") for path in disk.iterdir()} == {"3", "9"}
        assert len(failures) == 1
    finally:
        shutil.rmtree(disk, ignore_errors=True)


def test_an_earlier_checkpoint_that_was_set_aside_stays(run: Path, capsys: pytest.CaptureFixture) -> None:
    place = run / "checkpoints"
    for name in ("6.damaged", "6.damaged1"):
        (place / name).mkdir()
        (place / name / "old").touch()
    found = Start("resume", place / "3", damaged=((place / "6", "head/d/x is missing"),))
    run_dir.set_aside(found, place, run, RunLog())
    assert {path.name for path in place.iterdir()} == {"3", "6.damaged", "6.damaged1", "6.damaged2"}
    Checkpoints(place).close()
    assert {path.name for path in place.iterdir()} == {"3", "6.damaged", "6.damaged1", "6.damaged2"}
    assert runs.main(["verify", str(run)]) == 0


@pytest.mark.parametrize(
    ("saved", "stays"),
    [
        ('{"step": 6}', True),
        ('{"step": 9}', True),
        ('{"step": 3}', False),
        ('{"step": 0}', False),
        ("", True),
        (None, True),
    ],
)
def test_a_checkpoint_that_lost_its_checksums_stays(saved: str | None, stays: bool, run: Path) -> None:
    place = run / "checkpoints"
    (place / "6" / checksums.FILE).unlink()
    (run / SAVED).write_text(saved) if saved is not None else (run / SAVED).unlink()
    run_dir.set_aside(Start("resume", place / "3"), place, run, RunLog())
    Checkpoints(place).close()  # removes a save that was killed: it was never recorded
    assert {path.name for path in place.iterdir()} == {"3", *(["6.damaged"] if stays else [])}


@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
def test_two_runs_do_not_share_a_folder_of_checkpoints(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configs.replace(Config(), "run.checkpoint_dir", str(tmp_path / "a" / "ck"))
    with contextlib.ExitStack() as other:
        made = run_dir.lock_checkpoints(other, tmp_path, config.run.checkpoint_dir)
        assert made == [tmp_path / "a" / "ck" / LOCK, tmp_path / "a" / "ck", tmp_path / "a"]
        before = content(tmp_path)
        argv = ["--task", "gpt", "--run.dir", "new/run", "--run.checkpoint-dir", "a/ck", "--data.path", "missing.txt"]
        with pytest.raises(SystemExit):
            importlib.import_module(f"{program}.train").main(argv)
        assert f"run.checkpoint_dir={tmp_path / 'a' / 'ck'}: process {os.getpid()} on " in capsys.readouterr().err
        assert content(tmp_path) == before and not Path("new").exists()
    shutil.rmtree("a")
    with pytest.raises(SystemExit):
        importlib.import_module(f"{program}.train").main(argv)
    assert "missing.txt: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # a run that did not start leaves nothing


def test_each_whole_checkpoint_is_recorded(tmp_path: Path) -> None:
    seen = list[int]()
    with Checkpoints(tmp_path, record=seen.append) as checkpoints:
        for step in (3, 7):
            checkpoints.save(state_at(step), INFO | {"step": step}, {})
    assert seen == [3, 7]
    run_dir.record_saved(tmp_path, 7)
    assert history.last_saved(tmp_path) == 7
    run_dir.record_saved(tmp_path / "gone", 9)  # the run folder is gone: training continues
