"""Each use of a trained model by Python, to copy from. As a command, it tries those that go with the task of each run:

python scripts/use_models.py runs/mlm runs/gpt runs/sst2 runs/cola
"""

import http.client
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxlm import convert, predict
from jaxlm.inference import evaluation, load, predictors
from jaxlm.reporting import run_page, run_reader


def fill_masks(run: Path) -> None:
    fill = predict.load(run)
    (answer,) = fill(["The [MASK] of a function."], top_k=3)
    print(answer["filled"])
    for guess in answer["masks"][0]:
        print(f"  {guess['token']} {guess['probability']:.3f}")


def continue_prompts(run: Path) -> None:
    go_on = predict.load(run)
    for answer in go_on(["The statement", "A class"], max_new_tokens=20, temperature=0.7, seed=7):
        print(f"{answer['prompt']}{answer['continuation']}  [{answer['ending']}]")


def continue_as_it_is_made(run: Path) -> None:
    go_on = predict.load(run)
    assert isinstance(go_on, predictors.Continue)
    for piece in go_on.stream("The statement", max_new_tokens=20):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        else:
            print(f"\n{piece['tokens']} tokens, seed {piece['seed']}")


def classify(run: Path) -> None:
    for answer in predict.load(run)(["a fine film", "the plot is dull"]):
        print(f"label {answer['label']}, probabilities {answer['probabilities']}: {answer['text']}")


def look_at_attention(run: Path) -> None:
    seen = predict.load(run).attention("the name of a class", layer=0, head=1)
    for token, weights in zip(seen["tokens"], seen["weights"], strict=True):
        most = max(range(len(weights)), key=weights.__getitem__)
        print(f"{token!r} looks most at {seen['tokens'][most]!r}, {weights[most]:.2f}")


def score(run: Path) -> None:
    model = load.load(run)
    _, samples = evaluation.samples_of(model, "validation", {})
    for name, x in evaluation.evaluate(model, samples).scores.items():
        print(f"{name} {x.value:.4f}, 95% interval {x.low:.4f} to {x.high:.4f}, baseline {x.baseline:.4f}")


def read_metrics(run: Path) -> None:
    told = run_reader.read(run)
    print(f"settings that are no defaults: {', '.join(told.changed_settings())}")
    for row in told.rows[-3:]:
        print(row)


def write_report(run: Path) -> None:
    with tempfile.TemporaryDirectory() as target:
        page = Path(target) / "report.html"
        page.write_text(run_page.page([run_reader.read(run)]), encoding="utf-8")
        print(f"a page of {page.stat().st_size:,} bytes")


def export(run: Path) -> None:
    with tempfile.TemporaryDirectory() as target:
        convert.main([str(run), f"{target}/model.safetensors"])


def ask_server(run: Path) -> None:
    command = [sys.executable, "-m", "jaxlm.serve", "--checkpoint", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        port = next(int(found[1]) for line in server.stderr if (found := re.search(r"serving http://.*:(\d+)/", line)))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({"prompt": "The statement", "max_new_tokens": 20})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        for line in connection.getresponse():
            print(line.decode(), end="")
        connection.close()
        server.terminate()


OF_ALL = [look_at_attention, score, read_metrics, write_report, export]
USES: dict[str, list[Callable[[Path], None]]] = {
    "mlm": [fill_masks, *OF_ALL],
    "gpt": [continue_prompts, continue_as_it_is_made, ask_server, *OF_ALL],
    "pairs": [continue_prompts, *OF_ALL],
    "sst2": [classify, *OF_ALL],
    "cola": [classify, *OF_ALL],
}


def main() -> None:
    for run in map(Path, sys.argv[1:]):
        for use in USES[run_reader.read(run).settings["task"]]:
            print(f"\n--- {use.__name__}: {run}", flush=True)
            use(run)


if __name__ == "__main__":
    main()
