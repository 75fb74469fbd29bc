"""Model flops of an update: the matmuls of the model, and nothing else.

As in PaLM (arXiv 2204.02311, appendix B), but with a model's own width, and logits only at the positions that have
them: what is recomputed to save memory does not count, and attention counts whole, also where it is causal.
"""

from jaxlm.config import GATED, Config
from jaxlm.data.samples import most_texts
from jaxlm.params import names
from jaxlm.tasks import parameters


def forward_flops(config: Config, seq_len: int = 0) -> int:
    """Return the flops of one sample's logits; those of an addition and a multiplication are two.

    `seq_len` is the length of the sample; 0: model.seq_len.
    """
    layers, pairs, adapters, output = _products(config, seq_len)
    return config.model.n_layers * (layers + adapters) + sum(pairs) + output


def n_logits(config: Config, seq_len: int = 0) -> tuple[int, int]:
    """Return how many positions of a sample have logits, and how many outputs each of them has."""
    model, data = config.model, config.data
    seq_len = seq_len or model.seq_len
    kind = parameters.model_kind(config.task)
    if kind == "classifier":
        classes = model.vocab_size if model.head_outputs == "vocabulary" else parameters.n_outputs(config)
        own = {} if config.task in parameters.BUILT_IN else parameters.shapes(config)
        n_texts = most_texts(seq_len) if data.pack == "documents" else 1
        return n_texts, own.get("head.linear.weight", (classes,))[0]
    if kind == "embedder":
        return 0, 0
    if kind == "tagger":  # as if each token began a word
        return seq_len, data.n_classes
    return seq_len if kind == "causal" else max(1, int(data.mask_fraction * seq_len)), model.vocab_size


def flops_per_sample(config: Config, seq_len: int = 0) -> int:
    """Return the model flops of a sample's part in an update: the gradients of a product are two more products.

    A frozen weight has no gradient, and below the lowest parameter that is trained there is none at all.
    """
    model = config.model
    layers, pairs, adapters, output = _products(config, seq_len)
    n, kind = model.frozen_layers, parameters.model_kind(config.task)
    is_embedding_frozen = model.frozen_embedding or model.lora_rank > 0
    is_trained_below = n < model.n_layers or not is_embedding_frozen or model.final_norm or kind == "masked"
    frozen = n * (layers + adapters) + sum(pairs[:n]) if is_embedding_frozen else n * 2 * layers + 3 * sum(pairs[:n])
    upper = (model.n_layers - n) * ((2 if model.lora_rank else 3) * layers + 3 * adapters) + 3 * sum(pairs[n:])
    is_output_trained = not (model.tied_embedding and is_embedding_frozen and kind not in ("classifier", "tagger"))
    passes = 1 + is_trained_below + is_output_trained
    return frozen + upper + passes * output


def flops_per_update(config: Config) -> int:
    """Return the model flops of an update over all devices; with train.cycle_steps, of one with train.accumulate."""
    return flops_per_sample(config) * config.train.batch_size * config.train.accumulate


def _products(config: Config, seq_len: int) -> tuple[int, list[int], int, int]:
    """Return the flops of a sample in a block's linear layers, between positions, in adapters, and in the output.

    Those between positions are of each block.
    """
    model = config.model
    T, D, F = seq_len or model.seq_len, model.d_model, model.n_hidden
    n_texts = 2 if parameters.model_kind(config.task) == "embedder" else 1
    positions, outputs = n_logits(config, T)
    HK, GK = model.n_heads * model.head_size, model.kv_heads * model.head_size
    widths = {"query": (D, HK), "key": (D, GK), "value": (D, GK), "output": (HK, D), "fc1": (D, F), "fc2": (F, D)}
    widths |= {"up": (D, F)} if model.mlp in GATED else {}
    layers = n_texts * 2 * T * sum(n_in * n_out for n_in, n_out in widths.values())
    is_causal = parameters.model_kind(config.task) == "causal" or model.pooling == "last"
    # Scores of pairs of positions, and the sums they weight.
    pairs = [n_texts * 2 * 2 * _n_pairs(T, model.window_of(i), is_causal) * HK for i in range(model.n_layers)]
    ends = sum(sum(widths[name]) for name in names.lora_products(model))
    head = names.head_layers(model, parameters.model_kind(config.task))
    dense = sum(n_in * n_out for name, (n_in, n_out) in head.items() if name != "layernorm")
    if model.pooling == "late" and parameters.model_kind(config.task) == "classifier":
        positions = T
    return layers, pairs, n_texts * 2 * T * model.lora_rank * ends, 2 * positions * (dense + D * outputs)


def _n_pairs(T: int, window: int, is_causal: bool) -> int:
    """Return how many pairs of positions attend: all, or those within the window."""
    if not window or window >= T:
        return T * T
    one_side = T * window - window * (window + 1) // 2
    return T + one_side * (1 if is_causal else 2)
