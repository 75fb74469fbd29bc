"""One update of Muon against PyTorch's own, and what it updates."""

from typing import Any

import pytest
import torch

from jaxlm import config as configs
from jaxlm.config import TrainConfig
from torchlm import optim
from torchlm.tasks import TASKS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_an_update_is_that_of_torch_optim_muon(shape: Any, scale: Any, theirs: str, precision: Any) -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    ours, pytorch = (torch.nn.Parameter(start.clone()) for _ in range(2))
    config = TrainConfig(optimizer="muon", muon_scale=scale, precision=precision)
    own = optim.Muon(config, [{"params": [ours], "weight_decay": 0.3, "is_hidden": True}], lr=0.1)
    other = torch.optim.Muon([pytorch], lr=0.1, weight_decay=0.3, adjust_lr_fn=theirs)
    for x, optimizer in ((ours, own), (pytorch, other)):
        x.grad = gradient.clone()
        optimizer.step()
    want = pytorch.detach() - start
    # PyTorch computes in bfloat16 only: 2^-9 in each of 15 products, which small singular values enlarge.
    assert (ours.detach() - pytorch.detach()).norm() < 0.03 * want.norm()


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    sizes = {"model.vocab_size": 11, "model.d_model": 12, "model.n_heads": 3, "model.seq_len": 5}
    config = configs.build({"task": "gpt", "train.optimizer": "muon", "train.muon_rate": 2.0, **sizes})
    model = TASKS["gpt"](config).build_model(torch.Generator())
    optimizer = optim.make_optimizer(config.train, model)
    hidden = {id(x) for group in optimizer.param_groups if "is_hidden" in group for x in group["params"]}
    for name, x in model.named_parameters():
        assert (id(x) in hidden) == (x.ndim == 2 and name.startswith("base.blocks.")), name
        x.grad = torch.ones_like(x)
    optimizer.step()
    assert {group.get("share", 1) for group in optimizer.param_groups if "is_hidden" in group} == {2.0}
    assert {id(x) for x, state in optimizer.state.items() if "exp_avg_sq" not in state} == hidden
