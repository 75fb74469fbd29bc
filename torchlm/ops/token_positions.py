"""Rotary positions of queries and keys, and positions that start at 0 in each document of a row.

Letters as in model.py; the tables are in jaxlm/ops/position_tables.py.
"""

import numpy as np
import torch
from torch import Tensor, nn


def rotate(x_BTHK: Tensor, frequency_K: np.ndarray, positions_BT: Tensor | None = None) -> Tensor:
    """Rotate each pair of columns (k, k + K/2) by position * frequency radians (RoFormer, arXiv 2104.09864, eq. 34).

    Positions are 0 to T - 1, or `positions_BT`.
    """
    angle_TK = np.arange(x_BTHK.shape[1])[:, None] * frequency_K
    cos, sin = (torch.tensor(f(angle_TK)[None, :, None, :], dtype=torch.float32) for f in (np.cos, np.sin))
    cos, sin = cos.to(x_BTHK.device), sin.to(x_BTHK.device)
    if positions_BT is not None:
        cos, sin = cos[0][positions_BT], sin[0][positions_BT]
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def document_positions(segments_BT: Tensor) -> Tensor:
    """Return the index of each position in its document, int [B, T]."""
    index_BT = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand(segments_BT.shape)
    is_first_BT = segments_BT != nn.functional.pad(segments_BT, (1, 0), value=-1)[:, :-1]
    return index_BT - torch.where(is_first_BT, index_BT, 0).cummax(dim=1).values
