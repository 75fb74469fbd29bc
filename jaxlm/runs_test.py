"""`python -m jaxlm.runs verify`: a line on each checkpoint, and an exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from jaxlm import runs
from jaxlm.data import tokenization
from jaxlm.io import checksums
from jaxlm.training.resume_test import damage, flip, snapshot_of
from jaxlm.weights import formats

CASES = Path(__file__).parent.parent / "parity_tests" / "cases"


def told(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return the exit status, and what comes after the path in each line."""
    status = runs.main(["verify", str(path)])
    lines = capsys.readouterr().out.splitlines()
    return status, [line.removeprefix(f"{path}/checkpoints/").removeprefix(str(path)) for line in lines]


def test_what_is_whole_is_told(run: Path, torch_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(run, capsys) == (0, [f"{step}: complete, step {step}, jaxlm 0.1.0" for step in (3, 6, 9)])
    assert told(torch_run, capsys) == (0, [f"{step}.pt: complete, step {step}, jaxlm 0.1.0" for step in (3, 6, 9)])
    assert told(run / "checkpoints" / "6", capsys) == (0, [": complete, step 6, jaxlm 0.1.0"])
    assert told(torch_run / "checkpoints" / "6.pt", capsys) == (0, [": complete, step 6, jaxlm 0.1.0"])
    assert told(CASES / "mlm" / "checkpoint.pt", capsys) == (0, [": complete, step 12"])  # of the original


def test_damage_is_told_beside_what_is_whole(run: Path, torch_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 6)
    (run / "checkpoints" / "9" / checksums.FILE).unlink()
    status, (first, second, third) = told(run, capsys)
    assert (status, first) == (1, "3: complete, step 3, jaxlm 0.1.0")
    assert second.startswith("6: damaged: head/") and second.endswith(" does not match its checksum")
    assert third == "9: damaged: checksums.json is missing: the save is incomplete"

    flip(torch_run / "checkpoints" / "3.pt")
    path = torch_run / "checkpoints" / "9.pt"
    path.write_bytes(path.read_bytes()[:-100])
    status, (first, second, third) = told(torch_run, capsys)
    assert (status, second) == (1, "6.pt: complete, step 6, jaxlm 0.1.0")
    assert first.startswith("3.pt: damaged: its part ") and " is not as it was written" in first
    assert third.startswith("9.pt: cannot be read as a file of torch.save")


def test_format_settings_and_tokenizer_are_looked_at(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, change in (
        (3, {"format": 1}),
        (6, {"config": {"model.width": 3}}),
        (9, {"config": {"model.d_model": "wide"}}),
    ):
        path = run / "checkpoints" / str(step)
        info = json.loads((path / "info" / "metadata").read_text()) | change
        (path / "info" / "metadata").write_text(json.dumps(info))
        checksums.write(path)  # by a program that wrote it so
    status, (first, second, third) = told(run, capsys)
    assert (status, first) == (
        1,
        "3: checkpoint of format 1, but only 2 can be read; use the jaxlm that wrote it, 0.1.0",
    )
    assert second.startswith("6: its setting model.width is unknown here")
    assert third.startswith("9: in its settings: Expected `int`, got `str`")


def test_another_tokenizer_in_the_run_is_told(run: Path, torch_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "b": 1}, unk_token="[UNK]"))
    for folder in (run, torch_run):
        tokenization.save(other, folder / "tokenizer.json")
        status, lines = told(folder, capsys)
        assert status == 1
        assert all("tokenizer.json is not the tokenizer of this checkpoint" in line for line in lines)
        (folder / "tokenizer.json").write_text("{")
        status, lines = told(folder, capsys)
        assert status == 1 and all("cannot be read as a tokenizer" in line for line in lines)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("", "runs: there is no such folder"),
        ("verify", "PATH"),
        ("verify gone", "gone: there is no such run or checkpoint"),
        ("verify empty", "empty: there is no checkpoint of a run"),
        ("verify run gone", "gone: there is no such run or checkpoint"),
        ("examine run", "examine: neither a command nor a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: str, why: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runs.main(args.split())
    captured = capsys.readouterr()
    assert (end.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and why in captured.err


def test_the_command_imports_no_framework_and_takes_several_paths(run: Path, tmp_path: Path) -> None:
    formats.WRITERS[formats.RUN](tmp_path / "converted", snapshot_of(7))  # which has no tokenizer.json
    code = (
        "import sys; from jaxlm.runs import main; status = main(sys.argv[1:]); "
        "print({'jax', 'torch', 'orbax'} & set(sys.modules)); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "verify", run, tmp_path / "converted"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5 and done.stdout.endswith("set()\n")
