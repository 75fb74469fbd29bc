"""Faults of Muon: its scale, momentum, polynomials, and what it updates."""

from parity_tests.faults.planting import Fault, both, edit, mirrored
from parity_tests.faults.targets import adamw, apart, muon_step, orthogonal, rate_shares

MUON, LAYERS = "Muon of NumPy", "Muon of layers"
AHEAD = "(1 - _beta) * _grad + _beta * _momentum"
HIDDEN = "{{_path: _x for _path, _x in _leaves if {}}}"
ITERATIONS = "for _a, _b, _c in _all[coefficients]{}: *_rest"
CORRECTED = "(1 - _beta) * {grad} / (1 - _beta**{count}) + _beta * _momentum / (1 - _beta ** ({count} + 1))"
TORCH_AHEAD = "(1 - _beta) * _x.grad + _beta * _momentum"


def scaled(title: str, n_in_n_out: str) -> list[Fault]:
    """Return a fault that has another scale, an expression of n_in and n_out."""
    jax, torch = (f"(lambda n_in, n_out: {n_in_n_out})({sizes})" for sizes in ("*_grad.shape[-2:]", "*_x.shape[::-1]"))
    return both(
        title,
        MUON,
        edit(muon_step.jaxlm, ("_scale(_kind, *_grad.shape[-2:])", jax)),
        edit(muon_step.torchlm, ("_scale(_kind, _x.shape[1], _x.shape[0])", torch)),
    )


FAULTS = [
    *scaled("spectral scale upside down: sqrt(n_in / n_out)", "max(1, n_in / n_out) ** 0.5"),
    *scaled("no factor of 0.2: updates five times as large as AdamW's", "max(n_in, n_out) ** 0.5"),
    *scaled("scale by the smaller side: sqrt(min(n_in, n_out))", "0.2 * min(n_in, n_out) ** 0.5"),
    *scaled("Muon unscaled: the update is as orthogonal as it comes", "1"),
    *both(
        "scale of the transposed: n_in and n_out are taken for each other",
        MUON,
        edit(muon_step.jaxlm, ("_scale(_kind, *_grad.shape[-2:])", "_scale(_kind, *_grad.shape[:-3:-1])")),
        edit(
            muon_step.torchlm,
            ("_scale(_kind, _x.shape[1], _x.shape[0])", "_scale(_kind, _x.shape[0], _x.shape[1])"),
        ),
    ),
    *both(
        "momentum without Nesterov: the mean gradient, not a look ahead",
        MUON,
        edit(muon_step.jaxlm, (AHEAD, "_momentum")),
        edit(muon_step.torchlm, (TORCH_AHEAD, "_momentum")),
    ),
    *both(
        "momentum of a sum: gradients are added whole, and then mixed as if they were a mean",
        MUON,
        edit(muon_step.jaxlm, (AHEAD, "(1 - _beta) * _grad + _beta * _momentum / (1 - _beta)")),
        edit(muon_step.torchlm, (TORCH_AHEAD, "(1 - _beta) * _x.grad + _beta * _momentum / (1 - _beta)")),
    ),
    *both(
        "bias correction: momentum and gradient by different counts, as optax.contrib.muon has it",
        MUON,
        edit(
            muon_step.jaxlm,
            ("optax.ScaleByAdamState(_state.count, _first, _state.nu)",) * 2,
            (AHEAD, CORRECTED.format(grad="_grad", count="_state.count")),
        ),
        edit(
            muon_step.torchlm,
            ("_n += 1", "_n += 1"),
            (TORCH_AHEAD, CORRECTED.format(grad="_x.grad", count="_n")),
        ),
    ),
    *both(
        "momentum of AdamW: beta1 in place of Muon's momentum",
        MUON,
        edit(muon_step.jaxlm, ("config.muon_momentum", "config.beta1")),
        edit(muon_step.torchlm, ("self.config.muon_momentum", "self.config.beta1")),
    ),
    *mirrored(
        "four iterations: the last polynomial is left out",
        MUON,
        orthogonal,
        (ITERATIONS.format(""), ITERATIONS.format("[:-1]")),
    ),
    *both(
        "no fifth order: the polynomial ends with its cube",
        MUON,
        edit(orthogonal.jaxlm, ("_b * _gram + _c * _square", "_b * _gram")),
        edit(orthogonal.torchlm, ("torch.addmm(_gram, _gram, _gram, beta=_b, alpha=_c)", "_b * _gram")),
    ),
    *mirrored(
        "one polynomial for all: Polar Express repeats its first",
        MUON,
        orthogonal,
        (ITERATIONS.format(""), ITERATIONS.format("[:1] * 5")),
    ),
    *mirrored(
        "no margin: Polar Express starts from a norm of 1",
        MUON,
        orthogonal,
        ("_norm * _margins[coefficients]", "_norm"),
    ),
    *both(
        "layers as one matrix: all layers are divided by one norm",
        MUON,
        edit(orthogonal.jaxlm, ("jnp.sum(_square, axis=(-2, -1), keepdims=True)", "jnp.sum(_square, keepdims=True)")),
        None,
    ),
    *both(
        "Muon on the output layer: all kernels are taken for hidden ones",
        MUON,
        edit(apart, (HIDDEN.format("_is_hidden(_path)"), HIDDEN.format("_path[-1] == 'kernel'"))),
        edit(
            adamw.torchlm,
            ("_updates(config, _name)", "(_updates(config, _name) or _name == 'head.linear.weight')"),
        ),
    ),
    *both(
        "Muon on the embedding: tables are taken for hidden matrices",
        MUON,
        edit(
            apart, (HIDDEN.format("_is_hidden(_path)"), HIDDEN.format("_is_hidden(_path) or _path[-1] == 'embedding'"))
        ),
        edit(adamw.torchlm, ("_updates(config, _name)", "(_updates(config, _name) or '.token.' in _name)")),
    ),
    *both(
        "decay before Muon: the decay is made orthogonal with the gradient",
        MUON,
        edit(adamw.jaxlm, ("optax.chain(_muon, _decay, *_rest)", "optax.chain(_decay, _muon, *_rest)")),
        edit(
            muon_step.torchlm,
            ("_group['lr'] * _group['weight_decay']", "0 * _group['weight_decay']"),
            (TORCH_AHEAD, "(1 - _beta) * _x.grad + _beta * _momentum + _group['weight_decay'] * _x"),
        ),
    ),
    *both(
        "decay by the scale: the decay has the update's scale, too",
        MUON,
        edit(
            muon_step.jaxlm,
            ("_scale(_kind, *_grad.shape[-2:]) * _step", "_scale(_kind, *_grad.shape[-2:])**2 * _step"),
        ),
        edit(
            muon_step.torchlm,
            (
                "_x.mul_(1 - _group['lr'] * _group['weight_decay'])",
                "_x.mul_(1 - _group['lr'] * _group['weight_decay'] * 0.2 * max(_x.shape) ** 0.5)",
            ),
        ),
    ),
    *mirrored(
        "no rate of its own: Muon's matrices have the rate of all else", MUON, rate_shares, ("_share * _rate", "_share")
    ),
    *both(
        "layer decay not of Muon: the matrices of all layers have the whole rate",
        LAYERS,
        edit(rate_shares.jaxlm, ("_share * config.muon_rate", "np.ones_like(_share) * config.muon_rate")),
        edit(rate_shares.torchlm, ("_share * _rate", "_rate")),
    ),
]
