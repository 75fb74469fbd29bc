"""Compares embeddings of jaxlm with those of sentence-transformers, and their Spearman correlations on STS-B.

    python scripts/compare_embeddings.py MODEL sts-test.csv --python PYTHON

MODEL is a folder of sentence-transformers. The file is as the publishers of STS-B have it: tab-separated, without a
header, the score in column 4 and the texts in 5 and 6. PYTHON is an interpreter whose packages have
sentence-transformers, which jaxlm does without.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from jaxlm import predict

THEIRS = """
import sys
import numpy
import sentence_transformers
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
texts = open(sys.argv[2], encoding="utf-8").read().split("\\n")
numpy.save(sys.argv[3], model.encode(texts, normalize_embeddings=True))
print(sentence_transformers.__version__)
"""


def main() -> None:
    """Print the largest difference of two numbers of a vector, and both correlations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    rows = [line.split("\t") for line in args.file.read_text(encoding="utf-8").splitlines()]
    scores = np.array([float(row[4]) for row in rows])
    texts = [row[column].strip() for column in (5, 6) for row in rows]
    ours = predict.load(args.model, embeds=True).vectors(texts)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
        argv = [args.python, "-c", THEIRS, args.model, f"{folder}/texts.txt", f"{folder}/theirs.npy"]
        version = subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.split()[-1]
        theirs = np.load(f"{folder}/theirs.npy")
    print(
        f"{len(rows):,} pairs; largest difference from sentence-transformers {version}: "
        f"{np.abs(ours - theirs).max():.1e}"
    )
    for name, vectors in (("jaxlm", ours), ("sentence-transformers", theirs)):
        cosines = np.sum(vectors[: len(rows)] * vectors[len(rows) :], axis=1)
        print(f"Spearman correlation, {name}: {spearmanr(cosines, scores).statistic:.6f}")


if __name__ == "__main__":
    main()
