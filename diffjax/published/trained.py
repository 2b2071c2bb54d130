"""Loading a trained network from a run's directory, an exported file, or by its name."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .. import models
from ..denoisers import schedule_of
from ..experiment import Config, Experiment, resolve, run_directory
from ..experiment.conditioning import make_null
from ..guidance import classifier_free
from ..training.store import as_path
from ..types import Data
from . import weights
from .pretrained import PRETRAINED

MEANING = ("target", "scales_output", "unit_input", "time_input", "fourier_features")
"""Fields of a config that say what a network's input and output mean."""
EMBEDS = ("embedding", "embedding_period", "flow_time", "log_snr_scale", "log_snr_shift")
MAY_CHANGE = {
    "two_times",
    "guidance_weight",
    "dropout",
    "remat",
    "bfloat16",
    "out_channels",
    *EMBEDS,
}
"""Fields of a network's config in which a flow map may differ from the network that it starts from.
`out_channels` is compared by the shapes of parameters, because None stands for the data's."""
CONDITIONS: dict[str, Callable[[Config], Any]] = {
    "model.labels": lambda c: c.model.labels,
    "model.augment_dim": lambda c: models.takes(c.model, "augment_dim"),
    "low_resolution": lambda c: c.low_resolution,
    "data.latents": lambda c: c.data.latents,
}
"""What a network is told of its examples, which a teacher must share with the map."""


def load(
    source: Path | str, average: float | None = None
) -> tuple[Callable[..., Data], Any, Config]:
    """Load a trained network.

    Args:
      source: a run's directory; a file that `python -m diffjax.export` wrote; or, if there is no
        such path, a name in `PRETRAINED`, a network that comes with diffjax.
      average: relative width of a power-function average that is made from the run's snapshots, in
        place of the moving average of constant decay.

    Returns:
      `apply`, a function (params, x_t, log_snr, cond) -> an estimate of `config.target`; the moving
      average of its parameters at the newest sound checkpoint, or at the newest snapshot; and the
      config.

    Raises:
      FileNotFoundError: if there is no config, no sound checkpoint, or a snapshot is missing.
      ValueError: if the config or the file cannot be read, or there is no such average.

    From the network to a denoiser, and to samples:

    >>> import functools, jax, diffjax
    >>> from diffjax.checkpoint import load
    >>> from diffjax.experiment import resolve, with_parameters
    >>> apply, params, config = load("digits")
    >>> e = with_parameters(resolve(config), params)  # for a schedule that is learned, too
    >>> denoise = e.clip(e.denoiser(functools.partial(apply, params)))
    >>> walk = diffjax.ddim(functools.partial(denoise, cond={"label": jax.numpy.arange(2)}),
    ...                     e.schedule)
    >>> x_1 = diffjax.prior_sample(jax.random.key(0), e.schedule, (2, 8, 8, 1))
    >>> diffjax.sample(jax.random.key(1), walk, x_1, diffjax.uniform_times(3))[0].shape
    (2, 8, 8, 1)
    """
    path = _located(source)
    if path.is_file():
        if average is not None:
            raise ValueError(f"average={average}: {path} is a file, not the directory of a run")
        params, config = weights.read(path)
    else:
        config = read_config(path)
        read = run_directory.read_params
        params = read(path) if average is None else run_directory.read_average(path, average)[0]
    return resolve(config).apply, params, config


def read_config(source: Path | str) -> Config:
    """Read the config of a trained network, without its parameters.

    Raises:
      FileNotFoundError, ValueError: as `load` does.
    """
    path = _located(source)
    if path.is_file():
        return weights.read_config(path)
    try:
        return run_directory.read_config(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; nor is it a file, or one of the networks that come with diffjax, "
            f"{', '.join(PRETRAINED)}"
        ) from error


def inherit(e: Experiment, shape: tuple[int, ...]) -> Experiment:
    """The same experiment with what a flow map takes from trained networks, if anything.

    That is the teacher, whose guided denoiser becomes the velocity of its loss, and the parameters
    that it starts from.

    Args:
      e: the experiment.
      shape: the shape of its examples.

    Raises:
      ValueError: if the teacher has another schedule, shape or labels, or guidance that it cannot
        have; or the network to start from has another model, or its output another meaning.
      FileNotFoundError: if there is no such network, as in `load`.
    """
    options = e.config.flow_map
    if e.config.objective != "flow_map":
        return e
    if options.velocity not in ("own", "pair"):
        velocity = _teacher(e, options.velocity, shape)
        objective = e.objective
        e = e._replace(
            objective=lambda levels, axis_name=None: functools.partial(
                objective(levels, axis_name), velocity=velocity
            )
        )
    if options.start is not None:
        _, params, config = load(options.start)
        init = e.init
        pairs = [(config, e.config, name) for name in MEANING]
        if type(config.model) is type(e.config.model):
            fields = vars(config.model).keys() - MAY_CHANGE
            pairs += [(config.model, e.config.model, name) for name in sorted(fields)]
        for theirs, ours, name in pairs:
            if getattr(theirs, name) != getattr(ours, name):
                raise ValueError(
                    f"flow_map.start={options.start}: its network was trained with "
                    f"{name}={getattr(theirs, name)}, the map's has {name}={getattr(ours, name)}"
                )
        started = lambda key, shape: models.start_from(init(key, shape), params)
        try:
            jax.eval_shape(lambda: started(jax.random.key(0), shape))
        except ValueError as error:
            raise ValueError(f"flow_map.start={options.start}: {error}") from None
        e = e._replace(init=started)
    return e


def _teacher(e, source, shape):
    """The guided denoiser of a trained network, which must suit the experiment."""
    name = f"flow_map.velocity={source}"
    apply, params, config = load(source)
    if config.data.shape not in (None, shape):
        raise ValueError(f"{name}: its data are of shape {config.data.shape}, these of {shape}")
    for option, get in CONDITIONS.items():
        theirs, ours = get(config), get(e.config)
        if theirs != ours:
            raise ValueError(f"{name}: it has {option}={theirs}, the map {option}={ours}")
    if models.takes(config.model, "guidance_weight"):
        raise ValueError(
            f"{name}: its network is given the weight of its guidance, and cannot teach; train a "
            "teacher with flow_map.guidance in place of guidance_to"
        )
    if config.augmentation == "window":
        raise ValueError(
            f"{name}: it was trained on windows, and would take each for a whole image; train a "
            "teacher of whole images"
        )
    sampling = dataclasses.replace(config.sampling, guidance=e.config.flow_map.guidance)
    teacher = resolve(dataclasses.replace(config, sampling=sampling))
    denoise = teacher.denoiser(functools.partial(apply, params))
    try:
        schedule_of(denoise, e.schedule)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if e.config.flow_map.guidance_to is None:
        return teacher.guide(denoise)
    if not config.model.null_label:
        raise ValueError(f"{name}: for guidance_to it needs model.null_label=True")
    null = make_null(config, teacher.schedule, {"label"})

    def guided(x_t, t, cond):
        others = {name: x for name, x in cond.items() if name != "guidance"}
        return classifier_free(denoise, cond["guidance"], null)(x_t, t, others)

    return guided


def home(source: Path | str) -> Path:
    """The default directory for the results of a trained network.

    It is the run's directory, the folder of the file, or, for a network that comes with diffjax,
    `runs/NAME`, which is created.
    """
    path = as_path(source)
    if not path.exists() and str(source) in PRETRAINED:
        path = Path("runs") / path
        path.mkdir(parents=True, exist_ok=True)
    return path if path.is_dir() else path.parent


def _located(source):
    path = as_path(source)
    return path if path.exists() else PRETRAINED.get(str(source), path)
