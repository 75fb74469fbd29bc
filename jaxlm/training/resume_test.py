"""What a run starts from, by the files of real checkpoints: which is used, with what of it, and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxlm import config as configs
from jaxlm.data import tokenization
from jaxlm.data.position import Position
from jaxlm.errors import UserError
from jaxlm.params.layout import PARTS
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.training.resume import Start
from jaxlm.weights import formats
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS

STEPS = (3, 6, 9)
SIZES = {"vocab_size": 11, "d_model": 12, "n_heads": 3, "seq_len": 5, "n_layers": 2, "positions": "rotary"}
TOKENIZER = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
RATE = 0.125


def snapshot_of(step: int, **settings: Any) -> Snapshot:
    """Return the training state of a tiny mlm after some updates of 4 samples."""
    sizes = {f"model.{name}": value for name, value in SIZES.items()}
    config = configs.build({"task": "mlm", "train.batch_size": 4, "train.rewarmup_steps": 5, **sizes, **settings})
    random = np.random.default_rng(step)

    def arrays() -> dict[str, np.ndarray]:
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in parameters.shapes(config).items()}

    info = {"step": step, "task": config.task, "rate": RATE, "sample_iter": 4 * step, "val_loss": None}
    info |= {"tokenizer": tokenization.fingerprint(TOKENIZER), "data": "a hash", "rewarmed": None, "skipped": [[8, 12]]}
    return Snapshot(config, info | {"version": "0.1.0"}, arrays(), (arrays(), arrays()), n_updates=step)


def write_run(folder: Path, form: str, steps: tuple[int, ...] = STEPS) -> Path:
    """Write a run with checkpoints of one form as its trainer leaves it; return its folder."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / resume.LOCK).touch()
    (folder / "config.toml").touch()
    tokenization.save(TOKENIZER, folder / "tokenizer.json")
    for step in steps:
        if form == RUN:
            formats.WRITERS[RUN](folder / "made", snapshot_of(step))
            (folder / "made" / "checkpoints" / str(step)).rename(folder / "checkpoints" / str(step))
            shutil.rmtree(folder / "made")
        else:
            formats.WRITERS[form](folder / "checkpoints" / f"{step}.pt", snapshot_of(step))
    return folder


def flip(path: Path, place: int = -1) -> None:
    """Flip a bit of the byte at a place in a file, half-way through it by default."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1
    path.write_bytes(content)


def damage(run: Path, step: int) -> None:
    flip(max((run / "checkpoints" / str(step) / "head").rglob("d/*"), key=lambda path: path.stat().st_size))


MIX = {"sources": {"a hash": {"name": "", "rate": 0, "before": 0, "used": 36}}}  # should several sources follow


def find(form: str = RUN, /, **given: Any) -> Start:
    """Return what settings find; their names have __ for a point."""
    return resume.find({name.replace("__", "."): str(value) for name, value in given.items()}, form)


def loaded(*argv: Any) -> tuple[configs.Config, Start]:
    config, _, start = resume.load([str(arg) for arg in argv], "python -m jaxlm.train", RUN)
    return config, start


# --resume auto


def test_auto_needs_the_folder() -> None:
    with pytest.raises(UserError, match="resume=auto: .* --run.dir"):
        find(resume="auto")


def test_auto_starts_afresh_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert find(resume="auto", run__dir=tmp_path / "new") == Start(is_retry=True)
    (tmp_path / resume.LOCK).touch()  # of a run that was killed before its first checkpoint
    assert find(resume="auto", run__dir=tmp_path) == Start(is_retry=True)


def test_auto_leaves_a_folder_alone_that_is_of_no_run(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    assert find(resume="auto", run__dir=tmp_path) == Start(is_retry=False)


def test_auto_takes_the_newest(run: Path) -> None:
    start = find(resume="auto", run__dir=run)
    assert (start.kind, start.path, start.form) == ("resume", run / "checkpoints" / "9", RUN)
    assert (start.parts, start.run_dir, start.damaged) == (PARTS, str(run), ())
    assert start.position() == Position(9, 36, ((8, 12),), MIX)


def test_auto_sets_aside_what_is_damaged_and_takes_the_one_before(run: Path) -> None:
    damage(run, 9)
    start = find(resume="auto", run__dir=run)
    assert start.path == run / "checkpoints" / "6" and start.position().step == 6
    ((path, what),) = start.damaged
    assert (
        path == run / "checkpoints" / "9" and what.startswith("head/") and what.endswith("does not match its checksum")
    )


@pytest.mark.parametrize("n_whole", [0, 2])
def test_auto_passes_over_a_save_that_was_cut_short(n_whole: int, run: Path) -> None:
    for step in STEPS[n_whole:]:
        (run / "checkpoints" / str(step) / "checksums.json").unlink()
    start = find(resume="auto", run__dir=run)
    assert start.damaged == ()
    assert (start.path, start.is_retry) == ((run / "checkpoints" / "6", False) if n_whole else (None, True))


def test_auto_refuses_to_begin_anew_where_all_is_damaged(run: Path) -> None:
    for step in STEPS:
        damage(run, step)
    place = run / "checkpoints"
    with pytest.raises(UserError, match=rf"in {place}: none can be used \(the newest, 9: head/.* new --run.dir$"):
        find(resume="auto", run__dir=run)


def test_auto_refuses_another_task_and_another_program(run: Path, torch_run: Path) -> None:
    with pytest.raises(UserError, match="its run is of task mlm; give another folder"):
        find(resume="auto", run__dir=run, task="gpt")
    with pytest.raises(UserError, match=r"of another program \(checkpoint 1.2\); .*--resume .* --run.dir NEW"):
        find(resume="auto", run__dir=torch_run)
    with pytest.raises(UserError, match=r"of another program \(jaxlm run\)"):
        find(CHECKPOINT_1_2, resume="auto", run__dir=run)
    assert find(CHECKPOINT_1_2, resume="auto", run__dir=torch_run).path == torch_run / "checkpoints" / "9.pt"


def test_auto_with_a_base_starts_from_it_once(run: Path, tmp_path: Path) -> None:
    start = find(resume="auto", run__dir=tmp_path / "new", init_from=run)
    assert (start.kind, start.parts, start.run_dir, start.is_retry) == ("base", ("base",), "", True)
    assert find(resume="auto", run__dir=run, init_from=tmp_path / "gone").kind == "resume"


# --resume PATH and --init-from


@pytest.mark.parametrize("source", ["", "checkpoints", "checkpoints/9"])
def test_a_run_goes_on_in_its_folder(source: str, run: Path) -> None:
    start = find(resume=run / source)
    assert (start.kind, start.path, start.run_dir) == ("resume", run / "checkpoints" / "9", str(run))


def test_an_older_checkpoint_goes_on_in_a_new_folder_only(run: Path, tmp_path: Path) -> None:
    older = run / "checkpoints" / "3"
    for given in ({}, {"run__dir": run}):
        with pytest.raises(UserError, match=r"has newer checkpoints \(9\), which would be lost; .* --run.dir"):
            find(resume=older, **given)
    start = find(resume=older, run__dir=tmp_path / "new")
    assert (start.kind, start.path, start.run_dir) == ("resume", older, "")


def test_a_damaged_checkpoint_is_refused_alone_and_passed_over_in_a_run(run: Path, tmp_path: Path) -> None:
    damage(run, 9)
    with pytest.raises(UserError, match="checkpoints/9: damaged: head/.* does not match its checksum"):
        find(resume=run / "checkpoints" / "9")
    start = find(resume=run)
    assert (start.path, start.run_dir) == (run / "checkpoints" / "6", str(run))
    assert [path.name for path, _ in start.damaged] == ["9"]
    for step in STEPS[:2]:
        damage(run, step)
    with pytest.raises(UserError, match="checkpoints/9: damaged: .*; there is no other checkpoint"):
        find(resume=run)


def test_base_alone_is_asked_for_by_init_from_by_another_task_and_by_switch_training(run: Path) -> None:
    for given in ({"init_from": run}, {"resume": run, "task": "gpt"}, {"resume": run, "train__switch_training": True}):
        start = find(**given)
        assert (start.kind, start.parts, start.run_dir, start.position()) == ("base", ("base",), "", Position())


def test_a_base_is_used_though_the_rest_is_damaged(run: Path) -> None:
    damage(run, 9)  # in its head
    assert find(init_from=run).path == run / "checkpoints" / "9"


def test_reset_optimizer_keeps_head_and_counters(run: Path) -> None:
    start = find(resume=run, train__reset_optimizer=True)
    assert (start.kind, start.parts) == ("resume", ("base", "head"))
    assert start.position() == Position(9, 36, ((8, 12),), MIX)


def test_another_optimizer_starts_anew(run: Path) -> None:
    argv = ("--resume", run, "--train.optimizer", "muon")
    with pytest.raises(UserError, match="leave this setting out, or start it anew with --train.reset-optimizer$"):
        loaded(*argv)
    assert loaded(*argv, "--train.reset-optimizer")[0].train.optimizer == "muon"


def test_another_program_goes_on_in_a_new_folder(run: Path, torch_run: Path) -> None:
    for form, source, path in (
        (RUN, torch_run, torch_run / "checkpoints" / "9.pt"),
        (CHECKPOINT_1_2, run, run / "checkpoints" / "9"),
    ):
        start = find(form, resume=source)
        assert (start.kind, start.path, start.run_dir, start.position().sample) == ("resume", path, "", 36)
    assert find(CHECKPOINT_1_2, resume=torch_run).run_dir == str(torch_run)


def test_what_is_no_checkpoint_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter.txt").write_text("dear reader")
    formats.WRITERS[formats.STATE_DICT](tmp_path / "bare.pt", snapshot_of(1))
    for name, why in (
        ("gone", "there is no such run or checkpoint"),
        ("empty", "there is no checkpoint of a run"),
        ("letter.txt", "neither a file of torch.save nor safetensors"),
        ("bare.pt", "weights without settings; python -m jaxlm.convert .*bare.pt NEW --config FILE makes a run"),
    ):
        for setting in ("resume", "init_from"):
            with pytest.raises(UserError, match=f"{name}: {why}"):
                find(**{setting: tmp_path / name})


# Settings


def test_a_run_that_goes_on_has_its_settings_and_new_ones_are_listed(run: Path) -> None:
    config, start = loaded("--resume", run, "--train.learning-rate", "0.5", "--train.batch-size", "2")
    assert (config.task, config.model.d_model, config.run.dir) == ("mlm", 12, str(run))
    assert start.changes(config) == [("train.batch_size", 4, 2), ("train.learning_rate", 1e-3, 0.5)]
    assert start.changes(loaded("--resume", run)[0]) == []


OTHER = {
    "model.d_model": 24,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.vocab_size": 12,
    "model.positions": "fixed",
    "model.final_norm": "true",
    "model.post_norm": "true",
    "model.embedding_norm": "true",
    "model.norm_epsilon": "1e-06",
    "model.gelu": "tanh",
    "model.pad_id": 1,
    "model.segments": 2,
    "model.seq_len": 6,
    "model.tied_embedding": "true",
    "model.head_outputs": "vocabulary",
    "model.pooling": "last",
    "model.head_dense": "bert",
    "model.output_bias": "false",
    "model.head_hidden": 5,
    "model.classifier_bias": "false",
    "model.norm": "rmsnorm",
    "model.mlp": "swiglu",
    "model.d_ff": 20,
    "model.biases": "none",
    "model.logit_softcap": 15.0,
    "model.n_kv_heads": 1,
    "model.head_dim": 8,
    "model.qk_norm": "true",
    "model.first_norm": "false",
    "model.window": 4,
    "model.global_every": 2,
    "model.global_first": "false",
    "model.rotary_base": 5000.0,
    "model.rotary_base_local": 1000.0,
    "model.rotary_scaling": 8.0,
    "model.rotary_scaling_len": 16,
    "data.n_labels": 3,
    "data.stride": 2,
    "data.pack": "documents",
    "tokenizer.marks": "file",
    "train.seed": 1,
    "model.frozen_embedding": "true",
    "model.frozen_layers": 1,
    "model.lora_rank": 2,
    "model.lora_alpha": 3.0,
    "model.lora_products": "key",
    "train.optimizer": "muon",
}


@pytest.mark.parametrize("name", resume.FIXED)
def test_what_cannot_change_is_refused_by_name(name: str, run: Path) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"^{name}=.*, but .*checkpoints/9 has .*, which cannot change; leave this"):
        loaded("--resume", run, flag, OTHER[name])
    if name in resume.BASE_SETTINGS:
        with pytest.raises(UserError, match=f"^{name}=.*, which cannot change"):
            loaded("--init-from", run, "--task", "mlm", flag, OTHER[name])
    else:
        config, start = loaded("--init-from", run, "--task", "mlm", flag, OTHER[name])
        assert str(configs.get(config, name)).lower() == str(OTHER[name]) and start.changes(config) == []


def test_a_base_brings_its_shape_and_its_tokenizer(run: Path) -> None:
    config, start = loaded("--init-from", run, "--task", "gpt", "--model.dropout", "0.25")
    assert (config.task, config.run.dir, config.model.dropout) == ("gpt", "", 0.25)
    assert {name: configs.get(config, f"model.{name}") for name in SIZES if name != "seq_len"} == {
        name: value for name, value in SIZES.items() if name != "seq_len"
    }
    assert config.tokenizer.path == str(run / "tokenizer.json")
    assert {origin for _, _, origin in start.layers()} == {str(run / "checkpoints" / "9")}


def test_a_causal_base_makes_a_classifier_read_the_last_token(run: Path, tmp_path: Path) -> None:
    def pooling(settings: dict[str, Any], *argv: Any) -> str:
        path = tmp_path / "base.safetensors"
        formats.WRITERS[SAFETENSORS](path, snapshot_of(3, **settings))
        return loaded("--init-from", path, *argv)[0].model.pooling

    assert pooling({"task": "gpt"}, "--task", "cola") == "last"
    assert pooling({"task": "sst2", "model.pooling": "last"}, "--task", "cola") == "last"  # a gpt, tuned once before
    assert pooling({"task": "gpt"}, "--task", "cola", "--model.pooling", "first") == "first"
    assert pooling({"task": "gpt"}, "--task", "gpt") == "first"  # which has no use for it
    assert pooling({"task": "mlm"}, "--task", "cola") == pooling({"task": "sst2"}, "--task", "cola") == "first"


def test_a_causal_language_model_goes_on_with_its_output_layer(tmp_path: Path) -> None:
    def begun(task: str, *argv: Any) -> tuple[tuple[str, ...], bool]:
        path = tmp_path / "base.safetensors"
        formats.WRITERS[SAFETENSORS](path, snapshot_of(3, **{"task": task, "model.tied_embedding": True}))
        config, start = loaded(*argv[:1], path, *argv[1:])
        return start.parts, config.model.tied_embedding

    for before, after in (("gpt", "gpt"), ("gpt", "pairs"), ("pairs", "gpt")):
        assert begun(before, "--init-from", "--task", after) == (("base", "head"), True)
    assert begun("gpt", "--resume", "--task", "pairs") == (("base", "head"), True)
    for before, after in (("gpt", "cola"), ("mlm", "mlm"), ("mlm", "gpt")):
        assert begun(before, "--init-from", "--task", after) == (("base",), False)
    assert begun("gpt", "--resume", "--task", "gpt", "--train.switch-training") == (("base",), False)
    with pytest.raises(UserError, match="^model.tied_embedding=False, but .* has True, which cannot change"):
        begun("gpt", "--init-from", "--task", "gpt", "--model.tied-embedding", "false")


def test_a_damaged_head_is_passed_over_where_it_is_needed(tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "gpt", {3: None, 6: None, 9: None})
    damage(run, 9)
    assert loaded("--init-from", run, "--task", "cola")[1].path == run / "checkpoints" / "9"
    start = loaded("--init-from", run, "--task", "gpt")[1]
    assert start.path == run / "checkpoints" / "6" and start.damaged[0][0] == run / "checkpoints" / "9"


def test_learned_positions_bring_their_number(tmp_path: Path) -> None:
    path = tmp_path / "learned.safetensors"
    formats.WRITERS[SAFETENSORS](path, snapshot_of(3, **{"model.positions": "learned"}))
    assert loaded("--init-from", path, "--task", "mlm")[0].model.seq_len == 5
    assert loaded("--init-from", path, "--task", "mlm", "--model.seq-len", "4")[0].model.seq_len == 4


# Data and tokenizer


def test_other_data_and_another_tokenizer_are_refused(run: Path) -> None:
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "b": 1}, unk_token="[UNK]"))

    def data(tokenizer: Tokenizer = TOKENIZER, fingerprint: str = "a hash") -> Any:
        source = SimpleNamespace(fingerprint=fingerprint, description="texts.txt", classes=())
        return SimpleNamespace(tokenizer=tokenizer, source=source, samples={"train": None})

    resumed, base = find(resume=run), find(init_from=run)
    for start in (resumed, base, Start()):
        start.check(data())
    for start in (resumed, base):
        with pytest.raises(UserError, match="checkpoints/9: it has another tokenizer"):
            start.check(data(tokenizer=other))
    with pytest.raises(UserError, match=r"the data have changed \(texts.txt\)"):
        resumed.check(data(fingerprint="another"))
    base.check(data(fingerprint="another"))


# Re-warmup


def test_a_rewarmup_begins_where_the_schedule_changes(run: Path, tmp_path: Path) -> None:
    def rewarmed(*argv: Any) -> tuple[int, float] | None:
        config, start = loaded(*argv)
        return start.rewarmed(config.train)

    assert rewarmed("--resume", run) is None  # the schedule is the one that was
    assert rewarmed("--resume", run, "--train.learning-rate", "0.5") == (9, RATE)
    assert rewarmed("--resume", run, "--train.max-steps", "2000") == (9, RATE)  # where the decay ends
    assert rewarmed("--resume", run, "--train.max-steps", "2000", "--train.rewarmup-steps", "0") is None
    assert rewarmed("--resume", run, "--train.batch-size", "2") is None
    assert rewarmed("--resume", run, "--run.dir", tmp_path / "new") == (9, RATE)  # the next phase
    assert rewarmed("--init-from", run, "--task", "mlm", "--train.rewarmup-steps", "5") is None


def test_a_rewarmup_that_was_interrupted_goes_on(run: Path) -> None:
    start = find(resume=run)
    config, _ = loaded("--resume", run)
    start.info["rewarmed"] = [7, 0.0625]
    assert start.rewarmed(config.train) == (7, 0.0625)
