"""One training step, a pure function of state and batch, which its caller maps over devices."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from .. import keys
from ..types import Array, Key, at_least_float32

Params = Any
Batch = dict[str, Any]


class Losses(NamedTuple):
    """What a loss function returns for the examples of a batch.

    Attributes:
      loss: `[batch]`; training minimises its mean.
      seen: what `remember` and `measure` need of each example, by name: arrays `[batch, ...]`.
    """

    loss: Array
    seen: dict[str, Array] = {}  # noqa: RUF012, it is never changed


LossFn = Callable[[Key, Params, Batch, Any], Losses]
"""(the key of this step, params, batch, `TrainState.extra`) -> `Losses`."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and its key; a pytree of arrays and nothing else.

    Attributes:
      step: steps taken, int32 `[]`.
      params: the network's parameters.
      ema_params: their exponential moving average, which samples are drawn with. It is of at least
        float32, because in fewer bits a decay near 1 would round each of its steps to nothing.
      opt_state: the optimiser's state.
      key: the run's key; step k draws from this key folded with k, so the key never changes.
      extra: any pytree that a method carries from step to step.
    """

    step: Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    key: Key
    extra: Any = ()


def init_state(
    key: Key, params: Params, tx: optax.GradientTransformation, extra: Any = ()
) -> TrainState:
    """The state before the first step.

    Args:
      key: the run's key, a single one.
      params: initial parameters.
      tx: the optimiser.
      extra: the first value of what a method carries from step to step.

    >>> state = init_state(jax.random.key(0), {"w": jnp.ones(3)}, optax.adam(1e-3))
    >>> int(state.step)
    0
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: a donated state may not hold the same buffer twice.
        ema_params=jax.tree.map(lambda p: jnp.copy(_averaged(p)), params),
        opt_state=tx.init(params),
        key=keys.typed(key),
        extra=extra,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float | Callable[[Array], Array],
    axis_name: str | None = None,
    accumulate: int = 1,
    remember: Callable[[Any, dict[str, Array]], Any] | None = None,
    measure: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of gradient descent on the mean loss, and of the moving average.

    Args:
      state: the state so far.
      batch: arrays `[batch, ...]`, among them `index`, each example's position in the global
        batch, from which `loss_fn` derives a key for each example (`keys.fold_in(key, index)`).
      loss_fn: (key of this step, params, batch, `state.extra`) -> `Losses`. A function of the first
        three alone that returns losses `[batch]` is accepted too.
      tx: the optimiser. One that takes the loss, `value`, as `optax.contrib.reduce_on_plateau`
        does, gets the mean over the global batch.
      ema_decay: decay of the moving average in [0, 1), or a function of the step to it.
      axis_name: the mapped axis to average over under `pmap` or `shard_map`; None under `jit`.
      accumulate: into how many equal parts to split the batch, which are then processed one after
        the other to save memory; the result is the same.
      remember: (`state.extra`, `Losses.seen` of the global batch by ascending index) -> the next
        extra; None leaves the extra as it is.
      measure: `Losses.seen` of the examples on this device -> sums over them, by name, which become
        metrics.
      skip_nonfinite: whether a batch with an infinite or undefined loss or gradient changes nothing
        but the number of steps taken.

    Returns:
      The new state, and metrics: `loss`, the mean over the global batch; `grad_norm`, the global
      norm of the gradient before the optimiser clips it; and the sums of `measure` over the global
      batch.

    Raises:
      ValueError: if the batch does not split into `accumulate` equal parts.

    >>> loss_fn = lambda key, params, batch, extra: Losses(
    ...     jnp.sum((batch["x"] - params[None]) ** 2, -1))
    >>> tx = optax.sgd(0.5)
    >>> state = init_state(jax.random.key(0), jnp.zeros(2), tx)
    >>> batch = {"x": jnp.ones((4, 2)), "index": jnp.arange(4)}
    >>> state, metrics = train_step(state, batch, loss_fn=loss_fn, tx=tx, ema_decay=0.9)
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """
    key = keys.fold_in(state.key, state.step)
    loss_fn = _with_extra(loss_fn)
    # Under shard_map with check_vma=True, the gradient with respect to replicated parameters is
    # already a sum over the devices; with respect to each device's own, it never is.
    local_params = _varying(state.params, axis_name)

    def loss_and_grads(batch):
        def mean_loss(params):
            losses = loss_fn(key, params, batch, state.extra)
            return jnp.mean(at_least_float32(losses.loss)), losses.seen

        (loss, seen), grads = jax.value_and_grad(mean_loss, has_aux=True)(local_params)
        return (loss, grads), seen

    (loss, grads), seen = _mean_over_parts(loss_and_grads, batch, accumulate, axis_name)
    sums = {} if measure is None else measure(seen)
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
        sums = jax.lax.psum(sums, axis_name)
    extra = state.extra
    if remember is not None:
        index = batch["index"]
        if axis_name is not None:
            gather = functools.partial(jax.lax.all_gather, tiled=True, to="invarying")
            index, seen = gather((index, seen), axis_name)
        # Sorted by index, so that the result does not depend on the layout of the devices.
        order = jnp.argsort(index)
        extra = remember(extra, jax.tree.map(lambda x: x[order], seen))
    update = optax.with_extra_args_support(tx).update  # some need the loss, as reduce_on_plateau
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam relies on
        updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
    new = state.replace(
        params=params,
        ema_params=_moved(state.ema_params, params, 1 - decay),
        opt_state=opt_state,
        extra=extra,
    )
    grad_norm = optax.tree.norm(grads)
    if skip_nonfinite:
        sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
    return new.replace(step=state.step + 1), {"loss": loss, "grad_norm": grad_norm} | sums


def projected(
    tx: optax.GradientTransformation, project: Callable[[Params], Params]
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser, whose updates end on `project(params + updates)`.

    Projected gradient descent; EDM2's forced weight normalisation is this with filters of length
    one.

    Args:
      tx: the optimiser.
      project: parameters -> parameters of the same shapes.

    >>> unit = lambda w: w / jnp.linalg.norm(w)
    >>> tx = projected(optax.sgd(1.0), unit)
    >>> w = jnp.array([1.0, 0.0])
    >>> updates, _ = tx.update(jnp.array([0.0, -1.0]), tx.init(w), w)
    >>> [f"{x:.3f}" for x in w + updates]
    ['0.707', '0.707']
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params: Any = None, **given):
        updates, state = inner.update(updates, state, params, **given)
        aim = project(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, aim, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _averaged(p):
    return at_least_float32(p) if jnp.issubdtype(jnp.result_type(p), jnp.floating) else p


def _moved(average, params, by):
    """The moving average, a part `by` nearer to the parameters; its dtypes stay what they are."""
    same = lambda tree: jax.tree.map(lambda x, like: x.astype(like.dtype), tree, average)
    return same(optax.incremental_update(same(params), average, by))


def _varying(tree, axis_name):
    """The same values, of a type that may differ from device to device (shard_map's "varying")."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), tree)


def _with_extra(loss_fn):
    """`loss_fn` as a `LossFn`; a function (key, params, batch) -> losses `[batch]` is converted."""
    parameters = inspect.signature(loss_fn).parameters.values()
    if sum(p.default is p.empty for p in parameters) > 3:  # one with a default is an option
        return loss_fn
    return lambda key, params, batch, extra: Losses(loss_fn(key, params, batch))


def several_steps(step: Callable[..., Any]) -> Callable[..., Any]:
    """Several steps in one program, so that the host starts fewer programs.

    Args:
      step: `(state, batch, **options) -> (state, metrics)`, such as `train_step`.

    Returns:
      A function that takes the batches of several steps side by side, arrays `[batch, steps, ...]`,
      and makes these steps one after the other; its metrics are those of every step, `[steps]`.

    >>> step = lambda state, batch: (state + batch["x"].sum(), {"loss": state})
    >>> state, metrics = several_steps(step)(jnp.zeros(()), {"x": jnp.ones((4, 3))})
    >>> float(state), metrics["loss"].tolist()
    (12.0, [0.0, 4.0, 8.0])
    """

    def steps(state, batches, **options):
        in_order = jax.tree.map(lambda x: x.swapaxes(0, 1), batches)
        return jax.lax.scan(lambda state, batch: step(state, batch, **options), state, in_order)

    return steps


def ema_warmup(decay: float) -> Callable[[Array], Array]:
    """A decay that grows with the step: min(decay, (1 + step) / (10 + step)).

    The average forgets the initial parameters in a short run too. This is the warm-up of Song et
    al. 2021 and of TensorFlow's `ExponentialMovingAverage(num_updates)`.

    Raises:
      ValueError: unless `0 <= decay < 1`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema {decay=}: must be in [0, 1)")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def _mean_over_parts(f, batch, parts, axis_name):
    """The mean of f's first output over equal parts, and its second output joined."""
    size = len(batch["index"])
    if size % parts:
        raise ValueError(f"a batch of {size} per device does not split into {parts} equal parts")
    if parts == 1:
        return f(batch)
    # Each part takes every parts-th example, so that no example leaves its device.
    split = lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batches)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, first)[0])
    zero = _varying(zero, axis_name)

    def add(total, part):
        mean, each = f(part)
        return jax.tree.map(jnp.add, total, mean), each

    total, each = jax.lax.scan(add, zero, batches)
    join = lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:])
    return jax.tree.map(lambda x: x / parts, total), jax.tree.map(join, each)
