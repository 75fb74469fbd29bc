"""Position tables in NumPy, which compile to constants. Both packages use them; this file imports neither framework.

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
    """Return the rotary frequencies base^(-2k/K), in radians per position, [K/2].

    `rotary_scaling` divides the frequencies of pairs that turn less than once in `rotary_scaling_len` positions. Pairs
    that turn 4 times or more keep theirs; those between are interpolated (Llama 3.1's rope_scaling).
    """
    K, base = config.head_size, is_local and config.rotary_base_local or config.rotary_base
    frequency_K = base ** (-np.arange(0, K, 2) / K)
    if config.rotary_scaling == 1:
        return frequency_K
    n_turns_K = config.rotary_scaling_len * frequency_K / (2 * np.pi)
    share_K = np.clip((n_turns_K - 1) / (4 - 1), 0, 1)
    return frequency_K * (share_K + (1 - share_K) / config.rotary_scaling)
