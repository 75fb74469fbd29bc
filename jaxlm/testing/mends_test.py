"""Files of weights that are not as they should be: one line each, and what the line says to do works."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxlm import config as configs
from jaxlm import convert, predict
from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.errors import UserError
from jaxlm.io import checksums, utf8
from jaxlm.params import layout
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.weights import snapshots
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS, STATE_DICT

STAND_INS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "run git lfs pull"),
    "pointer with a mark": (
        b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "run git lfs pull",
    ),
    "annex": (b"/annex/objects/SHA256E-s12--4d7a.safetensors\n", "run git annex get"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML .*download the raw file"),
    "refusal": (b"<Error><Code>AccessDenied</Code></Error>", "XML, .*download the raw file"),
    "empty": (b"", "empty; copy or download it again"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write(tmp_path_factory.mktemp("runs") / "run", "sst2")


@pytest.fixture(scope="module")
def public_model(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """A model of transformers, with a tokenizer."""
    folder = tmp_path_factory.mktemp("public") / "model"
    n_ids = tokenization.n_ids(tokenization.read(TokenizerConfig(path=str(run / "tokenizer.json"))))
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=n_ids, max_position_embeddings=16, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    shutil.copy(run / "tokenizer.json", folder)
    return folder


@pytest.fixture
def model(public_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(public_model, tmp_path / "model")


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        read()
    message = str(raised.value)
    assert "\n" not in message and ("; " in message or ": " in message)
    return message


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "model.safetensors", "config.json", "tokenizer.json"])
def test_what_stands_in_for_a_file_is_named(kind: str, name: str, model: Path, run: Path, tmp_path: Path) -> None:
    content, mend = STAND_INS[kind]
    is_alone = name.startswith("x.")
    file = (tmp_path if is_alone else model) / name
    before = None if is_alone else file.read_bytes()
    file.write_bytes(content)
    message = refusal(lambda: snapshots.load(file if is_alone else model))
    assert name in message and re.search(mend, message)
    if before is not None:
        file.write_bytes(before)  # as the mend says
        assert snapshots.load(model).weights


@pytest.mark.parametrize("name", ["texts.txt", "vocab.txt", "run.toml"])
def test_a_pointer_in_place_of_text_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(STAND_INS["pointer"][0])
    with pytest.raises(ValueError, match="run git lfs pull"):
        utf8.read(tmp_path / name)
    with (tmp_path / name).open("rb") as stream, pytest.raises(ValueError, match="run git lfs pull"):
        list(utf8.lines(stream))


# Headers and metadata of safetensors


def with_header(header: dict[str, Any] | str, n_data: int = 8, n_header: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if n_header is None else n_header) + text + bytes(n_data)


def tensor(first: Any, end: Any, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


HEADERS = {
    "longer than the file": with_header({"a": tensor(0, 4)}, n_header=1 << 20),
    "cut": with_header({"a": tensor(0, 4)}, n_data=0),
    "negative": with_header({"a": tensor(-4, 4)}),
    "backwards": with_header({"a": tensor(8, 4)}),
    "overlapping": with_header({"a": tensor(0, 8, shape=(2,)), "b": tensor(4, 8)}),
    "a hole": with_header({"a": tensor(0, 2, "F16"), "b": tensor(4, 8)}),
    "another type": with_header({"a": tensor(0, 8, "F99")}),
    "another shape": with_header({"a": tensor(0, 8, shape=(3,))}),
    "huge shape": with_header({"a": tensor(0, 8, shape=(2**62, 2**62))}),
    "no object": with_header("{[]}"),
    "a name twice": with_header('{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 4)),) * 2)),
    "deep": with_header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep metadata": with_header({"__metadata__": {"jaxlm": "[" * 100_000 + "]" * 100_000}}, n_data=0),
    "metadata of numbers": with_header({"__metadata__": {"jaxlm": 3}}, n_data=0),
    "metadata in a list": with_header({"__metadata__": [1]}, n_data=0),
    "half a letter": with_header({"__metadata__": {"jaxlm": '"\\ud800"'}}, n_data=0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_odd_header_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(HEADERS[name])
    message = refusal(lambda: snapshots.load(file))
    assert message.startswith(f"{file}: cannot be read as safetensors: ") and message.endswith("; copy it again")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda info: [info], "its metadata is no object"),
        (lambda info: 3, "its metadata is no object"),
        (lambda info: {**info, "step": "3"}, "its step='3' has a wrong type"),
        (lambda info: {**info, "step": True}, "its step=True has a wrong type"),
        (lambda info: {**info, "step": 3.5}, "its step=3.5 has a wrong type"),
        (lambda info: {**info, "step": -1}, "its step or sample_iter is below 0"),
        (lambda info: {**info, "rate": None}, "its rate=None has a wrong type"),
        (lambda info: {**info, "task": ["sst2"]}, "its task=.* has a wrong type"),
        (lambda info: {**info, "tokenizer": 7}, "its tokenizer=7 has a wrong type"),
        (lambda info: {**info, "val_loss": "low"}, "its val_loss='low' has a wrong type"),
        (lambda info: {**info, "classes": 3}, "its classes=3 has a wrong type"),
        (lambda info: {**info, "classes": "abc"}, "its classes='abc' has a wrong type"),
        (lambda info: {**info, "config": []}, r"its config=\[\] has a wrong type"),
        (lambda info: {k: v for k, v in info.items() if k != "rate"}, "its metadata has no rate"),
        (lambda info: setting(info, "model.d_model", "12"), "in its settings: Expected `int`, got `str`"),
        (lambda info: setting(info, "model.d_model", None), "in its settings: Expected `int`, got `null`"),
        (lambda info: setting(info, "model.d_model", 0), "in its settings: Expected `int` >= 1"),
        (lambda info: setting(info, "model.d_model", 12.5), "in its settings: Expected `int`, got `float`"),
        (lambda info: setting(info, "model.n_heads", 5), "in its settings: model.d_model=12 is not divisible"),
        (lambda info: setting(info, "model.dropout", float("nan")), "model.dropout.*no finite number|in its settings"),
        (lambda info: setting(info, "train.learning_rate", float("nan")), "no finite number|in its settings"),
        (lambda info: setting(info, "model.positions", "sideways"), "in its settings: "),
        (lambda info: setting(info, "model.seq_len", {"a": 1}), "in its settings: "),
        (lambda info: setting(info, "model.widht", 3), "setting model.widht is unknown here"),
        (lambda info: setting(info, "task", "other"), "its settings are of task other"),
    ],
)
@pytest.mark.parametrize("form", [RUN, SAFETENSORS, CHECKPOINT_1_2])
def test_what_a_checkpoint_tells_of_itself_is_checked(
    change: Callable[[Any], Any], expected: str, form: str, run: Path, tmp_path: Path
) -> None:
    path = rewritten(run, tmp_path, form, change)
    if path is None:
        return
    message = refusal(lambda: snapshots.read(path))
    assert str(path) in message and re.search(expected.replace("its metadata is no object", ".* object"), message)
    assert refusal(lambda: predict.load(path)) and refusal(lambda: use(resume.to_use(path)))


def use(start: Any) -> None:
    start.config()
    snapshots.read(start.path)


def setting(info: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**info, "config": {**info["config"], name: value}}


def rewritten(run: Path, folder: Path, form: str, change: Callable[[Any], Any]) -> Path | None:
    """Return a checkpoint that tells another thing of itself; None if the form has no place for that."""
    if form == RUN:
        path = shutil.copytree(run / "checkpoints" / "3", folder / "checkpoints" / "3")
        file = path / "info" / "metadata"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        checksums.write(path)
        return path
    if form == SAFETENSORS:
        path = folder / "x.safetensors"
        snapshots.write(path, snapshots.read(run), form)
        tensors = load_file(path)
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        info = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["jaxlm"])
        save_file(tensors, path, {"jaxlm": json.dumps(change(info))})
        return path
    path = folder / "x.pt"
    snapshots.write(path, snapshots.read(run), form)
    tree = torch.load(path, weights_only=True)
    before = {"step": 3, "task": "sst2", "rate": 0.1, "val_loss": None, "tokenizer": None, "config": None}
    after = change({**before, "config": tree["config"]["torchlm"]["settings"]})
    if not isinstance(after, dict) or any(
        after.get(k) != v for k, v in before.items() if k not in ("config", "tokenizer")
    ):
        return None
    tree["config"]["torchlm"]["settings"] = after["config"]
    tree["config"]["torchlm"]["info"] |= {key: after[key] for key in ("tokenizer", "classes") if after.get(key)}
    torch.save(tree, path)
    return path


# Names that wrappers change


WRAPPED: dict[str, Callable[[str], str]] = {
    "DataParallel": "module.{}".format,
    "torch.compile": "_orig_mod.{}".format,
    "compiled in DistributedDataParallel": "module._orig_mod.{}".format,
    "an attribute": "model.{}".format,
    "an attribute, wrapped": "module.model.{}".format,
    "attributes": "model.model.{}".format,
    "an attribute of another name": "student.{}".format,
    "two of other names, wrapped": "base_model.module.net.{}".format,
    "one of several modules": "0.{}".format,
    "a compiled part": lambda name: name.replace("attention.", "attention._orig_mod."),
    "some parts in FSDP": lambda name: name.replace("attention.", "_fsdp_wrapped_module.attention."),
    "only the first part compiled": lambda name: f"_orig_mod.{name}" if "embedding" in name else name,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("form", [STATE_DICT, SAFETENSORS, "public"])
def test_names_that_a_wrapper_changed_are_read(wrapper: str, form: str, run: Path, model: Path, tmp_path: Path) -> None:
    snapshot, rename = snapshots.read(run), WRAPPED[wrapper]
    if form == "public":
        file, before = model / "model.safetensors", snapshots.read(model)
        save_file({rename(name): x for name, x in load_file(file).items()}, file)
        after = snapshots.read(model)
        assert all(np.array_equal(after.weights[name], x) for name, x in before.weights.items())
        return
    tensors = {rename(name): x for name, x in snapshot.weights.items()}
    path = tmp_path / ("x.pt" if form == STATE_DICT else "x.safetensors")
    if form == STATE_DICT:
        torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, path)
    else:
        save_file(tensors, path)
    after = snapshots.read(path, snapshot.config)
    assert all(np.array_equal(after.weights[name], x) for name, x in snapshot.weights.items())


def test_names_of_several_models_are_refused(run: Path, tmp_path: Path) -> None:
    weights, file = snapshots.read(run).weights, tmp_path / "x.safetensors"
    first, *others = weights
    for change, expected in (
        (
            {f"model.{first}": weights[first], **{n: weights[n] for n in others}},
            "begin with model., not base.",
        ),
        ({f"module.{first}": weights[first], **weights}, f"has {first} twice, once as "),
    ):
        save_file(change, file)
        message = refusal(lambda: snapshots.load(file))
        assert expected in message and message.endswith("save the state dict of one model")


@pytest.mark.parametrize("form", [STATE_DICT, SAFETENSORS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_read_as_the_same_numbers(form: str, dtype: str, run: Path, tmp_path: Path) -> None:
    snapshot = snapshots.read(run)
    halves = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in snapshot.weights.items()}
    path = tmp_path / ("x.pt" if form == STATE_DICT else "x.safetensors")
    if form == STATE_DICT:
        torch.save(halves, path)
    else:
        from safetensors.torch import save_file as save_tensors

        save_tensors(halves, path)
    after = snapshots.read(path, snapshot.config)
    assert all(np.array_equal(after.weights[name], x.float().numpy()) for name, x in halves.items())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "qint8", "sparse", "csr", "meta"])
@pytest.mark.parametrize("form", [STATE_DICT, SAFETENSORS])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
def test_tensors_that_are_not_read_are_named(form: str, dtype: str, tmp_path: Path) -> None:
    x: Any = torch.ones(2, 2)
    made = {
        "qint8": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "sparse": x.to_sparse,
        "csr": x.to_sparse_csr,
        "meta": lambda: x.to("meta"),
    }
    tensor = made[dtype]() if dtype in made else x.to(getattr(torch, dtype))
    path = tmp_path / ("x.pt" if form == STATE_DICT else "x.safetensors")
    if form == STATE_DICT:
        torch.save({"a": tensor}, path)
    elif dtype in made:
        return
    else:
        from safetensors.torch import save_file as save_tensors

        save_tensors({"a": tensor}, path)
    message = refusal(lambda: snapshots.load(path))
    assert dtype.partition("_")[0] in message and "save it as float32" in message


@pytest.mark.parametrize(
    "change",
    [
        *({"optimizer": x} for x in (None, 3, "x", [], {}, torch.ones(2), {"state": 3}, {"state": {0: 1}})),
        *({"config": x} for x in (None, 3, torch.ones(2), {"torchlm": []})),
        *({"base_model": x} for x in (None, torch.ones(2), {"a": 1})),
    ],
)
def test_a_damaged_value_of_a_checkpoint_is_one_line(change: dict[str, Any], run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    snapshots.write(path, snapshots.read(run), CHECKPOINT_1_2)
    torch.save(torch.load(path, weights_only=True) | change, path)
    assert refusal(lambda: snapshots.read(path)).endswith("; save it again")


@pytest.mark.parametrize("value", [torch.ones(3), 3, None, {}, {1: torch.ones(2)}, {"a": torch.ones(2), "epoch": 3}])
def test_what_is_no_state_dict_is_named(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    message = refusal(lambda: snapshots.load(tmp_path / "x.pt"))
    assert re.search(r"it has (nothing|.* of type \w+); save what model.state_dict\(\) returns$", message)


def test_a_file_is_read_by_its_content_whatever_its_name(run: Path, tmp_path: Path) -> None:
    snapshot = snapshots.read(run)
    for form, name in ((STATE_DICT, "x.safetensors"), (SAFETENSORS, "x.pt")):
        snapshots.write(tmp_path / "made", snapshot, form)
        (tmp_path / "made").rename(tmp_path / name)
        assert snapshots.load(tmp_path / name).weights.keys() == snapshot.weights.keys()


# Mends that are code or commands: they are run


@pytest.mark.parametrize(
    "around",
    [
        lambda weights: {"epoch": 3, "state_dict": weights},
        lambda weights: {"model": weights, "optimizer": {"state": {}}},
        lambda weights: {"checkpoint": {"model_state_dict": weights}},
        lambda weights: [3, weights],
        lambda weights: {"models": (weights,)},
    ],
)
def test_the_mend_for_a_state_dict_within_others_works(
    around: Callable[[Any], Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = snapshots.read(run)
    weights = {name: torch.from_numpy(x) for name, x in snapshot.weights.items()}
    monkeypatch.chdir(tmp_path)
    torch.save(around(weights), "FILE")
    message = refusal(lambda: snapshots.load(Path("FILE")))
    exec(message.partition("alone: ")[2].replace("FILE", "'FILE'").replace("NEW", "'NEW.pt'"), {"torch": torch})
    assert snapshots.read(Path("NEW.pt"), snapshot.config).weights.keys() == weights.keys()


def test_the_mend_for_bare_weights_works(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshots.write(Path("w.pt"), snapshots.read(run), STATE_DICT)
    message = refusal(lambda: resume.to_use("w.pt"))
    command = re.search(r"python -m jaxlm\.convert (.*) makes a run", message)
    assert command
    args = command[1].replace("FILE", str(run / "config.toml")).split()
    assert convert.main(args) == 0
    assert resume.to_use("NEW").info["task"] == "sst2"
    other = configs.replace(snapshots.read(run).config, "model.d_model", 24)
    assert "with the settings of --config: weights of another model: " in refusal(
        lambda: snapshots.read(Path("w.pt"), other)
    )


def test_a_file_of_a_newer_kind_says_so(run: Path, tmp_path: Path) -> None:
    path = rewritten(run, tmp_path, RUN, lambda info: {**info, "format": 99, "version": "9.1"})
    assert path
    assert refusal(lambda: layout.info_of_run(path)).endswith(
        "but only 2 can be read; use the jaxlm that wrote it, 9.1"
    )
