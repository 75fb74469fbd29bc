"""The task `embed` and the command of its name: vectors, search, ranks, folders of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxlm import config as configs
from jaxlm import convert, embed, predict, train
from jaxlm.data import embedded
from jaxlm.data.cache import Split
from jaxlm.data.couples import CoupleSamples
from jaxlm.errors import UserError
from jaxlm.inference import evaluation, http_api, load
from jaxlm.inference.batching import Engine
from jaxlm.tasks import TASKS
from jaxlm.testing import tiny_runs
from jaxlm.weights import sentences

BERT = {
    **{"model.post_norm": True, "model.embedding_norm": True, "model.positions": "learned"},
    **{"model.head_dense": "bert", "model.norm_epsilon": 1e-12, "model.tied_embedding": True},
}
TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "",
    "old cats saw what they saw, and both of them sat on the log of the dog",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write(tmp_path_factory.mktemp("runs") / "embed", "embed", **BERT)


def test_a_vector_does_not_depend_on_the_texts_beside_it(run: Path) -> None:
    model: Any = predict.load(run)
    vectors = model.vectors(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    alone = np.concatenate([model.vectors([text]) for text in TEXTS])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)
    assert len(model.encode(TEXTS[3])) == model.model.seq_len  # it is cut
    assert model(TEXTS[:1])[0]["vector"] == pytest.approx(vectors[0].tolist(), abs=1e-6)
    query = model.nearest(TEXTS[0], TEXTS, 2)
    assert query[0]["text"] == TEXTS[0] and query[0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert query[1]["similarity"] == pytest.approx(np.sort(vectors @ vectors[0])[-2], abs=1e-6)


@pytest.mark.parametrize(("task", "pooling"), [("mlm", "mean"), ("gpt", "last"), ("sst2", "mean")])
def test_any_model_embeds_by_hand(task: str, pooling: str, tmp_path: Path) -> None:
    import jax.numpy as jnp

    source = tiny_runs.write(tmp_path / "run", task)
    (tmp_path / "texts.txt").write_text("the cat\n\na dog sat\n")
    for chosen in ("", "first"):
        options = [f"--pooling={chosen}"] if chosen else []
        files = ["--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "a.npy")]
        assert embed.main(["--checkpoint", str(source), *files, *options]) == 0
        found = np.load(tmp_path / "a.npy")
        model: Any = predict.load(source, embeds=True)
        assert found.shape == (3, 12) and found.dtype == np.float32 and model.pooling == pooling
        ids = model.encode("the cat")
        (hidden,) = np.asarray(model.trained.model.base(jnp.array([ids])))
        by_hand = {"mean": hidden.mean(axis=0), "first": hidden[0], "last": hidden[-1]}[chosen or pooling]
        np.testing.assert_allclose(found[0], by_hand / np.linalg.norm(by_hand), atol=1e-5)


@pytest.mark.parametrize(("out", "message"), [("a.txt", "has to end in .npy"), ("no/a.npy", "cannot be written")])
def test_a_wrong_name_leaves_nothing(run: Path, tmp_path: Path, out: str, message: str, capsys: Any) -> None:
    (tmp_path / "texts.txt").write_text("one\n")
    argv = ["--checkpoint", str(run), "--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / out)]
    with pytest.raises(SystemExit) as caught:
        embed.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_an_empty_file_has_no_vectors(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(SystemExit) as caught:
        embed.main(["--checkpoint", str(run), "--file", str(tmp_path / "none.txt"), "--out", str(tmp_path / "a.npy")])
    assert caught.value.code == 2 and "none.txt: is empty; write a text in each line" in capsys.readouterr().err


def test_a_query_finds_the_nearest_lines(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(text for text in TEXTS if text))
    argv = ["--checkpoint", str(run), "--file", str(tmp_path / "texts.txt"), "--query", "a dog", "--top-k", "2"]
    assert predict.main([*argv, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows][0] == "a dog" and len(rows) == 2
    assert predict.main(argv) == 0
    assert capsys.readouterr().out.startswith("1.0000  a dog\n")


def test_samples_are_both_texts_with_their_marks() -> None:
    split = Split(np.arange(10, 20), np.array([0, 2, 3, 3, 10]), np.full(4, -1), np.ones(4, int))
    config = configs.build({"task": "embed", "model.seq_len": 6, "model.pooling": "mean"})
    samples = CoupleSamples(split, config, {"pad": 0, "start": 1, "end": 2}, 30)
    batch = samples.batch(np.arange(2), np.zeros(2, int))
    assert batch["tokens"].tolist() == [[1, 10, 11, 2, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert batch["pair_tokens"].tolist() == [[1, 12, 2, 0, 0, 0], [1, 13, 14, 15, 16, 2]]
    assert batch["last"].tolist() == [3, 1] and batch["pair_last"].tolist() == [2, 5]
    assert samples.lengths(np.arange(2)).tolist() == [4, 6] and samples.n_tokens(batch) == 15 and samples.n_cut == 1
    causal = CoupleSamples(split, configs.replace(config, "model.pooling", "last"), {"article": 7}, 30)
    assert causal.batch(np.array([0]), np.zeros(1, int))["tokens"].tolist() == [[7, 10, 11, 7, 7, 7]]


def test_ranks_are_among_all_pairs(run: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(50, 2, 4))
    vectors[:, 1] += 2 * vectors[:, 0]
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    task: Any = TASKS["embed"](configs.Config())
    totals = task.ranked(vectors)
    for i in range(50):
        cosines = [float(vectors[i, 0] @ vectors[k, 1]) for k in range(50)]
        rank = sorted(cosines, reverse=True).index(cosines[i]) + 1
        assert totals["reciprocal"][i] == 1 / rank and totals["correct"][i] == (rank == 1)
        p = np.exp(20 * np.array(cosines))
        assert totals["loss"][i] == pytest.approx(-np.log(p[i] / p.sum()))
    scores = task.scores({name: x.sum() for name, x in totals.items()})
    assert 0.1 < scores["accuracy"] < scores["mrr"] < 1


def test_it_is_served(run: Path) -> None:
    engine = Engine(predict.load(run))
    try:
        client = TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost")
        answer = client.post("/predict", json={"text": TEXTS[3]})
        assert answer.status_code == 200
        assert answer.json()["vector"] == pytest.approx(predict.load(run)([TEXTS[3]])[0]["vector"], abs=1e-5)
        assert "Embed a text" in client.get("/").text
    finally:
        engine.close()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_written_folder_is_one_of_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    """Its modules are read here by hand, as sentence-transformers does: it is not among what tests install."""
    import torch
    import transformers

    source = tiny_runs.write(tmp_path / "run", "embed", **{**BERT, "model.pooling": pooling})
    folder = tmp_path / "st"
    assert convert.main([str(source), str(folder), "--as", "bert"]) == 0
    modules = json.loads((folder / "modules.json").read_text())
    assert [x["type"] for x in modules] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    assert all((folder / x["path"]).is_dir() for x in modules)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    n = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=n, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1) if pooling == "mean" else hidden[:, 0]
    expected = torch.nn.functional.normalize(vectors, dim=1).numpy()
    for path in (source, folder):
        model: Any = predict.load(path)
        assert model.pooling == pooling
        np.testing.assert_allclose(model.vectors(TEXTS), expected, atol=2e-6)


def test_what_does_more_than_pool_is_refused(tmp_path: Path) -> None:
    source = tiny_runs.write(tmp_path / "run", "embed", **BERT)
    folder = tmp_path / "st"
    assert convert.main([str(source), str(folder), "--as", "bert"]) == 0
    place = folder / "1_Pooling" / "config.json"
    values = json.loads(place.read_text())
    place.write_text(json.dumps(values | {"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="can be read with one of pooling_mode_mean_tokens, .* and Normalize only"):
        sentences.pooling_of(folder)
    place.write_text(json.dumps(values))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="Transformer, Pooling, Normalize, Dense"):
        load.load(folder)


def test_embedded_pairs_say_the_same_in_two_ways() -> None:
    articles = [x.text for x in embedded.sentences("embed").articles() if x.split == "test"]
    for text, pair in zip(articles[::2], articles[1::2], strict=True):
        assert text != pair and len(set(text.lower().strip(".").split()) & set(pair.lower().strip(".").split())) > 2


@pytest.mark.slow
def test_it_is_trained_on_two_columns_and_goes_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, n in (("train", 200), ("validation", 30), ("test", 30)):
        words = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(n)]
        rows = "".join(f"find {word}\t{word} is here\n" for word in words)
        (tmp_path / f"{name}.tsv").write_text(f"anchor\tpositive\n{rows}")
    sizes = "--model.d-model 16 --model.n-heads 2 --model.n-layers 1 --train.batch-size 16 --train.warmup-steps 5"
    updates = "--train.max-steps 40 --train.eval-interval 20 --train.learning-rate 3e-3 --model.dropout 0"
    files = ["--data.path", str(tmp_path), "--data.cache-dir", str(tmp_path / "cache")]
    folder = str(tmp_path / "run")
    assert train.main(["--task", "embed", *files, "--run.dir", folder, *sizes.split(), *updates.split()]) == 0
    assert train.main(["--resume", folder, "--train.max-steps", "60", "--data.cache-dir", str(tmp_path / "cache")]) == 0
    trained = load.load(folder)
    assert trained.start.info["step"] > 0
    _, samples = evaluation.samples_of(trained, "test", {"data.cache_dir": str(tmp_path / "cache")})
    found = evaluation.evaluate(trained, samples)
    assert found.scores["accuracy"].value > 0.5 and found.scores["accuracy"].baseline == pytest.approx(1 / 30)
    assert convert.main([folder, str(tmp_path / "model.pt")]) == 0
    from torchlm.load import load_model

    model, _ = load_model(tmp_path / "model.pt")
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"base"}
