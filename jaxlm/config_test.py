"""Settings: layers and their origins, round trip, errors in one line, warnings, and the help of the real command."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import config as configs
from jaxlm.config import COMMAND_LINE, SETTINGS, Config
from jaxlm.errors import UserError, nearest, reported


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def failure(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        configs.load(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def warnings_of(*argv: str, of_other_tasks: tuple[str, ...] = ()) -> list[str]:
    config, origins = configs.load(list(argv))
    return configs.warnings(config, origins, of_other_tasks)


# Layers


def test_later_layers_win_and_tell_their_origin(tmp_path):
    first = write(tmp_path / "first.toml", 'task = "gpt"\nmodel.d_model = 64\nmodel.n_heads = 2\ntrain.seed = 1\n')
    second = write(tmp_path / "second.toml", "[model]\nd_model = 96\n[train]\nbatch_size = 5\n")
    argv = ["--train.seed", "7", "--config", first, "--model.n-heads", "3", "--config", second, "--train.batch-size=9"]
    config, origins = configs.load(argv)
    assert (config.task, config.tokenizer.kind, config.model.pad_id) == ("gpt", "bpe", -1)  # of the preset of gpt
    assert (config.train.seed, config.model.n_heads) == (1, 3)  # a file wins over an argument before it
    assert (config.model.d_model, config.train.batch_size) == (96, 9)
    preset = str(configs.presets_dir() / "gpt.toml")
    expected = {"task": first, "train.seed": first, "model.n_heads": COMMAND_LINE, "model.d_model": second}
    expected |= {"train.batch_size": COMMAND_LINE, "tokenizer.kind": preset, "model.pad_id": preset}
    assert {name: origins[name] for name in expected} == expected


def test_the_preset_is_that_of_the_last_task(tmp_path):
    path = write(tmp_path / "a.toml", 'task = "gpt"\nmodel.seq_len = 32\n')
    config, origins = configs.load(["--config", path, "--task", "mlm"])
    assert (config.task, config.tokenizer.kind, config.model.seq_len) == ("mlm", "wordpiece", 32)
    assert origins["task"] == COMMAND_LINE


def test_without_arguments_the_task_is_mlm():
    config, origins = configs.load([])
    assert config.task == "mlm"
    assert set(origins.values()) == {str(configs.presets_dir() / "mlm.toml")}


def test_tasks_of_glue_share_a_preset():
    for task in configs.GLUE:
        config, _ = configs.load(["--task", task])
        assert (config.task, config.data.hub_config, config.data.pair_column) == (task, task, "auto")


@pytest.mark.parametrize("task", ["mlm", "gpt", "sst2", "cola", "rte"])
def test_each_preset_is_valid_and_warns_of_nothing(task):
    assert configs.load(["--task", task])[0].task == task
    assert warnings_of("--task", task) == []


@pytest.mark.parametrize("path", sorted(configs.presets_dir().glob("*.toml")), ids=lambda path: path.stem)
def test_each_file_of_the_presets_folder_can_be_read(path):
    config, _ = configs.load(["--config", str(path)])
    if path.stem == "glue":  # of several tasks
        return
    assert path.stem == config.task or path.stem.endswith(f"_{config.task}") or path.stem.startswith(f"{config.task}_")


def test_dump_is_read_back_to_the_same_settings(tmp_path):
    def other(name: str) -> object:
        value = configs.get(Config(), name)
        choices = {
            "data.format": "tsv",
            "data.header": "no",
            "data.documents": "file",
            "data.stride": 3,
            "data.fold": 2,
        }
        choices |= {"data.pack": "documents", "train.group_by_length": False}  # one of the two
        choices |= {"model.positions": "rotary", "tokenizer.kind": "bpe"}
        choices |= {"tokenizer.marks": "file", "tokenizer.end_ids": "7,9"}
        choices |= {"model.head_outputs": "vocabulary", "model.pooling": "last", "model.gelu": "tanh"}
        choices |= {
            "model.lora_products": "fc1,key",
            "model.head_dense": "bert",
            "train.precision": "bfloat16",
            "task": "cola",
        }
        choices |= {
            "data.validation_path": 'a "folder" é \\ = [x]',
            "data.path": "C:\\new\tfile",
            "data.hub": "",
            "data.sources": (),
            "data.weights_after": 0,
            "model.d_model": 48,
        }
        choices |= {"train.min_learning_rate": 1e-7, "train.learning_rate": 1 / 3}
        choices |= {
            "train.schedule": "linear",
            "train.on_nonfinite": "skip",
            "model.remat": "full",
            "model.attention": "plain",
        }
        choices |= {"model.norm": "rmsnorm", "model.mlp": "swiglu", "model.biases": "none"}
        choices |= {
            "model.n_kv_heads": 2,
            "model.head_dim": 6,
            "model.first_norm": True,
            "model.rotary_base_local": 9.0,
            "model.rotary_scaling": 8.0,
        }
        choices |= {"train.optimizer": "muon", "train.muon_scale": "spectral"}
        choices |= {"train.muon_coefficients": "polar_express", "train.sampling": "shuffled", "train.class_weights": ""}
        choices |= {"model.initialization": "gpt2", "model.logit_softcap": 15.0, "model.z_loss": 1e-4}
        if name in choices:
            return choices[name]
        if isinstance(value, bool):
            return not value
        return "text" if isinstance(value, str) else value * 3 + 5 if isinstance(value, int) else value / 3

    lasting = [name for name in SETTINGS if name not in configs.TRANSIENT]
    config = configs.build({name: other(name) for name in lasting if name != "model.n_heads"})
    same = [name for name in lasting if configs.get(config, name) == configs.get(Config(), name)]
    assert same == [
        "data.hub",
        "data.sources",
        "data.weights_after",
        "model.n_heads",
        "model.first_norm",
        "train.group_by_length",
        "train.label_smoothing",
        "train.class_weights",
        "train.sampling",
    ]
    path = write(tmp_path / "config.toml", configs.dump(config))
    again, origins = configs.load(["--config", path])
    assert again == config
    assert set(origins) == {*lasting, "run.checkpoint_dir"} and set(origins.values()) == {path}
    assert [type(configs.get(again, name)) for name in SETTINGS] == [type(configs.get(config, n)) for n in SETTINGS]


def test_hyphens_and_underscores_and_equals_signs_mean_the_same():
    spellings = [
        ["--train.max-steps", "7"],
        ["--train.max_steps", "7"],
        ["--train.max-steps=7"],
        ["--train.max_steps=7"],
    ]
    assert {configs.load(argv)[0].train.max_steps for argv in spellings} == {7}
    assert configs.load(["--data.path", "my-file_1=x.txt"])[0].data.path == "my-file_1=x.txt"
    assert configs.load(["--data.path=a=b"])[0].data.path == "a=b"


def test_negative_numbers_and_switches():
    assert configs.load(["--model.pad-id", "-1"])[0].model.pad_id == -1
    for argv in (["--log.samples"], ["--log.samples", "true"], ["--log.samples=true"], ["--log.samples", "--debug"]):
        assert configs.load(argv)[0].log.samples is True
    assert configs.load(["--log.samples", "--log.samples", "false"])[0].log.samples is False


def test_numbers_of_columns_may_be_numbers_in_a_file(tmp_path):
    path = write(tmp_path / "a.toml", 'data.path = "a"\ndata.text_column = 3\ndata.label_column = "1"\n')
    config, _ = configs.load(["--config", path])
    assert (config.data.text_column, config.data.label_column) == ("3", "1")


def test_names_that_scripts_use_exist():
    names = "run.dir train.max-steps train.eval-interval train.batch-size train.seed data.path".split()
    names += "model.d-model model.n-layers model.n-heads model.seq-len".split()
    values = dict.fromkeys(names, "8") | {"model.d-model": "16"}
    config, _ = configs.load([part for name in names for part in (f"--{name}", values[name])])
    assert {name: str(configs.get(config, name.replace("-", "_"))) for name in names} == values


# Errors


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--modle.d-model", "3"], ["--modle.d-model: unknown setting", "did you mean --model.d-model?"]),
        (["--d-model", "3"], ["unknown setting", "did you mean --model.d-model?"]),
        (["--train.batchsize", "3"], ["unknown setting", "did you mean --train.batch-size?"]),
        (["--confg", "x"], ["--confg: unknown setting", "did you mean --config?"]),
        (["--zzzzzzzzzzzz", "3"], ["--zzzzzzzzzzzz: unknown setting (--help lists them)"]),
        (["mlm"], ["argument 'mlm' is not a setting", "--help"]),
        (["-x"], ["argument '-x' is not a setting"]),
        (["--train.max-steps"], ["--train.max-steps: value is missing (optimizer updates; default: 1000)"]),
        (["--data.path", "--task", "mlm"], ["--data.path: value is missing"]),
        (["--config"], ["--config: value is missing"]),
        (["--train.max-steps", "many"], ["--train.max-steps many: expected int", "default: 1000"]),
        (["--train.max-steps", "1.5"], ["--train.max-steps 1.5: expected int"]),
        (["--train.max-steps", ""], ["--train.max-steps", "expected int"]),
        (["--train.learning-rate", "fast"], ["--train.learning-rate fast: expected float", "0.001"]),
        (["--log.samples", "yes"], ["--log.samples yes: expected bool"]),
        (["--train.max-steps", "0"], ["--train.max-steps 0: expected int >= 1"]),
        (["--train.batch-size", "-4"], ["--train.batch-size -4: expected int >= 1"]),
        (["--train.seed", str(2**31)], ["expected int <= 2147483647"]),
        (["--train.seed", str(10**30)], ["expected int <= 2147483647"]),
        (["--model.pad-id", "-2"], ["expected int >= -1"]),
        (["--model.seq-len", "3"], ["expected int >= 4"]),
        (["--model.dropout", "1"], ["--model.dropout 1: expected float < 1.0"]),
        (["--data.mask-fraction", "0"], ["expected float > 0.0"]),
        (["--data.n-labels", "1"], ["data.n_labels=1", "two classes or more"]),
        (["--tokenizer.vocab-size", "299"], ["expected int >= 300"]),
        (["--train.clip-norm", "0"], ["expected float > 0.0"]),
        (["--train.learning-rate", "nan"], ["--train.learning-rate nan", "expected float"]),
        (["--train.learning-rate", "inf"], ["--train.learning-rate inf", "expected float <= "]),
        (["--train.precision", "fp16"], ["--train.precision fp16: must be one of float32, bfloat16"]),
        (["--model.positions", ""], ["must be one of fixed, learned, rotary"]),
        (["--task", "gtp"], ["task=gtp: unknown task; did you mean gpt?", "embed, gpt, mlm"]),
        (["--task", "regres"], ["task=regres: unknown task; did you mean regress?", "qnli, qqp, regress, rte"]),
        (["--task", "mlm_base"], ["task=mlm_base: unknown task", "embed, gpt, mlm"]),
    ],
)
def test_bad_arguments_are_one_line(argv, parts):
    message = failure(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "content, parts",
    [
        ("model.d_modle = 3", ["model.d_modle: unknown setting", "did you mean model.d_model?"]),
        ("[modle]\nd_model = 3", ["modle.d_model: unknown setting", "did you mean model.d_model?"]),
        ("d_model = 3", ["d_model: unknown setting", "did you mean model.d_model?"]),
        ("model = 3", ["model: unknown setting"]),
        ("[model.x]\ny = 3", ["model.x: unknown setting"]),
        ('model.d_model = "128"', ["model.d_model = '128': expected int, got str"]),
        ("model.d_model = true", ["model.d_model = True: expected int, got bool"]),
        ("model.d_model = 1.5", ["model.d_model = 1.5: expected int, got float"]),
        ("debug = 1", ["debug = 1: expected bool, got int"]),
        ('data.text_column = ["a"]', ["data.text_column = ['a']: expected str"]),
        ("train.learning_rate = -1e-3", ["train.learning_rate = -0.001: expected float >= 0.0"]),
        ('train.precision = "half"', ["train.precision = 'half': must be one of float32, bfloat16"]),
        ("task = 3", ["task=3: unknown task"]),
        ("task = mlm", ["cannot be read as TOML", "line 1"]),
        ("train.seed = 1\ntrain.seed = 2", ["cannot be read as TOML"]),
    ],
)
def test_bad_files_are_one_line_that_names_the_file(tmp_path, content, parts):
    path = write(tmp_path / "my.toml", content)
    message = failure("--config", path)
    assert all(part in message for part in parts), message
    assert path in message or "unknown task" in message


def test_files_that_cannot_be_read(tmp_path):
    assert "no.toml: cannot be read as TOML" in failure("--config", str(tmp_path / "no.toml"))
    assert "cannot be read as TOML" in failure("--config", str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml: cannot be read as TOML" in failure("--config", str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--model.d-model", "130"], ["model.d_model=130 is not divisible by model.n_heads=4; use 128 or 132"]),
        (["--model.d-model", "3"], ["model.d_model=3", "use 4"]),
        (
            ["--model.d-model", "15", "--model.n-heads", "5", "--model.positions", "fixed"],
            ["model.d_model=15 is odd", "model.positions=fixed"],
        ),
        (
            ["--model.d-model", "12", "--model.n-heads", "4", "--model.positions", "rotary"],
            ["model.positions=rotary needs an even head size, not model.d_model / model.n_heads = 3"],
        ),
        (["--train.learning-rate", "1e-5"], ["train.min_learning_rate=0.0001 is above train.learning_rate=1e-05"]),
        (["--data.path", "a.txt", "--data.hub", "b"], ["data.path=a.txt and data.hub=b"]),
        (
            ["--data.validation-fraction", "0.6", "--data.test-fraction", "0.4"],
            ["data.validation_fraction=0.6 and data.test_fraction=0.4", "below 1"],
        ),
    ],
)
def test_settings_that_do_not_go_together(argv, parts):
    message = failure(*argv)
    assert all(part in message for part in parts), message


def test_values_at_the_border_are_allowed():
    for argv in (
        ["--model.d-model", "15", "--model.n-heads", "5", "--model.positions", "learned"],
        ["--model.d-model", "12", "--model.n-heads", "3", "--model.positions", "rotary"],
        ["--train.learning-rate", "1e-4"],
        ["--train.learning-rate", "0", "--train.min-learning-rate", "0"],
        ["--data.validation-fraction", "0", "--data.test-fraction", "0"],
        ["--train.clip-norm", "inf"],
        ["--train.seed", str(2**31 - 1)],
    ):
        configs.load(argv)


# Warnings


@pytest.mark.parametrize(
    "argv, without_effect",
    [
        (["--data.hub-config", "sst2"], ["data.hub_config=sst2"]),
        (["--data.format", "csv", "--data.header", "no"], ["data.format=csv", "data.header=no"]),
        (["--data.text-column", "3"], ["data.text_column=3"]),
        (["--data.test-path", "x"], ["data.test_path=x"]),
        (["--data.path", "a", "--data.text-column", "3", "--data.header", "no", "--data.format", "csv"], []),
        (["--data.hub", "a", "--data.test-path", "b.csv", "--data.header", "no"], []),
        (["--data.hub", "a", "--data.header", "no"], ["data.header=no"]),
        (
            ["--data.path", "a", "--data.test-path", "b", "--data.test-fraction", "0.2"],
            ["data.test_fraction=0.2"],
        ),
        (["--data.path", "a", "--data.test-fraction", "0.2"], []),
        (["--tokenizer.path", "a.json", "--tokenizer.vocab-size", "500"], ["tokenizer.vocab_size=500"]),
        (["--tokenizer.path", "a.json", "--tokenizer.lowercase", "false"], ["tokenizer.lowercase=False"]),
        (["--tokenizer.path", "vocab.txt", "--tokenizer.lowercase", "false"], []),
        (["--tokenizer.lowercase", "false"], []),
        (["--task", "gpt", "--tokenizer.lowercase", "false"], ["tokenizer.lowercase=False"]),
        (["--task", "gpt", "--tokenizer.path", "gpt2"], []),  # the kind is of the preset, so nobody asked for it
        (["--tokenizer.kind", "bpe", "--tokenizer.path", "gpt2"], ["tokenizer.kind=bpe"]),
        (["--data.hub-config", ""], []),  # the default, said again
    ],
)
def test_settings_without_effect_warn(argv, without_effect):
    found = warnings_of(*argv)
    assert [line.partition(" has no effect: ")[0] for line in found] == without_effect


def test_lowercase_has_an_effect_on_a_folder_with_a_vocab_txt(tmp_path):
    argv = ("--tokenizer.path", str(tmp_path), "--tokenizer.lowercase", "false")
    write(tmp_path / "vocab.txt", "[UNK]\n")
    assert warnings_of(*argv) == []
    write(tmp_path / "tokenizer.json", "{}")  # which is read first
    assert len(warnings_of(*argv)) == 1


def test_settings_of_other_tasks_warn():
    argv = ("--task", "gpt", "--data.n-maskings", "3", "--data.mask-fraction", "0.15")
    found = warnings_of(*argv, of_other_tasks=("data.n_maskings", "data.mask_fraction"))
    assert found == ["data.n_maskings=3 has no effect: task=gpt does not use it"]


def test_warmup_and_decay_that_do_not_fit_warn():
    assert "train.warmup_steps=100 is not below train.max_steps=100" in warnings_of("--train.max-steps", "100")[0]
    assert warnings_of("--train.max-steps", "101") == []
    assert "train.decay_steps=100 is not above" in warnings_of("--train.decay-steps", "100")[0]
    assert warnings_of("--train.decay-steps", "101") == []


# Errors and help of a process


def test_nearest_prefers_the_whole_name():
    assert nearest("model.n_head", SETTINGS) == "; did you mean model.n_heads?"
    assert nearest("vocab", ["tokenizer.vocab_size", "model.vocab"]) == "; did you mean model.vocab?"
    assert nearest("qqq", SETTINGS) == ""


def test_reported_prints_one_line_and_exits_2(capsys):
    with pytest.raises(SystemExit) as caught, reported(debug=False):
        raise UserError("first\nsecond  third")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: first second third\n")
    with pytest.raises(SystemExit) as caught, reported(debug=True):
        raise UserError("with a traceback")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")
    with pytest.raises(ZeroDivisionError), reported(debug=False):
        raise ZeroDivisionError


RUN = """
import sys
sys.argv[0] = "train"
try:
    from jaxlm.train import main
    status = main()
finally:
    print([name for name in ("jax", "torch", "flax", "datasets") if name in sys.modules])
"""


def process(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    root = str(Path(configs.__file__).parents[1])
    command = [sys.executable, "-c", RUN, *argv]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


def test_help_lists_sections_with_defaults_and_imports_no_framework():
    done = process("--help", "--task", "gpt", "--model.d-model", "96")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("[]\n")  # nothing was imported
    text = " ".join(done.stdout.replace("│", " ").split())
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')} " in text, name
    for section in dataclasses.fields(Config)[5:]:
        assert f" {section.name} options " in text
    assert "(default: gpt)" in text and "(default: 96)" in text and "(default: bpe)" in text  # after all layers
    assert "optimizer updates (default: " in text and "defaults below are those of task gpt" in text
    assert f"updates to trace, {configs.BARE['profile']} without a number" in text
    assert "--config FILE" in text and "\x1b" not in text


def test_every_setting_has_a_comment():
    texts = configs.comments()
    assert [name for name in SETTINGS if not texts.get(name)] == []
    assert texts["train.max_steps"] == "optimizer updates"
    assert texts["data.documents"].startswith("What separates documents")


def test_every_setting_has_its_line_of_help():
    done = process("--help")
    lines = " ".join(done.stdout.replace("│", " ").split()).split(" --")
    for name in SETTINGS:
        line = next(line for line in lines if line.startswith(name.replace("_", "-") + " "))
        words = line.partition(" (default")[0].split()
        assert len(words) >= 3, line  # flag, type, and what it is


@pytest.mark.parametrize(
    ("bad", "mend", "mended"),
    [
        ("--model.d-model 10", "use 8 or 12", ("--model.d-model 8", "--model.d-model 12")),
        ("--model.d-model 3", "use 4", ("--model.d-model 4",)),
        (
            "--model.d-model 15 --model.n-heads 3",
            "use an even one, or --model.positions learned",
            ("--model.d-model 18 --model.n-heads 3", "--model.d-model 15 --model.n-heads 3 --model.positions learned"),
        ),
        (
            "--model.d-model 15 --model.n-heads 3 --model.positions rotary",
            "or use --model.positions learned",
            ("--model.d-model 15 --model.n-heads 3 --model.positions learned",),
        ),
        ("--model.frozen-layers 3", "lower it", ("--model.frozen-layers 2",)),
        ("--train.learning-rate 1e-5", "lower it", ("--train.learning-rate 1e-5 --train.min-learning-rate 1e-6",)),
        (
            "--train.schedule wsd --train.stable-steps 950",
            "raise train.max_steps",
            ("--train.schedule wsd --train.stable-steps 950 --train.max-steps 1050",),
        ),
        (
            "--train.schedule wsd --train.stable-steps 450 --train.decay-steps 500",
            "raise train.decay_steps",
            ("--train.schedule wsd --train.stable-steps 450 --train.decay-steps 550",),
        ),
        ("--mesh.data 0", "use 1 or more, or -1", ("--mesh.data 1", "--mesh.data -1")),
        ("--config configs/gtp_base.toml", "did you mean gpt_base?", ("--config configs/gpt_base.toml",)),
        ("--config gptbase", "did you mean gpt_base?", ("--config gpt_base", "--config gpt_base.toml")),
        ("--d-model 64", "did you mean --model.d-model?", ("--model.d-model 64",)),
        ("--task gtp", "did you mean gpt?", ("--task gpt",)),
    ],
)
def test_following_the_mend_of_an_error_leads_on(bad, mend, mended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder of presets, as for an installed package
    plain = "--model.n-heads 4 --model.positions fixed --train.max-steps 1000 --train.warmup-steps 100".split()
    assert mend in failure(*plain, *bad.split())
    for args in mended:
        configs.load([*plain, *args.split()])


@pytest.mark.parametrize(
    ("settings", "n_devices", "mend", "mended"),
    [
        ({"mesh.data": 3}, 4, "set mesh.data to -1", {"mesh.data": -1}),
        ({"mesh.data": 2, "mesh.fsdp": 3}, 4, "use divisors of 4", {"mesh.data": 2, "mesh.fsdp": 2}),
        ({"train.batch_size": 6}, 4, "use 4 or 8", {"train.batch_size": 8}),
        ({"model.d_model": 96, "model.n_heads": 6, "mesh.tensor": 4}, 4, "use 4 or 8 heads", {"model.n_heads": 8}),
        (
            {"model.d_model": 90, "model.n_heads": 9, "mesh.tensor": 4},
            4,
            "; use another mesh.tensor",
            {"mesh.tensor": 1},
        ),
    ],
)
def test_following_the_mend_for_a_mesh_leads_on(settings, n_devices, mend, mended):
    with pytest.raises(UserError, match=mend):
        configs.mesh_sizes(configs.build(settings), n_devices)
    assert configs.mesh_sizes(configs.build({"train.batch_size": 32} | settings | mended), n_devices)


@pytest.mark.parametrize("flag", ["--tyro-print-completion", "--tyro-write-completion"])
def test_no_completion_is_made_since_it_would_be_that_of_all_of_python(flag):
    done = process(flag, "bash", "--help")
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == f"error: {flag}: unknown setting (--help lists them)\n"


def test_bad_setting_exits_2_before_any_framework_is_imported():
    done = process("--train.max-steps", "0")
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == "error: --train.max-steps 0: expected int >= 1 (default: 1000)\n"
    done = process("--train.max-steps", "0", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and "expected int >= 1" in done.stderr


@pytest.mark.parametrize("path", sorted((configs.presets_dir() / "architectures").glob("*.toml")), ids=lambda x: x.stem)
def test_each_architecture_is_a_design_of_any_size(path: Path) -> None:
    sizes = ["--model.d-model", "48", "--model.n-heads", "4", "--model.n-layers", "7"]
    config, origins = configs.load([*sizes, "--task", "gpt", "--arch", path.stem])
    assert {name for name, origin in origins.items() if origin == str(path)} >= {"model.norm", "model.window"}
    assert all(name.startswith("model.") for name, origin in origins.items() if origin == str(path))
    assert config.model.d_model == 48 and path.read_text().startswith("# ")


def test_an_architecture_is_between_the_preset_and_all_else() -> None:
    argv = ["--model.norm", "layernorm", "--task", "gpt", "--arch", "llama"]
    model = configs.load(argv)[0].model
    assert (model.norm, model.mlp, model.positions) == ("layernorm", "swiglu", "rotary")
    assert configs.load(["--task", "gpt", "--arch", "gpt2"])[0].model.positions == "learned"  # not that of the preset
    with pytest.raises(UserError, match="^--arch lama: unknown architecture; did you mean llama.*; there are bert, "):
        configs.load(["--arch", "lama"])
