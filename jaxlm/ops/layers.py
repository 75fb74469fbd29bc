"""Linear layers with their initialization and adapters, and norms: the parts of blocks and output layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.ops import matmul
from jaxlm.params.names import lora_products


class Linear(nnx.Linear):
    """nnx.Linear on [..., n_in], with the derivatives of matmul.py; its kernel may have an adapter (add_adapters)."""

    lora_scale = 0.0  # lora_alpha / lora_rank; 0: no adapter
    lora_a: nnx.Param
    lora_b: nnx.Param

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        is_rounded = self.preferred_element_type == self.dtype
        bias = None if self.bias is None else self.bias[...]
        y = matmul.linear(x, self.kernel[...], bias, self.dtype, is_rounded=is_rounded)
        if self.lora_scale:
            x_R = matmul.linear(x, self.lora_a[...], None, self.dtype)
            y += self.lora_scale * matmul.linear(x_R, self.lora_b[...], None, self.dtype)
        return checkpoint_name(y.astype(self.preferred_element_type), "product")


def initial_weights(config: ModelConfig, std: float = 0.02) -> nnx.Initializer:
    """Return an initializer: normal(0, std), truncated at 2 std for ModernBERT (arXiv 2412.13663, app. A.2)."""
    if config.initialization == "modernbert":
        return jax.nn.initializers.truncated_normal(std, lower=-2, upper=2)
    return jax.nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Return the initial std of layers that add to the residual stream: 2 L of them add up, so 0.02 / sqrt(2 L)."""
    return 0.02 if config.initialization == "llama" else 0.02 / (2 * config.n_layers) ** 0.5


def linear(
    config: ModelConfig,
    n_in: int,
    n_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    has_bias: bool = True,
    std: float = 0.02,
) -> Linear:
    """Return a linear layer of a block.

    The original's initial weights are Xavier-uniform, and its biases PyTorch's default; the others have
    `initial_weights`, and zero.
    """
    bound = n_in**-0.5 if config.initialization == "original" else 0.0
    xavier = jax.nn.initializers.xavier_uniform()
    return Linear(
        n_in,
        n_out,
        use_bias=has_bias,
        kernel_init=xavier if config.initialization == "original" else initial_weights(config, std),
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        dtype=dtype,
        preferred_element_type=dtype,
        rngs=rngs,
    )


def add_adapters(blocks: Any, config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Add LoRA adapters to stacked blocks (arXiv 2106.09685): kernels become W + alpha / rank A B; B starts at zero."""
    for name in lora_products(config):
        layer = getattr(blocks.attention if hasattr(blocks.attention, name) else blocks.feed_forward, name)
        L, n_in, n_out = layer.kernel.shape
        bound = n_in**-0.5
        lora_a = jax.random.uniform(rngs.params(), (L, n_in, config.lora_rank), minval=-bound, maxval=bound)
        layer.lora_a, layer.lora_b = nnx.Param(lora_a), nnx.Param(jnp.zeros((L, config.lora_rank, n_out)))
        layer.lora_scale = config.lora_alpha / config.lora_rank


def norm(config: ModelConfig, rngs: nnx.Rngs, size: int = 0) -> nnx.LayerNorm | nnx.RMSNorm:
    """Return LayerNorm or RMSNorm (arXiv 1910.07467) of `size` or d_model numbers, in float32."""
    size, epsilon = size or config.d_model, config.norm_epsilon
    if config.norm in ("rmsnorm", "rmsnorm_no_scale"):
        return nnx.RMSNorm(size, epsilon=epsilon, use_scale=config.norm == "rmsnorm", rngs=rngs)
    has_bias = config.norm == "layernorm"
    return nnx.LayerNorm(size, epsilon=epsilon, use_bias=has_bias, use_fast_variance=False, rngs=rngs)
