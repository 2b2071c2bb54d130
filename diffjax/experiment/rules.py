"""Rules across the sections of a config, and between a config and its data.

The rules of one section stand beside its fields in `config`, those of a network in its own config
(`check_input`), those of one function (a schedule, a sampler) in that function.
"""

import inspect
import math

import numpy as np

from ..augmentations import AUGMENTATIONS
from ..averages import check_width
from ..couplings import COUPLINGS
from ..data import Examples, shape_of
from ..densities import DENSITIES
from ..guidance import GUIDANCES, STEP_GUIDANCES
from ..latents import LATENTS
from ..models import takes
from ..samplers import SAMPLERS
from ..schedules import LONGEST, SCHEDULES, Schedule, resolution_shift, ve
from ..super_resolution import size_of
from ..targets import decode, row, unit_variance
from ..training import writers
from ..training.averaging import DTYPES
from ..training.runners import RUNNERS
from ..weightings import WEIGHTINGS
from .conditioning import arguments, check_null, needs_null
from .config import (
    BEST,
    OBJECTIVES,
    Config,
    FlowMap,
    at_least,
    known_name,
    learned_weight,
    parse_guidance,
    require,
)

LARGEST_GAIN = 1e5
"""The largest factor from a network's relative error to x_0 without a warning. It is 1,800 for the
cosine schedule, 20,000 for its betas, and 160,000 for a table with zero terminal SNR."""
LARGEST_GAIN_OF_VELOCITY = 10.0
"""The largest factor from a flow map's network to its velocity. It is at most 1.5 for v, flow and
F, and grows without bound at one end for x_0, eps and the score, by which maps were learned 10 to
2,000 times worse."""
UNBOUNDED = {
    name
    for name, make in SCHEDULES.items()
    if any(p.default is ve for p in inspect.signature(make).parameters.values())
}
"""Schedules whose noise is unbounded: those of variance exploding scales."""


HIGHEST = 12
"""The largest exponent of a Fourier feature: 2^12 pi x_t has 12 bits left of float32's 24."""


def check(config: Config) -> None:
    """Refuse a config that cannot run, before anything is loaded or compiled.

    `resolve` calls this, and then refuses options that the functions themselves refuse.

    Raises:
      ValueError: naming the value, the constraint and the choices.
    """
    c = config
    row(c.target)
    known_name("schedule", SCHEDULES, c.schedule)
    known_name("weighting", WEIGHTINGS, c.weighting)
    known_name("density", DENSITIES, c.density)
    known_name("coupling", COUPLINGS, c.coupling)
    if c.parallel is not None:
        known_name("runner", RUNNERS, c.parallel)
    known_name("snapshot_dtype", DTYPES, c.snapshot_dtype)
    known_name("keep_best_by", BEST, c.keep_best_by)
    known_name("objective", OBJECTIVES, c.objective)
    for name in c.writers:
        writers.check(name)
    for section in (c.data, c.optimizer, c.sampling, c.eval, c.flow_map):
        section.check()
    at_least(c, steps=1, steps_per_call=1, log_every=1, eval_every=1, sample_every=1, save_every=1)
    at_least(c, snapshot_every=1)
    at_least(c, keep=1, keep_every=1, keep_best=0, skip_nonfinite=0, time_steps=1)
    require(
        (
            c.time_steps is None or c.time_steps <= LONGEST,
            f"time_steps={c.time_steps}: must be at most {LONGEST}",
        ),
        (0 <= c.ema < 1, f"ema={c.ema}: must be in [0, 1)"),
        (0 <= c.seed < 2**32, f"seed={c.seed}: must be in [0, 2**32)"),
        (0 <= c.label_drop < 1, f"label_drop={c.label_drop}: must be in [0, 1)"),
        (
            0 <= c.low_resolution_drop < 1,
            f"low_resolution_drop={c.low_resolution_drop}: must be in [0, 1)",
        ),
        (math.isfinite(c.schedule_shift), f"schedule_shift={c.schedule_shift}: must be finite"),
        *_of_intervals(c),
        *_of_averages(c),
        *_of_time(c),
        *_of_schedule(c),
        *_of_conditioning(c),
        *_of_coupling(c),
        *_of_flow_maps(c),
        *_of_guidance(c.sampling.guidance),
    )


def _of_intervals(c):
    return (
        (
            c.eval_every % c.log_every == c.save_every % c.log_every == 0,
            f"eval_every={c.eval_every} and save_every={c.save_every}: must be "
            f"multiples of log_every={c.log_every}, so that a resumed run logs the same",
        ),
        (
            c.keep_best == 0 or c.keep_best_by != "eval_loss" or c.save_every % c.eval_every == 0,
            f"keep_best={c.keep_best}: to find the best, save_every={c.save_every} must be a "
            f"multiple of eval_every={c.eval_every}",
        ),
        (
            c.keep_best_by != "eval_frechet" or c.eval.features is not None,
            f"keep_best_by={c.keep_best_by}: needs eval.features",
        ),
        (
            c.keep_best == 0
            or c.keep_best_by != "eval_frechet"
            or c.save_every % c.eval.every == 0,
            f"keep_best={c.keep_best}: to find the best, save_every={c.save_every} must be a "
            f"multiple of eval.every={c.eval.every}",
        ),
        (
            c.eval.features is None or c.eval.every % c.log_every == 0,
            f"eval.every={c.eval.every}: must be a multiple of log_every={c.log_every}",
        ),
        (
            c.eval.features is None or c.given_height is None,
            f"eval.features={c.eval.features}: a run that enlarges images "
            f"(low_resolution={c.low_resolution}) cannot draw samples by itself; sampling.cascade "
            "names the runs that draw its small images",
        ),
        (
            not any(n % c.steps_per_call for n in (c.steps, c.log_every, c.sample_every)),
            f"steps_per_call={c.steps_per_call}: must be at least 1, and divide steps={c.steps}, "
            f"log_every={c.log_every} and sample_every={c.sample_every}",
        ),
    )


def _of_averages(c):
    """Power-function averages and their snapshots."""
    for std in c.averages:
        check_width(std)
    return (
        (
            len({f"{std:g}" for std in c.averages}) == len(c.averages),
            f"averages={c.averages}: a width is there twice",
        ),
        (
            bool(c.averages) == (c.snapshot_every is not None),
            f"averages={c.averages}, snapshot_every={c.snapshot_every}: give both, or neither",
        ),
        (
            bool(c.averages) or c.snapshot_dtype == "float32",
            f"snapshot_dtype={c.snapshot_dtype}: there are no snapshots without averages",
        ),
        (
            c.snapshot_every is None or c.snapshot_every % c.log_every == 0,
            f"snapshot_every={c.snapshot_every}: must be a multiple of log_every={c.log_every}, "
            "at which the numbers are checked",
        ),
    )


def _of_time(c):
    """Discrete time, and what needs it."""
    steps = inspect.signature(SCHEDULES[c.schedule]).parameters.get("steps")
    table = None if steps is None else c.schedule_options.get("steps", steps.default)
    return (
        (
            None in (c.time_steps, table) or c.time_steps == table,
            f"time_steps={c.time_steps}: the table of {c.schedule} has {table} steps",
        ),
        (
            c.time_steps is not None
            or not (c.loss_aware_times or c.time_input or c.bound_weight is not None),
            f"loss_aware_times={c.loss_aware_times}, time_input={c.time_input}, "
            f"bound_weight={c.bound_weight}: need discrete time, time_steps=T",
        ),
        (
            not c.time_input
            or not (takes(c.model, "flow_time") or takes(c.model, "embedding") == "angle"),
            "time_input=True: model.flow_time=True and model.embedding=angle embed log-SNR, which "
            "the network would not be given",
        ),
        (
            not c.loss_aware_times or (c.density == "uniform" and c.density_weights),
            f"density={c.density}, density_weights={c.density_weights}: loss_aware_times=True has "
            "a density and weights of its own",
        ),
        (
            c.weighting != "edm" or c.density_weights,
            f"weighting=edm with density={c.density}, density_weights=False: this weight has the "
            "density of EDM's noise levels in it, which would count twice; use "
            "weighting=preconditioned",
        ),
        (
            c.bound_weight is None or (c.bound_weight >= 0 and c.time_steps != 1),
            f"bound_weight={c.bound_weight}: must be at least 0, and time_steps at least 2",
        ),
        (
            c.bound_weight is None or not c.scales_output,
            f"bound_weight={c.bound_weight}: with unit_output=True no variance can be learned",
        ),
        (
            c.bound_weight is not None or c.sampling.options.get("variance") != "learned",
            "sampling.options variance=learned: the run must learn one, by its bound_weight",
        ),
    )


def _of_schedule(c):
    """What a learned schedule is learned from, and the network's Fourier features."""
    fixed = not c.learns_schedule
    learned = f"schedule={c.schedule} is learned"
    return (
        (
            fixed or c.weighting == "elbo",
            f"weighting={c.weighting}: {learned}, from the bound, which is weighting=elbo; under "
            "another weighting the mean of the loss would depend on the schedule",
        ),
        (
            fixed or c.time_steps is None,
            f"time_steps={c.time_steps}: {learned}, in continuous time; in discrete time the bound "
            "depends on the whole schedule, not on its ends alone",
        ),
        (
            fixed or c.density == "uniform",
            f"density={c.density}: {learned}, and is itself the density of noise levels; give "
            "density=uniform",
        ),
        (
            fixed or not c.learned_uncertainty,
            f"learned_uncertainty={c.learned_uncertainty}: {learned}, from the bound, which has no "
            "uncertainty",
        ),
        (
            fixed or log_snr_shift(c) == 0,
            f"schedule_shift={log_snr_shift(c)}: {learned}, with its ends; give log_snr_min and "
            "log_snr_max in schedule_options, where they start",
        ),
        (
            fixed or c.low_resolution is None,
            f"low_resolution={c.low_resolution}: {learned}, and the low-resolution image would be "
            "diffused by another schedule at each step",
        ),
        (
            c.learns_schedule or c.optimizer.schedule_factor == 1,
            f"optimizer.schedule_factor={c.optimizer.schedule_factor}: needs a schedule that is "
            f"learned, schedule=monotone, not {c.schedule}",
        ),
        (
            len(set(c.fourier_features)) == len(c.fourier_features)
            and all(-HIGHEST <= n <= HIGHEST for n in c.fourier_features),
            f"fourier_features={c.fourier_features}: must be different, and from {-HIGHEST} to "
            f"{HIGHEST}",
        ),
        (
            not (c.fourier_features and c.unit_input),
            f"fourier_features={c.fourier_features}: their periods are those of the data's grid, "
            "which unit_input=True would scale",
        ),
    )


def log_snr_shift(config: Config) -> float:
    """What is added to the schedule's log-SNR, by `schedule_shift` and `schedule_base`.

    Raises:
      ValueError: if it depends on the size of the images, and the config does not say this.
    """
    base, size = config.schedule_base, config.data.image_size
    if base is None:
        return config.schedule_shift
    if size is None or base < 1:
        raise ValueError(
            f"schedule_base={base}: must be at least 1, and needs the size of the images, "
            "data.size, or data.shape, such as 28 28 1"
        )
    return config.schedule_shift + resolution_shift(*size, base)


def _of_conditioning(c):
    """Super-resolution, labels and guidance."""
    s = c.sampling
    learns_bound = c.learns_schedule or c.bound_weight is not None
    image_cond = takes(c.model, "image_cond")
    check_null(c)
    return (
        (
            c.low_resolution is not None or c.max_cond_noise == s.cond_noise == 0,
            f"max_cond_noise={c.max_cond_noise}, sampling.cond_noise={s.cond_noise}: need "
            "low_resolution, the height of the low-resolution image",
        ),
        (
            c.low_resolution is not None or c.low_resolution_drop == 0,
            f"low_resolution_drop={c.low_resolution_drop}: needs low_resolution, the height of the "
            "image that is dropped",
        ),
        (
            0 <= s.cond_noise <= c.max_cond_noise <= 1,
            f"sampling.cond_noise={s.cond_noise}, max_cond_noise={c.max_cond_noise}: need "
            "0 <= cond_noise <= max_cond_noise <= 1",
        ),
        (
            c.low_resolution is not None or not s.cascade,
            f"sampling.cascade={' '.join(s.cascade)}: its samples are small images; a run that "
            "enlarges them needs low_resolution, their height",
        ),
        (
            c.low_resolution is None or c.data.latents is None,
            f"low_resolution={c.low_resolution}: super-resolution is of images, not of "
            f"data.latents={c.data.latents}",
        ),
        (
            c.augmentation is None or not (learns_bound or c.data.latents),
            f"augmentation={c.augmentation}: latents are not augmented, nor images whose bound is "
            "learned (bound_weight, or schedule=monotone)",
        ),
        (
            s.overlap is None or (c.augmentation == "window" and s.overlap >= 1),
            f"sampling.overlap={s.overlap}: must be at least 1, with augmentation=window",
        ),
        (
            image_cond == (c.low_resolution is not None),
            f"model.image_cond={image_cond} and low_resolution={c.low_resolution}: the "
            "image that the network is given is that of super-resolution; give both, or neither",
        ),
    )


def _of_coupling(c):
    """What a coupling of data and noise excludes."""
    said = f"coupling={c.coupling}"
    independent = c.coupling == "independent"
    return (
        (
            independent or (c.bound_weight is None and c.weighting != "elbo"),
            f"{said}: weighting={c.weighting}, bound_weight={c.bound_weight} train on the bound, "
            "which needs coupling=independent",
        ),
        (
            c.coupling != "ot" or (c.low_resolution is None and not takes(c.model, "augment_dim")),
            f"{said}: with low_resolution={c.low_resolution} or model.augment_dim="
            f"{takes(c.model, 'augment_dim')} no two examples have the same condition, so that "
            "they have no noise to exchange; use coupling=independent or immiscible",
        ),
        (
            c.coupling != "ot" or c.optimizer.accumulate == 1,
            f"{said}: it pairs the whole batch, and optimizer.accumulate={c.optimizer.accumulate} "
            "would split that; use accumulate=1",
        ),
    )


def _of_guidance(chain):
    """What makes no sense in a chain of guidances, whatever their options."""
    said = f"sampling.guidance={' '.join(chain)}"
    names = [word.partition(":")[0] for word in chain]
    twice = sorted({name for name in names if names.count(name) > 1})
    amplify = [name for name in names if needs_null(name)]
    # Those that refer to the denoiser without guidance do nothing to it alone.
    alone = "denoise" in arguments(names[0])[1:] if names and names[0] in GUIDANCES else False
    late = [name for name in names[1:] if name in STEP_GUIDANCES]
    return (
        (not twice, f"{said}: {', '.join(twice)} is there twice"),
        (
            len(amplify) <= 1,
            f"{said}: {' and '.join(amplify)} both amplify the condition; choose one of them",
        ),
        (not alone, f"{said}: {''.join(names[:1])} changes the guidance before it; there is none"),
        (
            not late,
            f"{said}: {', '.join(late)} guides a whole step, and must be the first of the chain",
        ),
        (
            not {"apg_momentum", "within"} <= set(names),
            f"{said}: the momentum needs every step, which within leaves out; use apg",
        ),
    )


def _of_flow_maps(c):
    """Flow maps, and samplers that need one."""
    learned, s = c.objective == "flow_map", c.sampling
    jumps = SAMPLERS[s.sampler].two_times
    two_times, weighs = (takes(c.model, name) for name in ("two_times", "guidance_weight"))
    gain = learned and _gain_of_velocity(c.target)
    return (
        (
            learned or c.flow_map == FlowMap(),
            f"objective={c.objective}: the options of flow_map need objective=flow_map",
        ),
        (
            two_times == learned,
            f"model.two_times={two_times} and objective={c.objective}: a flow map needs a "
            "network with model.embedding=angle and model.two_times=True (unet, dit or mlp), and "
            "nothing else does",
        ),
        (
            gain <= LARGEST_GAIN_OF_VELOCITY,
            f"target={c.target}: at an end of the schedule the velocity has {gain:.0e} times the "
            "network's relative error, and flow maps do not learn; v, flow and F have no such "
            "factor",
        ),
        (
            not (learned and c.flow_map.identity == "lagrangian" and c.schedule in UNBOUNDED),
            f"flow_map.identity=lagrangian with schedule={c.schedule}: training diverges where "
            "noise is unbounded; use eulerian or semigroup, or a schedule of other scales",
        ),
        (
            not learned or (c.bound_weight is None and not c.time_input),
            f"objective=flow_map: bound_weight={c.bound_weight} and time_input={c.time_input} are "
            "of denoisers; leave them out",
        ),
        (
            not learned or (c.coupling == "independent" and not c.learns_schedule),
            f"objective=flow_map: coupling={c.coupling} and schedule={c.schedule} are of "
            "denoisers; take coupling=independent and a fixed schedule",
        ),
        (
            learned or not jumps,
            f"sampling.sampler={s.sampler}: needs a flow map, a run with objective=flow_map",
        ),
        (
            weighs == (c.flow_map.guidance_to is not None),
            f"model.guidance_weight={weighs} and flow_map.guidance_to="
            f"{c.flow_map.guidance_to}: give both, or neither",
        ),
        (
            not (jumps and s.guidance) or c.flow_map.guidance_to is not None,
            f"sampling.guidance={' '.join(s.guidance)} with sampling.sampler={s.sampler}: a map "
            "cannot be guided after training; guide its teacher, flow_map.guidance or guidance_to",
        ),
        (
            c.flow_map.guidance_to is None or 1 <= _weight_of(s.guidance) <= c.flow_map.guidance_to,
            f"sampling.guidance={' '.join(s.guidance)}: need one weight of classifier_free from 1 "
            f"to flow_map.guidance_to={c.flow_map.guidance_to}, which the map has learned",
        ),
    )


def _weight_of(guidance):
    """The weight of `learned_weight`, or -1 if the chain is another."""
    try:
        return learned_weight(guidance)
    except ValueError:
        return -1


def _gain_of_velocity(target):
    """The largest factor from a network's relative error to the error of dy/dphi (see `ode`)."""

    def gain(alpha, sigma):
        a, b = row(target)(alpha, sigma)
        per_out = (alpha**2 + sigma**2) ** 0.5 / abs(alpha * b - sigma * a)
        return per_out * (a**2 + b**2) ** 0.5

    return max(gain(1.0, 1e-3), gain(1e-3, 1.0))


def cautions(config: Config, schedule: Schedule, train: Examples) -> list[str]:
    """Warnings, a line each, of a config and data that a run accepts but that are likely mistakes.

    They are of float data without a negative number, and of a target whose estimate of x_0 at t = 1
    multiplies the network's relative error by more than `LARGEST_GAIN`. Another line says what
    pictures of samples show if they cannot show all.
    """
    x, found = train.x, []
    *around, channels = shape_of(x)
    if config.data.latents is not None and config.data.autoencoder is None:
        found.append(
            f"pictures show the {channels} channels of latents side by side, clipped to [-1, 1]; "
            "data.autoencoder=FILE makes images of them"
        )
    elif config.data.latents is None and len(around) == 2 and channels not in (1, 3):
        found.append(f"pictures show the {channels} channels side by side, in grey")
    elif not around and channels > 2:
        found.append(f"pictures show the first two of {channels} features")
    whole = network_shape(config, shape_of(x)) == shape_of(x)
    if config.augmentation is not None and whole and not takes(config.model, "augment_dim"):
        found.append(
            f"augmentation={config.augmentation}: the network is not told of it, so samples will "
            "look augmented too; model.augment_dim tells it"
        )
    if isinstance(x, np.ndarray) and x.dtype == np.float32 and x.min() >= 0:
        found.append(
            f"all numbers of the data are in [{x.min():.3g}, {x.max():.3g}]: the range of data is "
            "[-1, 1]; if theirs is [0, 1], store 2 x - 1"
        )
    alpha, sigma = schedule(1.0)
    one = np.ones(1, np.float32)
    per_out = decode(config.target, one, 0 * one, alpha, sigma).x_0[0]
    gain = float(abs(per_out) * unit_variance(config.target, alpha, sigma) ** 0.5)
    if gain > LARGEST_GAIN:
        found.append(
            f"target={config.target}: at t = 1, where the log-SNR is "
            f"{float(schedule.log_snr(1.0)):.3g}, x_0 has {gain:.1e} times the network's relative "
            "error; x_0 and v have no such factor"
        )
    return found


def check_low_resolution(low: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the small images of super-resolution, for images of this shape.

    Raises:
      ValueError: if these are no images, or none of this height has their proportions.
    """
    if len(shape) != 3 or not low <= shape[0]:
        raise ValueError(f"low_resolution={low}: must be at most the height of images, not {shape}")
    try:
        return (*size_of(shape, low), shape[-1])
    except ValueError as error:
        raise ValueError(f"low_resolution: {error}") from None


def network_shape(config: Config, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what the network is given, for examples of a shape: the same, or a window's.

    Raises:
      ValueError: if the examples are smaller than a window.
    """
    if config.augmentation is None or len(shape) != 3:
        return shape
    side = AUGMENTATIONS[config.augmentation](**config.augmentation_options).side
    if side is None:
        return shape
    if min(shape[:2]) < side:
        raise ValueError(f"augmentation=window: side={side} is larger than images of {shape[:2]}")
    return (side, side, shape[-1])


def check_data(config: Config, train: Examples, test: Examples) -> None:
    """Refuse data that the config's network cannot take.

    Raises:
      ValueError: naming the value and the constraint.
    """
    c, shape = config, shape_of(train.x)
    c.model.check_input(network_shape(c, shape))
    channels = shape[-1] * (1 if c.bound_weight is None else 2)
    variance = "no learned variance" if c.bound_weight is None else "a learned variance"
    guidances = [parse_guidance(word)[1] for word in c.sampling.guidance]
    most = max((options.get("channels", 0) for options in guidances), default=0)
    if c.low_resolution is not None:
        check_low_resolution(c.low_resolution, shape)
    require(
        (
            c.data.shape in (None, shape),
            f"data.shape={c.data.shape}: the examples are of shape {shape}",
        ),
        (
            test.x.shape[1:] == train.x.shape[1:],
            f"held-out examples of shape {test.x.shape[1:]}, others {train.x.shape[1:]}",
        ),
        (
            (c.data.latents is not None) == (train.x.dtype == np.float16),
            f"data.latents={c.data.latents}: the data are {train.x.dtype}, and latents, which are "
            f"float16, need one of {', '.join(LATENTS)}",
        ),
        (
            c.augmentation is None or len(shape) == 3,
            f"augmentation={c.augmentation}: is of images, not of data of shape {shape}",
        ),
        (
            (c.model.out_channels or shape[-1]) == channels,
            f"model.out_channels={c.model.out_channels}: data of {shape[-1]} channels and "
            f"{variance} (bound_weight={c.bound_weight}) need {channels}",
        ),
        (
            not c.fourier_features or c.model.out_channels == channels,
            f"fourier_features={c.fourier_features}: the network's input has more channels than "
            f"the data, so that it needs model.out_channels={channels}, not "
            f"{c.model.out_channels}",
        ),
        (
            most <= shape[-1],
            f"sampling.guidance={' '.join(c.sampling.guidance)}: guides {most} channels, and the "
            f"data have {shape[-1]}",
        ),
        (
            len(train.x) >= c.batch_size,
            f"batch_size={c.batch_size} exceeds the {len(train.x)} examples",
        ),
        (
            not c.sampling.eval_samples or min(len(train.x), len(test.x)) >= 2,
            f"sampling.eval_samples={c.sampling.eval_samples}: need at least 2 examples to train "
            f"on and 2 held out, not {len(train.x)} and {len(test.x)}",
        ),
        (
            len(shape) == 3 or not c.data.flip,
            f"data.flip=True needs images, not examples {shape}",
        ),
    )
    for examples in (train, test) if c.model.labels else ():
        if examples.label is None:
            raise ValueError(f"model.labels={c.model.labels}: the data has no labels")
        if examples.label.max() >= c.model.labels:
            raise ValueError(
                f"model.labels={c.model.labels}: the data has labels up to "
                f"{examples.label.max()}, which needs {examples.label.max() + 1}"
            )
