"""Compares published weights in jaxlm with transformers: ids, hidden states, logits; and again written back.

    python scripts/real_weights.py FOLDER texts.txt

The file has a text in each line. Needs transformers and PyTorch.
"""

import argparse
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxlm import convert, predict
from jaxlm.inference import load
from jaxlm.weights import huggingface, snapshots
from jaxlm.weights.families import FAMILIES


def main() -> None:
    """Print how many texts have equal ids, and the largest differences of hidden states and logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    args = parser.parse_args()
    texts = [line for line in args.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    source = huggingface.find(args.folder)
    config = snapshots.read(source).config
    family = FAMILIES[huggingface.load(source).form.split()[-1]]
    model_class = getattr(transformers, family.class_name(huggingface._task(config)))
    predictor: Any = predict.load(source, embeds=config.task in ("base", "embed"))
    ids = [getattr(predictor, "encode_any", predictor.encode)(text) for text in texts]
    print(
        f"{date.today()}, {platform.machine()}, {model_class.__name__}, transformers {transformers.__version__}: "
        f"{len(texts)} texts, {sum(map(len, ids)):,} tokens"
    )
    with tempfile.TemporaryDirectory() as target:
        back = Path(target) / "back"
        assert convert.main([str(source), f"{target}/run"]) == 0
        assert convert.main([f"{target}/run", str(back), "--as", family.type]) == 0
        results = {"jaxlm": ours(source, ids), "written back, in transformers": theirs(model_class, back, ids)}
        tokenizers = {"jaxlm": ids, "written back, in transformers": ids_of(back, texts)}
    expected, expected_ids = theirs(model_class, source, ids), ids_of(source, texts)
    for name, outputs in results.items():
        n_equal = sum(a == b for a, b in zip(tokenizers[name], expected_ids, strict=True))
        print(f"{name}: ids equal in {n_equal} of {len(texts)} texts")
        for kind, (a, b) in {kind: (outputs[kind], expected[kind]) for kind in expected}.items():
            apart, largest = np.abs(a - b).max(), np.abs(b).max()
            same = f"; the likeliest token is the same at {np.mean(a.argmax(1) == b.argmax(1)):.2%}"
            print(
                f"  {kind}: at most {apart:.1e} apart, the largest is {largest:.1f}{same if kind == 'logits' else ''}"
            )


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def ours(folder: Path, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """Return hidden states [N, D], and logits [N, V] of a language model, of all tokens."""
    model, config = load.load_model(folder)
    tokens_BT = np.full((len(ids), max(map(len, ids))), max(config.model.pad_id, 0), np.int32)
    for row, text in zip(tokens_BT, ids, strict=True):
        row[: len(text)] = text
    is_real_BT = np.arange(tokens_BT.shape[1]) < np.array([len(text) for text in ids])[:, None]
    hidden = jax.jit(lambda model, tokens_BT: model.base(tokens_BT))
    outputs = {"hidden states": np.asarray(hidden(model, tokens_BT))[is_real_BT]}
    if config.task in ("mlm", "gpt"):
        logits = jax.jit(lambda model, tokens_BT: model(tokens_BT))
        outputs["logits"] = np.asarray(logits(model, tokens_BT))[is_real_BT]
    return outputs


def theirs(model_class: Any, folder: Path, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the same, of a folder that transformers loads; each text alone."""
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for text in ids:
            result = model(input_ids=torch.tensor([text]), output_hidden_states=True)
            outputs.setdefault("hidden states", []).append(result.hidden_states[-1][0].numpy())
            if "logits" in result:
                outputs.setdefault("logits", []).append(result.logits[0].numpy())
    return {kind: np.concatenate(x) for kind, x in outputs.items()}


if __name__ == "__main__":
    main()
