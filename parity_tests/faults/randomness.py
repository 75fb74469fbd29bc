"""Faults of what is drawn: start values, and the masks of dropout."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import (
    attend,
    dropout,
    embedding,
    embedding_start,
    feed_forward,
    head_linear,
    linear,
    train_step,
    transformer,
)

START, MASKS, SAME = "start values", "statistics of dropout", "dropout with the same masks"
JAX_XAVIER = "jax.nn.initializers.xavier_uniform()"
TORCH_NORMAL = "nn.init.normal_(_x, std=0.02, generator=_generator)"
TORCH_XAVIER = "nn.init.xavier_uniform_(_x, generator=_generator)"
NO_KEY = "jax.random.key(0) if key is None else key"

FAULTS = [
    # Start values
    *both(
        "head of Xavier: the head starts as the other layers",
        START,
        edit(head_linear.jaxlm, ("_start(_config, _std)", JAX_XAVIER)),
        edit(head_linear.torchlm, ("_start(_x, _config, _generator, _std)", TORCH_XAVIER)),
    ),
    *both(
        "layers of normal(0.02): layers start as GPT-2's",
        START,
        edit(linear.jaxlm, (JAX_XAVIER, "jax.nn.initializers.normal(0.02)")),
        edit(linear.torchlm, (TORCH_XAVIER, TORCH_NORMAL)),
    ),
    *mirrored("zero biases: biases start at zero, flax's default", START, linear, ("n_in**-0.5", "0.0")),
    *mirrored("small embedding: tokens of normal(0.02)", START, embedding_start, ("0.02 if _x else 1.0", "0.02")),
    *both(
        "pad row random: the row of the pad does not start at zero",
        START,
        edit(embedding_start.jaxlm, ("config.pad_id >= 0", "False")),
        edit(embedding_start.torchlm, ("nn.init.zeros_(_row)", "_row")),
    ),
    # Dropout
    *both(
        "dropout not scaled: what is kept is not divided by its share",
        SAME,
        edit(dropout.jaxlm, ("x / (1 - rate)", "x")),
        edit(dropout.torchlm, ("_drop(x, *_how)", "_drop(x, *_how) * (1 - rate * is_training)")),
    ),
    *both(
        "rate for share: the share that is kept for the one that is dropped",
        MASKS,
        edit(dropout.jaxlm, ("_keeps(key, rate, _shape)", "_keeps(key, 1 - rate, _shape)")),
        edit(dropout.torchlm, ("_drop(x, rate, is_training)", "_drop(x, 1 - rate, is_training)")),
    ),
    *mirrored(
        "no dropout of attention: attention weights are not dropped", SAME, attend, ("drop(_weights)", "_weights")
    ),
    *mirrored(
        "no dropout of the embedding: embedded tokens are not dropped",
        MASKS,
        embedding,
        ("_dropout(_x, self.config.dropout, _how)", "_x"),
    ),
    *mirrored(
        "dropout after the feed-forward: of its output, not of its hidden layer",
        SAME,
        feed_forward,
        ("self.fc2(_dropout(_x, *_how))", "_dropout(self.fc2(_x), *_how)"),
    ),
    *both(
        "masks shared between layers: each layer drops the same",
        MASKS,
        edit(
            transformer.jaxlm,
            ("(self.blocks, _keys)", "(self.blocks, _keys if _keys is None else _keys[jnp.zeros(len(_keys), int)])"),
        ),
        edit(dropout.torchlm, ("return _dropped", "torch.manual_seed(0); return _dropped")),
    ),
    *both(
        "dropout in evaluation: the mode of the model is ignored",
        SAME,
        edit(
            dropout.jaxlm, ("key is None or rate == 0", "rate == 0"), ("_keeps(key, *_how)", f"_keeps({NO_KEY}, *_how)")
        ),
        edit(dropout.torchlm, ("is_training", "True")),
    ),
    *both(
        "same masks in each update: the seed does not depend on the update",
        "masks of updates",
        edit(train_step.jaxlm, ("jax.random.fold_in(key, state.step)", "key")),
        edit(train_step.torchlm, ("hash((key, state.step))", "hash(key)")),
    ),
]
