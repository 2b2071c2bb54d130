"""Upper bounds on -log p of data: the variational bound and the probability flow of a network."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import keys, likelihood
from ..experiment import Config, Experiment, with_parameters
from ..experiment.functions import conditioned
from ..training.runners import Runner, in_parts
from ..types import Array
from .sampling import with_progress

Bound = Callable[[Any, dict[str, Array]], Array]


def check_bound(
    config: Config,
    instead: str = "evaluate.py --flow=True counts bits by the flow, and --held_out=0 counts none",
) -> None:
    """Raise a ValueError, with what to do instead, if a run of this config has no bound."""
    if config.coupling != "independent":
        raise ValueError(
            f"coupling={config.coupling}: the variational bound needs a network that was trained "
            f"with independent noise; {instead}"
        )


def variational_bound(e: Experiment, levels: int | None, samples: int = 32) -> Bound:
    """A pure function (params, batch) -> the variational bound of each example, in nats `[batch]`.

    It uses the run's own time, discrete or continuous, and its conditioning. The random draws
    for example i depend only on the seed and `batch["index"][i]`.

    Args:
      e: the experiment.
      levels: number of values that an element of the data can take; None for continuous data.
      samples: times at which the denoising term is evaluated, for each example.

    Raises:
      ValueError: if the run was trained on coupled pairs of data and noise.
    """
    check_bound(e.config)
    variance = "learned" if e.config.bound_weight is not None else "posterior"

    def bound(params, batch):
        now = with_parameters(e, params)
        key, _, key_cond, key_x = jax.random.split(e.keys().held_out, 4)
        return likelihood.elbo(
            keys.fold_in(key, batch["index"]),
            conditioned(now, now.clip, params, key_cond, batch),
            now.schedule,
            e.example(keys.fold_in(key_x, batch["index"]), batch["x"]),
            e.config.time_steps,
            variance=variance,
            levels=levels,
            samples=samples,
        ).nats

    return bound


def flow_bound(e: Experiment, levels: int | None, steps: int = 50) -> Bound:
    """A pure function (params, batch) -> a bound by the probability flow, in nats `[batch]`.

    The data is dequantised, and the divergence is Hutchinson's estimate. The denoiser is not
    clipped, because the flow of a clipped denoiser has no density.

    Args:
      e: the experiment.
      levels: as in `variational_bound`.
      steps: steps of the ODE solver.
    """

    def bound(params, batch):
        now = with_parameters(e, params)
        _, key, key_cond, key_x = jax.random.split(e.keys().held_out, 4)
        denoise = conditioned(now, lambda denoise: denoise, params, key_cond, batch)
        key_cell, key_signs = (keys.fold_in(k, batch["index"]) for k in jax.random.split(key))
        x, log_volume = e.example(keys.fold_in(key_x, batch["index"]), batch["x"]), 0.0
        if levels is not None:
            x, log_volume = likelihood.dequantise(key_cell, x, levels)
        log_p = likelihood.flow_log_likelihood(denoise, now.schedule, x, key_signs, steps=steps)
        return -log_p - log_volume

    return bound


def bits(
    runner: Runner,
    mapped: Callable,
    params: Any,
    batch: dict[str, np.ndarray],
    size: int,
    shape: tuple[int, ...],
    what: str,
) -> tuple[float, float]:
    """Mean bits per dimension of the examples of a host batch, and their standard error.

    It shows how many examples are done.

    Args:
      runner: the runner that `mapped` was made by.
      mapped: `runner.map(bound)`, where `bound` is one of the functions above.
      params: of the network.
      batch: at least two examples.
      size: examples per call, rounded up to a multiple of the device count.
      shape: that of an example, whose numbers are the dimensions.
      what: what is counted, for the progress.
    """
    parts = in_parts(runner, mapped, params, batch, size)
    nats = np.concatenate(list(with_progress(parts, what, len(batch["index"]))))
    found = np.asarray(likelihood.bits_per_dim(nats, shape), np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))
