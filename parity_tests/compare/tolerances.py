"""How far apart two computations of the same numbers may be: each bound once, with its reason.

The measure is what rounding does to one package: its float32 against its own float64, from the same weights
(`python -m parity_tests.rounding`; the tests check that it still holds). Two packages round differently, so that they
may be twice that far apart. Another size rounds otherwise: a sum of n products is off by about the root of n roundings
of 6e-8, and the sums here have 24 to 128 of them (4,096 in the long inputs). Each bound is therefore 4 to 20 times the
measure, unless another reason is given.

Training can blow up rounding: after fifty updates that learn fast, the norm of a gradient may be off by 1e-4, in one
package alone. And a loss of 1e-5 is the logarithm of a sum near 1, so that it is off by up to 1e-2. A replay therefore
samples torchlm's own rounding in its very case, and where eight times that is more than a bound of gradients or of what
updates make, it is the bound (rounding.bounds). In none of the recorded cases it is.
"""

from dataclasses import dataclass
from typing import Any

Bound = Any  # a float, or an array with one for each update


@dataclass(frozen=True)
class Tolerances:
    """Bounds of what trajectory.compare measures."""

    logits: float  # largest difference over the largest logit
    loss: float  # relative
    gradients: float  # norm of the difference over the norm of the tensor
    gradients_of_key_biases: float  # over the norm of all gradients
    rates: float  # relative
    used_rates: float  # over the highest rate
    losses: Bound  # of all updates, relative
    grad_norms: Bound  # of all updates, relative
    moments: float  # norm of the difference over the norm of the tensor
    moments_of_key_biases: float  # over the norm of all
    weights: float  # norm of the difference over that of the tensor's whole movement
    key_biases: float  # largest difference over the sum of the rates
    eval_loss: float  # relative


# The worst of both packages, of all recorded cases and of long inputs (checks.py); 24 November 2026, on a CPU, with jax
# 0.10.2 and torch 2.13.0.
ROUNDING = Tolerances(
    logits=2.2e-6,  # 4,096 positions; recorded cases 3.3e-7
    loss=1.3e-7,
    gradients=1.5e-6,  # 4,096 positions; recorded cases 7.5e-7
    gradients_of_key_biases=8.9e-9,  # 4,096 positions; recorded cases 8.5e-10
    rates=0.0,
    used_rates=1.2e-7,
    losses=3.0e-7,
    grad_norms=5.9e-7,
    moments=7.4e-7,
    moments_of_key_biases=1.1e-9,
    weights=5.2e-5,
    key_biases=2.1e-2,
    eval_loss=1.3e-7,
)

FLOAT32 = Tolerances(
    logits=1e-5,
    loss=2e-6,
    gradients=1e-5,
    # Without rounding it is zero, since a bias of the keys shifts all scores of a query alike. What is left is the
    # rounding of a sum over all queries.
    gradients_of_key_biases=1e-7,
    # Both packages say what a rate is in float64, and differ from the record in the order of a few operations.
    rates=1e-9,
    # jaxlm's update has it in float32: a cosine and three operations, each off by 6e-8 of the highest rate.
    used_rates=4e-7,
    losses=5e-6,
    grad_norms=1e-5,
    moments=1e-5,
    moments_of_key_biases=1e-7,
    # Adam divides a gradient by its own size, so that an element whose gradient is as small as the rounding of its
    # tensor's, a share d of that norm, makes steps that are all noise. A share of about d of all elements is as small:
    # the norm is off by up to the root of d = 7.5e-7, which is 9e-4.
    weights=1e-3,
    # All noise. A step is about the rate at most, and two may have opposite directions.
    key_biases=2.0,
    eval_loss=2e-6,
)

# Nothing but the mathematics is left: two packages are 1e-14 apart over 200 updates (weights; losses 5e-16).
FLOAT64 = Tolerances(
    logits=1e-12,
    loss=1e-12,
    gradients=1e-12,
    gradients_of_key_biases=1e-15,
    rates=1e-13,
    used_rates=1e-13,
    losses=1e-12,
    grad_norms=1e-12,
    moments=1e-11,
    moments_of_key_biases=1e-15,
    # As above, but Adam's epsilon of 1e-8 holds the steps of elements below it: 1e-16 over 1e-8, of a small share.
    weights=1e-10,
    # A gradient of 1e-16 over that epsilon makes steps of 1e-8 of the rate.
    key_biases=1e-8,
    eval_loss=1e-12,
)

# Of products, in the recorded cases: the bounds hold for sums up to it.
LONGEST_SUM = 128

# jaxlm's drift in bfloat16 over that of torch.autocast.
BFLOAT16_FACTOR = 1.25

# A slope by finite differences over the norm of the gradient: the loss, off by 2e-16 of itself, over a way of 1e-3.
SLOPE = 1e-11

# A share of dropout, in standard deviations of its binomial distribution: by chance 1 in 2 million is farther off.
DEVIATIONS = 5.0
