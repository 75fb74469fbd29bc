"""jaxlm and torchlm behind one interface: NumPy in, NumPy out, and the names of torchlm's state dict.

All that computes is the packages' own: models, tasks, schedules, optimizers and update steps. Nothing is kept between
two objects, so that a change of a package shows in the next one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from jaxlm import distill as jax_distill
from jaxlm import optim as jax_optim
from jaxlm import parallel as jax_parallel
from jaxlm import schedule as jax_schedule
from jaxlm import step as jax_step
from jaxlm import tasks as jax_tasks
from jaxlm.config import Config
from jaxlm.params import frozen as jax_tune
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.training.teacher import Teacher
from parity_tests.plan import Batch
from torchlm import distill as torch_distill
from torchlm import optim as torch_optim
from torchlm import parallel as torch_parallel
from torchlm import schedule as torch_schedule
from torchlm import step as torch_step
from torchlm import tasks as torch_tasks

# GPUs and TPUs round the operands of float32 products otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

Rate = Callable[[Any], Any]
Scalars = dict[str, np.ndarray]
Precision = Literal["float64", "float32", "bfloat16"]


def mean_of_each(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a task's loss with each batch as one unit, so that accumulated batches weigh the same: the original's way.

    Both packages count over all that is accumulated instead, so that a batch with few labels weighs less.
    """

    def mean(*args: Any) -> Any:
        totals = loss(*args)
        count = totals["count"]
        return {"loss": totals["loss"] / count, "count": count // count}

    return mean


class Jaxlm:
    """A training state of jaxlm."""

    name: ClassVar[str] = "jaxlm"
    schedule: ClassVar[Any] = jax_schedule

    def __init__(self, config: Config, weights: Arrays, precision: Precision, seed: int = 0):
        self.config, self.is_double = config, precision == "float64"
        self.task: Any = jax_tasks.TASKS[config.task](config)
        self.task.dtype = {"float64": jnp.float64, "float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]
        self.key = jax.random.key(seed)
        with self._precision():
            self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self.task.build_model(nnx.Rngs(0))))
            self.evaluate = jax.jit(self._evaluate)
        self.set_weights(weights)

    def set_weights(self, weights: Arrays) -> None:
        """Set all weights."""
        with self._precision():
            dtype = jnp.float64 if self.is_double else jnp.float32
            self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), names.to_jax(weights))

    def start(self, rate: Rate, is_mean_of_means: bool = False, teacher: Teacher | None = None) -> None:
        """Make ready for the first update."""
        loss = self._taught(teacher) if teacher else self._loss
        self.loss = mean_of_each(loss) if is_mean_of_means else loss
        self.set_rate(rate)
        with self._precision():
            self.state = jax_step.init_state(self.params, self.optimizer, self.config.model)

    def set_rate(self, rate: Rate) -> None:
        """Let the rate of further updates be another function of their numbers."""
        self.rate = rate
        model, clip_norm = self.config.model, self.config.train.clip_norm
        self.optimizer = jax_optim.make_optimizer(self.config.train, rate, model.n_layers)
        step = functools.partial(
            jax_step.train_step, jax_step.Rule(self.optimizer, rate, clip_norm, model=model), self.loss
        )
        self.step = jax.jit(step)

    def exact_rate(self, i: int) -> float:
        """Return the rate of update i in float64, which the update itself computes in float32."""
        with jax.enable_x64(True):
            return float(self.rate(i))

    def update(self, batches: Batch) -> Scalars:
        """Make an update from arrays [A, B, ...]; return its totals, rate and norm."""
        with self._precision():
            self.state, metrics = self.step(self.state, batches, self.key)
            self.params = self.state.params
            return {name: np.asarray(x) for name, x in metrics.items()}

    def forward(self, batch: Batch) -> tuple[Scalars, np.ndarray, Arrays]:
        """Return totals and logits of a batch without dropout, and the gradients of its mean loss."""
        with self._precision():
            totals, logits, gradients = jax.device_get(self.evaluate(self.params, batch))
            return totals, logits, names.to_torch(gradients, self.config.model.frozen_layers)

    def totals(self, logits: np.ndarray, labels: np.ndarray) -> Scalars:
        """Return the totals of logits."""
        return {name: np.asarray(x) for name, x in self.task.totals(jnp.asarray(logits), jnp.asarray(labels)).items()}

    def dropped(self, tokens: np.ndarray, seed: int) -> np.ndarray:
        """Return the hidden states of the base model with dropout."""
        run = jax.jit(lambda params, key: nnx.merge(self.graphdef, params).base(tokens, key))
        return np.asarray(run(self.params, jax.random.key(seed)))

    def weights(self) -> Arrays:
        """Return the weights."""
        return names.to_torch(jax.device_get(self.params))

    def moments(self) -> tuple[Arrays, Arrays]:
        """Return the optimizer's first and second moments."""
        moments = [optax.tree.get(self.state.opt_state, name) for name in ("mu", "nu")]
        first, second = (names.to_torch(jax.device_get(x), self.config.model.frozen_layers) for x in moments)
        return first, second

    def counts(self) -> list[int]:
        """Return all counters of updates: the state's and the optimizer's."""
        return [int(self.state.step), *(int(x) for _, x in optax.tree.get_all_with_path(self.state.opt_state, "count"))]

    def _precision(self) -> Any:
        return jax.enable_x64(self.is_double)

    def _loss(self, params: Any, batch: Any, key: Any) -> Any:
        return self.task.loss(nnx.merge(self.graphdef, params), batch, key)

    def _taught(self, teacher: Teacher) -> Callable[..., Any]:
        with self._precision():
            wide = {name: x.astype(np.float64) for name, x in teacher.weights.items()}
            teacher = dataclasses.replace(teacher, weights=wide) if self.is_double else teacher
            mesh = jax_parallel.make_mesh(self.config, jax.devices()[:1])
            model = jax_distill.model_of(teacher, self.task, mesh)

        def loss(params: Any, batch: Any, key: Any) -> Any:
            return jax_distill.loss(self.task, nnx.merge(self.graphdef, params), model, batch, key)

        return loss

    def _evaluate(self, whole: Any, batch: Any) -> tuple[Any, Any, Any]:
        def mean_loss(trained: Any) -> tuple[Any, tuple[Any, Any]]:
            params = jax_tune.with_trained(whole, trained)
            totals = self._loss(params, batch, None)
            logits = nnx.merge(self.graphdef, params)(*_inputs(self.config.task, batch))
            return totals["loss"] / jnp.maximum(totals["count"], 1), (totals, logits)

        trained = jax_tune.trained(self.config.model, whole)
        gradients, (totals, logits) = jax.grad(mean_loss, has_aux=True)(trained)
        return totals, logits, gradients


class Torchlm:
    """A training state of torchlm."""

    name: ClassVar[str] = "torchlm"
    schedule: ClassVar[Any] = torch_schedule

    def __init__(self, config: Config, weights: Arrays, precision: Precision, seed: int = 0):
        self.config, self.key, self.is_double = config, seed, precision == "float64"
        self.task: Any = torch_tasks.TASKS[config.task](config)
        self.task.dtype = {"bfloat16": torch.bfloat16}.get(precision, torch.float32)
        self.model = self.task.build_model(torch.Generator().manual_seed(0))
        if self.is_double:
            self.model = self.model.double()
        self.set_weights(weights)

    def set_weights(self, weights: Arrays) -> None:
        """Set all weights."""
        self.model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()})

    def start(self, rate: Rate, is_mean_of_means: bool = False, teacher: Teacher | None = None) -> None:
        """Make ready for the first update."""
        loss = self._taught(teacher) if teacher else self.task.loss
        self.loss = mean_of_each(loss) if is_mean_of_means else loss
        self.set_rate(rate)
        self.state = torch_step.init_state(self.model, torch_optim.make_optimizer(self.config.train, self.model))

    def set_rate(self, rate: Rate) -> None:
        """Let the rate of further updates be another function of their numbers."""
        self.rate = rate
        self.step = functools.partial(
            torch_step.train_step, torch_step.Rule(rate, self.config.train.clip_norm), self.loss
        )

    def exact_rate(self, i: int) -> float:
        """Return the rate of update i."""
        return float(self.rate(i))

    def update(self, batches: Batch) -> Scalars:
        """Make an update from arrays [A, B, ...]; return its totals, rate and norm."""
        self.state, metrics = self.step(self.state, _tensors(batches), self.key)
        return {name: x.numpy() for name, x in metrics.items()}

    def forward(self, batch: Batch) -> tuple[Scalars, np.ndarray, Arrays]:
        """Return totals and logits of a batch without dropout, and the gradients of its mean loss."""
        self.model.eval()
        tensors = _tensors(batch)
        totals = self.task.loss(self.model, tensors, None)
        (totals["loss"] / totals["count"].clamp(min=1)).backward()
        gradients = {name: x.grad.numpy().copy() for name, x in self.model.named_parameters() if x.grad is not None}
        self.model.zero_grad()
        with torch.no_grad():
            logits = self.model(*_inputs(self.config.task, tensors))
        if logits.dtype == torch.bfloat16:  # which NumPy has not
            logits = logits.float()
        return {name: x.detach().numpy() for name, x in totals.items()}, logits.numpy(), gradients

    def totals(self, logits: np.ndarray, labels: np.ndarray) -> Scalars:
        """Return the totals of logits."""
        totals = self.task.totals(torch.from_numpy(logits), torch.from_numpy(labels))
        return {name: x.numpy() for name, x in totals.items()}

    def dropped(self, tokens: np.ndarray, seed: int) -> np.ndarray:
        """Return the hidden states of the base model with dropout."""
        torch.manual_seed(seed)
        with torch.no_grad():
            return self.model.train().get_submodule("base")(torch.from_numpy(tokens)).numpy()

    def weights(self) -> Arrays:
        """Return the weights."""
        return {name: x.detach().numpy().copy() for name, x in self.model.named_parameters()}

    def moments(self) -> tuple[Arrays, Arrays]:
        """Return the optimizer's first and second moments."""
        trained = {name: x for name, x in self.model.named_parameters() if x.requires_grad}
        states = {name: self.state.optimizer.state[x] for name, x in trained.items()}
        first, second = ({name: s[key].numpy().copy() for name, s in states.items() if key in s} for key in _MOMENTS)
        return first, second

    def counts(self) -> list[int]:
        """Return all counters of updates: the state's and the optimizer's."""
        return [self.state.step, *(int(x["step"]) for x in self.state.optimizer.state.values())]

    def _taught(self, teacher: Teacher) -> Callable[..., Any]:
        mesh = torch_parallel.Mesh(0, 1, torch.device("cpu"))
        model = torch_distill.model_of(teacher, self.task, mesh)
        if self.is_double:
            model = model.double()
        return lambda student, batch, key: torch_distill.loss(self.task, student, model, batch, key)


_MOMENTS = ("exp_avg", "exp_avg_sq")
PACKAGES = (Jaxlm, Torchlm)
Package = Jaxlm | Torchlm


def _inputs(task: str, batch: Any) -> tuple[Any, ...]:
    """Return what a model has logits of."""
    if "types" in batch:
        return batch["tokens"], None, batch.get("last"), False, None, batch["types"]
    places = "positions" if task == "tag" else "last"
    return (batch["tokens"], None, batch[places]) if places in batch else (batch["tokens"],)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}
    return {name: x if x.is_floating_point() else x.long() for name, x in tensors.items()}
