"""How attention may be computed: the settings in which ports of it differ."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Attention:
    """How attention is computed from queries, keys and values [B, T, D]."""

    heads: int
    layout: str = "contiguous"
    rotary: str = "none"
    scale: str = "root of the head size"
    future: int | None = None  # how many positions ahead are seen; None: all
    pad: int | None = None
    masks: str = "keys"
    axis: int = -1
    merged: bool = True
    is_swapped: bool = False
    base: float = 10_000.0

    def compute(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, tokens: np.ndarray | None) -> np.ndarray | None:
        B, T, D = q.shape
        H, K = self.heads, D // self.heads
        if D % H or k.shape[-1] % K or v.shape[-1] % K or (self.rotary != "none" and K % 2):
            return None
        if self.is_swapped:
            q, k = k, q
        q, k, v = (self._split(x, K) for x in (q, k, v))
        if self.rotary != "none":
            q, k = self._turned(q), self._turned(k)
        n = q.shape[2] // k.shape[2] if k.shape[2] else 0
        if n > 1:
            k, v = np.repeat(k, n, axis=2), np.repeat(v, n, axis=2)
        divisor = {"root of the head size": K**0.5, "1": 1.0, "root of the width": D**0.5, "the head size": float(K)}
        scores = np.einsum("bthk,bshk->bhts", q, k) / divisor[self.scale]
        if self.pad is not None and tokens is not None:
            is_pad = tokens == self.pad
            mask = is_pad[:, None, None, :] if self.masks == "keys" else is_pad[:, None, :, None]
            scores = np.where(mask, -1e9, scores)
        if self.future is not None:
            scores = np.where(np.triu(np.ones((T, T), bool), k=1 + self.future), -np.inf, scores)
        scores = scores - scores.max(self.axis, keepdims=True)
        weights = np.exp(scores)
        weights /= weights.sum(self.axis, keepdims=True)
        mixed = np.einsum("bhts,bshk->bthk", weights, v)
        return (mixed if self.merged else mixed.swapaxes(1, 2)).reshape(B, T, D)

    def _split(self, x: np.ndarray, K: int) -> np.ndarray:
        B, T, D = x.shape
        return x.reshape(B, T, D // K, K) if self.layout == "contiguous" else x.reshape(B, T, K, D // K).swapaxes(2, 3)

    def _turned(self, x: np.ndarray) -> np.ndarray:
        T, K = x.shape[1], x.shape[3]
        start = 1 if "from 1" in self.rotary else 0
        power = np.arange(0, K, 2) / K * (0.5 if "half the exponent" in self.rotary else 1.0)
        angle = (start + np.arange(T))[:, None] * self.base**-power
        cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
        if "opposite" in self.rotary:
            sin = -sin
        if "interleaved" in self.rotary:
            one, two = x[..., ::2], x[..., 1::2]
            if "apart" not in self.rotary:
                turned = np.stack([one * cos - two * sin, two * cos + one * sin], axis=-1)
                return turned.reshape(x.shape)
        else:
            one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    def text(self) -> str:
        seen = (
            "all positions"
            if self.future is None
            else "positions up to its own" + f" and {self.future} more" * bool(self.future)
        )
        parts = [f"attends to {seen}, {self.heads} heads, scores over {self.scale}"]
        parts += (
            [f"masks {'keys' if self.masks == 'keys' else 'queries'} of pads"]
            if self.pad is not None
            else ["masks no pads"]
        )
        parts += [f"rotary positions in {self.rotary}, base {self.base:g}"] if self.rotary != "none" else []
        parts += ["softmax over queries"] if self.axis == -2 else []
        parts += ["query and key swapped"] if self.is_swapped else []
        parts += [f"{self.layout} heads"] if self.layout != "contiguous" else []
        parts += ["heads not swapped back"] if not self.merged else []
        return ", ".join(parts)


ATTENTION_KINDS = {
    "heads": "head layout",
    "layout": "head layout",
    "merged": "head layout",
    "scale": "attention scale",
    "future": "attention mask",
    "pad": "attention mask",
    "masks": "attention mask",
    "axis": "softmax axis",
    "is_swapped": "query and key swapped",
    "rotary": "rotary layout",
    "base": "rotary frequencies",
}
