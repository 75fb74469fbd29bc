"""Faults of training a part of a model: rates by layer, frozen layers, adapters."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import adamw, add_adapters, is_decayed, layer_shares, trained, transformer_start

DECAY, LORA = "frozen layers and layer decay", "LoRA"
TRAINED = "_x[max(_first - _n, 0):] if _first else _x"
ALL_TRAINED = (
    edit(trained, ("(_first := _block) is not None", "(_first := _block or 0) is not None")),
    edit(transformer_start.torchlm, ("_x.requires_grad_(_is_trained)", "_x.requires_grad_(True)")),
)

FAULTS = [
    *both(
        "layer decay upside down: the lowest block has the highest rate",
        DECAY,
        edit(layer_shares.jaxlm, ("range(len(_x), 0, -1)", "range(1, len(_x) + 1)")),
        edit(layer_shares.torchlm, ("_n_layers - int(_i)", "1 + int(_i)")),
    ),
    *both(
        "layer decay from the head: the top block has the rate of the head",
        DECAY,
        edit(layer_shares.jaxlm, ("range(len(_x), 0, -1)", "range(len(_x) - 1, -1, -1)")),
        edit(layer_shares.torchlm, ("_n_layers - int(_i)", "_n_layers - 1 - int(_i)")),
    ),
    *both(
        "layer decay not of decay: the weight decay has the whole rate in all layers",
        DECAY,
        edit(adamw.jaxlm, ("optax.chain(_adam, _decay, _layers, _rate)", "optax.chain(_adam, _layers, _decay, _rate)")),
        edit(
            adamw.torchlm,
            (
                "_group | {'share': _share}",
                "_group | {'share': _share, 'weight_decay': _group['weight_decay'] / _share}",
            ),
        ),
    ),
    *both(
        "frozen weights decayed: frozen layers have no gradient, but moments and decay",
        DECAY,
        edit(trained, (TRAINED, "_x")),
        None,
    ),
    *both("frozen weights trained: what is frozen is trained as all else is", DECAY, *ALL_TRAINED),
    *mirrored(
        "LoRA without its scale: adapters are not scaled by alpha / rank",
        LORA,
        add_adapters,
        ("config.lora_alpha / config.lora_rank", "1.0"),
    ),
    *mirrored(
        "LoRA scaled by the root: alpha / sqrt(rank), as rsLoRA has it",
        LORA,
        add_adapters,
        ("config.lora_alpha / config.lora_rank", "config.lora_alpha / config.lora_rank**0.5"),
    ),
    *both("LoRA beside the base: the base is trained with its adapters", LORA, *ALL_TRAINED),
    *both(
        "adapters spared from decay: adapters have no weight decay",
        LORA,
        edit(is_decayed.jaxlm, ("{'lora_a': -1, 'lora_b': -1, **_rest}", "{**_rest}")),
        edit(is_decayed.torchlm, ("_x.ndim > 1", "min(_x.shape) > 2")),
    ),
]
