"""Samples of a trained network: which samples, how they are drawn, and the file that holds them.

Sample i depends only on the settings and on i, and is equal bit for bit on any number of devices of
one kind. For this, each device computes samples in tiles of one size: the rounding of a matrix
product depends on the size of the matrix, and would otherwise depend on the number of devices.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from .. import data, keys, models, samplers
from ..data import limits
from ..denoisers import schedule_of
from ..experiment import (
    Config,
    Experiment,
    Sampling,
    Walk,
    config as config_lib,
    resolve,
    with_parameters,
)
from ..experiment.config import known_name, require
from ..experiment.functions import Streams, condition_of
from ..experiment.rules import network_shape
from ..experiment.run_directory import check_average
from ..process import prior_sample
from ..published import cascades, trained
from ..super_resolution import enlarge, psnr, shrink
from ..training import parsing
from ..training.files import digest, file_digest, replacing, write_text
from ..training.runners import Runner, in_batches
from ..training.store import fetched
from ..types import Data, LearnedPrediction
from . import distances

TILE = 64
"""Samples that a device draws at once."""
TILES = {"cpu": 16}
"""The same number on the platforms where it differs."""
MANIFEST = "manifest.json"
MOST_ROWS = 20
"""The most classes that have a row of their own in a picture."""
PATIENCE = 10.0
"""Seconds between two lines that say how many samples are done, where there is no terminal."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Which samples to draw, and how."""

    n: int = 1000
    """Number of samples."""
    label: int | None = None
    """Class of all samples; with None, sample i is of class i modulo the number of classes."""
    seed: int = 0
    """Seed of the noise."""
    walk: tyro.conf.OmitArgPrefixes[Walk] = Walk()  # noqa: RUF009, it is frozen
    """How the samples are drawn."""
    average: float | None = None
    """Relative width, such as 0.1, of the power-function average of parameters to draw with, made
    from the run's snapshots; None: the moving average of decay `ema`."""


def drawn_by(config: Config, drawing: Drawing) -> Experiment:
    """The experiment of a run, with the seed and the walk of a drawing.

    Raises:
      ValueError: if the drawing is invalid, or does not fit this run.

    >>> drawn_by(Config(), Drawing(seed=3, walk=Walk(sampler="edm"))).config.sampling.grid
    'karras'
    """
    if drawing.n < 1:
        raise ValueError(f"n={drawing.n}: must be at least 1")
    sampling = dataclasses.replace(config.sampling, **_shallow(drawing.walk))
    config = dataclasses.replace(config, sampling=sampling, seed=drawing.seed)
    if config.given_height is not None:
        raise ValueError(
            f"low_resolution={config.low_resolution}: the run enlarges images, and cannot draw "
            "samples by itself; give it the runs that draw the small ones, --cascade RUN"
        )
    e, classes = resolve(config), cascades.classes(config)
    if drawing.label is not None and not 0 <= drawing.label < classes:
        has = f"classes 0 to {classes - 1}" if classes else "no classes"
        raise ValueError(f"label={drawing.label}: the run has {has}")
    if drawing.average is not None:
        check_average(config, drawing.average)
    return e


class Stage(NamedTuple):
    """A run that draws samples of a shape, and the network that it guides away from, if any."""

    experiment: Experiment
    shape: tuple[int, ...]
    weaker: Experiment | None = None


class Others(NamedTuple):
    """The trained networks that a run's samples depend on beside its own, loaded.

    Attributes:
      stages: those of its cascade, which draw the small images.
      weaker: the experiment of the network that it guides away from; None if there is none.
      join: parameters -> what the function of `make_generate` then takes for parameters.
      settings: what the settings of samples say of them.
    """

    stages: tuple[Stage, ...] = ()
    weaker: Experiment | None = None
    join: Callable[[Any], Any] = lambda params: params
    settings: dict[str, Any] = {}  # noqa: RUF012, it is never changed


def make_generate(
    e: Experiment, shape: tuple[int, ...], others: Others = Others()
) -> Callable[[Any, dict[str, Any]], Data]:
    """A pure function (params, batch) -> samples `[batch, *shape]`.

    Sample i depends only on the experiment, the parameters, `batch["index"][i]` and its
    conditioning, so that it is the same on any number of devices and in any batch.

    Args:
      e: the experiment.
      shape: shape of a sample.
      others: of `load_others`. The parameters are then what its `join` makes of those of the run.

    Raises:
      ValueError: if `e` guides by a weaker network, and there is none, or it does not fit.
    """
    last = Stage(e, shape, others.weaker)
    return make_cascade((*others.stages, last)) if others.stages else _make_generate(last)


def make_cascade(stages: Sequence[Stage]) -> Callable[[Any, dict[str, Any]], Data]:
    """A pure function (parameters of each stage, batch) -> samples of the last stage.

    Args:
      stages: the first draws images from nothing, and each other one enlarges what the stage before
        it has drawn. Their noise depends on the seed of the last, and on their place before it.

    Raises:
      ValueError: if a stage but the first does not enlarge images of the size that it is given, or
        as for `make_generate`.
    """
    cascades.check_sizes([(stage.experiment.config, stage.shape) for stage in stages])
    last = stages[-1].experiment

    def streams(place):  # with the same keys, all stages would draw the same noise
        return lambda: Streams(*map(functools.partial(keys.fold_in, data=place), last.keys()))

    first = [
        _make_generate(stage._replace(experiment=stage.experiment._replace(keys=streams(place))))
        for place, stage in zip(range(len(stages) - 1, 0, -1), stages[:-1], strict=True)
    ]
    each = (*first, _make_generate(stages[-1]))

    def generate(params, batch):
        small = {}
        for draw, own in zip(each, params, strict=True):
            small = {"small": draw(own, batch | small)}
        return small["small"]

    return generate


def _make_generate(stage):
    """`make_generate` of one stage, which takes small images, if it enlarges them, as `small`."""
    e, shape, weaker = stage
    # That of a fixed schedule is computed here, where its values are known and checked.
    fixed = None if e.config.learns_schedule else e.grid()
    if e.weaker is not None and weaker is None:
        raise ValueError(
            f"sampling.guidance={' '.join(e.config.sampling.guidance)}: the weaker network "
            f"{e.weaker.source} is not loaded here; sample.py and evaluate.py do that"
        )

    def generate(params, batch):
        key_prior, key_walk, key_cond = jax.random.split(e.keys().samples, 3)
        keys_prior, keys_walk = (keys.fold_in(k, batch["index"]) for k in (key_prior, key_walk))
        other = None
        if weaker is not None:
            params, other = params[0], weaker.denoiser(functools.partial(weaker.apply, params[1]))
        now = with_parameters(e, params)
        cond = condition_of(now, key_cond, batch)
        x_1 = prior_sample(keys_prior, now.schedule, (len(batch["index"]), *shape))
        if getattr(e.config.model, "bfloat16", False):
            params = models.cast_ahead(now.apply, params, x_1, jnp.zeros(len(x_1)), cond)
        denoise = now.denoiser(functools.partial(now.apply, params))

        def finish(guided):
            return functools.partial(now.clip(now.guide(denoise, guided, other)), cond=cond)

        ts = now.grid() if fixed is None else fixed
        return samplers.sample(keys_walk, now.sampler(denoise, finish), x_1, ts)[0]

    return generate


def load_others(e: Experiment, shape: tuple[int, ...]) -> Others:
    """Load the networks that the experiment's samples depend on beside its own, if there are any.

    Raises:
      FileNotFoundError, ValueError: if one cannot be loaded, or was trained for other samples.
    """
    stages, joined, about = [], [], []
    for source, config, size in cascades.chain(e.config, shape):
        _, params, _ = trained.load(source)
        walk = dataclasses.replace(config.sampling, cascade=())
        own = resolve(dataclasses.replace(config, sampling=walk))
        check_shape(own, params, size)
        check_parameters(params, Path(source))
        weaker, join, settings = _load_weaker(own, size)
        stages.append(Stage(own, size, weaker))
        joined.append(join(params))
        about.append(_described(own, parameters(config, params)) | settings)
    weaker, join, settings = _load_weaker(e, shape)
    if not stages:
        return Others((), weaker, join, settings)
    together = lambda own: (*joined, join(own))
    return Others(tuple(stages), weaker, together, settings | {"stages": about})


def _load_weaker(e, shape):
    """The network that the experiment guides away from: `weaker`, `join` and `settings`."""
    if e.weaker is None:
        return None, lambda params: params, {}
    source, average = e.weaker
    _, params, config = trained.load(source, average)
    weaker = resolve(dataclasses.replace(config, sampling=Sampling()))
    told = models.takes(config.model, "augment_dim")
    require(
        (
            config.model.labels in (0, e.config.model.labels),
            f"weaker={source}: it has {config.model.labels} classes, not "
            f"{e.config.model.labels}, or none",
        ),
        (
            config.low_resolution == e.config.low_resolution,
            f"weaker={source}: it has low_resolution={config.low_resolution}, not "
            f"{e.config.low_resolution}",
        ),
        (
            told in (0, models.takes(e.config.model, "augment_dim")),
            f"weaker={source}: it has model.augment_dim={told}, not that of the run, or 0",
        ),
    )
    try:
        check_shape(weaker, params, shape)
        schedule_of(weaker.denoiser(functools.partial(weaker.apply, params)), e.schedule)
    except ValueError as error:
        raise ValueError(f"weaker={source}: {error}") from error
    check_parameters(params, Path(source))
    about = {"weaker": parameters(config, params, average)}
    return weaker, lambda own: (own, params), about


def picture_rows(config: Config) -> int:
    """Rows of a run's picture: one for each class; if they are too many, as many as columns.

    More than `MOST_ROWS` classes are too many. Super-resolution enlarges one row of images.

    >>> picture_rows(Config()), Config().sampling.columns
    (10, 10)
    """
    if config.given_height is not None:
        return 1
    labels = cascades.classes(config)
    return labels if 0 < labels <= MOST_ROWS else config.sampling.columns


def request(config: Config, test: data.Examples, n: int) -> dict[str, np.ndarray]:
    """A batch for which the function of `make_generate` draws n samples, of each class in turn.

    In super-resolution without a cascade the samples enlarge the first n held-out images, which are
    the batch's `x`.
    """
    if config.given_height is not None:
        return data.first(test, n)
    index, classes = np.arange(n, dtype=np.int32), cascades.classes(config)
    return {"index": index} | ({"label": index % classes} if classes else {})


def evaluate(
    config: Config, dataset: data.Dataset, requested: dict[str, np.ndarray], x: np.ndarray
) -> dict[str, float]:
    """The results of `distances.from_halves` for samples x of a `request`.

    In super-resolution without a cascade they are the distance to 10,000 of the training images,
    `psnr`, in decibels, of one sample per image, and both numbers for bicubic enlargement, with the
    suffix `_bicubic`.

    Raises:
      FloatingPointError: if a sample is not finite.
    """
    check_finite(x)
    if config.given_height is None:
        real, label = data.all_examples(dataset)
        return distances.from_halves(x, requested.get("label"), real, label)
    real, truth = data.first(dataset.train, 10_000)["x"], requested["x"]
    bicubic = np.asarray(enlarge(shrink(truth, config.given_height), x.shape[1]))
    found = distances.from_halves(x, None, real, None)
    return found | {
        "frechet_pca24_bicubic": distances.from_halves(bicubic, None, real, None)["frechet_pca24"],
        "psnr": float(psnr(x, truth).mean()),
        "psnr_bicubic": float(psnr(bicubic, truth).mean()),
    }


def labels(config: Config, drawing: Drawing) -> np.ndarray | None:
    """The classes of the samples, `[n]`, or None if the run has none."""
    classes = cascades.classes(config)
    if not classes:
        return None
    if drawing.label is not None:
        return np.full(drawing.n, drawing.label, np.int32)
    return np.arange(drawing.n, dtype=np.int32) % classes


def settings(e: Experiment, drawing: Drawing, params: Any) -> dict[str, Any]:
    """Everything that the samples depend on, as JSON values.

    Args:
      e: the experiment that `drawn_by` returned.
      drawing: which samples.
      params: the parameters, which are hashed.

    Returns:
      The fields of the drawing and of its walk; `function_evaluations`; `parameters`; `config`.
    """
    chosen = _shallow(drawing) | _walk_settings(e.config)
    del chosen["walk"]
    return _as_json(chosen | _described(e, parameters(e.config, params, drawing.average)))


def _described(e, parameters):
    """What a network's samples depend on: its parameters and its config; and what they cost."""
    return {
        "function_evaluations": function_evaluations(e),
        "parameters": parameters,
        "config": config_lib.to_tree(e.config),
    }


def parameters(config: Config, params: Any, average: float | None = None) -> dict[str, Any]:
    """The decay `ema` of the parameters' average, or its width `average`, and their hash."""
    kind = {"ema": config.ema} if average is None else {"average": average}
    return kind | {"sha256": digest(params)}


def function_evaluations(e: Experiment) -> int:
    """How often the experiment's sampler calls the denoiser for one sample.

    With classifier-free guidance each call is two evaluations of the network.

    >>> function_evaluations(drawn_by(Config(), Drawing(walk=Walk(sampler="heun", steps=7))))
    14
    """
    calls = []

    def denoise(x_t, t, cond=None, s=None):
        calls.append(None)  # not t, which would leak out of the trace
        return LearnedPrediction(x_t, x_t, x_t)

    sampler = e.sampler(denoise, lambda _: denoise)
    step = lambda key, x: sampler.step(key, sampler.init(x), jnp.float32(1), jnp.float32(0.5))
    jax.eval_shape(step, jax.random.key(0), jnp.zeros((1, 2)))
    return len(calls) * e.config.sampling.steps


def check_shape(e: Experiment, params: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the network takes examples of this shape.

    A network of super-resolution takes the shape of its run only, because the factor by which it
    enlarges images is that of its training.
    """
    if e.config.low_resolution is not None and e.config.data.shape not in (None, shape):
        raise ValueError(
            f"shape {shape}: the network enlarges images to {e.config.data.shape}; another factor "
            "needs another run"
        )
    e.config.model.check_input(network_shape(e.config, shape))
    made = jax.eval_shape(lambda key: e.init(key, shape), jax.random.key(0))
    if jax.tree.map(jnp.shape, made) != jax.tree.map(jnp.shape, params):
        raise ValueError(f"examples of shape {shape} are not what the network was trained on")


def draw(
    runner: Runner,
    generate: Callable[[Any, dict[str, Any]], Data],
    params: Any,
    label: np.ndarray | None,
    indices: range,
    size: int,
    store: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Iterator[np.ndarray]:
    """Draw samples over all devices of all processes, with one compiled program.

    Args:
      runner: maps over the devices.
      generate: a function that `make_generate` made.
      params: its parameters.
      label: the class of every sample, or None.
      indices: which samples to draw.
      size: samples per batch over all devices, if there are as many; rounded up to whole tiles on
        each device.
      store: what the network makes -> what is stored and measured (`pixels.Form.store`); by
        default the same.

    Yields:
      The next samples, in every process.

    Raises:
      FloatingPointError: if a sample is not finite.
    """
    tile = TILES.get(jax.default_backend(), TILE)
    whole = tile * jax.device_count()
    size = -(-min(size, max(1, len(indices))) // whole) * whole
    mapped = runner.map(_in_tiles(generate, tile, size))
    for start in range(indices.start, indices.stop, size):
        index = np.arange(start, min(start + size, indices.stop), dtype=np.int32)
        batch = {"index": index, "label": None if label is None else label[index]}
        x = in_batches(runner, mapped, params, batch, size)
        check_finite(x, start)
        yield store(x)


def check_finite(x: np.ndarray, start: int = 0) -> None:
    """Raise a FloatingPointError if a sample is not finite; `start` is the number of the first."""
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} of {len(x)} samples are not finite, the first is number {start + bad[0]}"
        )


def check_parameters(params: Any, workdir: Path) -> None:
    """Raise a ValueError if a parameter of the network is not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [path for path, leaf in leaves if not np.isfinite(leaf).all()]
    if bad:
        name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        raise ValueError(
            f"{workdir}: {len(bad)} of {len(leaves)} arrays of parameters are not finite, such as "
            f"{name}: nothing can be drawn with them"
        )


def parts_of(x: Any, order: np.ndarray | None = None, size: int = 1024) -> Iterator[np.ndarray]:
    """Yield rows of x in parts, in an order if one is given; x may read its rows from a disk."""
    for start in range(0, len(x), size):
        rows = np.arange(start, min(start + size, len(x)))
        yield np.asarray(x[rows if order is None else order[rows]])


def with_progress(
    parts: Iterable[np.ndarray], what: str, n: int, done: int = 0
) -> Iterator[np.ndarray]:
    """Yield the parts of n samples or examples, and show how many are done.

    The first process shows a bar on a terminal; elsewhere it prints a line at the beginning, and
    then at most every `PATIENCE` seconds.
    """
    console = Console(quiet=jax.process_index() > 0, highlight=False, soft_wrap=True)
    bar = Progress(console=console, disable=not console.is_terminal)
    said = -math.inf

    def say():
        nonlocal said
        if bar.disable and time.monotonic() - said > PATIENCE:
            console.print(f"{what}: {done:,} of {n:,}")
            said = time.monotonic()

    with bar:
        task = bar.add_task(what, total=n, completed=done)
        say()
        for part in parts:
            done += len(part)
            bar.update(task, completed=done)
            say()
            yield part


def save_part(parts: Path, start: int, x: np.ndarray) -> None:
    """Write the samples from number `start` on as one file, and record its hash in the manifest."""
    file = parts / f"{start + len(x):09}.npy"
    with replacing(file) as new, new.open("wb") as opened:
        np.save(opened, x)
    part = {"start": start, "stop": start + len(x), "sha256": file_digest(file)}
    # What was damaged, and what follows it, is drawn again.
    before = {name: p for name, p in _manifest(parts).items() if p["stop"] <= start}
    write_text(parts / MANIFEST, json.dumps(before | {file.name: part}))


def count_parts(parts: Path) -> int:
    """How many samples the parts hold, from number 0 on, up to the first that is missing or bad."""
    return sum(len(x) for x in read_parts(parts))


def count_written(parts: Path) -> int:
    """How many samples the parts held, by the names of their files, sound or not."""
    stops = (file.stem for file in parts.iterdir() if file.suffix == ".npy")
    return max((int(stop) for stop in stops if stop.isdecimal()), default=0)


def read_parts(parts: Path) -> Iterator[np.ndarray]:
    """The parts in order, up to the first that is missing, or is not as the manifest says."""
    done = 0
    for name, part in sorted(_manifest(parts).items(), key=lambda item: item[1]["start"]):
        file = parts / name
        if part["start"] != done or not file.is_file() or file_digest(file) != part["sha256"]:
            return
        done = part["stop"]
        yield limits.read_npy(file)


def _manifest(parts):
    try:
        found = parsing.read(parts / MANIFEST)
        types = {"start": int, "stop": int, "sha256": str}
        return {
            name: part
            for name, part in found.items()
            if isinstance(part, dict)
            and all(parsing.is_of(part.get(key), kind) for key, kind in types.items())
            and Path(name).name == name
        }
    except (FileNotFoundError, ValueError):
        return {}  # there is none, or it was damaged: its samples are drawn again


def read(path: Path) -> tuple[data.Examples, dict[str, Any]]:
    """Read the samples of a file of sample.py, and their `settings`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if sample.py did not write it, it is damaged, or a sample is not finite.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file of sample.py: it is not a regular file")
    try:
        with fetched(path) as here:
            arrays = limits.read_npz(here, ("x", "index", "settings"), ("label",))
        x, index, label = arrays["x"], arrays["index"], arrays.get("label")
        settings = upgraded(parsing.parse(str(arrays["settings"])))
        if x.ndim < 2 or x.dtype not in (np.uint8, np.float32):
            raise ValueError(f"its samples are {x.dtype}{x.shape}")
        if label is not None and (label.ndim != 1 or label.dtype.kind not in "iu"):
            raise ValueError(f"its labels are {label.dtype}{label.shape}")
    except FileNotFoundError:
        raise
    except Exception as error:  # untrusted input may raise anything
        why = parsing.short(error)
        raise ValueError(f"{path} is not a file of sample.py: {why}") from error
    whole = len(x) == settings["n"] and np.array_equal(index, np.arange(len(x)))
    whole = whole and (label is None or len(label) == len(x))
    # Version 0.1 stored no hash.
    if not whole or digest(x) != settings.get("sha256", digest(x)):
        raise ValueError(f"{path} is damaged: its samples are not those that were drawn; delete it")
    try:
        check_finite(x)
    except FloatingPointError as error:
        raise ValueError(f"{path}: {error}") from error
    return data.Examples(x, label), settings


def upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert `settings` of this or an earlier version to the form that this version writes."""
    parsing.field(settings, "n", int)
    parsing.field(settings, "parameters", dict)
    config = config_lib.from_tree(parsing.field(settings, "config", dict))
    known_name("sampler", samplers.SAMPLERS, config.sampling.sampler)
    # Version 0.1 stored images of any data as bytes, and said nothing.
    shape = settings.get("shape")
    images = isinstance(shape, list) and len(shape) == 3
    dtype = {"dtype": "uint8" if images else "float32"}
    new = _walk_settings(config) | {"config": config_lib.to_tree(config)}
    return dtype | settings | _as_json(new)


def _in_tiles(generate, tile, size):
    """`generate` on batches of `size` samples over all devices: on each, one tile after another."""

    def in_tiles(params, batch):
        # `pmap` passes the share of one device, `sharded` the whole batch, split by its first axis.
        devices = len(batch["index"]) * jax.device_count() // size
        split = lambda x: x.reshape(devices, -1, tile, *x.shape[1:]).swapaxes(0, 1)
        tiles = jax.tree.map(split, batch)
        x = jax.lax.map(jax.vmap(functools.partial(generate, params)), tiles).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])

    return in_tiles


def _walk_settings(config):
    """The fields of the walk, with the grid of times in use."""
    walk = {field.name: getattr(config.sampling, field.name) for field in dataclasses.fields(Walk)}
    return walk | {"times": config.sampling.grid}


def _as_json(tree):
    """The tree as it is after it has been written to JSON and read."""
    return json.loads(json.dumps(tree))


def _shallow(section):
    """The fields of a dataclass and their values, as they are."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
