"""Models of transformers, against transformers itself: small and random ones of each kind, made here."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxlm import config as configs
from jaxlm import convert, predict
from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.errors import UserError
from jaxlm.inference import evaluation, load
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.weights import huggingface, snapshots
from jaxlm.weights.families import FAMILIES
from jaxlm.weights.formats import RUN

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a dog and a cat, both of them old: what they saw"]
T, D, C = 24, 24, 3
KINDS = (*("bert", "distilbert", "roberta", "gpt2"), *("bert classes", "distilbert classes", "roberta classes"))
KINDS += ("bert tags", "distilbert tags", "roberta tags")
LOGITS = 5e-6  # of the largest; measured: 1.4e-6 between float32s, where each is up to 1.4e-6 from float64

Make = Callable[[str], tuple[Path, Any]]


def tokenizer_of(kind: str) -> Tokenizer:
    """Return a tokenizer with the special tokens of a kind of model."""
    family = kind.partition(" ")[0]
    if family != "roberta":
        config = TokenizerConfig(kind="bpe" if family == "gpt2" else "wordpiece", vocab_size=300)
        return tokenization.train(config, lambda: iter(TEXTS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=letters)
    )
    return tokenizer


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function from a kind to the folder of a small random model, and the model of transformers."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def model(kind: str) -> tuple[Path, Any]:
        if kind in made:
            return made[kind]
        tokenizer = tokenizer_of(kind)
        family, _, is_classes = kind.partition(" ")
        common = {"vocab_size": tokenization.n_ids(tokenizer), "num_labels": C}
        bert = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * D}
        config: Any = {
            "bert": lambda: transformers.BertConfig(**common, **bert, max_position_embeddings=T),
            "distilbert": lambda: transformers.DistilBertConfig(
                **common, dim=D, n_layers=3, n_heads=4, hidden_dim=4 * D, max_position_embeddings=T
            ),
            "roberta": lambda: transformers.RobertaConfig(
                **common, **bert, max_position_embeddings=T + 2, type_vocab_size=1, layer_norm_eps=1e-5
            ),
            "gpt2": lambda: transformers.GPT2Config(
                **common, n_embd=D, n_layer=3, n_head=4, n_positions=T, bos_token_id=None, eos_token_id=None
            ),
        }[family]()
        task = {"classes": "sst2", "tags": "tag"}[is_classes] if is_classes else "gpt" if family == "gpt2" else "mlm"
        theirs = getattr(transformers, FAMILIES[family].class_name(task))(config).eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for x in theirs.parameters():  # norms are not left at 1 and 0, nor biases at 0
                x.copy_(0.3 * torch.randn(x.shape, generator=random) + (x.ndim == 1) * x)
        made[kind] = folder, theirs = tmp_path_factory.mktemp("models") / kind.replace(" ", "_"), theirs
        theirs.save_pretrained(folder)
        if is_classes == "tags":  # which transformers makes up, but which a tagger cannot have
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(values | {"id2label": {"0": "O", "1": "B-X", "2": "I-X"}}))
        tokenization.save(tokenizer, folder / "tokenizer.json")
        return folder, theirs

    return model


def inputs(pad_id: int, n_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts [4, T], two of them as long as can be, and which of their tokens are real."""
    is_real = np.arange(T)[None] < np.array([T, T, T // 2, 3])[:, None]
    tokens = np.random.default_rng(0).integers(5, n_ids, (4, T))
    return np.where(is_real, tokens, max(pad_id, 0)).astype(np.int32), is_real


def logits_of(theirs: Any, tokens: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result = theirs(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(is_real).long())
    return of_real(result.logits.numpy(), is_real)


def of_real(logits: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    return logits[is_real] if logits.ndim == 3 else logits


def ours(source: Path, tokens: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    import jax

    model, config = load.load_model(source)
    places = [np.tile(np.arange(T), (len(tokens), 1))] if config.task == "tag" else []
    return of_real(np.asarray(jax.jit(lambda model, x: model(x, None, *places))(model, tokens)), is_real)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def written(source: Path, folder: Path, *args: str) -> Path:
    assert convert.main([str(source), str(folder), *args]) == 0
    return folder


# Logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, make: Make) -> None:
    from torchlm.load import load_model

    folder, theirs = make(kind)
    twin, config = load_model(folder)
    tokens, is_real = inputs(config.model.pad_id, config.model.vocab_size)
    want = logits_of(theirs, tokens, is_real)
    assert want.std() > 0.1
    assert apart(ours(folder, tokens, is_real), want) < LOGITS
    # Without rounding, which could hide a small mistake, such as another epsilon.
    exact_theirs = type(theirs)(theirs.config).double().eval()
    exact_theirs.load_state_dict(theirs.state_dict())
    exact = logits_of(exact_theirs, tokens, is_real)
    with torch.no_grad():
        places = [torch.arange(T).expand(len(tokens), T)] if config.task == "tag" else []
        got = of_real(twin.double()(torch.from_numpy(tokens).long(), None, *places).numpy(), is_real)
    assert apart(got, exact) < 1e-13


# Written back


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_back_is_loaded_by_transformers_and_here(kind: str, make: Make, tmp_path: Path) -> None:
    import transformers

    folder, theirs = make(kind)
    run = written(folder, tmp_path / "run")
    back = written(run, tmp_path / "back", "--as", kind.partition(" ")[0])
    autos = {"mlm": "MaskedLM", "gpt": "CausalLM", "sst2": "SequenceClassification", "tag": "TokenClassification"}
    auto = autos[snapshots.load(run).info["task"]]
    again = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(back)
    assert type(again) is type(theirs)
    tokens, is_real = inputs(getattr(theirs.config, "pad_token_id", 0) or 0, theirs.config.vocab_size)
    assert apart(logits_of(again.eval(), tokens, is_real), logits_of(theirs, tokens, is_real)) < LOGITS
    weights = [snapshots.read(path).weights for path in (folder, run, back)]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])
        np.testing.assert_array_equal(array, weights[2][name])


@pytest.mark.parametrize(
    ("family", "task", "settings", "message"),
    [
        ("bert", "gpt", {}, "--as bert: task=gpt, but a model of bert has mlm, sst2, tag, embed only"),
        ("gpt2", "mlm", {}, "--as gpt2: task=mlm, but a model of gpt2 has gpt, sst2 only"),
        ("gpt2", "gpt", {"model.positions": "rotary"}, "model.positions=rotary, but a model of gpt2 has learned"),
        ("gpt2", "gpt", {"model.positions": "fixed"}, "model.final_norm=False, but a model of gpt2 has True"),
        ("gpt2", "gpt", {"model.tied_embedding": True}, "model.output_bias=True, but a model of gpt2 has False"),
        ("gpt2", "gpt", {"model.d_ff": 20}, "model.d_ff=20, but a model of gpt2 has 4 x model.d_model"),
        ("gpt2", "gpt", {"model.norm": "rmsnorm"}, "model.norm=rmsnorm, but a model of gpt2 has layernorm"),
        ("gpt2", "gpt", {"model.logit_softcap": 9.0}, "model.logit_softcap=9.0, but a model of gpt2 has none"),
        ("bert", "mlm", {}, "model.post_norm=False, but a model of bert has True"),
        (
            "bert",
            "cola",
            {"model.head_outputs": "vocabulary"},
            "model.head_outputs=vocabulary, but a model of bert has labels",
        ),
        ("distilbert", "mlm", {}, "model.norm_epsilon=1e-05, but a model of distilbert has 1e-12"),
        ("roberta", "mlm", {"model.pad_id": -1, "model.gelu": "tanh"}, "model.pad_id=-1, but positions of roberta"),
    ],
)
def test_what_transformers_has_not_is_refused_by_name(
    family: str, task: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        huggingface.check(configs.build({"task": task, **settings}), FAMILIES[family])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Other files than those that transformers writes today


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """Return a copy of a model's folder with other tensors in it."""
    from safetensors.numpy import load_file

    shutil.copytree(folder, to)
    save_file(
        {name: x.copy() for name, x in change(load_file(to / huggingface.WEIGHTS)).items()}, to / huggingface.WEIGHTS
    )
    return to


def as_of_old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors of BERT as bert-base-uncased has them."""
    table = tensors["bert.embeddings.word_embeddings.weight"]
    more = {"cls.predictions.decoder.weight": table, "bert.embeddings.position_ids": np.arange(T)}
    more |= {"bert.pooler.dense.weight": np.ones((D, D)), "cls.seq_relationship.bias": np.ones(2)}
    old = {name: x for name, x in tensors.items() if "LayerNorm" not in name}
    kinds = {"weight": "gamma", "bias": "beta"}
    for name in tensors.keys() - old.keys():
        before, _, kind = name.rpartition(".")
        old[f"{before}.{kinds[kind]}"] = tensors[name]
    return old | more


def as_bare_gpt2(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors of GPT-2 as openai-community/gpt2 has them."""
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, T, T)) for i in range(3)}
    return {name.removeprefix("transformer."): x for name, x in tensors.items()} | masks


@pytest.mark.parametrize(("kind", "change"), [("bert", as_of_old), ("gpt2", as_bare_gpt2)])
def test_files_as_they_are_on_the_hub_are_read_as_well(kind: str, change: Any, make: Make, tmp_path: Path) -> None:
    folder, _ = make(kind)
    want, got = snapshots.read(folder), snapshots.read(rewritten(folder, tmp_path / "other", change))
    for name, array in want.weights.items():
        np.testing.assert_array_equal(array, got.weights[name])


@pytest.mark.parametrize("kind", ["several files", "pickle", "pickle, several files"])
def test_weights_in_other_files_are_read_as_well(kind: str, make: Make, tmp_path: Path) -> None:
    first, theirs = make("bert classes")
    folder = shutil.copytree(first, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if kind == "several files":
        theirs.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        torch.save(state := theirs.state_dict(), folder / "pytorch_model.bin")
        if "several" in kind:
            places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
            for file in {*places.values()}:
                torch.save({name: x for name, x in state.items() if places[name] == file}, folder / file)
            (folder / "pytorch_model.bin").unlink()
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    want, got = (snapshots.read(path).weights for path in (first, folder))
    assert all(np.array_equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_halves_are_read_without_a_change(dtype: Any, make: Make, tmp_path: Path) -> None:
    import ml_dtypes

    folder, _ = make("distilbert")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    halves = rewritten(folder, tmp_path / "half", lambda tensors: {name: x.astype(kind) for name, x in tensors.items()})
    got = snapshots.read(halves).weights
    for name, array in snapshots.read(folder).weights.items():
        np.testing.assert_array_equal(array.astype(kind).astype(np.float32), got[name])
    tensors = {name: x.astype(np.float64) for name, x in snapshots.load(folder).tree.items()}
    with pytest.raises(UserError, match="is float64, but can be read as float32, .*; save it again as float32"):
        snapshots.read(rewritten(folder, tmp_path / "double", lambda _: tensors))


def test_a_vocab_txt_says_whether_it_has_case(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make("bert")[0], tmp_path / "model")
    vocab = tokenization.read(TokenizerConfig(path=str(folder))).get_vocab()
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(vocab, key=vocab.__getitem__)))
    told = [snapshots.load(folder).info["config"]["tokenizer.lowercase"]]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    told.append(snapshots.load(folder).info["config"]["tokenizer.lowercase"])
    assert told == [True, False]


# Used


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_predictions_are_those_of_transformers(kind: str, make: Make) -> None:
    folder, theirs = make(kind)
    model = predict.load(folder)
    text = "the cat" if kind == "gpt2" else "the [MASK] sat on"
    ids = torch.tensor([model.encode(text)])
    if kind == "gpt2":  # a token at a time, with the keys and values of those before
        made = theirs.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert model([text], temperature=0, max_new_tokens=9)[0]["continuation"] == model.tokenizer.decode(
            made.tolist()
        )
        return
    with torch.no_grad():
        p_V = theirs(ids).logits[0, ids[0].tolist().index(model.mask)].softmax(-1)
    guesses = model([text], top_k=3)[0]["masks"][0]
    assert [guess["id"] for guess in guesses] == p_V.topk(3).indices.tolist()
    assert [guess["probability"] for guess in guesses] == pytest.approx(p_V.topk(3).values.tolist(), rel=1e-5)


def loaded(*argv: Any) -> tuple[configs.Config, resume.Start]:
    config, _, start = resume.load([str(arg) for arg in argv], "python -m jaxlm.train", RUN)
    return config, start


def test_a_run_starts_from_the_base_and_for_the_same_task_from_the_head_too(make: Make) -> None:
    folder, _ = make("roberta")
    config, start = loaded("--init-from", folder, "--task", "mlm", "--model.seq-len", 8)
    assert (start.kind, start.parts, config.tokenizer.path) == ("base", ("base", "head"), str(folder))
    model = config.model
    assert (model.d_model, model.n_layers, model.positions, model.pad_id, model.seq_len) == (D, 3, "learned", 1, 8)
    assert (model.norm_epsilon, model.embedding_norm, model.head_dense, model.tied_embedding) == (
        1e-5,
        True,
        "bert",
        True,
    )
    config, start = loaded("--init-from", folder, "--task", "sst2")
    assert (start.parts, config.model.head_dense, config.model.tied_embedding) == (("base",), "bert", False)
    config, start = loaded("--init-from", folder, "--task", "sst2", "--model.head-dense", "none")
    assert config.model.head_dense == "none"
    with pytest.raises(UserError, match="^model.tied_embedding=False, but .*roberta has True, which cannot change"):
        loaded("--init-from", folder, "--task", "mlm", "--model.tied-embedding", "false")
    with pytest.raises(UserError, match="^resume=.*roberta: is a model without a training state; .* --init-from"):
        loaded("--resume", folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("bert", "sst2"), ("roberta", "mlm"), ("gpt2", "gpt")])
def test_a_model_is_trained_further_and_written_for_transformers(
    kind: str, task: str, make: Make, launch: Any, tmp_path: Path
) -> None:
    import transformers

    folder, theirs = make(kind)
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 30)]
    data = tmp_path / ("texts.tsv" if task == "sst2" else "texts.txt")
    rows = ["sentence\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(texts))]
    data.write_text("\n".join(rows if task == "sst2" else texts) + "\n")
    args = (
        f"--task {task} --init-from {folder} --run.dir run --data.path {data} --model.seq-len 16 --model.dropout 0"
        " --train.max-steps 4 --train.eval-interval 4 --train.warmup-steps 1 --train.batch-size 4"
        " --train.learning-rate 1e-4"
    )
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len([line for line in output.splitlines() if "restored" in line]) == (1 if task == "sst2" else 2)

    run, back = tmp_path / "run", written(tmp_path / "run", tmp_path / "back", "--as", kind)
    auto = {"mlm": "MaskedLM", "gpt": "CausalLM", "sst2": "SequenceClassification"}[task]
    again = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(back).eval()
    tokens, is_real = (x[:, :16] for x in inputs(theirs.config.pad_token_id or 0, theirs.config.vocab_size))
    got = ours(run, tokens, is_real)
    assert apart(logits_of(again, tokens, is_real), got) < LOGITS
    if task != "sst2":  # the model has moved, but not far
        assert 1e-4 < apart(got, logits_of(theirs, tokens, is_real)) < 0.5
    text = "the cat sat"
    ids = transformers.AutoTokenizer.from_pretrained(back)(text)["input_ids"]
    assert ids == predict.load(run).encode_any(text)[kind == "gpt2" :]


# Two texts, numbers and names of classes

MNLI = ("contradiction", "neutral", "entailment")  # not in the order of the alphabet
OF_BERT = {"post_norm": True, "embedding_norm": True, "positions": "learned", "head_dense": "bert", "d_model": D}
OF_BERT |= {"n_heads": 4, "norm_epsilon": 1e-12, "seq_len": 32}


@pytest.mark.parametrize(("family", "task"), [("bert", "sst2"), ("roberta", "regress")])
def test_two_texts_are_those_of_transformers(family: str, task: str, tmp_path: Path) -> None:
    import transformers

    is_bert = family == "bert"
    settings: dict[str, Any] = {f"model.{name}": value for name, value in OF_BERT.items()}
    settings |= {"data.pair_column": "auto", "model.segments": 2 if is_bert else 1, "model.pad_id": int(not is_bert)}
    classes = MNLI if task == "sst2" else ()
    run = tiny_runs.write(tmp_path / "run", task, None, tokenizer_of(family), classes, **settings)
    folder = written(run, tmp_path / "back", "--as", family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    a, b = TEXTS[0][:20], TEXTS[1][:11]
    batch = tokenizer(a, b, return_tensors="pt")
    predictor = predict.load(run)
    assert batch["input_ids"][0].tolist() == predictor.encode(f"{a}\t{b}")
    assert batch["input_ids"][0].tolist().count(tokenizer.sep_token_id) == 2 + (family == "roberta")
    with torch.no_grad():
        output_C = model(**batch).logits[0]
    (answer,) = predictor([f"{a}\t{b}"])
    (other,) = predictor([f"{a}\t{a}"])
    if task == "regress":
        assert model.config.num_labels == 1 and model.config.problem_type == "regression"
        assert answer["value"] == pytest.approx(output_C.item(), rel=1e-4) and answer["value"] != other["value"]
    else:
        expected = {name: output_C.softmax(0)[i].item() for i, name in enumerate(MNLI)}
        assert answer["probabilities"] == pytest.approx(expected, rel=1e-4)
        assert model.config.id2label == dict(enumerate(MNLI))


def test_a_model_of_one_output_predicts_a_number(make: Make, tmp_path: Path) -> None:
    import transformers

    folder, theirs = make("roberta classes")
    config = type(theirs.config)(**{**theirs.config.to_dict(), "num_labels": 1, "id2label": {0: "LABEL_0"}})
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.copy(folder / "tokenizer.json", tmp_path / "model")
    predictor = predict.load(tmp_path / "model")
    (answer,) = predictor(["the cat sat"])
    with torch.no_grad():
        (expected,) = model(torch.tensor([predictor.encode("the cat sat")])).logits[0].tolist()
    assert predictor.trained.config.task == "regress" and answer["value"] == pytest.approx(expected, rel=1e-5)
    config, start = loaded("--init-from", tmp_path / "model", "--task", "regress", "--model.segments", 1)
    assert start.parts == ("base", "head")
    run = written(tmp_path / "model", tmp_path / "run")
    back = written(run, tmp_path / "back", "--as", "roberta")
    for name, array in snapshots.read(tmp_path / "model").weights.items():
        np.testing.assert_array_equal(array, snapshots.read(back).weights[name])


def test_classes_of_a_model_keep_the_numbers_of_their_names(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, theirs = make("bert classes")
    shutil.copytree(folder, tmp_path / "mnli")
    values = json.loads((tmp_path / "mnli" / "config.json").read_text())
    values |= {"id2label": {i: name.upper() for i, name in enumerate(MNLI)}}
    (tmp_path / "mnli" / "config.json").write_text(json.dumps(values))
    rows = [(TEXTS[0], TEXTS[1], name) for name in sorted(MNLI)]
    file = tmp_path / "pairs.tsv"
    file.write_text("sentence1\tsentence2\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows))
    trained = load.load(tmp_path / "mnli")
    assert trained.task.classes == tuple(name.upper() for name in MNLI)
    _, samples = evaluation.samples_of(trained, "test", {"data.path": str(file), "data.pair_column": "auto"})
    assert samples.labels.tolist() == [0, 2, 1]  # contradiction, entailment, neutral
    back = written(tmp_path / "mnli", tmp_path / "back", "--as", "bert")
    assert list(json.loads((back / "config.json").read_text())["id2label"].values()) == [*map(str.upper, MNLI)]

    asked = ["--text", "the cat sat", "--pair", "a dog", "--json", "--checkpoint"]
    capsys.readouterr()
    assert predict.main([*asked, str(tmp_path / "mnli")]) == 0
    answer = json.loads(capsys.readouterr().out)
    first, second = (trained.tokenizer.encode(text).ids for text in ("the cat sat", "a dog"))
    start, end = (trained.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    ids = [start, *first, end, *second, end]
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    with torch.no_grad():
        p_C = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0].softmax(0)
    expected = {name.upper(): p for name, p in zip(MNLI, p_C.tolist(), strict=True)}
    assert answer["pair"] == "a dog" and answer["probabilities"] == pytest.approx(expected, rel=1e-5)
    run = written(tmp_path / "mnli", tmp_path / "run")
    with pytest.raises(SystemExit):
        predict.main([*asked, str(run)])
    assert "reads one text; leave --pair out" in capsys.readouterr().err


# Refused

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "kind": (
        "bert",
        {"model_type": "t5"},
        "model_type=t5: can be read from bert, distilbert, roberta, gpt2, llama, qwen3, ",
    ),
    "activation": ("bert", {"hidden_act": "relu"}, "hidden_act=relu: can be read with gelu, gelu_new, "),
    "activation of RoBERTa": ("roberta", {"hidden_act": "gelu_new"}, "hidden_act=gelu_new: can be read with gelu only"),
    "positions": ("bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": '),
    "decoder": ("bert", {"is_decoder": True}, "is_decoder=true: can be read with false only"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true: "),
    "untied": ("roberta", {"tie_word_embeddings": False}, "tie_word_embeddings=false: can be read with true only"),
    "scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true: "),
    "no scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false: "),
    "sines": ("distilbert", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds=true: "),
    "width": ("distilbert", {"hidden_dim": 100}, "hidden_dim=100: can be read with 4 x the width, 96, only"),
    "heads": ("gpt2", {"n_head": 5}, "n_head=5 does not divide 24"),
    "no size": ("bert", {"hidden_size": None}, "hidden_size=null: has to be a whole number above 0"),
    "epsilon": ("bert", {"layer_norm_eps": "small"}, "in its settings: Expected `float`, got `str`"),
    "pad": ("bert", {"pad_token_id": 1000}, "pad_token_id=1000: has to be a token of the vocabulary"),
    "regression": ("bert classes", {"problem_type": "regression"}, 'problem_type="regression" with 3 outputs: only'),
    "layers": ("bert", {"num_hidden_layers": 2}, "encoder.layer.2.attention.output.LayerNorm.bias [24] is not in"),
    "more layers": ("gpt2", {"n_layer": 4}, "transformer.h.3.ln_1.weight [24] is missing"),
    "vocabulary": (
        "gpt2",
        {"vocab_size": 9},
        "transformer.wte.weight has the shape [290, 24], but the model needs [9, ",
    ),
    "segments": ("bert", {"type_vocab_size": 3}, "token_type_embeddings.weight has the shape [2, 24], but the model "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_are_not_had_here_are_refused_by_name(name: str, make: Make, tmp_path: Path) -> None:
    kind, change, message = CONFIGS[name]
    folder = shutil.copytree(make(kind)[0], tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError) as caught:
        snapshots.read(folder)
    told = str(caught.value)
    assert message in told and told.startswith(str(folder)) and "\n" not in told


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2"])
def test_what_a_config_does_not_tell_is_as_in_transformers(kind: str, make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make(kind)[0], tmp_path / "model")
    full = snapshots.load(folder).info["config"]
    values = json.loads((folder / "config.json").read_text())
    default = type(make(kind)[1].config)().to_dict()
    sizes = [FAMILIES[kind].keys[name] for name in ("d_model", "n_layers", "n_heads", "vocab_size", "seq_len")]
    told = {key: x for key, x in values.items() if key in sizes or x != default.get(key) or key == "model_type"}
    assert len(told) < len(values) - 5
    (folder / "config.json").write_text(json.dumps(told))
    assert snapshots.load(folder).info["config"] == full


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2"])
def test_keys_that_change_nothing_are_passed_over_and_unknown_ones_are_refused(
    kind: str, make: Make, tmp_path: Path
) -> None:
    folder = shutil.copytree(make(kind)[0], tmp_path / "model")
    full = snapshots.load(folder).info["config"]
    values = json.loads((folder / "config.json").read_text())
    written = make(kind)[1].config.to_dict()  # with every key that the library has
    of_old = {"gradient_checkpointing": False, "finetuning_task": "sst2", "torch_dtype": "float32", "n_ctx": 24}
    of_old |= {"task_specific_params": {}, "_name_or_path": "x", "top_k": 50, "output_past": True, "pooler_type": "x"}
    (folder / "config.json").write_text(json.dumps(of_old | written | values))
    assert snapshots.load(folder).info["config"] == full
    for key, value in {"alibi": True, "rope_theta": 1e4, "embedding_size": 128, "auto_map": {}}.items():
        (folder / "config.json").write_text(json.dumps(values | {key: value}))
        with pytest.raises(UserError, match=f"config.json: {key}=.*: is not known here for model_type={kind}; remove"):
            snapshots.load(folder)


def test_another_step_around_a_text_is_refused(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make("bert")[0], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    for single in ("[CLS] $A", "$A [SEP]", "[SEP] $A [CLS]", "[CLS] $A [SEP]"):
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        tokenizer.save(str(folder / "tokenizer.json"))
        if single == "[CLS] $A [SEP]":
            snapshots.load(folder)
            continue
        with pytest.raises(UserError, match=r"its post_processor makes .* of the text a: can be read with \[CLS\] a"):
            snapshots.load(folder)


def test_files_that_are_missing_or_damaged_are_told(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make("bert")[0], tmp_path / "model")

    def failure() -> str:
        with pytest.raises(UserError) as caught:
            resume.to_use(folder)
        return str(caught.value).removeprefix(f"{folder}")

    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert failure().startswith("/model.safetensors: cannot be read as safetensors: ")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": print}, folder / "pytorch_model.bin")
    assert failure().startswith("/pytorch_model.bin: refused: its pickle is damaged, or has more than tensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (
        failure()
        == "/model.safetensors.index.json: its file model-1.safetensors is not there; copy or download it, too"
    )
    save_file({"b": np.zeros(1)}, folder / "model-1.safetensors")
    assert failure() == "/model.safetensors.index.json: a is not in model-1.safetensors; copy both again"
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    assert failure().startswith("/model.safetensors.index.json: weight_map has to say which file beside it each tensor")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin")
    assert failure() == ": there is no model.safetensors; copy or download it, too"
    (tmp_path / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{")
    assert failure().startswith("/config.json: cannot be read (")
    (folder / "config.json").unlink()
    assert failure() == "/config.json: cannot be read (No such file or directory); copy or download it again"


def test_tensors_that_do_not_fit_are_told(make: Make, tmp_path: Path) -> None:
    folder, _ = make("bert")

    def untied(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"] + 1}

    with pytest.raises(UserError, match="decoder.weight is another than bert.embeddings.word_embeddings.weight, but"):
        snapshots.load(rewritten(folder, tmp_path / "untied", untied))


# The hub


def test_a_name_on_the_hub_is_found_in_its_cache(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(make("gpt2")[0], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert resume.to_use("someone/small").path == cached / "snapshots" / "abc"
    with pytest.raises(UserError, match="^someone/other: there is no such run or checkpoint, and no model on the hub"):
        resume.to_use("someone/other")
    (tmp_path / "someone").mkdir()  # a local folder, not a name on the hub
    with pytest.raises(UserError, match="^someone/other: there is no such run or checkpoint$"):
        resume.to_use("someone/other")


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # that nothing listens on
    with pytest.raises(
        UserError, match="^bert-base-uncased: .*, and no model on the hub that can be reached"
    ) as caught:
        resume.to_use("bert-base-uncased")
    assert "\n" not in str(caught.value)


def test_further_output_layers_of_an_unknown_class_are_named_and_left_out(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = make("bert")
    shutil.copytree(folder, tmp_path / "more")
    further = {"cls.species.weight": np.zeros((6, D), np.float32), "cls.species.bias": np.zeros(6, np.float32)}
    save_file(load_file(folder / "model.safetensors") | further, tmp_path / "more" / "model.safetensors")
    with pytest.raises(UserError, match="cls.species.weight .* is not in the model"):
        huggingface.load(tmp_path / "more")
    values = json.loads((folder / "config.json").read_text()) | {"architectures": ["AntiBERTy"]}
    (tmp_path / "more" / "config.json").write_text(json.dumps(values))
    weights, more = huggingface.load(folder).weights, huggingface.load(tmp_path / "more").weights
    assert "leaving out output layers of AntiBERTy: cls.species\n" in capsys.readouterr().err
    assert weights.keys() == more.keys() and all(np.array_equal(more[name], x) for name, x in weights.items())


@pytest.mark.slow
def test_a_classifier_of_gpt2_is_read_and_written_without_a_bias(make: Make, tmp_path: Path) -> None:
    import transformers

    folder, theirs = make("gpt2 classes")
    assert theirs.score.bias is None and not load.load_model(folder)[1].model.classifier_bias
    assert "head.linear.bias" not in huggingface.load(folder).weights
    back = written(written(folder, tmp_path / "run"), tmp_path / "back", "--as", "gpt2")
    again, report = transformers.GPT2ForSequenceClassification.from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    for name, x in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], x)
