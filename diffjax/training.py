"""One training step, a pure function of state and batch. Whoever calls it decides how to map it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from . import keys
from .types import Array, Key

Params = Any
Batch = dict[str, Any]
LossFn = Callable[..., Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the key it draws from; arrays and nothing else.

    Attributes:
      step: steps taken, int32 `[]`.
      params: the network's parameters.
      ema_params: their exponential moving average, which samples are made with.
      opt_state: the optimiser's state.
      key: the run's key; step k draws from this folded with k, so it never changes.
      extra: any pytree that a method carries along.
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
      key: the run's key, one.
      params: initial parameters.
      tx: the optimiser.
      extra: what a method carries along, if it does.

    >>> state = init_state(jax.random.key(0), {"w": jnp.ones(3)}, optax.adam(1e-3))
    >>> int(state.step)
    0
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: a donated state may not hold the same buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
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
    remember: Callable[[Any, Any], Any] | None = None,
    measure: Callable[[Any], dict[str, Array]] | None = None,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of gradient descent on the mean loss, and of the moving average.

    Args:
      state: the state so far.
      batch: arrays `[batch, ...]`, among them `index`, each example's position in the global
        batch, by which `loss_fn` gives it randomness of its own (`keys.fold_in(key, index)`).
      loss_fn: (key of this step, params, batch) -> losses `[batch]`.
      tx: the optimiser.
      ema_decay: decay of the moving average in [0, 1), or a function of the step to it.
      axis_name: the mapped axis to average over under `pmap` or `shard_map`; None under `jit`.
      accumulate: how many equal parts of the batch to take one after the other, to save memory;
        the result is the same.
      remember: for a method that carries `state.extra` along. `loss_fn` then gets the extra as its
        fourth argument and returns, beside the losses, what it has seen, a pytree `[batch]`;
        `remember(extra, seen)`, with that of the global batch by ascending index, is the next
        extra.
      measure: for metrics of what `loss_fn` has seen, which it then gets and returns as above: what
        was seen to sums over the examples at hand, any pytrees by name.
      skip_nonfinite: whether a batch of infinite or undefined loss or gradient changes nothing but
        the number of steps taken.

    Returns:
      The new state, and metrics: `loss`, the mean over the global batch, and `grad_norm`, the
      global norm of the gradient before the optimiser clips it; and the sums that `measure`
      names, over the global batch.

    Raises:
      ValueError: if the batch does not split into `accumulate` equal parts.

    >>> loss_fn = lambda key, params, batch: jnp.sum((batch["x"] - params[None]) ** 2, -1)
    >>> tx = optax.sgd(0.5)
    >>> state = init_state(jax.random.key(0), jnp.zeros(2), tx)
    >>> batch = {"x": jnp.ones((4, 2)), "index": jnp.arange(4)}
    >>> state, metrics = train_step(state, batch, loss_fn=loss_fn, tx=tx, ema_decay=0.9)
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """
    key = keys.fold_in(state.key, state.step)

    def loss_and_grads(batch):
        def mean_loss(params):
            if remember is None and measure is None:
                return jnp.mean(loss_fn(key, params, batch)), ()
            losses, seen = loss_fn(key, params, batch, state.extra)
            return jnp.mean(losses), (batch["index"], seen)

        (loss, seen), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        return (loss, grads), seen

    (loss, grads), seen = _mean_over_parts(loss_and_grads, batch, accumulate)
    sums = {} if measure is None else measure(seen[1])
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
        sums = jax.lax.psum(sums, axis_name)
    extra = state.extra
    if remember is not None:
        if axis_name is not None:
            seen = jax.lax.all_gather(seen, axis_name, tiled=True)
        # In one order on every layout, because what is remembered may depend on it.
        order = jnp.argsort(seen[0])
        extra = remember(extra, jax.tree.map(lambda x: x[order], seen[1]))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
    new = state.replace(
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, 1 - decay),
        opt_state=opt_state,
        extra=extra,
    )
    grad_norm = optax.tree.norm(grads)
    if skip_nonfinite:
        sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state)
    return new.replace(step=state.step + 1), {"loss": loss, "grad_norm": grad_norm} | sums


def several_steps(step: Callable[..., Any]) -> Callable[..., Any]:
    """Several steps in one program, so that the host is asked less often.

    Args:
      step: `(state, batch, **options) -> (state, metrics)`, such as `train_step`.

    Returns:
      The same of the batches of so many steps side by side, arrays `[batch, steps, ...]`, one after
      the other; metrics are those of every step, `[steps]`.

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
    """A moving average that starts short: min(decay, (1 + step) / (10 + step)).

    So that the first parameters are forgotten in a short run too. Song et al. 2021's and
    TensorFlow's `ExponentialMovingAverage(num_updates)`.

    Raises:
      ValueError: unless `0 <= decay < 1`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema {decay=}: must be in [0, 1)")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def _mean_over_parts(f, batch, parts):
    """The mean over equal parts of what f says first, and all of what it says second, `[batch]`."""
    size = len(batch["index"])
    if size % parts:
        raise ValueError(f"a batch of {size} per device does not split into {parts} equal parts")
    if parts == 1:
        return f(batch)
    # Each part takes every parts-th example, so that a device finds its share in its own shard.
    split = lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batches)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, first)[0])

    def add(total, part):
        mean, each = f(part)
        return jax.tree.map(jnp.add, total, mean), each

    total, each = jax.lax.scan(add, zero, batches)
    join = lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:])
    return jax.tree.map(lambda x: x / parts, total), jax.tree.map(join, each)
