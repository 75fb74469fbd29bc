"""Tables of positions, in NumPy: constants of a program. Both packages use them; neither framework is imported here.

Letters as in model.py.
"""

import numpy as np

from jaxlm.config import ModelConfig


def fixed_positions(seq_len: int, d_model: int) -> np.ndarray:
    """Return the original's position table, float32 [T, D].

    The exponent uses the column number itself, so it runs twice as fast as in "Attention Is All You Need" (3.5).
    """
    column = np.arange(d_model)
    angle_TD = np.arange(seq_len)[:, None] / 10000.0 ** (2 * column / d_model)
    return np.where(column % 2 == 0, np.sin(angle_TD), np.cos(angle_TD)).astype(np.float32)


def frequencies(config: ModelConfig, is_local: bool) -> np.ndarray:
    """Return by how much each pair of a head turns from one position to the next, base^(-2k/K), [K/2].

    With `rotary_scaling`, pairs that turn less than once in `rotary_scaling_len` positions turn so much slower, those
    that turn 4 times or more as before, and those between in proportion (Llama 3.1's rope_scaling).
    """
    K, base = config.head_size, is_local and config.rotary_base_local or config.rotary_base
    frequency_K = base ** (-np.arange(0, K, 2) / K)
    if config.rotary_scaling == 1:
        return frequency_K
    n_turns_K = config.rotary_scaling_len * frequency_K / (2 * np.pi)
    share_K = np.clip((n_turns_K - 1) / (4 - 1), 0, 1)
    return frequency_K * (share_K + (1 - share_K) / config.rotary_scaling)
