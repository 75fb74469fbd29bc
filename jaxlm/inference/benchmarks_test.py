"""BLiMP and LAMBADA: log-probabilities against transformers' GPT-2 of the same weights, and bad rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import convert, evaluate
from jaxlm.inference import benchmarks, load
from jaxlm.testing import tiny_runs

GPT2: dict[str, Any] = {
    **{"positions": "learned", "tied_embedding": True, "final_norm": True, "gelu": "tanh", "output_bias": False},
    "initialization": "gpt2",
}
PAIRS = [
    ("the cat sat on the mat", "the cat sat the on mat"),
    ("a dog", "dog a"),
    ("a cat and a dog", "cat a and dog a"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    return tiny_runs.write(folder, "gpt", **{f"model.{name}": x for name, x in GPT2.items()})


def test_scores_are_those_of_transformers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    assert convert.main([str(run), str(tmp_path / "public"), "--as", "gpt2"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "public").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "public")

    def expected(context: str, target: str) -> tuple[float, bool]:
        n = len(tokenizer(context)["input_ids"]) if context else 0
        ids = [tokenizer.eos_token_id, *tokenizer(context + target)["input_ids"]]
        n_cut = max(0, len(ids) - 17)  # of 16 positions
        with torch.no_grad():
            log_p = model(torch.tensor([ids[n_cut:-1]])).logits[0].double().log_softmax(-1)[n - n_cut :]
        labels = torch.tensor(ids[n + 1 :])
        return float(log_p[torch.arange(len(labels)), labels].sum()), bool((log_p.argmax(-1) == labels).all())

    texts = [("", text) for pair in PAIRS for text in pair] + [(a, f" {b}") for a, b in PAIRS]
    texts += [("the cat sat on the mat and the dog sat on the log and the cat sat on the", " mat")]
    sums, likeliest = benchmarks.log_probabilities(load.load(run, precision="float32"), texts)
    of_transformers = [expected(*text) for text in texts]
    np.testing.assert_allclose(sums, [x for x, _ in of_transformers], rtol=1e-4)
    assert likeliest.tolist() == [x for _, x in of_transformers]
    rows = [{"sentence_good": a, "sentence_bad": b, "UID": f"kind {i % 2}"} for i, (a, b) in enumerate(PAIRS)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--checkpoint", str(run), "--benchmark", "blimp", "--data.path", str(tmp_path / "pairs.jsonl")]
    capsys.readouterr()
    assert evaluate.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    right = [of_transformers[2 * i][0] > of_transformers[2 * i + 1][0] for i in range(3)]
    assert result["scores"]["accuracy"][0] == pytest.approx(np.mean(right)) and result["n"] == 3
    assert result["kinds"] == {"kind 0": (right[0] + right[2]) / 2, "kind 1": right[1]}
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": f"{a} {b}"}) for a, b in PAIRS))
    words = [expected(f"{a} {b}".rpartition(" ")[0], f" {b.split()[-1]}") for a, b in PAIRS]
    argv[3], argv[5] = "lambada", str(tmp_path / "words.jsonl")
    assert evaluate.main([*argv, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["perplexity"][0] == pytest.approx(np.exp(-np.mean([x for x, _ in words])), rel=1e-4)
    assert scores["accuracy"][0] == pytest.approx(np.mean([x for _, x in words]))
    assert evaluate.main(argv) == 0 and "perplexity" in capsys.readouterr().out


def test_bad_rows_and_models_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": "one and two "}\n')
    (tmp_path / "none.jsonl").write_text("")
    mlm = tiny_runs.write(tmp_path / "mlm", "mlm")
    for checkpoint, benchmark, name, said in (
        (run, "blimp", "bad.jsonl", "line 1: has no sentence_good"),
        (run, "lambada", "bad.jsonl", "line 1: has a single word"),
        (run, "lambada", "blank.jsonl", "line 1: ends in a blank"),
        (run, "lambada", "none.jsonl", "has no rows"),
        (run, "lambada", "missing", "cannot be read (No such file"),
        (mlm, "lambada", "bad.jsonl", "needs a causal language model"),
    ):
        argv = ["--checkpoint", str(checkpoint), "--benchmark", benchmark, "--data.path", str(tmp_path / name)]
        with pytest.raises(SystemExit) as ending:
            evaluate.main(argv)
        assert ending.value.code == 2 and said in capsys.readouterr().err
