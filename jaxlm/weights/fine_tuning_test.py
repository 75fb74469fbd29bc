"""Fine-tuning of a model of transformers, against that of its own class by plain PyTorch.

Without dropout, with the same batches and rates. There, transformers' tokenizer makes the inputs.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from jaxlm import config as configs
from jaxlm import predict, train
from jaxlm.data import loader, tags, tokenization
from jaxlm.weights import huggingface_test

WORDS = "cat dog bird fox wolf old young sees likes hunts".split()
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
N, N_VALIDATION, B, UPDATES, WARMUP, RATE, DECAY = 90, 12, 8, 20, 4, 2e-3, 0.5
Row = tuple[Any, ...]


def rows_of(task: str, n: int, seed: int) -> list[Row]:
    """Return random words and what is to be learned: words and their tags, or two texts and a class or a number."""
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(n):
        a, b = (random.choice(WORDS, int(random.integers(2, 7))).tolist() for _ in range(2))
        if task == "tag":
            numbers = [1 + 2 * (WORDS.index(word) % 2) if word in WORDS[:5] else 0 for word in a]
            rows.append((a, [TAGS[i] for i in numbers]))
        else:
            is_in = int(a[0] in b)
            rows.append((" ".join(a), " ".join(b), is_in if task == "sst2" else is_in + len(a) / 4))
    return rows


def write(path: Path, task: str, rows: Sequence[Row]) -> Path:
    if task == "tag":
        blocks = ["\n".join(f"{word} {tag}" for word, tag in zip(*row, strict=True)) for row in rows]
        path.write_text("\n\n".join(blocks) + "\n")
    else:
        path.write_text("\n".join(["sentence1\tsentence2\tlabel", *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return path


def model_of(family: str, task: str, folder: Path) -> Any:
    """Write a small random model without dropout, and return it."""
    import transformers

    tokenizer = huggingface_test.tokenizer_of(family.lower())
    is_bert = family == "Bert"
    end, start = ((x, tokenizer.token_to_id(x)) for x in (("[SEP]", "[CLS]") if is_bert else ("</s>", "<s>")))
    tokenizer.post_processor = getattr(processors, f"{family}Processing")(end, start)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=tokenization.n_ids(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
        type_vocab_size=2 if is_bert else 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels={"sst2": 2, "tag": len(TAGS), "regress": 1}[task],
    )
    if task == "tag":
        config.id2label, config.label2id = dict(enumerate(TAGS)), {tag: i for i, tag in enumerate(TAGS)}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}For{'Token' if task == 'tag' else 'Sequence'}Classification")(config)
    model.save_pretrained(folder)
    tokenization.save(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{family}Tokenizer"}))
    return model


def inputs_of(tokenizer: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return what a model of transformers takes: the first token of a word has its tag."""
    if isinstance(rows[0][0], str):
        a, b, labels = zip(*rows, strict=True)
        return {**tokenizer(list(a), list(b), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}
    batch = tokenizer([row[0] for row in rows], is_split_into_words=True, padding=True, return_tensors="pt")
    labels_BT = torch.full(batch["input_ids"].shape, -100)
    for i, (_, found) in enumerate(rows):
        places = batch.word_ids(i)
        for word, tag in enumerate(found):
            labels_BT[i, places.index(word)] = TAGS.index(tag)
    return {**batch, "labels": labels_BT}


def fine_tune(
    model: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    n_updates: int = UPDATES,
    n_warmup: int = WARMUP,
    rate: float = RATE,
) -> list[float]:
    """Train a model as its users do, with a warmup and a linear decay; return the loss of each update."""
    import transformers

    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.0, DECAY)]
    for x in model.parameters():
        groups[x.ndim == 2 and len(x) > 1]["params"].append(x)
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, n_warmup, n_updates)
    losses = []
    for batch in batches:
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("Bert", "sst2"), ("Bert", "tag"), ("Roberta", "regress")])
def test_fine_tuning_is_that_of_transformers_and_pytorch(family: str, task: str, tmp_path: Path) -> None:
    import transformers

    model = model_of(family, task, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    rows, others = rows_of(task, N, 0), rows_of(task, N_VALIDATION, 1)
    files = ["--data.path", write(tmp_path / "train.txt", task, rows)]
    files += ["--data.validation-path", write(tmp_path / "valid.txt", task, others), "--data.test-fraction", 0]
    files += [] if task == "tag" else ["--data.format", "tsv", "--data.pair-column", "auto"]
    updates = (
        f"--train.max-steps {UPDATES} --train.eval-interval {UPDATES} --train.log-interval 1 --train.batch-size {B} "
        f"--train.learning-rate {RATE} --train.min-learning-rate 0 --train.warmup-steps {WARMUP} "
        f"--train.schedule linear --train.weight-decay {DECAY} --model.dropout 0 --model.seq-len 64"
    ).split()
    places = ["--run.dir", tmp_path / "run", "--data.cache-dir", tmp_path / "cache"]
    start = ["--task", task, "--init-from", tmp_path / "model"]
    assert train.main([str(x) for x in (*start, *files, *updates, *places)]) == 0

    order = loader.order_of(range(N), configs.TrainConfig(batch_size=B))  # type: ignore[arg-type]
    chosen = order(np.arange(UPDATES * B))[0].reshape(UPDATES, B)
    losses = fine_tune(model, (inputs_of(tokenizer, [rows[i] for i in some]) for some in chosen.tolist()))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in logged if row["split"] == "train"]
    assert min(losses) < 0.8 * losses[0]
    np.testing.assert_allclose(found, losses, rtol=1e-5)

    with torch.no_grad():
        result = model.eval()(**inputs_of(tokenizer, others))
    (scored,) = [row for row in logged if row["split"] == "validation"]
    assert scored["loss"] == pytest.approx(result.loss.item(), rel=1e-5)
    predictor = predict.load(tmp_path / "run")
    if task == "tag":
        answers = predictor([" ".join(words) for words, _ in others])
        labels = inputs_of(tokenizer, others)["labels"]
        for answer, guesses, is_word in zip(answers, result.logits.argmax(-1), labels >= 0, strict=True):
            spans = tags.spans([TAGS[i] for i in guesses[is_word].tolist()])
            words = [answer["text"][: x["start"]].count(" ") for x in answer["spans"]]
            assert [(x["type"], i) for x, i in zip(answer["spans"], words, strict=True)] == [x[:2] for x in spans]
    elif task == "regress":
        answers = predictor([f"{a}\t{b}" for a, b, _ in others])
        np.testing.assert_allclose([answer["value"] for answer in answers], result.logits[:, 0], atol=1e-5)
    else:
        answers = predictor([f"{a}\t{b}" for a, b, _ in others])
        p_BC = [list(answer["probabilities"]) for answer in answers]
        np.testing.assert_allclose(p_BC, result.logits.softmax(-1), atol=1e-5)
