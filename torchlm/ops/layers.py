"""Linear layers with their initialization and adapters, and norms: the parts of blocks and output layers."""

import torch
from torch import Tensor, nn

from jaxlm.config import ModelConfig
from jaxlm.params.names import lora_products


class Linear(nn.Linear):
    """nn.Linear on [..., n_in]; its weight may have an adapter (add_adapters)."""

    lora_scale = 0.0  # lora_alpha / lora_rank; 0: no adapter
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_scale:
            lora_a, lora_b = self.lora_a, self.lora_b
            y = y + self.lora_scale * nn.functional.linear(nn.functional.linear(x, lora_a), lora_b)
        return y


def initial_weights(x: Tensor, config: ModelConfig, rngs: torch.Generator, std: float = 0.02) -> None:
    """Fill a matrix with normal(0, std), truncated at 2 std for ModernBERT (arXiv 2412.13663, app. A.2)."""
    if config.initialization == "modernbert":
        nn.init.trunc_normal_(x, std=std, a=-2 * std, b=2 * std, generator=rngs)
    else:
        nn.init.normal_(x, std=std, generator=rngs)


def residual_std(config: ModelConfig) -> float:
    """Return the initial std of layers that add to the residual stream: 2 L of them add up, so 0.02 / sqrt(2 L)."""
    return 0.02 if config.initialization == "llama" else 0.02 / (2 * config.n_layers) ** 0.5


def linear(
    config: ModelConfig, n_in: int, n_out: int, rngs: torch.Generator, has_bias: bool = True, std: float = 0.02
) -> Linear:
    """Return a linear layer of a block.

    The original's initial weights are Xavier-uniform, and its biases PyTorch's default; the others have
    `initial_weights`, and zero.
    """
    bound = n_in**-0.5 if config.initialization == "original" else 0.0
    layer: Linear = nn.utils.skip_init(Linear, n_in, n_out, bias=has_bias)
    if config.initialization == "original":
        nn.init.xavier_uniform_(layer.weight, generator=rngs)
    else:
        initial_weights(layer.weight, config, rngs, std)
    if has_bias:
        nn.init.uniform_(layer.bias, -bound, bound, generator=rngs)
    return layer


def add_adapters(blocks: nn.ModuleList, config: ModelConfig, rngs: torch.Generator) -> None:
    """Add LoRA adapters to blocks (arXiv 2106.09685): weights become W + alpha / rank B A; B starts at zero."""
    for block in blocks:
        for name in lora_products(config):
            layer = getattr(block.attention if hasattr(block.attention, name) else block.feed_forward, name)
            lora_a, bound = torch.empty(config.lora_rank, layer.in_features), layer.in_features**-0.5
            layer.lora_a = nn.Parameter(nn.init.uniform_(lora_a, -bound, bound, generator=rngs))
            layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, config.lora_rank))
            layer.lora_scale = config.lora_alpha / config.lora_rank


def norm(config: ModelConfig, size: int = 0) -> nn.LayerNorm | nn.RMSNorm:
    """Return LayerNorm or RMSNorm (arXiv 1910.07467) of `size` or d_model numbers, in float32."""
    size, epsilon = size or config.d_model, config.norm_epsilon
    if config.norm in ("rmsnorm", "rmsnorm_no_scale"):
        return nn.RMSNorm(size, eps=epsilon, elementwise_affine=config.norm == "rmsnorm")
    return nn.LayerNorm(size, eps=epsilon, bias=config.norm == "layernorm")
