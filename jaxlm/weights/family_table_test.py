"""The table of families in PUBLIC_WEIGHTS.md: each cell is a test here, on a small random model beside transformers."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import AddedToken, processors

from jaxlm import config as configs
from jaxlm import convert, predict, train
from jaxlm.data import loader, tags, tokenization
from jaxlm.inference import load
from jaxlm.loss import cross_entropy
from jaxlm.params import names
from jaxlm.weights import families_test, huggingface, huggingface_test, snapshots
from jaxlm.weights.families import FAMILIES
from jaxlm.weights.fine_tuning_test import fine_tune
from torchlm.load import load_model

COLUMNS = ("load", "predict", "logits", "gradients", "fine-tune", "decode", "serve", "export")
NAMES = {
    **{"bert": "BERT", "distilbert": "DistilBERT", "roberta": "RoBERTa", "gpt2": "GPT-2", "llama": "Llama, SmolLM2"},
    **{"qwen3": "Qwen3", "modernbert": "ModernBERT, Ettin", "modernbert-decoder": "Ettin's decoders"},
    **{"eurobert": "EuroBERT", "ultrabert": "UltraBERT"},
}
# Models of masked words fill masks, which `predict` has; they have nothing to decode.
CELLS = {family: [x for x in COLUMNS if x != "decode" or FAMILIES[family].is_causal] for family in NAMES}
QUICK = {("llama", "load"), ("qwen3", "decode"), ("modernbert", "gradients"), ("gpt2", "predict")}
SOONER = {"bert", "modernbert", "llama"}  # not among the longest tests, as the others are
PAGE = Path(__file__).with_name("PUBLIC_WEIGHTS.md")
T, N, B, UPDATES, RATE = 24, 30, 6, 3, 1e-3
ROOM = 1e-5  # of the largest, float32; 5e-6 is what the tests of logits alone have, for smaller vocabularies
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OLD: dict[str, dict[str, Any]] = {
    "bert": BERT | {"max_position_embeddings": 48},
    "roberta": BERT | {"max_position_embeddings": 48 + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 48},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 0},
}
Make = Callable[[str], tuple[Path, Any]]


def cells(column: str) -> pytest.MarkDecorator:
    """Return the mark by which a test is that of a column, for each family that has the cell."""
    family = [name for name, columns in CELLS.items() if column in columns]
    rest = [pytest.mark.slow, pytest.mark.longest]
    marked = [x if (x, column) in QUICK else pytest.param(x, marks=rest[: 1 if x in SOONER else 2]) for x in family]
    return pytest.mark.parametrize("family", marked)


def test_the_page_has_the_table_of_these_tests() -> None:
    rows = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[NAMES[x], *("yes" if column in CELLS[x] else "" for column in COLUMNS)] for x in CELLS]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("|  |", "| |")
    assert set(NAMES) == set(FAMILIES) and table in PAGE.read_text(encoding="utf-8"), f"the page has to have\n{table}"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a family and an output layer to a folder of a small random model, and the model."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind.replace(" ", "_")
            made[kind] = write_old(kind, folder) if kind.split()[0] in OLD else write_new(kind, folder)
        return made[kind]

    return get


def write_new(kind: str, folder: Path) -> tuple[Path, Any]:
    sizes = {} if kind.startswith("modernbert") else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    if kind.startswith("ultrabert"):
        sizes = {}
    return families_test.with_tokenizer(kind, folder, **sizes)


def write_old(kind: str, folder: Path) -> tuple[Path, Any]:
    family, _, head = kind.partition(" ")
    tokenizer = huggingface_test.tokenizer_of(family)
    start, end = ("<s>", "</s>") if family == "roberta" else ("[CLS]", "[SEP]")
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if family == "gpt2":
        values |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        ids = tokenizer.get_vocab()
        tokenizer.post_processor = processors.BertProcessing((end, ids[end]), (start, ids[start]))
        if family == "roberta":  # as published: the blank before a mask is the mask's
            tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
        pad, mask = ("<pad>", "<mask>") if family == "roberta" else ("[PAD]", "[MASK]")
        values |= {"cls_token": start, "sep_token": end, "pad_token": pad, "mask_token": mask}
    task = {"lm": "gpt" if family == "gpt2" else "mlm", "classes": "sst2", "tags": "tag"}[head]
    model_class = getattr(transformers, FAMILIES[family].class_name(task))
    sizes = OLD[family] | {"id2label": families_test.SIZES["id2label"], "vocab_size": tokenization.n_ids(tokenizer)}
    sizes |= dict.fromkeys(FAMILIES[family].dropouts, 0.0) | ({"seq_classif_dropout": 0.0} if "dim" in sizes else {})
    # GPT-2's classifier would take the <|endoftext|> that ends a text here for a pad; token 0 is in no text.
    sizes["pad_token_id"] = 0 if family == "gpt2" else tokenizer.token_to_id(values["pad_token"])
    theirs = families_test.randomized(model_class(model_class.config_class(**sizes)).eval())
    theirs.save_pretrained(folder)
    tokenization.save(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder, theirs


def kind_of(family: str, head: str = "lm") -> str:
    return f"{family} {head}"


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def answer_of(family: str, folder: Path, theirs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a request, and what of its answer transformers makes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if FAMILIES[family].is_causal:
        text = "the cat's"
        ids = predict.load(folder).encode(text)  # families_test.py and huggingface_test.py have these beside theirs
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        tokens = torch.tensor([ids])
        made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(ids) :]
        return {"prompt": text, "temperature": 0, "max_new_tokens": 8}, {"continuation": tokenizer.decode(made)}
    text = f"the {tokenizer.mask_token} cat"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p_V = theirs(input_ids=ids).logits[0, ids[0].tolist().index(tokenizer.mask_token_id)].softmax(-1)
    return {"text": text, "top_k": 3}, {"p": p_V.topk(3).values.tolist(), "ids": p_V.topk(3).indices.tolist()}


def check_answer(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    if "continuation" in expected:
        assert answer["continuation"] == expected["continuation"]
        return
    (guesses,) = answer["masks"]
    assert [guess["id"] for guess in guesses] == expected["ids"]
    assert [guess["probability"] for guess in guesses] == pytest.approx(expected["p"], rel=1e-4)


# The columns


@cells("load")
def test_weights_are_read_from_files_of_each_kind(family: str, make: Make, tmp_path: Path) -> None:
    folder, theirs = make(kind_of(family))
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    want = snapshots.read(folder).weights
    shapes = [sorted(x.size for x in weights.values()) for weights in (want, snapshots.read(folder).weights)]
    assert shapes[0] == shapes[1]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    file = other / huggingface.WEIGHTS

    def check(expected: dict[str, np.ndarray]) -> None:
        got = snapshots.read(other).weights
        assert got.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(got[name], x, err_msg=name)

    # With tied output layers in the file as well, as state dicts have them.
    for prefix in ("", "module.", "_orig_mod.", "model.", "module._orig_mod."):
        save_file({prefix + name: x.copy() for name, x in state.items()}, file)
        check(want)
    for kind in (np.float16, ml_dtypes.bfloat16):
        save_file({name: x.astype(kind) for name, x in state.items()}, file)
        check({name: x.astype(kind).astype(np.float32) for name, x in want.items()})
    file.unlink()
    theirs.save_pretrained(other, max_shard_size="20KB")
    assert len(list(other.glob("model-*.safetensors"))) > 1
    check(want)
    for path in other.glob("model*.safetensors*"):
        path.unlink()
    torch.save(theirs.state_dict(), other / huggingface.PICKLE)
    check(want)


@cells("predict")
def test_the_command_predicts_what_transformers_does(family: str, make: Make) -> None:
    folder, theirs = make(kind_of(family))
    asked, expected = answer_of(family, folder, theirs)
    options = [str(x) for key, value in asked.items() for x in (f"--{key.replace('_', '-')}", value)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert predict.main(["--checkpoint", str(folder), "--json", *options]) == 0
    check_answer(json.loads(printed.getvalue()), expected)


@cells("logits")
@pytest.mark.filterwarnings("ignore:.*")
def test_logits_are_those_of_transformers(family: str, make: Make) -> None:
    folder, theirs = make(kind_of(family))
    model, config = load.load_model(folder)
    twin, _ = load_model(folder)
    tokens = np.random.default_rng(0).integers(6, config.model.vocab_size, (3, T))
    with torch.no_grad():
        want = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
        assert apart(twin(torch.from_numpy(tokens)).numpy(), want) < ROOM
    assert apart(jax.jit(lambda model, x: model(x))(model, np.int32(tokens)), want) < ROOM


@cells("gradients")
def test_loss_and_gradients_are_those_of_transformers(family: str, make: Make, tmp_path: Path) -> None:
    folder, theirs = make(kind_of(family))
    model, config = load.load_model(folder)
    twin, _ = load_model(folder)
    tokens, targets = np.random.default_rng(0).integers(6, config.model.vocab_size, (2, 3, T))
    loss = torch.nn.functional.cross_entropy(
        theirs(input_ids=torch.from_numpy(tokens)).logits.flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()
    # Their gradients are read as their weights are, from a folder that has them in their place.
    gradients = type(theirs)(theirs.config)
    with torch.no_grad():
        for x, y in zip(gradients.parameters(), theirs.parameters(), strict=True):
            x.copy_(y.grad)
            y.grad = None
    gradients.save_pretrained(tmp_path)
    want = huggingface.load(tmp_path).weights

    def mean_loss(model: Any) -> jax.Array:
        totals = cross_entropy(model(np.int32(tokens)), jnp.asarray(targets, jnp.int32))
        return totals["loss"] / totals["count"]

    found, state = nnx.jit(nnx.value_and_grad(mean_loss))(model)
    got = names.to_torch(jax.device_get(nnx.to_pure_dict(state)))
    twin_loss = torch.nn.functional.cross_entropy(
        twin(torch.from_numpy(tokens)).flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    twin_loss.backward()
    by_torch = {name: x.grad.numpy() for name, x in twin.named_parameters() if x.grad is not None}
    assert [float(found), twin_loss.item()] == pytest.approx([loss.item()] * 2, rel=1e-5)
    largest = max(np.abs(x).max() for x in want.values())
    assert {name for name, x in want.items() if np.any(x)} <= got.keys() & by_torch.keys()
    for name, x in want.items():
        if config.model.output_bias or name != "head.bias":
            for gradient in (got[name], by_torch[name]):
                np.testing.assert_allclose(gradient, x, rtol=1e-3, atol=1e-5 * largest, err_msg=name)


@cells("fine-tune")
def test_fine_tuning_is_that_of_transformers_and_is_written_back(family: str, make: Make, tmp_path: Path) -> None:
    folder, _ = make(kind_of(family, "classes"))
    model_class = getattr(transformers, FAMILIES[family].class_name("sst2"))
    theirs = model_class.from_pretrained(folder)
    if family == "eurobert":  # whose pad also ends texts: transformers would leave its row of the table untrained
        theirs.get_input_embeddings().padding_idx = None
    random = np.random.default_rng(0)
    words = ["the", "cat", "mat", "they", "like", "12"]
    rows = [(" ".join(random.choice(words, int(random.integers(2, 6)))), int(random.integers(3))) for _ in range(N)]
    for name, some in (("train", rows), ("valid", rows[:6])):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in some)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    argv = [
        *("--task", "sst2", "--init-from", folder, "--data.path", tmp_path / "train.tsv", "--data.test-fraction", 0),
        *("--data.validation-path", tmp_path / "valid.tsv", "--run.dir", tmp_path / "run", "--model.dropout", 0),
        *("--data.cache-dir", tmp_path / "cache", "--train.max-steps", UPDATES, "--train.eval-interval", UPDATES),
        *("--train.log-interval", 1, "--train.batch-size", B, "--train.learning-rate", RATE, "--train.schedule"),
        *("linear", "--train.min-learning-rate", 0, "--train.warmup-steps", 0, "--train.weight-decay", 0.5),
        *("--model.seq-len", snapshots.read(folder).config.model.seq_len),
    ]
    assert train.main([str(x) for x in argv]) == 0

    encode, pad = predict.load(folder).encode, theirs.config.pad_token_id
    order = loader.order_of(range(N), configs.TrainConfig(batch_size=B))  # type: ignore[arg-type]
    batches = []
    for numbers in order(np.arange(UPDATES * B))[0].reshape(UPDATES, B).tolist():
        some = [rows[i] for i in numbers]
        texts = [torch.tensor(encode(text)) for text, _ in some]
        ids = torch.nn.utils.rnn.pad_sequence(texts, True, pad)
        is_real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in texts], True)  # EuroBERT ends with a pad
        labels = torch.tensor([label for _, label in some])
        batches.append({"input_ids": ids, "attention_mask": is_real, "labels": labels})
    losses = fine_tune(theirs, iter(batches), UPDATES, 0, RATE)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["loss"] for row in logged if row["split"] == "train"], losses, rtol=1e-4)

    assert convert.main([str(tmp_path / "run"), str(tmp_path / "back"), "--as", family]) == 0
    again, report = model_class.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    got, want, before = (x.state_dict() for x in (again, theirs, model_class.from_pretrained(folder)))
    for name, x in want.items():
        used = slice(2 if family == "roberta" and "position" in name else 0, None)  # its first two are not read
        moved, off = (torch.linalg.norm((x - y)[used]).item() for y in (before[name], got[name]))
        if not name.endswith(("key.bias", "k_lin.bias", "c_attn.bias")):  # gradients of keys' biases are rounding
            assert off < 0.02 * moved + 1e-7, (name, off, moved)


@cells("decode")
def test_greedy_continuations_of_several_prompts_are_those_of_transformers(family: str, make: Make) -> None:
    folder, theirs = make(kind_of(family))
    predictor = predict.load(folder)
    prompts = ["the cat", "They don't like the mat", "12"]
    answers = predictor(prompts, temperature=0, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([predictor.encode(prompt)])
        made = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=predictor.specials["article"],
            pad_token_id=0,
        )[0, tokens.shape[1] :].tolist()
        made = made[: made.index(predictor.specials["article"])] if predictor.specials["article"] in made else made
        assert answer["continuation"] == predictor.tokenizer.decode(made)


@cells("serve")
def test_a_service_answers_what_transformers_does(family: str, make: Make) -> None:
    pytest.importorskip("fastapi")
    from jaxlm.serve_test import Server

    folder, theirs = make(kind_of(family))
    asked, expected = answer_of(family, folder, theirs)
    with contextlib.closing(Server(predict.load(folder))) as server:
        status, _, answer = server.ask("POST", "/predict", asked)
    assert status == 200, answer
    check_answer(answer, expected)


@cells("export")
def test_pipelines_of_transformers_take_what_is_written(family: str, make: Make, tmp_path: Path) -> None:
    for head in ("lm", "classes", *(["tags"] if "tag" in FAMILIES[family].heads else [])):
        folder, theirs = make(kind_of(family, head))
        run, back = tmp_path / f"{head} run", tmp_path / f"{head} back"
        assert convert.main([str(folder), str(run)]) == 0
        assert convert.main([str(run), str(back), "--as", family]) == 0
        again, report = type(theirs).from_pretrained(back, output_loading_info=True)
        assert not any(report.values()), report
        for name, x in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[name], x) or "position_embeddings" in name, name
        predictor = predict.load(run)
        tokenizer = transformers.AutoTokenizer.from_pretrained(back)
        if head == "lm":
            task: Any = "text-generation" if FAMILIES[family].is_causal else "fill-mask"
        else:
            task = "text-classification" if head == "classes" else "token-classification"
        options: dict[str, Any] = {"ignore_labels": []} if head == "tags" else {}
        pipeline = transformers.pipeline(task, model=str(back), tokenizer=tokenizer, **options)
        if task == "text-generation":
            asked, expected = answer_of(family, back, theirs)
            (answer,) = predictor([asked.pop("prompt")], **asked)
            assert answer["continuation"] == expected["continuation"]
            before = transformers.pipeline(task, model=str(folder), tokenizer=tokenizer)
            made = [x("the cat's", do_sample=False, max_new_tokens=8) for x in (pipeline, before)]
            assert made[0] == made[1] and made[0][0]["generated_text"].startswith("the cat's")
        elif task == "fill-mask":
            text = f"the {tokenizer.mask_token} cat"
            (answer,) = predictor([text])
            best, told = answer["masks"][0][0], pipeline(text)[0]
            assert (best["id"], best["probability"]) == (told["token"], pytest.approx(told["score"], rel=1e-4))
        elif task == "text-classification":
            (answer,) = predictor(["the cat"])
            told = {one["label"]: one["score"] for one in pipeline("the cat", top_k=3)}
            if family == "gpt2":  # whose texts have <|endoftext|> around them here, which is no pad
                again.config.pad_token_id = 0
                with torch.no_grad():
                    p_C = again(torch.tensor([predictor.encode("the cat")])).logits[0].softmax(-1)
                told = dict(zip(told, (p_C[again.config.label2id[x]].item() for x in told), strict=True))
            assert answer["probabilities"] == pytest.approx(told, rel=1e-4)
        else:  # a blank first, which each word of a tagger has before it
            text = " the cat's mat likes naive old cats"
            (answer,) = predictor([text])
            by_start: dict[int, str] = {}  # a blank may be a token of its own; the first token of a word has its tag
            for one in pipeline(text):
                by_start.setdefault(one["start"] + text[one["start"] :].startswith(" "), one["entity"])
            found = list(tags.WORD.finditer(text))
            spans = tags.spans([by_start.get(word.start(), "O") for word in found])
            want = [(kind, found[a].start(), found[b - 1].end()) for kind, a, b in spans]
            assert [(x["type"], x["start"], x["end"]) for x in answer["spans"]] == want and want
