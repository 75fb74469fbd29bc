"""What benchmark.py measures: works, the systems that do them side by side, and the ratios to reach."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench_tables import label

Settings = dict[str, Any]

SIZE = {"model.d_model": 256, "model.n_layers": 4, "model.n_heads": 4, "model.seq_len": 128, "train.batch_size": 16}
TINY = {
    **{"model.d_model": 32, "model.n_layers": 1, "model.n_heads": 2, "model.seq_len": 32, "train.batch_size": 4},
    **{"model.vocab_size": 1000, "tokenizer.vocab_size": 1000},
}
TRAINING = {
    "train.schedule": "constant",
    "train.warmup_steps": 10,
    "train.learning_rate": 5e-4,
    "train.max_steps": 1_000_000,
}
MLM = {**TRAINING, **SIZE, "task": "mlm", "model.vocab_size": 30_522}
GPT = {
    **TRAINING,
    **SIZE,
    "task": "gpt",
    "model.vocab_size": 50_257,
    "model.pad_id": -1,
    "tokenizer.kind": "bpe",
}
BASE_SIZE = {"model.d_model": 768, "model.n_layers": 12, "model.n_heads": 12}
BASE = {**MLM, **BASE_SIZE, "train.batch_size": 8, "train.learning_rate": 1e-4}
SST2 = {
    **MLM,
    "task": "sst2",
    "train.group_by_length": True,
    "train.batch_size": 32,
    "train.warmup_steps": 100,
    "train.learning_rate": 3e-4,
}
SMALL = {**MLM, "model.d_model": 128, "model.n_layers": 2, "model.seq_len": 64, "model.vocab_size": 4096}
AS_BERT = {"model.embedding_norm": True, "model.final_norm": True, "model.positions": "learned"}
TIED = {"model.tied_embedding": True, "model.final_norm": True, "model.positions": "learned"}  # as GPT-2


@dataclass(frozen=True)
class System:
    """One of SYSTEMS in bench_child.py, in one form."""

    name: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return label({"system": self.name, "precision": self.precision, "compiled": self.compiled})


def forms(name: str, precisions: Sequence[str] = ("float32", "bfloat16")) -> tuple[System, ...]:
    """Return a system of PyTorch in each precision, eager and compiled."""
    return tuple(System(name, precision, compiled) for precision in precisions for compiled in (False, True))


JAXLM = (System("jaxlm", "float32", True), System("jaxlm", "bfloat16", True))
JAXLM_TIED = System("jaxlm tied", "bfloat16", True)
ORIGINAL = System("original", "float32")
TRANSFORMERS = System("transformers", "bfloat16", True)


@dataclass(frozen=True)
class Work:
    """What the systems do side by side: in each round `command` with its arguments, once each."""

    settings: Settings
    systems: tuple[System, ...]
    command: tuple[Any, ...]  # a method of the systems, and its arguments
    rounds: int


WORKS = {
    "mlm": Work(MLM, (*JAXLM, JAXLM_TIED, ORIGINAL, *forms("torchlm"), *forms("transformers")), ("train", 4), 7),
    "gpt": Work(
        GPT, (*JAXLM, JAXLM_TIED, *forms("torchlm"), *forms("transformers"), *forms("plain GPT")), ("train", 3), 7
    ),
    "sst2": Work(
        SST2,
        (*JAXLM, ORIGINAL, System("transformers", "bfloat16"), System("transformers grouped", "bfloat16")),
        ("train", 0),  # a tenth of an epoch
        10,
    ),
    "base": Work(BASE, (JAXLM[1], JAXLM_TIED, *forms("transformers", ["bfloat16"])), ("train", 2), 5),
    "evaluation": Work(MLM, (*JAXLM, *forms("transformers")), ("evaluate",), 7),
    "generation of 1 row": Work(
        {**GPT, **TIED},
        (*JAXLM, System("transformers", "float32"), System("transformers", "bfloat16")),
        ("generate", 1, 16, 112),
        7,
    ),
    "generation of 16 rows": Work(
        {**GPT, **TIED},
        (*JAXLM, System("transformers", "float32"), System("transformers", "bfloat16")),
        ("generate", 16, 16, 112),
        7,
    ),
}
MLM_ON_GPU = {**MLM, **BASE_SIZE, "model.seq_len": 512, "train.batch_size": 32, "model.dropout": 0.0}
GPU_WORKS = {
    "mlm on a GPU": Work(MLM_ON_GPU, (JAXLM[1], JAXLM_TIED, TRANSFORMERS), ("train", 10), 5),
    "mlm on a GPU, dropout": Work({**MLM_ON_GPU, "model.dropout": 0.1}, (JAXLM[1], TRANSFORMERS), ("train", 10), 5),
    "gpt on a GPU": Work(
        {**GPT, **BASE_SIZE, "model.seq_len": 1024, "model.dropout": 0.0},
        (JAXLM[1], JAXLM_TIED, TRANSFORMERS, System("plain GPT", "bfloat16", True)),
        ("train", 10),
        5,
    ),
}
NOTES = {  # where the work is another than jaxlm's
    ("original", "mlm"): "logits at every position",
    ("original", "sst2"): "fixed length, an output for each token of the vocabulary",
    ("transformers", "mlm"): "logits at every position, tied output; no pads",
    ("transformers", "gpt"): "tied output; no pads",
    ("transformers", "sst2"): "padded to the longest of a batch",
    ("transformers grouped", "sst2"): "padded likewise, batches of like lengths",
    ("jaxlm", "sst2"): "cut likewise, batches of like lengths; norms of embedding and output, learned positions",
    ("plain GPT", "gpt"): "tied output; no pads",
    ("jaxlm tied", "mlm"): "tied output",
    ("jaxlm tied", "gpt"): "tied output",
}


@dataclass(frozen=True)
class Target:
    """A ratio to reach: ours to that of the best of the systems that `against` matches, a regular expression."""

    work: str
    ours: str
    against: str
    quantity: str  # of a row of the results
    target: float
    at_most: bool = False

    def is_of(self, system: System) -> bool:
        return str(system) == self.ours or bool(re.fullmatch(self.against, str(system)))


OF_PEERS = "(transformers|plain GPT) bfloat16 compiled"
TARGETS = (
    Target("mlm", "jaxlm bfloat16", "original float32", "tokens_per_s", 7),
    Target("mlm", "jaxlm float32", "original float32", "tokens_per_s", 3),
    Target("mlm", "jaxlm bfloat16", "transformers bfloat16 compiled", "tokens_per_s", 1.8),
    Target("mlm", "jaxlm float32", "torchlm float32", "peak_mb", 0.5, at_most=True),
    # What torchlm does for gpt is what the original does.
    Target("gpt", "jaxlm bfloat16", "torchlm float32", "tokens_per_s", 4),
    Target("gpt", "jaxlm float32", "torchlm float32", "tokens_per_s", 2),
    Target("gpt", "jaxlm tied bfloat16", "transformers bfloat16 compiled", "tokens_per_s", 1.2),
    Target("gpt", "jaxlm float32", "torchlm float32", "peak_mb", 0.5, at_most=True),
    Target("sst2", "jaxlm bfloat16", "original float32", "tokens_per_s", 12),
    Target("sst2", "jaxlm bfloat16", "transformers( grouped)? bfloat16", "tokens_per_s", 1.5),
    # 872 sentences: accuracies of equal models differ by 0.02 now and then.
    Target("sst2", "jaxlm bfloat16", "transformers( grouped)? bfloat16", "accuracy", 0.975),
    Target("base", "jaxlm bfloat16", "transformers bfloat16 compiled", "tokens_per_s", 1.2),
    Target("evaluation", "jaxlm bfloat16", "transformers .*", "tokens_per_s", 1.5),
    Target("generation of 1 row", "jaxlm bfloat16", "transformers .*", "tokens_per_s", 1.5),
    Target("generation of 16 rows", "jaxlm bfloat16", "transformers .*", "tokens_per_s", 1.5),
    *(Target(work, "jaxlm tied bfloat16", OF_PEERS, "tokens_per_s", 1) for work in ("mlm on a GPU", "gpt on a GPU")),
    Target("mlm on a GPU, dropout", "jaxlm bfloat16", OF_PEERS, "tokens_per_s", 1),
)
