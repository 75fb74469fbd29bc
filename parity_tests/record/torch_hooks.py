"""Records what a PyTorch model and its optimizer compute, by hooks; the training loop stays as it is."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from jaxlm.errors import UserError
from parity_tests.record import sketch
from parity_tests.record.files import Record, sketched
from parity_tests.record.recorder import WHOLE, Recorder


class TorchRecorder(Recorder):
    """Records a module: inputs, each output, loss, gradients, parameters, moments, rates and settings.

    The loss is what `backward` is called on, unless `loss` hands it over. An update ends with the optimizer's step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        path: Path | str | None = None,
        whole: int = WHOLE,
        masks: Record | None = None,
    ):
        super().__init__(f"torch {torch.__version__}", path, whole)
        self.masks = masks
        self.n_dropped: dict[int, int] = {}
        self.model, self.optimizer = model, optimizer
        self.names = {x: name for name, x in model.named_parameters()}
        self.seen: dict[int, tuple[weakref.ref, int, int]] = {}
        self.handles: list[Any] = []
        self.losses: list[Tensor] = []
        self.is_loss_given = False

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True),
            ]
        if self.optimizer:
            self.watch(self.optimizer)
        self._parameters()
        self.dropout = nn.functional.dropout
        if self.masks:
            nn.functional.dropout = self._dropped  # type: ignore[assignment]
        self.backward = torch.Tensor.backward
        torch.Tensor.backward = self._backward()  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.backward = self.backward  # type: ignore[method-assign]
        nn.functional.dropout = self.dropout
        for handle in self.handles:
            handle.remove()
        if self.losses and not self.is_loss_given:
            self._losses()
            self._gradients()
        super().__exit__()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Record an optimizer that is made inside the `with` block."""
        self.optimizer = optimizer
        n_open = 0  # steps: that of a subclass calls its parent's, which PyTorch gives the same hooks

        def before(*_: Any) -> None:
            nonlocal n_open
            n_open += 1
            if n_open == 1:
                self._gradients()

        def after(*_: Any) -> None:
            nonlocal n_open
            n_open -= 1
            if not n_open:
                self._step()

        self.handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def loss(self, value: Any) -> None:
        """Add the loss of this update, where it is not what `backward` is called on."""
        self.is_loss_given = True
        self.add("loss", "loss", value)

    def tag(self, name: str, x: Tensor) -> Tensor:
        """Add what is no module's output; return it."""
        self._output("activation", name, x)
        return x

    def _dropped(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Be torch.nn.functional.dropout, with the next mask of this update."""
        assert self.masks
        if not training or p == 0:
            return x
        masks = [e for e in self.masks.all("mask") if e.update == self.update]
        i = self.n_dropped[self.update] = self.n_dropped.get(self.update, -1) + 1
        if i >= len(masks):
            raise UserError(
                f"{self.masks.path}: update {self.update} has {len(masks)} masks; this model drops more often"
            )
        kept = torch.from_numpy(masks[i].array().astype(bool)).to(x.device)
        try:
            return torch.where(kept, x / (1 - p), torch.zeros_like(x))
        except RuntimeError as error:
            shapes = f"{list(kept.shape)}, and mask {i} of update {self.update} is for {list(x.shape)} here"
            raise UserError(f"{self.masks.path}: a mask has the shape {shapes}") from error

    def stored(self, x: Any) -> dict[str, Any]:
        if not isinstance(x, Tensor):
            return super().stored(x)
        x = x.detach()
        if hasattr(x, "full_tensor"):  # a DTensor, whose processes have to ask for it together
            x = x.full_tensor()
        shape, name = tuple(x.shape), str(x.dtype).removeprefix("torch.")
        if not sketched(x, self.whole):
            return self.writer.array(_numpy(x), name)
        wide = x.double() if x.is_floating_point() and x.device.type == "cpu" else x.float()
        sums = sketch.projections(wide, torch.einsum, lambda signs: torch.from_numpy(signs).to(wide))
        for axis, places in enumerate(sketch.axes(shape)):
            x = x.index_select(axis, torch.from_numpy(places).to(x.device))
        written = self.writer.array(_numpy(x), name, shape)
        norm = float(torch.linalg.vector_norm(wide))
        return written | {"sketch": sketch.line(shape, np.array([norm, *sums.tolist()]))}

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name == "":
                self.seen.clear()
            for key, x in _tensors((args, kwargs)):
                if name == "" or x.is_floating_point():
                    self._output("input", name + key, x)

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for key, x in _tensors(output):
                if x.is_floating_point():
                    self._output("activation", name + key, x, info=_info(module))

        return hook

    def _output(self, kind: str, name: str, x: Tensor, **line: Any) -> None:
        same = self._number(x)
        number = (
            self.writer.add(self.update, kind, name, same=same, **line)
            if same is not None
            else self.add(kind, name, x, **line)
        )
        self.seen[id(x)] = weakref.ref(x), number if same is None else same, x._version

    def _number(self, x: Tensor) -> int | None:
        """Return which line has this tensor."""
        known = self.seen.get(id(x))
        return known[1] if known and known[0]() is x and known[2] == x._version else None

    def _backward(self) -> Any:
        recorder, backward = self, self.backward

        def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            recorder.losses.append(tensor.detach())
            return backward(tensor, *args, **kwargs)

        return recorded

    def _losses(self) -> None:
        for x in self.losses if not self.is_loss_given else []:
            self.add("loss", "loss", x)
        self.losses, self.is_loss_given = [], False

    def _gradients(self) -> None:
        self._losses()
        for x, name in self.names.items():
            if x.grad is not None:
                self.add("gradient", name, x.grad)
        for i, group in enumerate(self.optimizer.param_groups if self.optimizer else []):
            names = [self.names[x] for x in group["params"] if x in self.names]
            settings = {key: float(x) if isinstance(x, Tensor) else x for key, x in group.items() if key != "params"}
            kept = {key: x for key, x in settings.items() if isinstance(x, int | float | str | tuple | None)}
            info = {"class": type(self.optimizer).__name__, "parameters": names, **kept}
            self.writer.add(self.update, "setting", f"group {i}", info=info)
            self.add("rate", f"group {i}", np.float64(settings.get("lr", np.nan)))

    def _step(self) -> None:
        assert self.optimizer
        for x, name in self.names.items():
            for slot, value in self.optimizer.state.get(x, {}).items():
                if isinstance(value, Tensor):
                    self.add("moment", f"{slot}/{name}", value)
        self.update += 1
        self.seen.clear()
        self._parameters()

    def _parameters(self) -> None:
        for x, name in self.names.items():
            self.add("parameter", name, x)
        if self.update == 0:
            for name, buffer in self.model.named_buffers():
                self.writer.add(0, "setting", f"buffer {name}", info={"shape": list(buffer.shape)})


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in arguments or results: the first without a name, others with #, number and name."""
    leaves = list(_leaves(value))
    for i, x in enumerate(leaves):
        yield f"#{i}" if i else "", x


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):  # transformers' outputs are, too
        for x in value.values():
            yield from _leaves(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _leaves(x)


def _info(module: nn.Module) -> dict[str, Any]:
    """Return what tells what a module does: its class, its mode and its numbers."""
    numbers = {key: x for key, x in vars(module).items() if isinstance(x, int | float | str) and key[:1] != "_"}
    return {"class": type(module).__name__, **numbers}


def _numpy(x: Tensor) -> np.ndarray:
    x = x.contiguous().cpu()
    return (x.view(torch.int16).numpy().view(np.uint16)) if x.dtype == torch.bfloat16 else x.numpy()
