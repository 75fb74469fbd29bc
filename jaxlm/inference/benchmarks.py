"""Benchmarks of causal language models, by the probabilities of texts: BLiMP and LAMBADA. USING.md has an example.

BLiMP (arXiv 1912.00582) has pairs of sentences, one of them acceptable: right if that one is likelier. LAMBADA (arXiv
1606.06031) has passages: right if each token of the last word is the likeliest. Each text follows the end of another.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data import metrics
from jaxlm.errors import UserError, os_errors, slow
from jaxlm.heads import LanguageModel
from jaxlm.inference import evaluation, predictors
from jaxlm.inference.load import LoadedModel
from jaxlm.io import utf8

KEYS = {"blimp": ("sentence_good", "sentence_bad"), "lambada": ("text",)}  # of a row of each benchmark
KIND = "UID"  # key of the kind of a pair
N_ROWS = 16  # texts that go through the model together


def score(trained: LoadedModel, benchmark: str, path: Path) -> dict[str, Any]:
    """Return the scores of a model on the rows of a file, or of all files of a folder, in values of JSON.

    Scores are [value, low, high], with the interval of evaluation.bootstrap. Raises UserError.
    """
    if not isinstance(trained.model, LanguageModel) or trained.task.samples.model_kind != "causal":
        raise UserError(
            f"--benchmark {benchmark}: needs a causal language model, and {trained} is none; train task=gpt"
        )
    rows = _rows(path, KEYS[benchmark])
    if benchmark == "blimp":
        texts = [row[key] for row in rows for key in KEYS[benchmark]]
        sums_N2 = log_probabilities(trained, [("", text) for text in texts])[0].reshape(-1, 2)
        # One published pair has two equal sentences: it counts as right, as in lm-evaluation-harness.
        totals = {"correct": 1.0 * (sums_N2[:, 0] >= sums_N2[:, 1])}
    else:
        parts = [row["text"].rpartition(" ") for row in rows]
        sums_N, are_likeliest = log_probabilities(trained, [(text, f" {word}") for text, _, word in parts])
        totals = {"correct": 1.0 * are_likeliest, "loss": -sums_N}
    totals["count"] = np.ones(len(rows))

    def scores(sums: Any) -> dict[str, float]:
        found = {"accuracy": metrics.accuracy(sums)}
        return found | ({"perplexity": metrics.perplexity(sums)} if "loss" in sums else {})

    intervals = evaluation.bootstrap(totals, scores)
    values = scores({name: x.sum() for name, x in totals.items()})
    of_kind: dict[str, list[float]] = defaultdict(list)
    for row, correct in zip(rows, totals["correct"].tolist(), strict=True):
        of_kind[str(row.get(KIND, ""))].append(correct)
    return {
        **{"checkpoint": str(trained.start.path), "step": trained.start.info["step"], "benchmark": benchmark},
        **{"data": str(path), "n": len(rows)},
        "scores": {name: [value, *intervals[name]] for name, value in values.items()},
        "kinds": {name: math.fsum(x) / len(x) for name, x in of_kind.items()} if len(of_kind) > 1 else {},
    }


@slow("scoring the texts")
def log_probabilities(trained: LoadedModel, texts: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each (context, target) the log-probability of the target in nats, and whether it is the likeliest.

    float64 [N] and bool [N]. Of what is longer than the model takes, the end is read. Raises UserError.
    """
    predictor, seq_len = predictors.Continue(trained), trained.config.model.seq_len
    before = predictor.before or [predictor.stop]
    rows = []
    for context, target in texts:
        of_context, whole = (
            trained.tokenizer.encode(text, add_special_tokens=False).ids for text in (context, context + target)
        )
        rows.append(([*before, *whole], len(before) + len(of_context)))
    compiled = jax.jit(_of_labels)
    sums_N, likeliest_N = np.zeros(len(rows)), np.zeros(len(rows), bool)
    order = np.argsort([len(ids) for ids, _ in rows], kind="stable")
    for first in range(0, len(rows), N_ROWS):
        some = order[first : first + N_ROWS]
        longest = max(len(rows[i][0]) - 1 for i in some)
        T = min(1 << (longest - 1).bit_length(), seq_len)
        tokens_BT = np.full((N_ROWS, T), max(trained.config.model.pad_id, 0), np.int32)
        labels_BT = np.full((N_ROWS, T), -1, np.int32)
        for k, i in enumerate(some):
            ids, n_context = np.array(rows[i][0][-T - 1 :]), rows[i][1] - max(0, len(rows[i][0]) - T - 1)
            tokens_BT[k, : len(ids) - 1] = ids[:-1]
            labels_BT[k, : len(ids) - 1] = np.where(np.arange(1, len(ids)) < n_context, -1, ids[1:])
        sums_B, likeliest_B = compiled(trained.model, tokens_BT, labels_BT)
        sums_N[some], likeliest_N[some] = np.asarray(sums_B)[: len(some)], np.asarray(likeliest_B)[: len(some)]
    return sums_N, likeliest_N


def _of_labels(model: LanguageModel, tokens_BT: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_BTV = model(tokens_BT)
    log_p_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32)))
    log_p_BT = jnp.take_along_axis(log_p_BTV, jnp.maximum(labels_BT, 0)[..., None], axis=-1)[..., 0]
    is_label_BT = labels_BT >= 0
    are_likeliest_B = jnp.all(~is_label_BT | (logits_BTV.argmax(axis=-1) == labels_BT), axis=1)
    return jnp.sum(jnp.where(is_label_BT, log_p_BT, 0), axis=1), are_likeliest_B


def _rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of JSON Lines, compressed or not. Raises UserError for one that lacks a text."""
    found = []
    try:
        with os_errors(f"--data.path {path}: cannot be read"):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                for number, line in enumerate(utf8.lines(utf8.opened(file)), start=1):
                    row = utf8.from_json(line)
                    for key in keys:
                        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                            raise UserError(f"{file}, line {number}: has no {key}; give a file of {', '.join(keys)}")
                    if keys == KEYS["lambada"] and " " not in row["text"].strip():
                        raise UserError(f"{file}, line {number}: has a single word; give a passage")
                    if keys == KEYS["lambada"] and row["text"] != row["text"].rstrip():
                        raise UserError(f"{file}, line {number}: ends in a blank; end it with the word to be guessed")
                    found.append(row)
    except (ValueError, *utf8.DAMAGED) as error:
        raise UserError(f"--data.path {path}: cannot be read as JSON Lines ({error}); give such a file") from error
    if not found:
        raise UserError(f"--data.path {path}: has no rows; give a file of {', '.join(keys)}")
    return found
