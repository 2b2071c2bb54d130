"""What a config means: its names and numbers become functions, or a clear refusal."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import (
    evaluation,
    keys,
    likelihood,
    loss_aware,
    losses,
    metrics,
    samplers,
    schedules,
    targets,
    weightings,
    writers,
)
from .config import SAMPLERS, SCHEDULES, TIMES, WEIGHTINGS, Config, Optimizer, fields
from .data import (
    DATASETS,
    Dataset,
    Examples,
    batch_indices,
    check_workers,
    first,
    in_range,
    load,
    train_batch,
    train_batches,
)
from .denoisers import classifier_free, clip_x_0, denoiser, time_input, unit_input, unit_output
from .learned_variance import hybrid_loss
from .models import MODELS, MLPConfig, UNetConfig, apply
from .parallel import RUNNERS
from .process import prior_sample
from .super_resolution import enlarge, psnr, shrink, small_image
from .training import TrainState, ema_warmup, init_state, several_steps, train_step
from .types import Array, Data, Denoiser, Key, Network

AT_LEAST = {
    "steps": 1,
    "steps_per_call": 1,
    "log_every": 1,
    "eval_every": 1,
    "sample_every": 1,
    "save_every": 1,
    "keep": 1,
    "keep_every": 1,
    "keep_best": 0,
    "skip_nonfinite": 0,
    "time_steps": 1,
    "seed": 0,
    "optimizer.warmup": 0,
    "optimizer.weight_decay": 0,
    "optimizer.accumulate": 1,
    "sampling.steps": 1,
    "sampling.columns": 1,
    "sampling.score": 0,
}
"""The least that a field of a config may be, if it is not None."""


def check(config: Config) -> None:
    """Refuse a config that cannot run, before anything is loaded or compiled.

    Raises:
      ValueError: naming the value, the constraint and the choices.
    """
    targets.row(config.target)
    make_weighting(config)
    make_sampler(config)
    _lookup("data set", DATASETS, config.data.name)
    _lookup("times", TIMES, config.sampling.times)
    _lookup("runner", RUNNERS, config.parallel)
    for name in config.writers:
        writers.check(name)
    check_workers(config.data.workers)
    values = fields(config)
    for name, least in AT_LEAST.items():
        if values[name] is not None and not values[name] >= least:
            raise ValueError(f"{name}={values[name]}: must be at least {least}")
    for rules in (_of_intervals, _of_objective, _of_optimizer, _of_sampling):
        for holds, what in rules(config):
            if not holds:
                raise ValueError(what)


def _of_intervals(c):
    """What must hold of a config, and what to say where it does not."""
    return (
        (
            c.eval_every % c.log_every == c.save_every % c.log_every == 0,
            f"eval_every={c.eval_every} and save_every={c.save_every}: must be "
            f"multiples of log_every={c.log_every}, so that a resumed run logs the same",
        ),
        (
            c.keep_best == 0 or c.save_every % c.eval_every == 0,
            f"keep_best={c.keep_best}: to find the best, save_every={c.save_every} must be a "
            f"multiple of eval_every={c.eval_every}",
        ),
        (
            not any(n % c.steps_per_call for n in (c.steps, c.log_every, c.sample_every)),
            f"steps_per_call={c.steps_per_call}: must be at least 1, and divide steps={c.steps}, "
            f"log_every={c.log_every} and sample_every={c.sample_every}",
        ),
    )


def _of_objective(c):
    table = c.schedule_options.get("steps", 1000)
    return (
        (
            c.time_steps is not None
            or not (c.loss_aware_times or c.time_input or c.bound_weight is not None),
            f"loss_aware_times={c.loss_aware_times}, time_input={c.time_input}, "
            f"bound_weight={c.bound_weight}: need discrete time, time_steps=T",
        ),
        (
            c.time_steps in (None, table) or not c.schedule.endswith("_betas"),
            f"time_steps={c.time_steps}: the table of {c.schedule} has {table} steps",
        ),
        (
            c.bound_weight is None or (c.bound_weight >= 0 and c.time_steps != 1),
            f"bound_weight={c.bound_weight}: must be at least 0, and time_steps at least 2",
        ),
        (
            c.bound_weight is None or not c.unit_output,
            f"bound_weight={c.bound_weight}: with unit_output=True no variance can be learned",
        ),
        (math.isfinite(c.schedule_shift), f"schedule_shift={c.schedule_shift}: must be finite"),
        (0 <= c.label_drop < 1, f"label_drop={c.label_drop}: must be in [0, 1)"),
    )


def _of_optimizer(c):
    o = c.optimizer
    return (
        (o.learning_rate > 0, f"optimizer.learning_rate={o.learning_rate}: must be positive"),
        (o.clip is None or o.clip > 0, f"optimizer.clip={o.clip}: must be positive, or None"),
        (
            o.decay_steps is None or o.decay_steps > o.warmup,
            f"optimizer.decay_steps={o.decay_steps}: must exceed warmup={o.warmup}, or be None",
        ),
        (
            0 <= o.beta_1 < 1 and 0 <= o.beta_2 < 1,
            f"optimizer.beta_1={o.beta_1}, beta_2={o.beta_2}: must be in [0, 1)",
        ),
        (0 <= c.ema < 1, f"ema={c.ema}: must be in [0, 1)"),
    )


def _of_sampling(c):
    s = c.sampling
    return (
        (
            c.bound_weight is not None or s.options.get("variance") != "learned",
            "sampling.options variance=learned: the run must learn one, by its bound_weight",
        ),
        (
            c.low is not None or c.augment == s.level == 0,
            f"augment={c.augment}, sampling.level={s.level}: need low, a small image's side",
        ),
        (
            0 <= s.level <= c.augment <= 1,
            f"sampling.level={s.level}, augment={c.augment}: need 0 <= level <= augment <= 1",
        ),
        (math.isfinite(s.guidance), f"sampling.guidance={s.guidance}: must be finite"),
        (
            c.low is None or s.guidance == 1,
            f"sampling.guidance={s.guidance}: super-resolution (low={c.low}) has none, 1",
        ),
        (
            s.guidance == 1 or c.model.null_label,
            f"sampling.guidance={s.guidance}: needs model.null_label=True (1 is no guidance)",
        ),
    )


def load_data(config: Config) -> Dataset:
    """The config's data set.

    Raises:
      ValueError, FileNotFoundError: as `data.load` does.
    """
    d = config.data
    return load(d.name, d.path, d.size, d.channels, d.unreadable, d.workers)


def check_data(config: Config, train: Examples, test: Examples) -> None:
    """Refuse data that the config's network cannot take.

    Raises:
      ValueError: naming the value and the constraint.
    """
    shape, model = train.x.shape[1:], config.model
    model.check_input(shape)
    make_grid(config)
    if config.data.shape not in (None, shape):
        raise ValueError(f"data.shape={config.data.shape}: the examples are of shape {shape}")
    if test.x.shape[1:] != shape:
        raise ValueError(f"held-out examples of shape {test.x.shape[1:]}, others {shape}")
    if len(shape) == 3 and shape[-1] not in (1, 3):
        raise ValueError(f"images of {shape[-1]} channels: need 1 (grey) or 3 (colour)")
    if len(shape) == 1 and shape[0] < 2:
        raise ValueError(f"vectors of {shape[0]} feature: need at least 2 to draw them")
    image_cond = isinstance(model, UNetConfig) and model.image_cond
    if image_cond != (config.low is not None):
        raise ValueError(
            f"model.image_cond={image_cond} and low={config.low}: the image that the network is "
            "given is the small one of super-resolution; give both, or neither"
        )
    square = shape[:1] == shape[1:2]
    if config.low is not None and (not square or config.low < 1 or shape[0] % config.low):
        raise ValueError(f"low={config.low}: must divide the side of square images, not {shape}")
    channels = shape[-1] * (1 if config.bound_weight is None else 2)
    if (model.out_channels or shape[-1]) != channels:
        why = "no learned variance" if config.bound_weight is None else "a learned variance"
        raise ValueError(
            f"model.out_channels={model.out_channels}: data of {shape[-1]} channels and {why} "
            f"(bound_weight={config.bound_weight}) need {channels}"
        )
    if isinstance(model, UNetConfig):
        heights = [shape[0] // model.patch // 2**level for level in range(len(model.mults))]
        if not set(model.attention) <= set(heights):
            raise ValueError(f"model.attention={model.attention}: the heights are {heights}")
    if len(train.x) < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} exceeds the {len(train.x)} examples")
    if config.data.flip and len(shape) != 3:
        raise ValueError(f"data.flip=True needs images, not examples {shape}")
    for examples in (train, test) if model.labels else ():
        if examples.label is None:
            raise ValueError(f"model.labels={model.labels}: the data has no labels")
        if examples.label.max() >= model.labels:
            raise ValueError(
                f"model.labels={model.labels}: the data has labels up to {examples.label.max()}"
            )


def example_shape(config: Config) -> tuple[int, ...]:
    """The shape of one example: `config.data.shape`, or the data's own, which is then loaded.

    Raises:
      FileNotFoundError: if the config has none and the data is not there.
    """
    if config.data.shape is not None:
        return config.data.shape
    return load_data(config).train.x.shape[1:]


class Streams(NamedTuple):
    """The run's keys, one for each use: nothing is drawn twice from the same bits."""

    params: Key
    train: Key
    held_out: Key
    samples: Key


def make_streams(config: Config) -> Streams:
    """The keys of a run, from its seed. Threefry, whose draws do not depend on the layout."""
    return Streams(*jax.random.split(jax.random.key(config.seed, impl="threefry2x32"), 4))


def make_schedule(config: Config) -> schedules.Schedule:
    """The noise schedule that the config names."""
    schedule = _call("schedule", SCHEDULES, config.schedule, config.schedule_options)
    return schedules.shift(schedule, config.schedule_shift) if config.schedule_shift else schedule


def make_weighting(config: Config) -> weightings.Weighting | None:
    """The loss weighting that the config names."""
    return _call("weighting", WEIGHTINGS, config.weighting, config.weighting_options)


def make_sampler(config: Config) -> Callable[..., samplers.Sampler]:
    """The sampler that the config names, a function of (denoise, schedule)."""
    c = config.sampling
    schedule = make_schedule(config)
    _call("sampler", SAMPLERS, c.sampler, c.options, denoise=lambda *_: None, schedule=schedule)
    return functools.partial(SAMPLERS[c.sampler], **c.options)


def make_grid(config: Config) -> Array:
    """The times that the config's samples walk along.

    Raises:
      ValueError: if two of them fall together: more steps than float32 can tell apart.
    """
    ts = TIMES[config.sampling.times](make_schedule(config), config.sampling.steps)
    samplers.check_times(np.asarray(ts), stochastic=True)
    return ts


def make_initial_state(
    config: Config, shape: tuple[int, ...], tx: optax.GradientTransformation, times: "Times"
) -> Callable[[], TrainState]:
    """() -> the state before the first step, for data of a shape."""

    def initial_state():
        streams = make_streams(config)
        params = make_params(config, streams.params, shape)
        return init_state(streams.train, params, tx, times.init())

    return initial_state


def make_params(config: Config, key: Key, shape: tuple[int, ...]) -> Any:
    """Fresh parameters of the config's network, for data of a shape."""
    module = MODELS[type(config.model)](config.model)
    batch = {"x": jnp.zeros((1, *shape)), "label": jnp.zeros(1, jnp.int32)}
    cond = make_condition(config)(keys.per_example(key, 1), batch)
    return module.init(key, batch["x"], jnp.zeros(1), cond)["params"]


def describe_step(config: Config, n: int, taken: int) -> str:
    """The learning rate after so many steps, and which of n examples the next one looks at."""
    rate = np.asarray(make_learning_rate(config.optimizer)(taken))
    index = batch_indices(config.seed, taken, n, config.batch_size)
    return f"learning rate {rate:.3g}, examples {index.tolist()}"


def make_learning_rate(o: Optimizer) -> optax.Schedule:
    """Learning rate as a function of the step: warm-up, then constant or a cosine to zero."""
    if o.decay_steps is None:
        # Optax's warm-up of no steps would stay at 0.
        first = 0.0 if o.warmup else o.learning_rate
        return optax.warmup_constant_schedule(first, o.learning_rate, o.warmup)
    return optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup, o.decay_steps)


def make_optimizer(o: Optimizer) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (AdamW if there is weight decay)."""
    adam = optax.adamw(make_learning_rate(o), b1=o.beta_1, b2=o.beta_2, weight_decay=o.weight_decay)
    return adam if o.clip is None else optax.chain(optax.clip_by_global_norm(o.clip), adam)


def make_step(
    config: Config, loss_fn: Callable, tx: optax.GradientTransformation, times: "Times"
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`train_step` as the config has it, for `Runner.step`."""
    schedule = make_schedule(config)

    def measure(seen):
        t, each = seen
        return {"by_log_snr": metrics.by_log_snr(schedule.log_snr(t), each)}

    step = functools.partial(
        train_step,
        loss_fn=loss_fn,
        tx=tx,
        ema_decay=ema_warmup(config.ema),
        accumulate=config.optimizer.accumulate,
        remember=times.remember,
        measure=measure,
        skip_nonfinite=config.skip_nonfinite > 0,
    )
    return step if config.steps_per_call == 1 else several_steps(step)


def make_steps(config: Config, start: int) -> range:
    """Steps taken before each call of the compiled step, in a run that goes on from `start`.

    Raises:
      ValueError: if it would not get to `config.steps` by whole calls.
    """
    k = config.steps_per_call
    if start % k:
        raise ValueError(f"steps_per_call={k}: must divide {start}, the step to go on from")
    return range(start, config.steps, k)


def make_batch(config: Config, examples: Examples, slots: np.ndarray) -> Callable[..., Any]:
    """Steps taken -> what the next call of the compiled step trains on, on the host."""
    options = {"batch_size": config.batch_size, "slots": slots, "flip": config.data.flip}
    if config.steps_per_call == 1:
        return functools.partial(train_batch, examples, config.seed, **options)
    count = config.steps_per_call
    return functools.partial(train_batches, examples, config.seed, count=count, **options)


def make_network(config: Config) -> Callable[..., Data]:
    """The network that the config names: (params, x_t, log_snr, cond) -> an estimate of the target.

    With the keyword `dropout`, keys `[batch]`, in training mode (see `models.apply`).
    """
    module = MODELS[type(config.model)](config.model)
    schedule = make_schedule(config)

    def network(params, x_t, log_snr, cond=None, **dropout):
        f = functools.partial(apply, module, params, **dropout)
        if config.time_input and config.time_steps is not None:
            f = time_input(f, schedule, config.time_steps)
        f = unit_input(f, schedule) if config.unit_input else f
        f = unit_output(f, config.target, schedule) if config.unit_output else f
        return f(x_t, log_snr, cond)

    return network


def make_denoiser(
    config: Config, network: Network, guidance: float = 1.0, clip: bool = True
) -> Denoiser:
    """The network's denoiser: guided, and clipped if the data is images."""
    schedule = make_schedule(config)
    learned = config.bound_weight is not None
    denoise = denoiser(network, schedule, config.target, learned_variance=learned)
    if guidance != 1:
        denoise = classifier_free(denoise, guidance, {"label": np.int32(config.model.labels)})
    images = not isinstance(config.model, MLPConfig)
    return clip_x_0(denoise, schedule) if clip and images else denoise


def make_condition(config: Config) -> Callable[..., Any]:
    """What the network is conditioned on: (keys `[batch]`, batch, train=False, level=None) -> cond.

    The `label` of the batch, if the model has labels; in training sometimes the null label. For
    super-resolution the batch's `small` images, or the means of its `x`, diffused to the time
    `level`, or, if None, to one at random.
    """
    schedule = make_schedule(config)

    def condition(key, batch, train=False, level=None):
        key_label, key_level, key_noise = (keys.fold_in(key, use) for use in range(3))
        cond = {}
        if config.model.labels:
            cond["label"] = batch["label"]
        if train and config.model.null_label:
            drop = jax.vmap(lambda k: jax.random.bernoulli(k, config.label_drop))(key_label)
            cond["label"] = jnp.where(drop, config.model.labels, batch["label"])
        if config.low is not None:
            small = batch["small"] if "small" in batch else shrink(batch["x"], config.low)
            t = config.augment * jax.vmap(jax.random.uniform)(key_level) if level is None else level
            cond |= small_image(key_noise, schedule, small, t)
        return cond or None

    return condition


class Times(NamedTuple):
    """How training draws its times.

    Attributes:
      init: () -> what it carries along, `TrainState.extra`.
      draw: (key, extra, index `[batch]`) -> times and the weights of their losses, `[batch]`.
      remember: (extra, (times, unweighted losses) of the global batch) -> the next extra; None if
        it carries nothing along.
    """

    init: Callable[[], Any]
    draw: Callable[[Key, Any, Array], tuple[Array, Array]]
    remember: Callable[[Any, tuple[Array, Array]], Any] | None


def make_times(config: Config) -> Times:
    """Stratified uniform times, or loss-aware ones."""
    n, steps = config.batch_size, config.time_steps

    def uniform(key, extra, index):
        t = losses.sample_times(key, n, steps, index)
        return t, jnp.ones_like(t)

    def aware(key, history, index):
        return loss_aware.loss_aware_times(key, history, n, index)

    if not config.loss_aware_times or steps is None:
        return Times(tuple, uniform, None)
    return Times(
        functools.partial(loss_aware.loss_history, steps),
        aware,
        lambda history, seen: loss_aware.remember_losses(history, *seen),
    )


def make_objective(config: Config, levels: int | None) -> Callable[..., Array]:
    """`diffusion_loss`, or, if the run learns a variance, `hybrid_loss` for so many `levels`."""
    if config.bound_weight is None:
        return losses.diffusion_loss
    return functools.partial(hybrid_loss, bound_weight=config.bound_weight, levels=levels)


def make_bound(
    config: Config, network: Callable[..., Data], levels: int | None, samples: int = 32
) -> Callable[[Any, dict[str, Array]], Array]:
    """A pure function (params, batch) -> the bound on -log p of each example, nats `[batch]`.

    In the run's own time, discrete or continuous, and with its labels. Example i draws from the
    seed and `batch["index"][i]` alone.
    """
    schedule = make_schedule(config)
    variance = "learned" if config.bound_weight is not None else "posterior"
    conditioned = _make_conditioned(config, network)

    def bound(params, batch):
        key, _, key_cond = jax.random.split(make_streams(config).held_out, 3)
        return likelihood.elbo(
            keys.fold_in(key, batch["index"]),
            conditioned(params, key_cond, batch),
            schedule,
            batch["x"],
            config.time_steps,
            variance=variance,
            levels=levels,
            samples=samples,
        ).nats

    return bound


def make_flow_bound(
    config: Config, network: Callable[..., Data], levels: int | None, steps: int = 50
) -> Callable[[Any, dict[str, Array]], Array]:
    """The same by the probability flow, on dequantised data, with Hutchinson's estimate.

    Its denoiser is not clipped: clipped, the flow would be of no density.
    """
    schedule = make_schedule(config)
    conditioned = _make_conditioned(config, network, clip=False)

    def bound(params, batch):
        _, key, key_cond = jax.random.split(make_streams(config).held_out, 3)
        denoise = conditioned(params, key_cond, batch)
        key_cell, key_signs = (keys.fold_in(k, batch["index"]) for k in jax.random.split(key))
        x, log_volume = batch["x"], 0.0
        if levels is not None:
            x, log_volume = likelihood.dequantise(key_cell, x, levels)
        log_p = likelihood.flow_log_likelihood(denoise, schedule, x, key_signs, steps=steps)
        return -log_p - log_volume

    return bound


def make_generate(
    config: Config, network: Callable[..., Data], shape: tuple[int, ...]
) -> Callable[[Any, dict[str, Array]], Data]:
    """A pure function (params, batch) -> samples `[batch, *shape]`.

    Sample i depends on the config, the parameters, `batch["index"][i]` and what it is conditioned
    on alone, so that it is the same on any number of devices and in any batch.
    """
    schedule, ts = make_schedule(config), make_grid(config)
    conditioned = _make_conditioned(config, network, config.sampling.guidance)

    def generate(params, batch):
        key_prior, key_walk, key_cond = jax.random.split(make_streams(config).samples, 3)
        keys_prior, keys_walk = (keys.fold_in(k, batch["index"]) for k in (key_prior, key_walk))
        sampler = make_sampler(config)(conditioned(params, key_cond, batch), schedule)
        x_1 = prior_sample(keys_prior, schedule, (len(batch["index"]), *shape))
        return samplers.sample(keys_walk, sampler, x_1, ts)[0]

    return generate


def _make_conditioned(config, network, guidance=1.0, clip=True):
    """(params, key, batch) -> the denoiser, bound to what the batch is conditioned on."""
    condition = make_condition(config)

    def conditioned(params, key, batch):
        keys_cond = keys.fold_in(key, batch["index"])
        cond = condition(keys_cond, batch, level=config.sampling.level)
        denoise = make_denoiser(config, functools.partial(network, params), guidance, clip)
        return functools.partial(denoise, cond=cond)

    return conditioned


def make_cascade(
    small: Config,
    small_network: Callable[..., Data],
    config: Config,
    network: Callable[..., Data],
    shape: tuple[int, ...],
) -> Callable[[Any, dict[str, Array]], Data]:
    """A pure function ((small's params, params), batch) -> samples, enlargements of small samples.

    Args:
      small: of a run on images of side `config.low`.
      small_network: its network.
      config: of a run of super-resolution.
      network: its network.
      shape: of the images that it enlarges to.

    Raises:
      ValueError: if `config` is none of super-resolution, or `small` draws no such images.
    """
    if config.low is None:
        raise ValueError("low=None: the second run of a cascade must be one of super-resolution")
    small_shape = (config.low, config.low, shape[-1])
    small.model.check_input(small_shape)
    # Of one seed, both would draw the same noise.
    config = dataclasses.replace(config, seed=small.seed + 1)
    sample_small = make_generate(small, small_network, small_shape)
    sample = make_generate(config, network, shape)

    def generate(params, batch):
        return sample(params[1], batch | {"small": sample_small(params[0], batch)})

    return generate


def ask(config: Config, test: Examples, n: int) -> dict[str, np.ndarray]:
    """The batch that asks `make_generate` for n samples: of each class in turn, if there are any.

    Super-resolution is asked to enlarge the first n held-out images, made small; they are its `x`.
    """
    if config.low is not None:
        return first(test, n)
    index = np.arange(n, dtype=np.int32)
    label = {"label": index % config.model.labels} if config.model.labels else {}
    return {"index": index} | label


def score(
    config: Config, dataset: Dataset, asked: dict[str, np.ndarray], x: np.ndarray
) -> dict[str, float]:
    """What `evaluation.score` says of the samples x that were asked for.

    For super-resolution, beside 10,000 of the images to train on, and with `psnr`, in decibels, of
    one sample for each image; and both of bicubic enlargement, `_bicubic`.
    """
    if config.low is None:
        return evaluation.score(x, asked.get("label"), *in_range(dataset))
    real, truth = first(dataset.train, 10_000)["x"], asked["x"]
    bicubic = np.asarray(enlarge(shrink(truth, config.low), x.shape[1]))
    scores = evaluation.score(x, None, real, None)
    return scores | {
        "frechet_pca24_bicubic": evaluation.score(bicubic, None, real, None)["frechet_pca24"],
        "psnr": float(psnr(x, truth).mean()),
        "psnr_bicubic": float(psnr(bicubic, truth).mean()),
    }


def _lookup(kind, table, name):
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: one of {', '.join(table)}")
    return table[name]


def _call(kind, table, name, options, **given):
    make = _lookup(kind, table, name)
    # What is a function by default (a schedule's scales) is for Python, not for a config.
    defaults = {
        n: p.default
        for n, p in inspect.signature(make).parameters.items()
        if n not in given and not callable(p.default)
    }
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(
                f"{kind} {name} has no option {option}; it has {', '.join(defaults) or 'none'}"
            )
        number = not isinstance(defaults[option], str)
        if number and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{kind} {name}: {option}={value}: must be a finite number")
    return make(**given, **options)
