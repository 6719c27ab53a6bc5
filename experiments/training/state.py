"""The state that training changes from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.task import Task
from experiments.training import partition
from experiments.training.optimizers import Transform

Tree = Any
# Steps use fold_in(key(seed), step), and no step has this number.
_INIT = 2**32 - 1


class TrainState(NamedTuple):
    """Everything that a training step updates. A checkpoint stores the data position next to it.

    Attributes:
        step: the number of finished steps, an int32 scalar.
        params: the parameters. Of an always-sparse run, the values of the backward sets.
        opt_state: the state of the optimizer, which contains the sets. Of an always-sparse run, it
            contains the indices of the values.
        model_state: what the model carries from step to step.
        reservoir: of an always-sparse run, what the host holds
            (`topkast_jax.always_sparse.Reservoir`). It never goes to the devices.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    model_state: Tree
    reservoir: Tree = ()


def abstract_params(task: Task) -> Tree:
    """The shapes and types of the parameters."""
    return jax.eval_shape(task.init, jax.random.key(0))[0]


def abstract_state(task: Task, tx: Transform, seed: int, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of the state."""
    shapes = jax.eval_shape(lambda: _init(task, tx, seed))
    split = partition.splits(shapes.params, task.tensor_axes, mesh)
    return on_mesh(shapes, task, mesh, split)


def on_mesh(
    shapes: TrainState, task: Task, mesh: Mesh, split: Mapping[str, partition.Split] | None = None
) -> TrainState:
    """An abstract state with a sharding for each array; `split` as for `partition.shardings`."""
    model_state = partition.from_specs(task.model_state_specs(shapes.model_state), mesh)
    shardings = partition.shardings(shapes, mesh, split)._replace(model_state=model_state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def shardings_of(abstract: Tree) -> Tree:
    """The sharding of each leaf."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def init_state(task: Task, tx: Transform, seed: int, abstract: TrainState) -> TrainState:
    """The state before the first step, initialised directly into its shards."""
    return jax.jit(lambda: _init(task, tx, seed), out_shardings=shardings_of(abstract))()


def init_model(task: Task, seed: int) -> tuple[Tree, Tree]:
    """The initial dense parameters and the initial model state."""
    return task.init(jax.random.fold_in(jax.random.key(seed), _INIT))


def _init(task: Task, tx: Transform, seed: int) -> TrainState:
    params, model_state = init_model(task, seed)
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), model_state)
