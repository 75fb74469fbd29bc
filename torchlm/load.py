"""A trained model of any form of file, in PyTorch."""

from pathlib import Path

import torch

from jaxlm.config import Config
from jaxlm.training import resume
from jaxlm.weights import snapshots
from torchlm.checkpoint import model_for


def load_model(path: str | Path) -> tuple[torch.nn.Module, Config]:
    """Return the model of a checkpoint, of any form that jaxlm.convert reads, and its settings.

    A run has that of its best checkpoint.
    """
    found = resume.to_use(path).path
    assert found is not None, "nothing was found"
    snapshot = snapshots.read(found)
    model = model_for(snapshot, str(found))
    model.load_state_dict({name: torch.tensor(x) for name, x in snapshot.weights.items()})
    return model.eval(), snapshot.config
