"""How far apart two computations of the same numbers may be, each bound once, with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """Bounds of what trajectory.compare measures."""

    logits: float  # largest difference over the largest logit
    loss: float  # relative
    gradients: float  # norm of the difference over the norm of the tensor
    gradients_of_key_biases: float  # over the norm of all gradients
    rates: float  # relative
    used_rates: float  # over the highest rate
    losses: float  # relative
    grad_norms: float  # relative
    moments: float  # norm of the difference over the norm of the tensor
    moments_of_key_biases: float  # over the norm of all
    weights: float  # norm of the difference over that of the tensor's whole movement
    key_biases: float  # largest difference over the sum of the rates


FLOAT32 = Tolerances(
    logits=1e-5,
    loss=1e-5,
    gradients=1e-5,
    gradients_of_key_biases=1e-7,
    rates=1e-9,
    used_rates=3e-7,
    losses=1e-5,
    grad_norms=1e-5,
    moments=1e-5,
    moments_of_key_biases=1e-7,
    weights=1e-4,
    key_biases=2.0,
)

FLOAT64 = Tolerances(
    logits=1e-10,
    loss=1e-10,
    gradients=1e-10,
    gradients_of_key_biases=1e-15,
    rates=1e-14,
    used_rates=1e-14,
    losses=1e-10,
    grad_norms=1e-10,
    moments=1e-10,
    moments_of_key_biases=1e-15,
    weights=1e-10,
    key_biases=1e-6,
)

BFLOAT16_FACTOR = 1.25
