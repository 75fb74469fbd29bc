"""One training that time_to_loss.py compares, in a process that tells its losses.

    python scripts/time_to_loss_child.py '{"system": "jaxlm", "settings": ["--task", "gpt"], "folder": "run"}'

Each line of its output that begins with POINT is JSON: the update, the loss of the validation part, the seconds that
evaluations and the first update took. The time at which a line comes is the reader's to take.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.config import Config

POINT = "point "


def tell(**values: Any) -> None:
    """Write a line for time_to_loss.py."""
    print(POINT + json.dumps(values), flush=True)


def train_ours(package: str, config: Config, folder: Path) -> None:
    """Train with jaxlm or torchlm, by their own command; only what tells of evaluations is put around its functions."""
    import importlib

    loop: Any = importlib.import_module(f"{package}.loop")
    evaluate, build, spent_s = loop.evaluate_and_show, loop.build, 0.0

    def told(run: Any, compiled: Any, state: Any, i: int, status: Any) -> None:
        nonlocal spent_s
        started_s = time.perf_counter()
        evaluate(run, compiled, state, i, status)
        spent_s += time.perf_counter() - started_s
        tell(update=i, loss=run.losses()[i], evaluations_s=spent_s)

    def built(*args: Any) -> Any:
        fresh, compiled = build(*args)
        is_first = True

        def update(*args: Any) -> Any:
            nonlocal is_first
            started_s = time.perf_counter()
            state, metrics = compiled.update(*args)
            if is_first:
                float(metrics["loss"])
                tell(first_update_s=time.perf_counter() - started_s)
                is_first = False
            return state, metrics

        return fresh, compiled._replace(update=update)

    loop.evaluate_and_show, loop.build = told, built
    train = importlib.import_module(f"{package}.train")
    (folder / "settings.toml").write_text(configs.dump(config), encoding="utf-8")
    sys.exit(train.main(["--config", str(folder / "settings.toml"), "--run.dir", str(folder / "run")]))


def train_transformers(config: Config, folder: Path) -> None:
    """Train transformers' GPT-2 or BERT by its Trainer: compiled, fused AdamW, bfloat16 where the CPU has it."""
    import numpy as np
    import torch
    import transformers
    from bench_peers import transformers_model

    from jaxlm.data import tokenization

    train = config.train
    n_tokens = tokenization.n_ids(tokenization.read(config.tokenizer))
    config = configs.replace(config, "model.vocab_size", n_tokens)
    if config.task == "mlm":
        config = configs.replace(config, "model.tied_embedding", True)
    splits = {name: np.load(folder / f"{name}.npy").astype(np.int64) for name in ("train", "validation")}
    T = config.model.seq_len

    def rows(name: str) -> list[dict[str, Any]]:
        windows = splits[name][: len(splits[name]) // T * T].reshape(-1, T)
        return [{"input_ids": row, **({"labels": row} if config.task == "gpt" else {})} for row in windows]

    validation = rows("validation")[: max(config.data.validation_tokens // T, 1)]
    torch.manual_seed(train.seed)
    model = transformers_model(config)
    tell(parameters=sum(x.numel() for x in model.parameters()))
    collator = None
    if config.task == "mlm":
        special = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=config.tokenizer.path, **special)
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.data.mask_fraction)
    has_bfloat16 = "bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    spent_s, started_s = 0.0, time.perf_counter()

    class Told(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                tell(first_update_s=time.perf_counter() - started_s)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal spent_s
            metrics = kwargs["metrics"]
            spent_s += metrics["eval_runtime"]
            tell(update=state.global_step, loss=metrics["eval_loss"], evaluations_s=spent_s)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "transformers"),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=4 * train.batch_size,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": train.min_learning_rate},
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta2,
        max_grad_norm=train.clip_norm,
        optim="adamw_torch_fused",
        torch_compile=not config.debug,
        bf16=has_bfloat16,
        eval_strategy="steps",
        eval_steps=train.eval_interval,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        seed=train.seed,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=rows("train"),
        eval_dataset=validation,
        data_collator=collator,
        callbacks=[Told()],
    ).train()


def prepare(config: Config, folder: Path) -> None:
    """Write the tokens of both splits and the tokenizer, as jaxlm makes them, for the systems that have none."""
    import pickle

    import numpy as np
    from bench_systems import read_data

    from jaxlm.data import cache, tokenization
    from jaxlm.io import temporary

    config, data = read_data(config)
    splits = cache.open_cache(
        data.source, data.tokenizer, temporary.user_cache_dir(config.data.cache_dir), lambda n: None
    )
    for name, short in (("train", "train"), ("validation", "val")):
        tokens = np.asarray(splits[name].tokens)
        np.save(folder / f"{name}.npy", tokens)
        tokens.astype(np.uint16).tofile(folder / f"{short}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.model.vocab_size}))
    tokenization.save(data.tokenizer, folder / "tokenizer.json")


def main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    config, _ = configs.load(spec["settings"])
    if spec["system"] == "prepare":
        prepare(config, folder)
    elif spec["system"] == "transformers":
        train_transformers(config, folder)
    else:
        train_ours(spec["system"], config, folder)


if __name__ == "__main__":
    main()
