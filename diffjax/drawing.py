"""Samples of a trained network: which, and how they are drawn.

Sample i of a drawing depends on its settings and on i alone. Among devices of a kind to the last
bit, because each computes them in tiles of one size: the rounding of a matrix product depends on
the matrix's size, and so, without tiles, on how many devices share a batch.
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from . import config as config_lib, data, experiment, parallel, provenance
from .config import BEST_TIMES, SAMPLERS, TIMES, Config, Options, one_of
from .types import Data, LearnedPrediction

TILE = 64
"""Samples that a device draws at once."""
TILES = {"cpu": 16}
"""Where they are not `TILE`."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Which samples to draw. None: as the run's config has it."""

    n: int = 1000
    """How many."""
    label: int | None = None
    """Their class; None: sample i is of class i modulo the number of classes."""
    sampler: Annotated[str | None, one_of(SAMPLERS)] = None
    """The sampler."""
    options: Options = dataclasses.field(default_factory=dict)
    """Its options."""
    times: Annotated[str | None, one_of(TIMES)] = None
    """The grid of times; None: the one that the sampler wants, if you name a sampler."""
    steps: int | None = None
    """Steps of the grid."""
    guidance: float | None = None
    """Weight of classifier-free guidance; 1: none."""
    seed: int = 0
    """Seed of the noise."""


def configured(config: Config, drawing: Drawing) -> Config:
    """A run's config with the sampling and the seed of a drawing.

    Raises:
      ValueError: if the drawing makes no sense, or not for this run.

    >>> configured(Config(), Drawing(sampler="edm")).sampling.times
    'karras'
    """
    sampling = config.sampling
    if drawing.sampler is not None:
        times = BEST_TIMES.get(drawing.sampler, sampling.times)
        sampling = dataclasses.replace(sampling, sampler=drawing.sampler, options={}, times=times)
    given = {name: getattr(drawing, name) for name in ("times", "steps", "guidance")}
    changed = {name: value for name, value in given.items() if value is not None}
    changed["options"] = sampling.options | drawing.options
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(sampling, **changed), seed=drawing.seed
    )
    if drawing.n < 1:
        raise ValueError(f"n={drawing.n}: must be at least 1")
    if config.low is not None:
        raise ValueError(f"low={config.low}: the run enlarges images, it draws none by itself")
    if drawing.label is not None and not 0 <= drawing.label < config.model.labels:
        has = f"classes 0 to {config.model.labels - 1}" if config.model.labels else "no classes"
        raise ValueError(f"label={drawing.label}: the run has {has}")
    experiment.check(config)
    return config


def labels(config: Config, drawing: Drawing) -> np.ndarray | None:
    """The classes of the samples, `[n]`, or None if the run has none."""
    if not config.model.labels:
        return None
    if drawing.label is not None:
        return np.full(drawing.n, drawing.label, np.int32)
    return np.arange(drawing.n, dtype=np.int32) % config.model.labels


def settings(config: Config, drawing: Drawing, params: Any) -> dict[str, Any]:
    """All that the samples depend on, for JSON.

    Args:
      config: `configured`.
      drawing: which samples.
      params: the parameters, of which the hash is taken.

    Returns:
      The drawing, with nothing left open; `function_evaluations`; `parameters`; and the `config`.
    """
    s = config.sampling
    walk = {name: getattr(s, name) for name in ("sampler", "options", "times", "steps", "guidance")}
    return {
        **dataclasses.asdict(drawing),
        **walk,
        "function_evaluations": function_evaluations(config),
        "parameters": parameters(config, params),
        "config": json.loads(config_lib.to_json(config)),
    }


def parameters(config: Config, params: Any) -> dict[str, Any]:
    """Which parameters: a moving average of decay `ema`, and their hash."""
    return {"ema": config.ema, "sha256": provenance.digest(params)}


def function_evaluations(config: Config) -> int:
    """How often the config's sampler calls the denoiser for a sample.

    With classifier-free guidance each call is two evaluations of the network.

    >>> function_evaluations(configured(Config(), Drawing(sampler="heun", steps=7)))
    14
    """
    calls = []

    def denoise(x_t, t):
        calls.append(t)
        return LearnedPrediction(x_t, x_t, x_t)

    sampler = experiment.make_sampler(config)(denoise, experiment.make_schedule(config))
    step = lambda key, x: sampler.step(key, sampler.init(x), jnp.float32(1), jnp.float32(0.5))
    jax.eval_shape(step, jax.random.key(0), jnp.zeros((1, 2)))
    return len(calls) * config.sampling.steps


def check_shape(config: Config, params: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the network takes examples of this shape."""
    config.model.check_input(shape)
    make = functools.partial(experiment.make_params, config, shape=shape)
    made = jax.eval_shape(make, jax.random.key(0))
    if jax.tree.map(jnp.shape, made) != jax.tree.map(jnp.shape, params):
        raise ValueError(f"examples of shape {shape} are not what the network was trained on")


def draw(
    generate: Callable[[Any, dict[str, Any]], Data],
    params: Any,
    label: np.ndarray | None,
    indices: range,
    size: int,
) -> Iterator[np.ndarray]:
    """Draw samples over all devices of all processes, with one compiled program.

    Args:
      generate: `experiment.make_generate`'s.
      params: its parameters.
      label: the class of every sample, or None.
      indices: which samples to draw.
      size: how many at once, over all devices; rounded up to whole tiles on each.

    Yields:
      The next of them, in every process: images as uint8, as they are stored and looked at;
      vectors as float32.
    """
    tile = TILES.get(jax.default_backend(), TILE)
    whole = tile * jax.device_count()
    size = -(-size // whole) * whole
    runner = parallel.pmap()
    mapped = runner.map(_in_tiles(generate, tile))
    for start in range(indices.start, indices.stop, size):
        index = np.arange(start, min(start + size, indices.stop), dtype=np.int32)
        batch = {"index": index, "label": None if label is None else label[index]}
        x = parallel.in_batches(runner, mapped, params, batch, size)
        yield data.to_bytes(x) if x.ndim == 4 else x


def watched(parts: Iterator[np.ndarray], what: str, n: int, done: int = 0) -> Iterator[np.ndarray]:
    """The same parts of n samples, while a bar on the first process' terminal shows how many."""
    console = Console(quiet=jax.process_index() > 0, highlight=False)
    with Progress(console=console) as progress:
        bar = progress.add_task(what, total=n, completed=done)
        for part in parts:
            progress.advance(bar, len(part))
            yield part


def read(path: Path) -> tuple[data.Examples, dict[str, Any]]:
    """The samples of a file of sample.py's, and their `settings`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such file.
    """
    try:
        with np.load(path) as file:
            label = file.get("label")
            return data.Examples(file["x"], label), json.loads(str(file["settings"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of sample.py's: {error}") from error


def _in_tiles(generate, tile):
    def in_tiles(params, batch):
        tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), batch)
        x = jax.lax.map(functools.partial(generate, params), tiles)
        return x.reshape(-1, *x.shape[2:])

    return in_tiles
