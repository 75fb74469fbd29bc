"""Models of transformers and a plain GPT, with the loop and the batches of a careful user of them.

Sizes, rate, dropout and clipping are of settings of jaxlm, and the text is the same: for language models as one stream
of tokens cut into windows without any pad; for classifiers, a batch is padded to its longest text.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from bench_systems import N_THREADS, InTorch, Reply, prompts, read_data, scored

from jaxlm.config import Config
from jaxlm.data import cache
from jaxlm.io import temporary


class Peer(InTorch):
    """A model of transformers, or the plain GPT below, and the loop that a careful user of it would write."""

    def __init__(self, config: Config, spec: dict[str, Any]):
        import torch

        from torchlm import schedule

        torch.set_num_threads(N_THREADS)
        torch.set_float32_matmul_precision("high")  # which a CPU does not heed
        torch.manual_seed(config.train.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.data = read_data(config)
        self.is_grouped = spec["system"].endswith("grouped")
        self.model = plain_gpt(self.config) if spec["system"] == "plain GPT" else transformers_model(self.config)
        self.model.to(self.device)
        self.optimizer = _adamw(self.model, config)
        self.rate = schedule.learning_rate(config.train)
        self.step = 0
        if spec["compiled"]:
            self.model.compile(dynamic=True if config.task == "sst2" else None)
        splits = cache.open_cache(
            self.data.source, self.data.tokenizer, temporary.user_cache_dir(config.data.cache_dir), lambda n: None
        )
        self.splits, self.batches = splits, self._batches(splits["train"])

    def update(self) -> tuple[Any, int]:
        import torch

        self.model.train()
        batch = next(self.batches)
        loss, _ = self._forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach(), _n_real(batch)

    def evaluate(self) -> Reply:
        """Score the validation part."""
        import torch

        self.model.eval()
        sums = {"loss": 0.0, "count": 0.0, "correct": 0.0}
        started_s = time.perf_counter()
        tokens = 0
        for batch in self._batches(self.splits["validation"], is_training=False):
            with torch.no_grad():
                loss, logits = self._forward(batch)
            is_counted = batch["labels"] >= 0
            count = int(is_counted.sum())
            sums["loss"] += loss.item() * count
            sums["count"] += count
            sums["correct"] += int((logits[is_counted].argmax(-1) == batch["labels"][is_counted]).sum())
            tokens += _n_real(batch)
        return scored(sums, time.perf_counter() - started_s, self.data) | {"tokens": tokens}

    def generate(self, n_rows: int, n_prompt: int, n_new: int) -> Reply:
        """Continue prompts greedily, with transformers' cache of keys and values."""
        import torch

        if self.config.train.precision == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.eval()
        prompts_BT = torch.from_numpy(prompts(self.data, n_rows, n_prompt))
        started_s = time.perf_counter()
        made = self.model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        n = made.numel() - prompts_BT.numel()
        return {"seconds": time.perf_counter() - started_s, "tokens": n, "loss": None}

    def _forward(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        is_bfloat16 = self.config.train.precision == "bfloat16"
        batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16):
            output = self.model(**batch)
        return output.loss, output.logits

    def _batches(self, split: cache.Split, is_training: bool = True) -> Iterator[dict[str, Any]]:
        import torch

        of_task = {"mlm": self._masked, "gpt": self._windows, "sst2": self._texts}[self.config.task]
        for seed in range(self.config.train.seed, sys.maxsize):
            for batch in of_task(split, np.random.default_rng(seed), is_training):
                yield {name: torch.from_numpy(x.astype(np.int64)) for name, x in batch.items()}
            if not is_training:
                return

    def _windows(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        T, B = self.config.model.seq_len, self.config.train.batch_size
        windows = split.tokens[: len(split.tokens) // T * T].reshape(-1, T)
        order = rng.permutation(len(windows)) if is_training else np.arange(len(windows))
        for start in range(0, len(order) - B + 1 if is_training else len(order), B):
            tokens = windows[order[start : start + B]].astype(np.int64)
            yield {"input_ids": tokens, "labels": tokens}

    def _masked(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        mask = self.data.tokenizer.token_to_id("[MASK]")
        for batch in self._windows(split, rng, is_training):
            tokens, draws = batch["input_ids"], rng.random(batch["input_ids"].shape)
            share = self.config.data.mask_fraction
            labels = np.where(draws < share, tokens, -100)
            kinds = draws / share
            other = rng.integers(0, self.config.model.vocab_size, tokens.shape)
            yield {
                "input_ids": np.where(kinds < 0.8, mask, np.where((kinds >= 0.8) & (kinds < 0.9), other, tokens)),
                "labels": labels,
            }

    def _texts(self, split: cache.Split, rng: np.random.Generator, is_training: bool) -> Iterator[dict[str, Any]]:
        samples, B = self.data.samples["train" if is_training else "validation"], self.config.train.batch_size
        lengths, n = np.diff(split.offsets), len(split)
        order = rng.permutation(n) if is_training else np.arange(n)
        if self.is_grouped:  # by length within chunks of 50 batches, the batches in random order
            chunks = [order[i : i + 50 * B] for i in range(0, n, 50 * B)]
            order = np.concatenate([chunk[np.argsort(lengths[chunk])] for chunk in chunks])
        batches = [order[i : i + B] for i in range(0, n, B)]
        if self.is_grouped and is_training:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        for indices in batches:
            batch = samples.batch(indices, np.zeros_like(indices))
            is_real = batch["tokens"] != self.config.model.pad_id
            longest = int(is_real.sum(axis=1).max())
            tokens, is_real = batch["tokens"][:, :longest], is_real[:, :longest]
            yield {"input_ids": tokens, "attention_mask": is_real, "labels": batch["labels"]}


class Mapped:
    """datasets.map with transformers' fast tokenizer, on all cores."""

    def __init__(self, config: Config, spec: dict[str, Any]):
        self.config = config

    def ready(self) -> Reply:
        """Tokenize the text, article by article, into Arrow files."""
        import datasets
        import transformers

        datasets.disable_progress_bars()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=self.config.tokenizer.path)
        data, folder = self.config.data, self.config.data.cache_dir
        texts = datasets.load_dataset("text", data_files=data.path, split="train", cache_dir=folder)
        tokens = texts.map(
            lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=N_THREADS,
            remove_columns="text",
        )
        return {"n": len(tokens)}


def _adamw(model: Any, config: Config) -> Any:
    import torch

    parameters, train = list(model.parameters()), config.train
    groups = [
        {"params": [x for x in parameters if x.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [x for x in parameters if x.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True)


def transformers_model(config: Config) -> Any:
    """Return transformers' model for the task, with start values."""
    import transformers

    model, p = config.model, config.model.dropout
    if config.task == "gpt":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=model.vocab_size,
                n_positions=model.seq_len,
                n_embd=model.d_model,
                n_layer=model.n_layers,
                n_head=model.n_heads,
                resid_pdrop=p,
                embd_pdrop=p,
                attn_pdrop=p,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    bert = transformers.BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        intermediate_size=4 * model.d_model,
        max_position_embeddings=model.seq_len,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    kinds = {"mlm": transformers.BertForMaskedLM, "sst2": transformers.BertForSequenceClassification}
    return kinds[config.task](bert)


def plain_gpt(config: Config) -> Any:
    """Return a small GPT in the manner of nanoGPT: query, key and value in one product, fused attention, tied table."""
    from torch import nn
    from torch.nn import functional as F

    c = config.model

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
            self.qkv, self.output = nn.Linear(c.d_model, 3 * c.d_model), nn.Linear(c.d_model, c.d_model)
            self.fc1, self.fc2 = nn.Linear(c.d_model, 4 * c.d_model), nn.Linear(4 * c.d_model, c.d_model)

        def forward(self, x: Any) -> Any:
            B, T, D = x.shape
            p = c.dropout if self.training else 0.0
            qkv = self.qkv(self.norm1(x)).view(B, T, 3, c.n_heads, D // c.n_heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=p, is_causal=True)
            x = x + F.dropout(self.output(y.transpose(1, 2).reshape(B, T, D)), p, self.training)
            return x + F.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))), p, self.training)

    class PlainGpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.seq_len, c.d_model)
            self.blocks = nn.ModuleList(Block() for _ in range(c.n_layers))
            self.norm = nn.LayerNorm(c.d_model)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, input_ids: Any, labels: Any) -> Any:
            x = self.token(input_ids) + self.position.weight[: input_ids.shape[1]]
            x = F.dropout(x, c.dropout, self.training)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.token.weight)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            return _Output(loss, logits)

    return PlainGpt()


class _Output:
    def __init__(self, loss: Any, logits: Any):
        self.loss, self.logits = loss, logits


def _n_real(batch: dict[str, Any]) -> int:
    return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
