"""Every name that a file system allows: a run, its checkpoints, and what reads or writes them have it as a path."""

import importlib
import os
import shlex
import shutil
from pathlib import Path

import pytest

from jaxlm import config, report, runs
from jaxlm.checkpoint import Checkpoints
from jaxlm.checkpoint_test import INFO, assert_bitwise_equal, state_at
from jaxlm.data import grammar
from jaxlm.errors import UserError
from jaxlm.inference import load
from jaxlm.io import checksums, storage
from jaxlm.params import layout
from jaxlm.reporting import verify
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.weights import formats, snapshots

NO_UTF_8 = os.fsdecode(b"\xff")
NAMES = (
    *(
        "b[1]",
        "[!a]",
        "*",
        "?",
        "a b",
        " ",
        "a%20b",
        "#1",
        "~",
        "$HOME",
        "{a}",
        "'q\"",
        "back\\slash",
        "new\nline",
        "\x01",
    ),
    *("-x", "trail.", "...", "123", "7.orbax-checkpoint-tmp", "x.__lock", "gs:", "a:", "s3:/x", "=&;|<>@`,"),
    *("é", "\U0001f600", NO_UTF_8, "n" * 255),
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_checkpoints_in_a_folder_of_any_name_can_be_read(name: str, tmp_path: Path) -> None:
    folder, failures = tmp_path / name / "checkpoints", list[str]()
    with Checkpoints(folder, warn=failures.append) as checkpoints:
        checkpoints.save(state_at(3), INFO | {"step": 3}, {})
        assert_bitwise_equal(checkpoints.restore(3, state_at(0)), state_at(3))
        checkpoints.save(state_at(7), INFO, {})
        assert_bitwise_equal(checkpoints.restore(7, state_at(0)), state_at(7))
        assert checkpoints.steps() == [7]
    assert not failures
    assert {path.name for path in folder.iterdir()} == {"7"}
    layout.check_run(folder / "7")


def test_no_link_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with storage.plain(tmp_path / "b[1]") as path:
        assert path != tmp_path / "b[1]"
        assert path.parent.parent == tmp_path
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[1]"))  # as odd
    with storage.plain(tmp_path / "b[1]") as path:
        assert "[" not in str(path)


@pytest.mark.parametrize("name", ["b[1]", "x.__lock", "gs:", "new\nline", "n" * 255, NO_UTF_8], ids=ascii)
def test_a_run_of_any_name_is_used(name: str, tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "gpt", {3: 1.0, 6: 2.0}).rename(tmp_path / name)
    assert verify.check(run / "checkpoints" / "6")["step"] == 6
    assert load.load(run).start.info["step"] == 3
    assert report.main([str(run)]) == 0
    assert (run / "report.html").is_file()
    for target, form in (
        ("a[1].safetensors", formats.SAFETENSORS),
        ("run[1]", formats.RUN),
        ("t[1].pt", formats.CHECKPOINT_1_2),
        ("m" * 255, formats.SAFETENSORS),
    ):
        snapshots.write(run / target, snapshots.read(run), form)
        assert snapshots.read(run / target).info["step"] == 6
    moved = (run / "checkpoints" / "6").rename(run / "6 (copy) [1]")
    assert snapshots.read(moved).info["step"] == 6


@pytest.mark.parametrize(
    ("setting", "value"),
    [("--run.dir", f"runs/{NO_UTF_8}"), ("--data.path", NO_UTF_8), ("--run.checkpoint-dir", f"/tmp/{NO_UTF_8}")],
)
def test_bytes_that_config_toml_cannot_hold_are_refused(setting: str, value: str) -> None:
    with pytest.raises(UserError, match="has bytes that are not UTF-8, which config.toml cannot hold; give another"):
        config.load([setting, value])


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "a#b", "a%20b"])
def test_names_that_gs_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="a name in gs:// cannot contain"):
        storage.path(f"gs://bucket/{name}/x")


@pytest.mark.parametrize("name", ["gs:/x", "x/http://y", "./gs://x", "-://x"])
def test_a_local_path_is_no_address(name: str) -> None:
    assert not storage.is_remote(name)


def spoil(folder: Path, what: str) -> None:
    """Take something from a checkpoint, and write its checksums anew: its bytes are as they were written."""
    base = folder / "base"
    for path in base.rglob("manifest.ocdbt") if what == "manifests" else ():
        path.unlink()
    if what == "manifest":
        (base / "manifest.ocdbt").unlink()
    elif what == "other manifest":
        (base / "manifest.ocdbt").write_bytes((folder / "head" / "manifest.ocdbt").read_bytes())
    elif what == "data":
        shutil.rmtree(base / "d")
    elif what == "metadata":
        (base / "_METADATA").write_text("{}")
    elif what == "part":
        shutil.rmtree(folder / "head")
    (folder / checksums.FILE).unlink()
    checksums.write(folder)


@pytest.mark.parametrize("what", ["manifest", "manifests", "other manifest", "data", "metadata", "part"])
def test_a_checkpoint_that_cannot_be_opened_is_not_whole(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tiny_runs.write(tmp_path / "run", "gpt", {3: 2.0, 6: 1.0})
    spoil(run / "checkpoints" / "6", what)
    assert checksums.damage(run / "checkpoints" / "6") == ""
    assert runs.main(["verify", str(run)]) == 1
    assert "6: damaged: " in capsys.readouterr().out
    given = {"resume": "auto", "run.dir": str(run), "task": "gpt"}
    found = resume.find(given, formats.RUN)
    assert (found.info["step"], [path.name for path, _ in found.damaged]) == (3, ["6"])
    with pytest.raises(UserError, match="6: damaged: .* cannot be opened"):
        resume.to_use(run / "checkpoints" / "6")


@pytest.mark.parametrize("what", ["manifest", "data"])
def test_no_checkpoint_is_removed_for_one_that_cannot_be_opened(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    with Checkpoints(tmp_path, warn=failures.append) as checkpoints:
        checkpoints.save(state_at(3), INFO | {"step": 3}, {})
        checkpoints.wait()
        finish = checkpoints.checkpointer.wait_until_finished

        def finish_badly() -> None:
            finish()
            part = tmp_path / "7" / "base"
            (part / "manifest.ocdbt").unlink() if what == "manifest" else shutil.rmtree(part / "d")

        monkeypatch.setattr(checkpoints.checkpointer, "wait_until_finished", finish_badly)
        checkpoints.save(state_at(7), INFO, {})
        checkpoints.wait()
        monkeypatch.undo()
        assert "step 7 could not be saved" in failures[0]
        assert checkpoints.steps() == [3]
        assert_bitwise_equal(checkpoints.restore(3, state_at(0)), state_at(3))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
def test_every_path_of_a_run_has_any_name(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = importlib.import_module(f"{program}.train").main
    texts = Path("~", "texts [1]?#%20.txt")  # not of the user's own folder
    texts.parent.mkdir()
    texts.write_text("".join(f"{text}\n" for text, _ in grammar.sentences("sst2")["train"][:160]))
    common = (
        *shlex.split("--task gpt --model.d-model 12 --model.n-layers 1 --model.n-heads 3 --model.seq-len 16"),
        *shlex.split("--train.batch-size 8 --train.eval-interval 2 --train.warmup-steps 1 --log.tensorboard true"),
        *("--data.cache-dir", "cache [*]", "--tokenizer.vocab-size", "300"),
    )
    data, named = ("--data.path", str(texts)), ("--run.dir=gs:/run [1]", "--run.checkpoint-dir", "a:/{*}.__lock\n")
    assert train([*common, *data, *named, "--train.max-steps", "4"]) == 0
    assert {path.name.removesuffix(".pt") for path in Path("a:", "{*}.__lock\n").iterdir()} == {".lock", "4"}
    assert runs.main(["verify", "./gs:/run [1]"]) == 0
    assert any(Path("gs:/run [1]/tensorboard").iterdir())
    assert train([*common, *data, named[0], "--resume", "auto", "--train.max-steps", "6"]) == 0
    assert resume.to_use(Path("gs:/run [1]")).info["step"] in (4, 6)
    tokenizer = ("--tokenizer.path", "gs:/run [1]/tokenizer.json")
    assert (
        train([*common, *data, "--init-from", "./gs:/run [1]", *tokenizer, "--train.max-steps=2", "--run.dir=-x"]) == 0
    )
    assert resume.to_use(Path("-x")).info["step"] == 2
