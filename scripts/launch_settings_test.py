import shutil
from pathlib import Path

import launch_settings
import pytest

from jaxlm.errors import UserError


def test_flags_go_over_the_file_and_words_after_them_over_train() -> None:
    settings = launch_settings.load(
        ["--tpu.zone", "here", "--tpu.spot=false", "--slurm.gpus-per-node", "0"], ["--task", "gpt"]
    )
    assert (settings.tpu.zone, settings.tpu.spot, settings.slurm.gpus_per_node) == ("here", False, 0)
    assert settings.train == ["--task", "gpt"]
    assert launch_settings.load().train == ["--config", "configs/gpt_base.toml"]


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        (["--tpu.zoen", "x"], [], "--tpu.zoen: unknown setting; did you mean tpu.zone?"),
        (["tpu.zone", "x"], [], "tpu.zone: unknown setting"),
        (["--train", "x"], [], "--train: unknown setting"),
        (["--tpu.zone"], [], "--tpu.zone: value is missing"),
        (["--tpu.spot", "maybe"], [], "tpu.spot: Expected `bool`"),
        (["--slurm.nodes", "0"], [], "slurm.nodes: Expected `int` >= 1"),
        (["--slurm.time-limit", "soon"], [], "slurm.time_limit: Expected `str` matching"),
        (["--jobset.kind", "quantum"], [], "jobset.kind: Invalid enum value 'quantum'"),
        (["--name", "My_Run"], [], "name: Expected `str` matching"),
        ([], ["--model.d-modl", "3"], "--model.d-modl: unknown setting; did you mean --model.d-model?"),
        ([], ["--train.max-steps", "0"], "--train.max-steps 0"),
        ([], ["--config", "configs/none.toml"], "--config configs/none.toml: there is no such file"),
        ([], ["--resume", "auto"], "train: --resume is added by the launchers; leave it"),
        ([], ["--run.dir", "x"], "train: --run.dir is added by the launchers; give run_dir instead"),
    ],
)
def test_wrong_settings_are_refused_by_name(flags: list[str], more: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        launch_settings.load(flags, more)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes = 2", 'nodes = "2"', "slurm.nodes: Expected `int`, got `str`"),
        ("nodes = 2", "", "slurm: Object missing required field `nodes`"),
        ("nodes = 2", "nodes = 2\nnods = 2", "slurm: Object contains unknown field `nods`"),
        ("nodes = 2", "nodes =", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "launch.toml"
    shutil.copy(launch_settings.FILE, file)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match="launch.toml: ") as error:
        launch_settings.load(["--slurm.cpus-per-task", "3"], (), file)  # a flag makes the file's own types no laxer
    assert message in str(error.value)


@pytest.mark.parametrize("words", [[], ["lop"], ["--dry-run"]])
def test_a_missing_command_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch_settings.main(words, "", {"loop": lambda settings, shell: 0})
    assert "no such command; give loop" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["loop", "-h"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_settings.main(words, "the page", {}) == 0
    assert capsys.readouterr().out == "the page\n"
