"""The protocol between a task and the loop, and the registry of tasks."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.registry import import_path

Batch = Mapping[str, Any]
"""Name → array; the first axis of each array numbers the examples (lanes of text)."""
Tree = Any
Sums = Mapping[str, tuple[Any, Any]]
"""Name → (numerator, denominator), float scalars summed over a batch of all hosts."""
Totals = Mapping[str, tuple[float, float]]
"""The same, summed over several batches, as numbers on the host."""


class DataIterator(Protocol):
    """Endless batches of NumPy arrays, with a position.

    The position after the n-th `next` says that n batches were taken. An iterator that is set to it
    yields batch n + 1 next. Batches are those of all hosts, each of which makes its part; if the
    position is the same on all, the run can continue on another number of hosts. A method `close()`
    is optional.
    """

    def __next__(self) -> Batch:
        """The next batch of this host: a dict of arrays whose first axis numbers the examples."""

    def get_state(self) -> Any:
        """The position, as a value that `json.dumps` accepts."""

    def set_state(self, state: Any) -> None:
        """Continues from a position that `get_state` returned, perhaps in another process."""


class Task(Protocol):
    """A model, its data and its loss.

    Attributes:
        unit: the unit in which throughput is counted, "examples" or "tokens".
        units_per_step: the number of units in one training step, over all hosts.
        eval_split: the split that is evaluated during training.
        test_split: the split that is evaluated at the end, for `final.json`.
        tensor_axes: (regular expression over the path of a parameter, axis) in order, the last for
            all paths: the axis that the mesh axis `tensor` splits, or None for none.
    """

    unit: str
    units_per_step: int
    eval_split: str
    test_split: str
    tensor_axes: Sequence[tuple[str, int | None]]

    def init(self, rng: jax.Array) -> tuple[Tree, Tree]:
        """Parameters (a nested dict of arrays) and model state; pure and jittable."""

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Sums]]:
        """The training loss; the function is pure.

        Args:
            params: the forward view of the parameters. A sparse leaf of an always-sparse run is a
                compact kernel, which the functions of `experiments.layers` accept.
            model_state: as `init` or the last step returned it.
            batch: a training batch of all hosts.
            rng: the random key of the step.

        Returns:
            The loss, a scalar, and a pair of the new model state and the sums over the batch.
        """

    def eval_state(self, model_state: Tree, split: str) -> Tree:
        """The state with which the evaluation of a split starts."""

    def eval_step(self, params: Tree, eval_state: Tree, batch: Batch) -> tuple[Tree, Sums]:
        """Evaluates one batch; the function is pure.

        Args:
            params: the forward view of the parameters, as in `loss`.
            eval_state: as `eval_state` or the last batch returned it.
            batch: a batch of `eval_data`, of all hosts. Padded entries have the weight 0.

        Returns:
            The new evaluation state, and the sums over the batch.
        """

    def train_data(self) -> DataIterator:
        """The training batches of this host, starting with the first."""

    def eval_data(self, split: str) -> Iterable[Batch]:
        """This host's part of all batches of a split; the last one is padded to the common size."""

    def model_state_specs(self, shapes: Tree) -> Tree:
        """A PartitionSpec for each leaf of the model state, from its abstract values."""

    def eval_context(self, split: str) -> dict[str, Any]:
        """What a metric depends on besides the parameters, such as the number of examples."""

    def final_metrics(self, totals: Totals) -> dict[str, float]:
        """The metrics to report, from the summed numerators and denominators."""

    def example_batch(self) -> Batch:
        """One training batch of all hosts, as ShapeDtypeStructs."""


# Where a task's module is. It defines `default_config() -> ConfigDict` with sections `model` and
# `data`, `validate(config)`, which raises UserError, and `make_task(config) -> Task`.
_MODULES: dict[str, str] = {
    "image_classification": "experiments.image_classification.task",
    "language_modelling": "experiments.language_modelling.task",
}


def register_task(name: str, module: str) -> None:
    """Makes a task known under a name.

    Args:
        name: the value of `config.task`.
        module: the import path of a module with `default_config`, `validate` and `make_task`.
    """
    _MODULES[name] = module


def task_module(name: str) -> ModuleType:
    """The module of a task.

    Args:
        name: a registered name, or the import path of a module.

    Raises:
        UserError: no task has this name; an error inside the module keeps its traceback.
    """
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    allowed = f"allowed: {', '.join(sorted(_MODULES))}, or the import path of a module"
    if not re.fullmatch(r"\w+(\.\w+)*", str(name)):
        raise UserError(f"config.task: found {name!r}; {allowed}")
    try:
        import_path("config.task", f"{name}:make_task")
    except UserError as error:
        raise UserError(f"{error}; {allowed}") from None
    return importlib.import_module(name)


def make_task(config: ConfigDict) -> Task:
    """The task that a validated config describes.

    Raises:
        UserError: no task has the name `config.task`, or its module refuses the config.
    """
    task: Task = task_module(config.task).make_task(config)
    return task


def ratios(totals: Totals) -> dict[str, float]:
    """The usual `final_metrics`: each numerator divided by its denominator."""
    return {
        name: top / bottom if bottom else float("nan") for name, (top, bottom) in totals.items()
    }
