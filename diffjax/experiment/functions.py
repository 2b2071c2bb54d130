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

from .. import keys, latents, loss_aware, losses, models, samplers, schedules
from ..augmentations import AUGMENTATIONS
from ..couplings import COUPLINGS
from ..denoisers import (
    clip_x_0,
    denoiser,
    flow_map,
    fourier_features,
    is_flow_map,
    predict,
    time_input,
    unit_input,
    unit_output,
    with_schedule,
)
from ..densities import DENSITIES, relative
from ..flow_maps import flow_map_loss
from ..guidance import GUIDANCES, STEP_GUIDANCES
from ..learned_schedule import continuous_bound_loss
from ..learned_variance import hybrid_loss
from ..samplers import SAMPLERS, TIMES, Sampler
from ..schedules import SCHEDULES, MonotoneParams, Schedule, monotone
from ..tiling import cover, tiled
from ..training import TrainState, ema_warmup, init_state, projected
from ..training.averaging import averaging
from ..types import Array, Data, Denoiser, Key, Network, Real, known
from ..weightings import WEIGHTINGS, Weighting
from .conditioning import make_condition, make_null, take_without
from .config import Config, Weaker, known_name, parse_guidance, take_weaker
from .rules import check, log_snr_shift, network_shape

SCHEDULE = "schedule"
"""The name of a learned schedule's parameters, beside those of the network."""


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
      schedule: the noise schedule; one that is learned is as it is before training, and
        `with_parameters` gives the experiment on the one that was learned.
      weighting: the weighting of the loss; None for unit variance.
      objective: (levels of the data, or None; the mapped axis over which a batch is split, or None)
        -> `diffusion_loss` with the config's coupling, `hybrid_loss` if a variance is learned,
        `continuous_bound_loss` if the schedule is, or `flow_map_loss`, whose teacher, if it has
        one, `trained.inherit` sets.
      times: how training draws its times.
      init: (key, shape of an example) -> fresh parameters of the network, and of the schedule if
        it is learned.
      apply: (params, x_t, log_snr, cond) -> an estimate of the target; with the keyword `dropout`,
        keys `[batch]`, in training mode. `partial(apply, params)` is a network.
      balance: (params, log_snr, losses) -> what training minimises, `[batch]` each: the losses, or
        exp(-u) loss + u if the uncertainty u is learned.
      condition: (keys `[batch]`, batch, drop=False, cond_noise=None, told=None) -> what the network
        is conditioned on, or None; `told` is of `augment`.
      denoiser: network -> denoiser, neither guided nor clipped; or flow map, which is one too.
      guide: (denoiser, start=denoiser, weaker=None) -> denoiser, by the chain of guidances in
        `sampling.guidance`. The chain begins with `start`; `weaker` is the denoiser of the network
        below.
      weaker: the network that the chain guides away from, or None.
      example: (keys `[batch]`, a batch's `x`) -> the examples that the network is trained on: the
        same, or latents that are drawn by their moments, and scaled.
      augment: (keys `[batch]`, examples, whether in training) -> augmented images in training, and
        windows, if the network takes these, else the same; and what the network is told of it, or
        None.
      clip: denoiser -> denoiser, whose x_0 stays in [-1, 1] if the data are images.
      sampler: (denoiser, finish) -> `Sampler`. A guidance that acts on a whole step, if the chain
        begins with one, is applied to the denoiser; `finish`, denoiser -> denoiser, does the rest.
      grid: () -> the times that samples walk along; a ValueError if two of them fall together.
      learning_rate: steps taken -> learning rate.
      ema_decay: steps taken -> decay of the moving average.
      optimizer: the optax transformation, which tracks the averages too, if there are any.
      keys: () -> the keys of the run, from its seed.
    """

    config: Config
    schedule: Schedule
    weighting: Weighting | None
    objective: Callable[..., Callable[..., Array]]
    times: Times
    init: Callable[[Key, tuple[int, ...]], Any]
    apply: Callable[..., Data]
    balance: Callable[[Any, Array, Array], Array]
    condition: Callable[..., Any]
    example: Callable[[Key, Data], Data]
    augment: Callable[[Key, Data, bool], tuple[Data, Any]]
    denoiser: Callable[[Network], Denoiser]
    guide: Callable[..., Denoiser]
    weaker: Weaker | None
    clip: Callable[[Denoiser], Denoiser]
    sampler: Callable[[Denoiser, Callable[[Denoiser], Denoiser]], Sampler]
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
    project = models.MODELS[models.name_of(config.model)].project

    def init(key, shape):
        x = jnp.zeros((1, *network_shape(config, shape)))
        batch = {"x": x, "label": jnp.zeros(1, jnp.int32)}
        cond = make_condition(config, schedule)(keys.per_example(key, 1), batch)
        if models.takes(config.model, "two_times"):
            cond = {**(cond or {}), "log_snr_s": jnp.zeros(1)}
        make = lambda x_t, log_snr, cond: module.init(key, x_t, log_snr, cond)
        params: Any = _featured(config, make)(x, jnp.zeros(1), cond)["params"]
        if config.learned_uncertainty:
            own = models.Uncertainty().init(keys.fold_in(key, 1), jnp.zeros(1))["params"]
            params = {**params, "uncertainty": own}
        params = params if project is None else project(params)
        return {**params, SCHEDULE: _parameters(schedule)} if config.learns_schedule else params

    def balance(params, log_snr, each):
        if not config.learned_uncertainty:
            return each
        u = jnp.asarray(models.Uncertainty().apply({"params": params["uncertainty"]}, log_snr))
        return jnp.exp(-u) * each + u

    coupling = _coupling(config)

    def objective(levels, axis_name=None):
        weight = config.bound_weight
        if config.learns_schedule:  # by the bound's own weight, in continuous time
            return lambda *args, weight, steps, **options: continuous_bound_loss(
                *args, levels=levels, **options
            )
        if config.objective == "flow_map":
            return functools.partial(flow_map_loss, **_loss_of_map(config.flow_map))
        if weight is None:
            return functools.partial(losses.diffusion_loss, coupling=coupling(axis_name))
        return functools.partial(hybrid_loss, bound_weight=weight, levels=levels)

    kind = config.data.latents

    def example(key, x):
        return x if kind is None else latents.draw(key, x, latents.LATENTS[kind])

    augmentation = _augmentation(config)
    augment_dim = models.takes(config.model, "augment_dim")

    def augment(key, x, train):
        if augmentation is None or not (train or augmentation.side):
            return x, None
        x, told = jax.vmap(augmentation.draw)(key, x)
        return x, told if augment_dim else None

    def streams():
        # Threefry, whose draws do not depend on the layout of the devices.
        return Streams(*jax.random.split(jax.random.key(config.seed, impl="threefry2x32"), 4))

    optimizer = _optimizer(config, project)
    on_schedule = _on_schedule(config, schedule)
    if config.learns_schedule:
        on_schedule["denoiser"] = _without_parameters
    return Experiment(
        config=config,
        weighting=bind("weighting", WEIGHTINGS, config.weighting, config.weighting_options)(),
        objective=objective,
        init=init,
        balance=balance,
        example=example,
        augment=augment,
        learning_rate=_learning_rate(config.optimizer),
        ema_decay=ema_warmup(config.ema)
        if config.ema_warmup
        else lambda _: jnp.asarray(config.ema),
        optimizer=_tracking(optimizer, config.averages),
        keys=streams,
        **on_schedule,
    )


def with_parameters(e: Experiment, params: Any) -> Experiment:
    """The experiment on the schedule that is among the parameters, if its schedule is learned.

    If its schedule is fixed, this is e itself.

    >>> e = resolve(Config(schedule="monotone", weighting="elbo", model=models.MLPConfig()))
    >>> params = e.init(jax.random.key(0), (2,))
    >>> params["schedule"]["log_snr_max"] += 1
    >>> [float(f.schedule.log_snr(0.0)) for f in (e, with_parameters(e, params))]
    [10.0, 11.0]
    """
    if not e.config.learns_schedule:
        return e
    own = params[SCHEDULE]
    inside = MonotoneParams(*(own[name] for name in MonotoneParams._fields))
    schedule = monotone(inside, own["log_snr_min"], own["log_snr_max"])
    return e._replace(**_on_schedule(e.config, schedule))


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
      e: the experiment, of `with_parameters`.
      wrap: denoiser -> denoiser, such as `e.clip`.
      params: of the network.
      key: the key of the conditioning noise, one.
      batch: `index`, and what the network is conditioned on.
    """
    denoise = wrap(e.denoiser(functools.partial(e.apply, params)))
    return functools.partial(denoise, cond=condition_of(e, key, batch))


def condition_of(e: Experiment, key: Key, batch: Any) -> Any:
    """What the network is conditioned on when it samples; the arguments are as in `conditioned`."""
    keys_cond = keys.fold_in(key, batch["index"])
    return e.condition(keys_cond, batch, cond_noise=e.config.sampling.cond_noise)


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
    signature = inspect.signature(table[name]).parameters
    annotations = {n: p.annotation for n, p in signature.items()}
    parameters = {
        # An argument that is a function (a schedule's scales) is for Python, not for a config.
        n: p.default
        for n, p in signature.items()
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
        if annotations[option] in (int, int | None) and not isinstance(value, int):
            raise ValueError(f"{kind} {name}: {option}={value}: must be a whole number")
    missing = [
        n for n, p in parameters.items() if p is inspect.Parameter.empty and n not in options
    ]
    if missing:
        raise ValueError(f"{kind} {name} needs {', '.join(f'{n}=NUMBER' for n in missing)}")
    return functools.partial(table[name], **options)


def _on_schedule(config: Config, schedule: Schedule) -> dict[str, Any]:
    """The fields of an `Experiment` that depend on its schedule."""
    learned_variance = config.bound_weight is not None
    of_step, guide, weaker = _guidance(config, schedule)
    whole = _of_windows(config)

    def clip(denoise):
        if config.data.latents is not None:  # which have no range
            return denoise
        clipped = clip_x_0(denoise, schedule)
        of_rank = lambda x_t: clipped if x_t.ndim == 4 else denoise
        images_clipped = lambda x_t, t, cond=None, s=None: predict(of_rank(x_t), x_t, t, cond, s)
        return with_schedule(schedule, images_clipped, is_flow_map(denoise))

    def grid():
        ts = TIMES[config.sampling.grid](schedule, config.sampling.steps)
        if known(ts):
            # stochastic: the times must fall
            samplers.check_times(np.asarray(ts), stochastic=True)
        return ts

    return dict(
        schedule=schedule,
        times=_times(config, schedule),
        apply=_apply(config, models.make_module(config.model), schedule),
        condition=make_condition(config, schedule),
        denoiser=lambda network: whole(
            flow_map(network, schedule, config.target)
            if config.objective == "flow_map"
            else denoiser(network, schedule, config.target, learned_variance=learned_variance)
        ),
        guide=guide,
        weaker=weaker,
        clip=clip,
        sampler=_sampler(config, schedule, of_step),
        grid=grid,
    )


def _without_parameters(network):
    raise ValueError(
        "schedule=monotone: the schedule is learned, so that a denoiser needs its parameters; take "
        "with_parameters(resolve(config), params).denoiser"
    )


def _parameters(schedule):
    """The parameters of a `monotone` schedule, by name."""
    inside, low, high = schedule.log_snr.args
    named = inside._asdict() | {"log_snr_min": low, "log_snr_max": high}
    return {name: jnp.asarray(x, float) for name, x in named.items()}


def _schedule(config):
    schedule = bind("schedule", SCHEDULES, config.schedule, config.schedule_options)()
    shift = log_snr_shift(config)
    return schedules.shift(schedule, shift) if shift else schedule


def _coupling(config):
    """The mapped axis over which a batch is split, or None -> the coupling."""
    make = bind("coupling", COUPLINGS, config.coupling, config.coupling_options, ("axis_name",))
    make()  # which refuses options out of range
    gathers = "axis_name" in inspect.signature(make).parameters
    return lambda axis_name: make(axis_name=axis_name) if gathers else make()


def _sampler(config, schedule, of_step):
    table = {name: row.make for name, row in SAMPLERS.items()}
    name, options = config.sampling.sampler, config.sampling.options
    make = bind("sampler", table, name, options, ("denoise", "flow_map", "schedule"))
    # This refuses options out of range.
    if make(lambda *_: None, schedule).stochastic and config.coupling != "independent":
        raise ValueError(
            f"sampler {name}: with coupling={config.coupling} the network has learned no score, "
            "which a stochastic sampler needs; use a deterministic one, such as ddim or heun"
        )

    def sampler(denoise, finish):
        return of_step(lambda guided, schedule: make(finish(guided), schedule), denoise)

    return sampler


def _loss_of_map(options):
    """The options of `flow_map_loss`."""
    ours = {
        "guidance",
        "guidance_to",
        "start",
    }  # which concern the teacher and the first parameters
    return {name: value for name, value in vars(options).items() if name not in ours}


def _guidance(config, schedule):
    """The chain, as (make, denoiser) -> sampler, (denoiser, ...) -> denoiser, and a `Weaker`."""
    supplied = {"schedule": schedule}
    weaker, chain = None, []
    of_step = lambda make, denoise: make(denoise, schedule)
    learned = config.flow_map.guidance_to is not None  # then the network is given the weight
    for word in () if learned else config.sampling.guidance:
        name, options = parse_guidance(word)
        known_name("guidance", GUIDANCES | STEP_GUIDANCES, name)
        table = STEP_GUIDANCES if name in STEP_GUIDANCES else GUIDANCES
        first, *others = inspect.signature(table[name]).parameters
        options, named = take_weaker(name, options)
        options, without = take_without(config, name, options)
        null = {"null": make_null(config, schedule, without)}
        weaker = named or weaker
        known = (first, "denoise", "weaker", "schedule", "null")
        guidance = bind("guidance", table, name, options, known)
        if table is STEP_GUIDANCES:
            of_step = functools.partial(guidance, **supplied, **null)
        else:
            chain.append((guidance, others, null))

    def guide(denoise, start=None, weaker=None):
        guided = denoise if start is None else start
        for make, parameters, null in chain:
            available = supplied | null | {"denoise": denoise, "weaker": weaker}
            guided = make(guided, **{n: v for n, v in available.items() if n in parameters})
        return guided

    nothing = lambda x_t, t, cond=None: None
    guide(nothing, weaker=nothing)  # which refuses options out of range
    of_step(SAMPLERS["ddim"].make, nothing)  # and this
    return of_step, guide, weaker


def _augmentation(config):
    """The config's augmentation, after what the network is told of it is checked; None: none."""
    name, told = config.augmentation, models.takes(config.model, "augment_dim")
    if name is None:
        if told or config.augmentation_options:
            raise ValueError(
                f"model.augment_dim={told}, augmentation_options={config.augmentation_options}: "
                f"need an augmentation, one of {', '.join(AUGMENTATIONS)}"
            )
        return None
    found = bind("augmentation", AUGMENTATIONS, name, config.augmentation_options)()
    if told not in (0, found.numbers):
        raise ValueError(
            f"model.augment_dim={told}: augmentation {name} has {found.numbers} numbers; 0 tells "
            "the network nothing"
        )
    return found


def _of_windows(config):
    """Denoiser -> denoiser of whole images, if that of the network is of windows."""
    found = _augmentation(config)
    if found is None or found.side is None:
        return lambda denoise: denoise
    half = max(1, found.side // 2)
    overlap = half if config.sampling.overlap is None else config.sampling.overlap
    if not 1 <= overlap < found.side:
        raise ValueError(
            f"sampling.overlap={overlap}: must be at least 1, and less than the side of windows, "
            f"{found.side}"
        )
    if config.low_resolution is not None:
        _check_small_windows(config, found.side, overlap)

    def tell(cond, position):
        if not (cond and "augment" in cond):
            return cond
        return {**cond, "augment": jnp.broadcast_to(position, cond["augment"].shape)}

    return lambda denoise: tiled(denoise, found.side, overlap, tell)


def _check_small_windows(config, side, overlap):
    """Raise a ValueError unless every window has a small image of whole pixels."""
    low, size = config.low_resolution, config.data.image_size
    if size is None:
        raise ValueError(
            f"low_resolution={low} with augmentation=window: needs the size of the images, "
            "data.size, or data.shape, such as 28 28 1"
        )
    edges = [side, *(start for length in size for start in cover(length, side, overlap)[0])]
    if any(edge * low % size[0] for edge in edges):
        raise ValueError(
            f"low_resolution={low} of images of {size[0]} x {size[1]}: the small images of windows "
            f"of side={side}, with sampling.overlap={overlap}, are no whole pixels; choose another "
            "side or overlap"
        )


def _featured(config, network):
    """The network itself without Fourier features, so that nothing changes."""
    exponents = config.fourier_features
    return fourier_features(network, exponents) if exponents else network


def _apply(config, module, schedule):
    def apply(params, x_t, log_snr, cond=None, **dropout):
        f = _featured(config, functools.partial(models.apply, module, params, **dropout))
        if config.time_input and config.time_steps is not None:
            f = time_input(f, schedule, config.time_steps)
        f = unit_input(f, schedule) if config.unit_input else f
        f = unit_output(f, config.target, schedule) if config.scales_output else f
        return f(x_t, log_snr, cond)

    return apply


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


def _leaving(tx, names):
    """The same optimiser and state, without changes to parameters of these names.

    A mask of the weight decay would change the state, which older checkpoints hold.
    """
    named = lambda path: any(getattr(key, "key", None) in names for key in path)
    still = lambda path, u: jnp.zeros_like(u) if named(path) else u

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(still, updates), state

    return optax.GradientTransformation(tx.init, update)


def _optimizer(config, project):
    """Clipping by global norm, then Adam (AdamW if there is weight decay), then the projection.

    A learned schedule has an Adam of its own, without decay: its gradient has another scale, which
    the network's should not be clipped by.
    """
    o = config.optimizer
    tx = optax.adamw(_learning_rate(o), b1=o.beta_1, b2=o.beta_2, weight_decay=o.weight_decay)
    tx = _leaving(tx, models.UNTRAINED)  # which otherwise decay
    tx = tx if o.clip is None else optax.chain(optax.clip_by_global_norm(o.clip), tx)
    tx = tx if project is None else projected(tx, project)
    if not config.learns_schedule:
        return tx
    rate = _learning_rate(o)
    own = optax.adam(lambda step: o.schedule_factor * rate(step), o.beta_1, o.beta_2)
    which = lambda params: {name: SCHEDULE if name == SCHEDULE else "network" for name in params}
    return optax.partition({"network": tx, SCHEDULE: own}, which)
