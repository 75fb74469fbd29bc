"""Models without an output layer, as sentence-transformers publishes them: taken where none is needed, else refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from jaxlm import config as configs
from jaxlm import convert, evaluate, predict
from jaxlm.config import BASE
from jaxlm.data import tokenization
from jaxlm.errors import UserError
from jaxlm.inference import http_api, load
from jaxlm.inference.batching import Engine
from jaxlm.training import resume
from jaxlm.weights import snapshots
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS
from jaxlm.weights.huggingface_test import C, D, T, tokenizer_of

Make = Callable[[str], Path]
NO_OUTPUT = (
    r"it has no output layer; train one with python -m jaxlm.train --task TASK --init-from \S+, see its attention"
)
HIDDEN = 5e-6  # of the largest; as public_test.LOGITS


def model_of(kind: str, n_ids: int) -> Any:
    """Return a small random model of transformers."""
    family, _, form = kind.partition(" ")
    bert = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * D}
    if family == "distilbert":
        shape = {"dim": D, "n_layers": 2, "n_heads": 4, "hidden_dim": 4 * D, "max_position_embeddings": T}
        return transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=n_ids, **shape))
    if family == "roberta":
        config = transformers.RobertaConfig(vocab_size=n_ids, **bert, max_position_embeddings=T + 2, type_vocab_size=1)
        return transformers.RobertaModel(config)
    config = transformers.BertConfig(vocab_size=n_ids, **bert, max_position_embeddings=T, num_labels=C)
    if form == "no pooler":
        return transformers.BertModel(config, add_pooling_layer=False)
    name = {"answers": "ForQuestionAnswering", "lost head": "ForMaskedLM"}
    return getattr(transformers, f"Bert{name.get(form, 'Model')}")(config)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a kind to the folder of a model."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind in made:
            return made[kind]
        folder = made[kind] = tmp_path_factory.mktemp("models") / kind.replace(" ", "_")
        tokenizer = tokenizer_of(kind)
        torch.manual_seed(0)
        theirs = model_of(kind, tokenization.n_ids(tokenizer))
        inner = folder / "0_Transformer" if kind.endswith("old folder") else folder
        theirs.save_pretrained(inner)
        tokenization.save(tokenizer, inner / "tokenizer.json")
        values = json.loads((inner / "config.json").read_text())
        if kind.endswith("lost head"):
            tensors = load_file(inner / "model.safetensors")
            save_file({n: x for n, x in tensors.items() if not n.startswith("cls.")}, inner / "model.safetensors")
        if kind.endswith("no architectures"):
            del values["architectures"]
            (inner / "config.json").write_text(json.dumps(values))
        if kind.endswith("half"):
            halves = {n: x.astype(np.float16) for n, x in load_file(inner / "model.safetensors").items()}
            save_file(halves, inner / "model.safetensors")
        if "folder" in kind:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
            path = inner.relative_to(folder).as_posix().replace(".", "")
            modules = [{"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.Transformer"}]
            (folder / "modules.json").write_text(json.dumps(modules))
        return folder

    return model


KINDS = (
    *("bert", "bert no pooler", "distilbert", "roberta", "bert answers", "bert lost head"),
    *("bert no architectures", "bert half", "bert new folder", "bert old folder"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_whatever_its_folder_is_like(kind: str, make: Make) -> None:
    start = resume.to_use(make(kind))
    assert start.info["task"] == BASE and start.path
    snapshot = snapshots.read(start.path)
    assert snapshot.weights and all(name.startswith("base.") for name in snapshot.weights)


@pytest.mark.parametrize(
    "kind", ["bert", pytest.param("distilbert", marks=pytest.mark.slow), "roberta", "bert old folder"]
)
def test_hidden_states_are_those_of_transformers(kind: str, make: Make, tmp_path: Path) -> None:
    from torchlm import load as torch_load

    folder = make(kind)
    inner = folder / "0_Transformer" if kind.endswith("old folder") else folder
    theirs = transformers.AutoModel.from_pretrained(inner).eval()
    tokens = np.random.default_rng(0).integers(5, theirs.config.vocab_size, (2, T))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens)).last_hidden_state.numpy()
    model, _ = load.load_model(folder)
    twin, _ = torch_load.load_model(folder)
    with torch.no_grad():
        found = {"jaxlm": np.asarray(model(tokens)), "torchlm": twin(torch.from_numpy(tokens)).numpy()}
    for x in found.values():
        assert np.abs(x - expected).max() < HIDDEN * np.abs(expected).max()


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_it_is_converted_and_back_bit_for_bit(family: str, make: Make, tmp_path: Path) -> None:
    first, source = snapshots.read(make(family)), ""
    for form, name in ((RUN, "run"), (SAFETENSORS, "x.safetensors"), (CHECKPOINT_1_2, "x.pt"), (RUN, "r")):
        snapshots.write(tmp_path / name, snapshots.read(tmp_path / source) if source else first, form)
        source = name
    config = snapshots.read(tmp_path / "r").config
    assert configs.dump(config) == configs.dump(first.config)
    assert convert.main([str(tmp_path / "r"), str(tmp_path / "w.pt"), "--state-dict"]) == 0
    options = ["--config", str(tmp_path / "run" / "config.toml")]
    assert convert.main([str(tmp_path / "w.pt"), str(tmp_path / "bare"), *options]) == 0
    assert convert.main([str(tmp_path / "bare"), str(tmp_path / "theirs"), "--as", family]) == 0
    last = snapshots.read(tmp_path / "theirs")
    assert all(np.array_equal(last.weights[name], x) for name, x in first.weights.items())
    kept, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", make(family)))
    assert set(kept) == {name for name in before if not name.startswith("pooler.")}  # as AutoModel names them
    architectures = (
        json.loads((folder / "config.json").read_text())["architectures"]
        for folder in (tmp_path / "theirs", make(family))
    )
    assert len({tuple(x) for x in architectures}) == 1


def test_what_needs_an_output_layer_says_what_can_be_done(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make("bert"))
    capsys.readouterr()  # of transformers, which has written it
    for main in (predict.main, evaluate.main):
        args = ["--checkpoint", folder] + (["--text", "a cat"] if main is predict.main else [])
        with pytest.raises(SystemExit) as ended:
            main(args)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and line.startswith("error: ")
        with pytest.raises(UserError, match=NO_OUTPUT):
            raise UserError(line)
    with pytest.raises(UserError, match=NO_OUTPUT):
        predict.load(folder)(["a cat"])
    with pytest.raises(UserError, match="no output layer; train one with --init-from"):
        resume.load(["--task", "mlm", "--distill.teacher", folder], "", RUN)
    assert convert.main([folder, str(tmp_path / "run")]) == 0
    for source in (folder, str(tmp_path / "run")):
        with pytest.raises(UserError, match="start a new run with .*--init-from"):
            resume.load(["--resume", source], "", RUN)


@pytest.mark.parametrize("task", ["mlm", "sst2", "cola"])
def test_a_run_takes_its_base(task: str, make: Make) -> None:
    config, _, start = resume.load(["--task", task, "--init-from", str(make("bert new folder"))], "", RUN)
    assert start.parts == ("base",)
    assert (config.model.d_model, config.model.n_layers, config.model.head_dense) == (D, 2, "bert")
    assert config.tokenizer.path == str(make("bert new folder"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
@pytest.mark.parametrize("task", ["mlm", "sst2"])
def test_a_run_starts_from_it(program: str, task: str, make: Make, tmp_path: Path) -> None:
    sizes = "--train.max-steps 2 --train.eval-interval 2 --train.batch-size 8 --train.warmup-steps 1 --model.seq-len 16"
    command = f"-m {program}.train --task {task} --init-from {make('bert')} --run.dir run {sizes}"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "started from" in done.stdout and "restored" in done.stdout


@pytest.mark.slow
def test_its_attention_is_served(make: Make) -> None:
    predictor = predict.load(make("bert"))
    look = predictor.attention("a cat", 1, 2)
    assert len(look["weights"]) == len(look["tokens"]) and np.allclose(np.sum(look["weights"], axis=1), 1, atol=1e-4)
    engine = Engine(predictor)
    try:
        with TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost") as client:
            assert client.post("/attention", json={"text": "a cat", "layer": 1, "head": 2}).json() == look
            assert client.post("/predict", json={"text": "a cat"}).status_code == 404
            assert '"kind": "look"' in client.get("/").text and client.get("/docs").status_code == 200
    finally:
        engine.close()
