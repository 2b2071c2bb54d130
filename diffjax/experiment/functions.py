"""From a config to the functions that it means, once: `resolve(config) -> Experiment`."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from .. import keys, loss_aware, losses, models, samplers, schedules
from ..denoisers import (
    clip_x_0,
    denoiser,
    predict,
    time_input,
    unit_input,
    unit_output,
    with_schedule,
)
from ..densities import DENSITIES, relative
from ..flow_maps import flow_map, flow_map_loss
from ..guidance import GUIDANCES
from ..learned_variance import hybrid_loss
from ..samplers import SAMPLERS, TIMES, Sampler
from ..schedules import SCHEDULES, Schedule
from ..super_resolution import shrink, small_image
from ..training import TrainState, ema_warmup, init_state, projected
from ..training.averaging import averaging
from ..types import Array, Data, Denoiser, Key, Network, Real
from ..weightings import WEIGHTINGS, Weighting
from .config import Config, known_name, learned_weight, parse_guidance
from .rules import check


class Streams(NamedTuple):
    """The keys of a run, one for each use, so that nothing is drawn twice from the same bits."""

    params: Key
    train: Key
    held_out: Key
    samples: Key


class Times(NamedTuple):
    """How training draws its times.

    Attributes:
      check: raise a ValueError if the schedule holds almost nothing of the density.
      init: () -> the first value of `TrainState.extra`.
      draw: (key, extra, index `[batch]`, n) -> times, and weights of their losses, `[batch]`; the
        times are stratified over n examples, those of a batch by default.
      remember: (extra, `t` and `loss` of the global batch, by name) -> the next extra; None if
        nothing is carried from step to step.
    """

    check: Callable[[], object]
    init: Callable[[], Any]
    draw: Callable[..., tuple[Array, Array]]
    remember: Callable[[Any, dict[str, Array]], Any] | None


class Experiment(NamedTuple):
    """What a config means: its values, and the functions that its names stand for.

    None of these functions depends on the data or has started JAX when `resolve` returns.

    Attributes:
      config: the config, checked.
      schedule: the noise schedule.
      weighting: the weighting of the loss; None for unit variance.
      objective: (levels of the data, or None) -> `diffusion_loss`, `hybrid_loss` if a variance is
        learned, or `flow_map_loss`, whose teacher, if it has one, `trained.inherit` sets.
      times: how training draws its times.
      init: (key, shape of an example) -> fresh parameters of the network.
      apply: (params, x_t, log_snr, cond) -> an estimate of the target; with the keyword `dropout`,
        keys `[batch]`, in training mode. `partial(apply, params)` is a network.
      balance: (params, log_snr, losses) -> what training minimises, `[batch]` each: the losses, or
        exp(-u) loss + u if the uncertainty u is learned.
      condition: (keys `[batch]`, batch, drop=False, cond_noise=None) -> what the network is
        conditioned on, or None.
      denoiser: network -> denoiser, neither guided nor clipped; or flow map, which is one too.
      guide: denoiser -> denoiser, by the chain of guidances in `sampling.guidance`.
      clip: denoiser -> denoiser, whose x_0 stays in [-1, 1] if the data are images.
      sampler: denoiser -> `Sampler`.
      grid: () -> the times that samples walk along; a ValueError if two of them fall together.
      learning_rate: steps taken -> learning rate.
      ema_decay: steps taken -> decay of the moving average.
      optimizer: the optax transformation, which tracks the averages too, if there are any.
      keys: () -> the keys of the run, from its seed.
    """

    config: Config
    schedule: Schedule
    weighting: Weighting | None
    objective: Callable[[int | None], Callable[..., Array]]
    times: Times
    init: Callable[[Key, tuple[int, ...]], Any]
    apply: Callable[..., Data]
    balance: Callable[[Any, Array, Array], Array]
    condition: Callable[..., Any]
    denoiser: Callable[[Network], Denoiser]
    guide: Callable[[Denoiser], Denoiser]
    clip: Callable[[Denoiser], Denoiser]
    sampler: Callable[[Denoiser], Sampler]
    grid: Callable[[], Float[Real, " times"]]
    learning_rate: optax.Schedule
    ema_decay: Callable[[Array], Array]
    optimizer: optax.GradientTransformation
    keys: Callable[[], Streams]


def resolve(config: Config) -> Experiment:
    """The functions that a config means.

    Raises:
      ValueError: if the config cannot run; names the value, the constraint and the choices.

    >>> e = resolve(Config())
    >>> float(e.schedule.log_snr(0.5))
    0.0
    >>> zero = lambda x_t, log_snr, cond: 0 * x_t
    >>> denoise = e.clip(e.guide(e.denoiser(zero)))
    >>> denoise(jnp.ones((1, 8, 8, 1)), 0.5).x_0.max()  # x_t / alpha_t is 1.41
    Array(1., dtype=float32)
    """
    check(config)
    schedule = _schedule(config)
    module = models.make_module(config.model)
    condition = _condition(config, schedule)
    project = models.MODELS[models.name_of(config.model)].project
    learned = config.bound_weight is not None

    def init(key, shape):
        batch = {"x": jnp.zeros((1, *shape)), "label": jnp.zeros(1, jnp.int32)}
        cond = condition(keys.per_example(key, 1), batch)
        if models.takes(config.model, "two_times"):
            cond = {**(cond or {}), "log_snr_s": jnp.zeros(1)}
        params = module.init(key, batch["x"], jnp.zeros(1), cond)["params"]
        if config.learned_uncertainty:
            own = models.Uncertainty().init(keys.fold_in(key, 1), jnp.zeros(1))["params"]
            params = {**params, "uncertainty": own}
        return params if project is None else project(params)

    def balance(params, log_snr, each):
        if not config.learned_uncertainty:
            return each
        u = jnp.asarray(models.Uncertainty().apply({"params": params["uncertainty"]}, log_snr))
        return jnp.exp(-u) * each + u

    def objective(levels):
        weight = config.bound_weight
        if config.objective == "flow_map":
            return functools.partial(flow_map_loss, **_loss_of_map(config.flow_map))
        if weight is None:
            return losses.diffusion_loss
        return functools.partial(hybrid_loss, bound_weight=weight, levels=levels)

    def clip(denoise):
        clipped = clip_x_0(denoise, schedule)
        of_rank = lambda x_t: clipped if x_t.ndim == 4 else denoise
        images_clipped = lambda x_t, t, cond=None, s=None: predict(of_rank(x_t), x_t, t, cond, s)
        return with_schedule(schedule, images_clipped)

    def grid():
        ts = TIMES[config.sampling.grid](schedule, config.sampling.steps)
        samplers.check_times(np.asarray(ts), stochastic=True)  # stochastic: the times must fall
        return ts

    def streams():
        # Threefry, whose draws do not depend on the layout of the devices.
        return Streams(*jax.random.split(jax.random.key(config.seed, impl="threefry2x32"), 4))

    return Experiment(
        config=config,
        schedule=schedule,
        weighting=bind("weighting", WEIGHTINGS, config.weighting, config.weighting_options)(),
        objective=objective,
        times=_times(config, schedule),
        init=init,
        apply=_apply(config, module, schedule),
        balance=balance,
        condition=condition,
        denoiser=lambda network: (
            flow_map(network, schedule, config.target)
            if config.objective == "flow_map"
            else denoiser(network, schedule, config.target, learned_variance=learned)
        ),
        guide=_guide(config, schedule),
        clip=clip,
        sampler=_sampler(config, schedule),
        grid=grid,
        learning_rate=_learning_rate(config.optimizer),
        ema_decay=ema_warmup(config.ema)
        if config.ema_warmup
        else lambda _: jnp.asarray(config.ema),
        optimizer=_tracking(_optimizer(config.optimizer, project), config.averages),
        keys=streams,
    )


def initial_state(e: Experiment, shape: tuple[int, ...]) -> Callable[[], TrainState]:
    """() -> the state before the first step, for data of a shape."""

    def make():
        streams = e.keys()
        params = e.init(streams.params, shape)
        return init_state(streams.train, params, e.optimizer, e.times.init())

    return make


def conditioned(
    e: Experiment, wrap: Callable[[Denoiser], Denoiser], params: Any, key: Key, batch: Any
) -> Denoiser:
    """The denoiser of samples and likelihoods, bound to the conditioning of a batch.

    Args:
      e: the experiment.
      wrap: denoiser -> denoiser, such as `e.clip`.
      params: of the network.
      key: the key of the conditioning noise, one.
      batch: `index`, and what the network is conditioned on.
    """
    keys_cond = keys.fold_in(key, batch["index"])
    cond = e.condition(keys_cond, batch, cond_noise=e.config.sampling.cond_noise)
    denoise = wrap(e.denoiser(functools.partial(e.apply, params)))
    return functools.partial(denoise, cond=cond)


def bind(
    kind: str,
    table: Mapping[str, Callable],
    name: str,
    options: dict[str, Any],
    known: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """The function of a table with options bound, after the options are checked.

    Args:
      kind: what the table holds, for messages.
      table: functions by name.
      name: of the function.
      options: its keyword arguments.
      known: the arguments that the run supplies, which are no options.

    Raises:
      ValueError: if the name or an option is unknown, an option is missing, or one that must be a
        finite number is none.
    """
    known_name(kind, table, name)
    parameters = {
        # An argument that is a function (a schedule's scales) is for Python, not for a config.
        n: p.default
        for n, p in inspect.signature(table[name]).parameters.items()
        if n not in known and (p.default is p.empty or not callable(p.default))
    }
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(
                f"{kind} {name} has no option {option}; it has {', '.join(parameters) or 'none'}"
            )
        number = not isinstance(parameters[option], str)
        if number and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{kind} {name}: {option}={value}: must be a finite number")
    missing = [
        n for n, p in parameters.items() if p is inspect.Parameter.empty and n not in options
    ]
    if missing:
        raise ValueError(f"{kind} {name} needs {', '.join(f'{n}=NUMBER' for n in missing)}")
    return functools.partial(table[name], **options)


def _schedule(config):
    schedule = bind("schedule", SCHEDULES, config.schedule, config.schedule_options)()
    shift = config.schedule_shift
    return schedules.shift(schedule, shift) if shift else schedule


def _loss_of_map(options):
    """The options of `flow_map_loss`."""
    ours = {
        "guidance",
        "guidance_to",
        "start",
    }  # which concern the teacher and the first parameters
    return {name: value for name, value in vars(options).items() if name not in ours}


def _sampler(config, schedule):
    table = {name: row.make for name, row in SAMPLERS.items()}
    name, options = config.sampling.sampler, config.sampling.options
    make = bind("sampler", table, name, options, ("denoise", "flow_map", "schedule"))
    make(lambda *_: None, schedule)  # which refuses options out of range
    return lambda denoise: make(denoise, schedule)


def _guide(config, schedule):
    """denoiser -> denoiser, by the config's chain."""
    supplied = {"schedule": schedule, "null": {"label": np.int32(config.model.labels)}}
    chain = []
    learned = config.flow_map.guidance_to is not None  # then the network is given the weight
    for word in () if learned else config.sampling.guidance:
        name, options = parse_guidance(word)
        known_name("guidance", GUIDANCES, name)
        first, *others = inspect.signature(GUIDANCES[name]).parameters
        known = (first, "denoise", *supplied)
        chain.append((bind("guidance", GUIDANCES, name, options, known), others))

    def guide(denoise):
        guided = denoise
        for make, parameters in chain:
            available = supplied | {"denoise": denoise}
            guided = make(guided, **{n: v for n, v in available.items() if n in parameters})
        return guided

    guide(lambda x_t, t, cond=None: None)  # which refuses options out of range
    return guide


def _apply(config, module, schedule):
    def apply(params, x_t, log_snr, cond=None, **dropout):
        f = functools.partial(models.apply, module, params, **dropout)
        if config.time_input and config.time_steps is not None:
            f = time_input(f, schedule, config.time_steps)
        f = unit_input(f, schedule) if config.unit_input else f
        f = unit_output(f, config.target, schedule) if config.unit_output else f
        return f(x_t, log_snr, cond)

    return apply


def _condition(config, schedule):
    """`Experiment.condition`.

    The `label` of the batch, if the model has labels, and with `drop` sometimes the null label. For
    super-resolution the batch's `small` images, or the means of its `x`, diffused to the time
    `cond_noise`, or, if None, to a random one. The weight of guidance, if a flow map learns it:
    with `drop` a random one, else that of sampling.
    """
    labels, low = config.model.labels, config.low_resolution

    def condition(key, batch, drop=False, cond_noise=None):
        key_label, key_time, key_noise, key_weight = (keys.fold_in(key, use) for use in range(4))
        cond = {}
        if labels:
            cond["label"] = batch["label"]
        if drop and config.model.null_label:
            none = jax.vmap(lambda k: jax.random.bernoulli(k, config.label_drop))(key_label)
            cond["label"] = jnp.where(none, labels, batch["label"])
        if low is not None:
            small = batch["small"] if "small" in batch else shrink(batch["x"], low)
            t = cond_noise
            if t is None:
                t = config.max_cond_noise * jax.vmap(jax.random.uniform)(key_time)
            cond |= small_image(key_noise, schedule, small, t)
        most = config.flow_map.guidance_to
        if most is not None:
            uniform = jax.vmap(jax.random.uniform)(key_weight)
            chosen = learned_weight(config.sampling.guidance)
            cond["guidance"] = 1 + (most - 1) * uniform if drop else 0 * uniform + chosen
        return cond or None

    return condition


def _times(config, schedule):
    """Stratified times of a density of noise levels, or loss-aware ones."""
    batch_size, steps = config.batch_size, config.time_steps
    make = bind("density", DENSITIES, config.density, config.density_options, ("schedule",))

    def density():
        with jax.ensure_compile_time_eval():  # values, also while a step is traced
            return make(schedule)

    def of_density(key, extra, index, n=batch_size):
        # For uniform times the schedule need not be inverted.
        chosen = None if config.density == "uniform" else density()
        t = losses.sample_times(key, n, steps, index, chosen)
        if chosen is None or not config.density_weights:
            return t, jnp.ones_like(t)
        return t, 1 / relative(chosen, t, steps)

    def aware(key, history, index, n=batch_size):
        return loss_aware.loss_aware_times(key, history, n, index)

    def remember(history, seen):
        return loss_aware.remember_losses(history, seen["t"], seen["loss"])

    if not config.loss_aware_times:
        return Times(density, tuple, of_density, None)
    return Times(density, functools.partial(loss_aware.loss_history, steps), aware, remember)


def _learning_rate(o):
    """Warm-up, then constant, a cosine to zero, or the inverse square root of the step."""
    if o.decay_steps is not None:
        return optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup, o.decay_steps)
    # With zero steps of warm-up, optax would stay at the initial value.
    first = 0.0 if o.warmup else o.learning_rate
    ramp = optax.warmup_constant_schedule(first, o.learning_rate, o.warmup)
    since = o.inverse_sqrt_from
    if since is None:
        return ramp
    return lambda step: ramp(step) / jnp.sqrt(jnp.maximum(step / since, 1))


def _tracking(tx, averages):
    """Without averages the optimiser itself, so that its state is what it always was."""
    return averaging(tx, averages) if averages else tx


def _optimizer(o, project):
    """Clipping by global norm, then Adam (AdamW if there is weight decay), then the projection."""
    tx = optax.adamw(_learning_rate(o), b1=o.beta_1, b2=o.beta_2, weight_decay=o.weight_decay)
    tx = tx if o.clip is None else optax.chain(optax.clip_by_global_norm(o.clip), tx)
    return tx if project is None else projected(tx, project)
