r"""Training with only the backward set of each sparse leaf on the device.

    sparse = AlwaysSparse(top_kast(optax.adam(1e-3), 0.1, 0.2), params)
    params, state, reservoir = sparse.start(params)

A step is that of a masked run, on the tree of values. `refresh` chooses new sets between steps and
on the host; a masked run does so inside a step.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.always_sparse import convert
from topkast_jax.always_sparse import host as hosts
from topkast_jax.always_sparse.ahead import ChoiceAhead
from topkast_jax.always_sparse.checks import (
    check_arrays,
    check_inner_state,
    check_plan,
    check_reservoir,
    whole_number,
)
from topkast_jax.always_sparse.convert import replace_nodes
from topkast_jax.always_sparse.exchange import Chosen, Exchange, outside_state
from topkast_jax.always_sparse.gradients import DenseGradients, groups
from topkast_jax.always_sparse.host import HostLeaf, Reservoir
from topkast_jax.always_sparse.kernel import CompactKernel, values_of
from topkast_jax.always_sparse.layout import Layout, is_here, is_random_key, on_host, places_of
from topkast_jax.always_sparse.moments import Moments
from topkast_jax.always_sparse.refresh import Place, check_wrapper, remembered_units
from topkast_jax.errors import SparsityError
from topkast_jax.flags import explores
from topkast_jax.method import Sets, enters_anew
from topkast_jax.sets import CompactState, SparsifyState, find_compact, forward_params
from topkast_jax.sparsify import (
    Plan,
    SparseTransform,
    at_forward_view,
    decay_update,
    held_where_skipped,
    shape_gradient,
)
from topkast_jax.trees import flatten

Tree = Any
T = TypeVar("T")


class AlwaysSparse:
    """A sparsity method in the always-sparse representation, for one tree of parameters.

    Between steps the device holds only the backward set B of each sparse leaf, and the host holds
    dense θ. Inside a step, products of single entries, most convolutions and lookups of many rows
    make the dense tile of their leaf while they run; products of blocks make no dense array.
    `gradients` makes the forward view and the gradient of one group of leaves dense on the device.

    One object serves one run at a time. The method's `inner_state` is taken as "reset", because the
    device keeps nothing of an entry that leaves B.

    Attributes:
      transform: gradient transformation over the tree of values. Its `update` takes
        `values_of(gradients)`. Take its state from `start`: its `init` does not know the indices of
        the units, and raises SparsityError.
      plan: the method and its arguments.
      delay: steps between the choice of sets and their use.
    """

    def __init__(
        self,
        tx: SparseTransform,
        params: Tree,
        *,
        delay: int = 0,
        place: Place | None = None,
    ):
        """Reads the shapes and types of the parameters, not their values.

        Args:
          tx: what `top_kast`, `static_random` or `sparsify` returns.
          params: dense parameters, or abstract ones.
          delay: steps, from 0 to below `refresh_every`. The sets that are chosen from θ after step
            t replace the old ones after step t + delay; with a delay above 0, a thread chooses them
            while the steps between run.
          place: function from the shape of an array, () for a scalar, to its sharding on the
            device; None: JAX's default device, to which the arrays are not committed.

        Raises:
          SparsityError: `tx` is no such transformation; the method needs dense gradients in every
            step or before its first choice, or sets that change their size; a pattern without a
            compact representation; a traced number; a delay out of its range; rules that do not fit
            the parameters; an inner optimizer whose state a refresh cannot follow.
        """
        if not isinstance(tx, SparseTransform):
            raise SparsityError(
                "always sparse needs what top_kast(...) or another method returns, found a "
                f"{type(tx).__name__}"
            )
        self.plan: Plan = tx.plan
        self.delay, self._place = whole_number("delay", delay), place
        layout = self._layout = Layout(self.plan, params)
        check_plan(self.plan, layout.sparse, self.delay)
        self._choose = hosts.Choice(self.plan, layout.sparse)
        self._gradients = DenseGradients(layout, place)
        check_inner_state(self.plan, layout.unflatten(layout.dense), values_of(self.abstract()))
        self._moments = Moments(layout, self.plan.inner.init, values_of(self.abstract()))
        self._groups = groups(layout.sparse)
        self.transform = optax.GradientTransformationExtraArgs(self._init, self._update)
        self._is_starting = False
        # A choice of single entries takes so long, and so much memory, that theirs is not kept.
        copies = hosts.Copies(
            name for name, leaf in layout.sparse.items() if leaf.pattern.unit_shape
        )
        self._exchange = Exchange(layout, self._choose, self._moments, place, copies)
        # What enters is what θ holds, then as now, unless the method changes it.
        self._takes_moves = not enters_anew(self.plan.method)
        self._ahead = ChoiceAhead(
            layout, self._choose, self._exchange, copies, moves=self._takes_moves
        )
        self._theta: list[Any] = []  # weak references to θ of the run that was followed last
        self._step = 0  # the last step that it was followed to

    def frozen(self, step: int) -> bool:
        """Whether B is A and the sets no longer change (`stop_exploring_at`).

        Args:
          step: the number of finished steps.
        """
        stop = self.plan.stop_exploring_at
        return stop is not None and step >= int(stop)

    def abstract(self, step: int = 0) -> Tree:
        """Shapes and types of the tree with compact kernels after so many finished steps."""
        return self._layout.abstract(self.frozen(step))

    def abstract_start(
        self, tx: optax.GradientTransformation | None = None, step: int = 0
    ) -> tuple[Tree, Any]:
        """Shapes and types of the values and the optimizer state, as `start` returns them."""
        kernels = self.abstract(step)
        self._check_wrapper(tx)
        init = functools.partial(jax.eval_shape, (self.transform if tx is None else tx).init)
        return values_of(kernels), self._first_state(init, kernels)

    def _check_wrapper(self, tx: optax.GradientTransformation | None) -> None:
        """Raises SparsityError unless a refresh can follow what `tx` adds to `transform`."""
        if tx is not None:
            init = lambda values: outside_state(self._starting(tx.init, values))  # noqa: E731
            leaves = self._layout.unflatten(self._layout.leaves)
            check_wrapper(init, values_of(self.abstract()), leaves)

    def _starting(self, init: Callable[[Tree], Any], values: Tree) -> Any:
        """What `init` returns, where `transform.init` may be a part of it."""
        self._is_starting = True
        try:
            return init(values)
        finally:
            self._is_starting = False

    def _first_state(self, init: Callable[[Tree], Any], kernels: Tree) -> Any:
        state = self._starting(init, values_of(kernels))
        if find_compact(state) is None:
            raise SparsityError("start: AlwaysSparse.transform is no part of the tx it was given")
        return replace_nodes(state, CompactState, lambda c: c._replace(kernels=places_of(kernels)))

    def abstract_reservoir(self) -> Reservoir:
        """Empty arrays of the reservoir's shapes; they take no memory before they are written."""
        theta = {name: np.empty(x.shape, x.dtype) for name, x in self._layout.theta_like.items()}

        def sets() -> dict[str, np.ndarray]:
            return {name: np.empty(x.shape, np.uint8) for name, x in theta.items()}

        def memory() -> dict[str, Any]:
            return {
                name: jax.tree.map(
                    lambda x: np.empty(x.shape, x.dtype),
                    self._choose.first_memory(leaf, theta[name]),
                )
                for name, leaf in self._layout.sparse.items()
            }

        flags, next_memory = sets(), memory()
        chosen = {name: (flags[name], next_memory[name]) for name in theta} if self.delay else {}
        return Reservoir(theta, sets(), memory(), chosen)

    def start(
        self,
        params: Tree,
        tx: optax.GradientTransformation | None = None,
        *,
        donate: bool = False,
    ) -> tuple[Tree, Any, Reservoir]:
        """The first sets, chosen on the host.

        Args:
          params: dense parameters, best as NumPy arrays or on the host's device; copied.
          tx: what trains, if `transform` is only a part of it (of an `optax.chain`, …).
          donate: take the sparse leaves of `params` over, so that the host never holds them twice.
            NumPy arrays become θ of the reservoir and are written to; JAX arrays are deleted.

        Returns:
          The tree of values and the optimizer state, on the device, and the reservoir.

        Raises:
          SparsityError: other parameters than those of `__init__`, a `tx` without `transform` in
            it or with arrays that a refresh cannot follow, or sets of another size than the
            densities say.
        """
        self._ahead.forget()
        self._check_wrapper(tx)
        theta = self._layout.theta("start", params, donate)
        chosen = self._choose(0, theta)
        if self.frozen(0):
            chosen = {
                name: (hosts.freeze(flags), memory) for name, (flags, memory) in chosen.items()
            }
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)
        state = self._first_state((self.transform if tx is None else tx).init, kernels)
        state = jax.tree.map(self._placed, state)
        self._follow(reservoir, 0)
        return values_of(kernels), state, reservoir

    def _reservoir(self, theta: dict[str, np.ndarray], chosen: dict[str, Any]) -> Reservoir:
        sets = {name: flags for name, (flags, _) in chosen.items()}
        memory = {name: memory for name, (_, memory) in chosen.items()}
        return Reservoir(theta, sets, memory, chosen if self.delay else {})

    def _put(self, array: Any) -> jax.Array:
        """A copy on the device; committed to it only if the user has said which it is."""
        if is_random_key(array):
            data = self._put(jax.random.key_data(array))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        host = np.array(array)
        if self._place is None:
            return jnp.asarray(host)
        return jax.make_array_from_callback(host.shape, self._place(host.shape), host.__getitem__)

    def _placed(self, array: Any) -> Any:
        """An array that `init` made, put where the user wants it if it was not made there."""
        made_anywhere = isinstance(array, jax.Array) and not array.committed
        return self._put(array) if made_anywhere and self._place is not None else array

    def _init(self, values: Tree) -> CompactState:
        """All indices are 0 here: `start` fills them in."""
        # Without leaves this is the placeholder with which `optax.tree.map_params` asks for the
        # structure.
        if not jax.tree.leaves(values):
            step: Any = jax.ShapeDtypeStruct((), jnp.int32)
            return CompactState(step, places_of(self.abstract()), self.plan.inner.init(values))
        if not self._is_starting:
            raise SparsityError(
                "transform.init does not know where the units sit: take the state that "
                "AlwaysSparse.start returns, or abstract_start for its shapes"
            )
        places = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), places_of(self.abstract(0)))
        return CompactState(jnp.zeros([], jnp.int32), places, self.plan.inner.init(values))

    def _update(
        self, grads: Tree, state: CompactState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, CompactState]:
        if params is None:
            raise SparsityError("update needs the values: transform.update(grads, state, values)")
        if not isinstance(state, CompactState):
            raise SparsityError(
                f"update(grads, state, values): state is a {type(state).__name__}, must be what "
                "start returned for this transform"
            )
        columns = (
            self._layout.leaves,
            self._layout.column("update: gradients", values_of(grads)),
            self._layout.column("update: values", params),
            self._layout.flatten(state.kernels),
        )
        rows = list(zip(*columns, strict=True))
        shaped = [
            grad if leaf is None else _shaped(self.plan, leaf, grad, values, kernel, state.step)
            for leaf, grad, values, kernel in rows
        ]
        updates, inner_state = self.plan.inner.update(
            self._layout.unflatten(shaped),
            state.inner_state,
            params,
            # A function that returns a gradient may return that of the kernels.
            **at_forward_view(extra, lambda values: forward_params(values, state), values_of),
        )
        decayed = [
            update
            if leaf is None or not self.plan.decays
            else decay_update(
                self.plan, leaf.leaf, update, values, _sets(kernel, values), state.step
            )
            for (leaf, _, values, kernel), update in zip(
                rows, self._layout.column("update", updates), strict=True
            )
        ]
        step = optax.safe_increment(state.step)
        updates, inner_state = held_where_skipped(
            self.plan, step, self._layout.unflatten(decayed), inner_state, state.inner_state
        )
        return updates, CompactState(step, state.kernels, inner_state)

    def needs_gradients(self, step: int) -> bool:
        """Whether the refresh after a step chooses by that step's dense gradient (RigL).

        Args:
          step: the number of the step that is about to be made; the first is 1.
        """
        return self.plan.needs_dense_gradient(step)

    def gradients(
        self,
        loss: Callable[..., Any],
        params: Tree,
        state: Any,
        *args: Any,
        has_aux: bool = False,
    ) -> dict[str, np.ndarray]:
        """The dense gradients of the sparse leaves, on the host, by name.

        Call it before each step where `needs_gradients(step)` is True, with the same arguments of
        the loss as in that step, and pass the result to `refresh` after the step. The loss is
        differentiated once for each group of leaves that have together at most as many entries as
        the largest leaf. The leaves of one group at a time are dense on the device.

        Args:
          loss: a function of ``forward_params(params, state)`` and `args`. It is compiled once for
            each group as long as it is the same object, and must accept a dense array in place of a
            compact kernel, as `matmul` does.
          params: the tree of values.
          state: the optimizer state, which holds `transform`'s.
          *args: further arguments of `loss`, such as the batch and a random key.
          has_aux: whether `loss` returns a pair whose first member is the loss.

        Returns:
          Leaf name → gradient at the forward view, a NumPy array of the leaf's dense shape and
          dtype.

        Raises:
          SparsityError: values or state of another run.
        """
        self._layout.values("gradients", params, state)
        return self._gradients(loss, has_aux, forward_params(params, state), args)

    def refresh(
        self,
        step: int,
        params: Tree,
        state: T,
        reservoir: Reservoir,
        gradients: dict[str, np.ndarray] | None = None,
    ) -> tuple[Tree, T, Reservoir]:
        """Refreshes the sets where a refresh is due. Call it after every step.

        Where a refresh is due, or `step` does not follow that of the last call, `step` is compared
        with the number of finished steps in the state, which waits for the device. Calls may be
        left out after steps that neither choose sets nor change them.

        Args:
          step: the number of finished steps, an int of at least 0.
          params: the tree of values.
          state: the optimizer state, which holds `transform`'s.
          reservoir: its arrays are written to.
          gradients: what `gradients` returned before this step; needed where
            `needs_gradients(step)`.

        Returns:
          The tree of values, the optimizer state and the reservoir for the next step. Do not use
          those that were passed in: a refresh writes to their arrays or deletes them.

        Raises:
          SparsityError: values or a state that do not belong together, a step that is not that of
            the state, a call that was left out where a refresh was due, sets of another size than
            the densities give, or no gradients where the method chooses by them.
        """
        step, last = whole_number("step", step), self._last_step(reservoir)
        if last is None or step < last:  # another run, or an earlier state of this one
            self._ahead.forget()
        if self.plan.chooses_after(step) and self.needs_gradients(step):
            self._check_gradients(gradients)
        if self._is_due(step) or not last or step != last + 1:  # also at the first call
            self._check_step(step, params, state)
            self._check_none_left_out(last, step)
        changes = self.changes_after(step) or self._stops_late(step, last, reservoir)
        params, state, reservoir = self._refresh(
            step, params, state, reservoir, gradients, changes=changes
        )
        self._follow(reservoir, step)
        return params, state, reservoir

    def _refresh(
        self,
        step: int,
        params: Tree,
        state: T,
        reservoir: Reservoir,
        gradients: Any,
        *,
        changes: bool,
    ) -> tuple[Tree, T, Reservoir]:
        if self.delay and self.plan.chooses_after(step):
            values = self._layout.values("refresh", params, state)
            reservoir = self._ahead.start(step, values, reservoir, gradients)
        if not changes:
            return params, state, reservoir
        ahead = bool(self.delay) and not self.frozen(step) and self._takes_moves
        if ahead:
            reservoir = hosts.writable(self.settled(reservoir))
        else:
            reservoir = self._current("refresh", params, state, reservoir)
        if self.frozen(step):
            new: Iterable[Chosen] = (
                {k: (hosts.freeze(reservoir.sets[k]), reservoir.memory[k]) for k in group}
                for group in self._groups
            )
        elif self.delay:
            new = [self._chosen_ahead(step, reservoir)]
        else:
            new = self._choose.in_groups(
                self._groups, step, reservoir.theta, reservoir.sets, reservoir.memory,
                gradients,
            )  # fmt: skip
        self._ahead.used()
        params, state, now = self._exchange(params, state, reservoir, new, ahead=ahead)
        return params, state, reservoir._replace(chosen=now if self.delay else {})

    def changes_after(self, step: int) -> bool:
        """Whether `refresh` changes the sets on the device, with the delay taken into account.

        Args:
          step: the number of finished steps.
        """
        if self.frozen(step):
            return not self.frozen(step - 1)
        every = self.plan.refresh_every
        return every is not None and step > self.delay and (step - self.delay) % int(every) == 0

    def _stops_late(self, step: int, last: int | None, reservoir: Reservoir) -> bool:
        """Whether the stop had passed when this object got a run that still explores."""
        held = reservoir.sets.values()
        return last is None and self.frozen(step) and any(map(explores, held))

    def _is_due(self, step: int) -> bool:
        return self.plan.chooses_after(step) or self.changes_after(step)

    def _follow(self, reservoir: Reservoir, step: int) -> None:
        """Remembers the last step of a run, which is known by its arrays of θ."""
        self._theta, self._step = [weakref.ref(x) for x in reservoir.theta.values()], step

    def _last_step(self, reservoir: Reservoir) -> int | None:
        """The last step that a run was followed to; None if it is not the one that was followed."""
        check_reservoir(reservoir, self._layout.theta_like)
        held = [known() for known in self._theta]
        same = [x is known for x, known in zip(reservoir.theta.values(), held, strict=False)]
        return self._step if same and all(same) else None

    def _check_none_left_out(self, last: int | None, step: int) -> None:
        left_out = () if last is None else range(last + 1, step)
        for due in filter(self._is_due, left_out):
            raise SparsityError(
                f"refresh: found step={step}, and step={last} in the last call: the refresh that "
                f"fell due after step {due} was left out; call it after every step"
            )

    def _check_step(self, step: int, params: Tree, state: Any) -> None:
        self._layout.values("refresh", params, state)
        compact: Any = find_compact(state)
        if int(compact.step) != step:
            raise SparsityError(
                f"refresh: found step={step}; must be the {int(compact.step)} finished steps of "
                "the state: call it once after each update"
            )

    def _check_gradients(self, gradients: dict[str, np.ndarray] | None) -> None:
        method = type(self.plan.method).__name__
        if gradients is None:
            raise SparsityError(
                f"refresh: {method} chooses by the dense gradient: where needs_gradients(step), "
                "call gradients(loss, params, state, ...) before the step and hand it on"
            )
        check_arrays("refresh: gradients", gradients, self._layout.theta_like)

    def settled(self, reservoir: Reservoir) -> Reservoir:
        """The reservoir as a checkpoint must hold it: with the sets that a thread is choosing.

        With a delay it waits for that thread; otherwise it returns the reservoir as it is.

        Args:
          reservoir: as `start` or the last `refresh` returned it.
        """
        check_reservoir(reservoir, self._layout.theta_like)
        return self._ahead.settled(reservoir)

    def _chosen_ahead(self, step: int, reservoir: Reservoir) -> Chosen:
        if not reservoir.chosen:
            raise SparsityError(
                f"refresh: the choice made at step {step - self.delay} is not in this reservoir: "
                "what is saved must be AlwaysSparse.settled(reservoir)"
            )
        return reservoir.chosen

    def _current(self, what: str, params: Tree, state: Any, reservoir: Reservoir) -> Reservoir:
        """With θ made current, and the choice that was under way, which reads it, in it."""
        values = self._layout.values(what, params, state)
        reservoir = hosts.writable(self.settled(reservoir))
        # What others hold a part of is a collective: one at a time, the same order everywhere.
        here, index = (
            {name: x if is_here(x) else on_host(x) for name, x in arrays.items()}
            for arrays in (values, self._layout.indices(state))
        )
        self._layout.write_back(reservoir.theta, index, here)
        return reservoir

    def masks(self, reservoir: Reservoir) -> tuple[Tree, SparsifyState]:
        """The shapes of the dense parameters, and the sets in the state of a masked run.

        Functions that read the sets accept the two in place of parameters and state, for example
        ``keep_masks(*sparse.masks(reservoir))`` and those of `topkast_jax.statistics`.

        Args:
          reservoir: as `start` or the last `refresh` returned it.

        Returns:
          A tree of `jax.ShapeDtypeStruct`, and a `SparsifyState` whose sets are the reservoir's own
          NumPy arrays.
        """
        return self._layout.masks(reservoir)

    def to_masked(self, params: Tree, state: T, reservoir: Reservoir) -> tuple[Tree, T]:
        """Dense parameters, and the optimizer state as a masked run would hold it.

        Moments are zero outside B. A masked run that goes on needs `inner_state="reset"`, which
        gives an entry that enters B what `init` makes of it. Call it after the `refresh` of the
        step; a choice that waits for its delay to pass is dropped.

        Args:
          params: the tree of values.
          state: the optimizer state, which holds `transform`'s.
          reservoir: its θ is made current.

        Returns:
          Both as NumPy arrays; copies of random keys, for which NumPy has no type. θ and the sets
          are the reservoir's own: copy what is to outlive the next refresh.

        Raises:
          SparsityError: values or state of another run, or an inner optimizer whose state has no
            dense representation.
        """
        reservoir = self._current("to_masked", params, state, reservoir)
        chooser = self._choose.chooser if self.plan.ever_chooses else ()
        return convert.to_masked(self._layout, self.plan, params, state, reservoir, chooser)

    def from_masked(
        self, params: Tree, state: T, tx: optax.GradientTransformation | None = None
    ) -> tuple[Tree, T, Reservoir]:
        """The inverse of `to_masked`.

        A choice that is due in the masked run is made. Moments outside B, which a masked run may
        hold with `inner_state="keep"`, are dropped.

        Args:
          params: dense parameters; copied.
          state: the optimizer state of the masked run; copied.
          tx: what trains, if `transform` is only a part of it, as for `start`.

        Returns:
          The tree of values and the optimizer state, on the device, and the reservoir.

        Raises:
          SparsityError: `state` holds no masks, or was made under other rules, or holds sets of
            another size than the densities give; other parameters than those of `__init__`; an
            inner optimizer whose state has no compact representation; a `tx` with arrays that a
            refresh cannot follow, or none where `transform` is a part of it that has such arrays.
        """
        self._ahead.forget()
        theta = self._layout.theta("from_masked", params)
        was, chosen = convert.sets_of(params, state)
        self._layout.check_sparse(was)
        self._check_wrapper(tx)
        if tx is None:
            self._check_alone(params, state)
        self._choose.enter(theta, was, {name: flags for name, (flags, _) in chosen.items()})
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)
        values = values_of(kernels)
        state = convert.from_masked(
            self._layout, self.plan.inner, params, state, reservoir, kernels, self._put
        )
        state = self._with_first_moments(state, values, was, reservoir)
        compact: Any = find_compact(state)
        step = int(compact.step)
        if not (self.frozen(step) and any(map(explores, reservoir.sets.values()))):
            self._follow(reservoir, step)  # Otherwise the next refresh ends the exploration.
        return values, state, reservoir

    def _check_alone(self, params: Tree, state: Any) -> None:
        """Raises SparsityError where units are remembered outside the sparsity state."""
        outside = replace_nodes(state, SparsifyState, lambda _: None)
        leaves = self._layout.unflatten(self._layout.leaves)
        for path, _ in remembered_units(outside, params, leaves):
            raise SparsityError(
                f"from_masked: a wrapper's state{path} holds numbers of units: hand the wrapper "
                "over as well, from_masked(params, state, tx)"
            )

    def _with_first_moments(
        self, state: T, values: Tree, was: dict[str, np.ndarray], reservoir: Reservoir
    ) -> T:
        """The state with what `init` makes of units that entered B with the choice that was due."""
        compact: Any = find_compact(state)
        by_path = dict(jax.tree_util.tree_leaves_with_path(compact.inner_state))
        columns = zip(self._layout.leaves, self._layout.flatten(values), strict=True)
        for number, (leaf, array) in enumerate(columns):
            if leaf is not None:
                entered = leaf.entered(was[leaf.path], reservoir.sets[leaf.path])
                entered = entered.reshape(*leaf.leaf.stack, -1)
                if entered.any():
                    begun = self._moments.begun(number, entered, array, by_path)
                    by_path |= {path: self._put(x) for path, x in begun.items()}
        inner = flatten(compact.inner_state)[1].unflatten(by_path.values())
        return replace_nodes(state, CompactState, lambda c: c._replace(inner_state=inner))

    def _kernels(self, params: Tree, reservoir: Reservoir) -> Tree:
        return self._layout.kernels(params, reservoir, self._put)


def _shaped(
    plan: Plan,
    host: HostLeaf,
    grad: jax.Array,
    values: jax.Array,
    kernel: CompactKernel,
    step: jax.Array,
) -> jax.Array:
    """The method's gradient of one leaf's values."""
    for what, array in (("gradient", grad), ("values", values)):
        if jnp.shape(array) != (*kernel.index.shape, *kernel.pattern.unit_shape):
            raise SparsityError(
                f"update: {what} of {host.path} must be of its {kernel.index.shape} units, found "
                f"shape {jnp.shape(array)}"
            )
    return shape_gradient(plan, host.leaf, grad, values, _sets(kernel, values), step)


def _sets(kernel: CompactKernel, values: jax.Array) -> Sets:
    """The sets of a leaf's values: all of them are in B, the first ones in A."""
    in_a = jnp.arange(kernel.backward) < kernel.forward
    in_a = in_a.reshape(-1, *(1,) * len(kernel.pattern.unit_shape))
    return Sets(jnp.broadcast_to(in_a, values.shape), jnp.ones(values.shape, bool))
