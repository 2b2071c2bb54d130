"""Upper bounds on -log p of data under a trained network, by the bound and by the flow."""

from collections.abc import Callable
from typing import Any

import jax

from .. import keys, likelihood
from ..experiment import Experiment
from ..experiment.functions import conditioned
from ..types import Array

Bound = Callable[[Any, dict[str, Array]], Array]


def variational_bound(e: Experiment, levels: int | None, samples: int = 32) -> Bound:
    """A pure function (params, batch) -> the variational bound of each example, nats `[batch]`.

    It uses the run's own time, discrete or continuous, and its conditioning. Example i draws from
    the seed and `batch["index"][i]` alone.

    Args:
      e: the experiment.
      levels: how many values a number of the data may have; None if it is continuous.
      samples: times at which the denoising term is evaluated, for each example.
    """
    variance = "learned" if e.config.bound_weight is not None else "posterior"

    def bound(params, batch):
        key, _, key_cond = jax.random.split(e.keys().held_out, 3)
        return likelihood.elbo(
            keys.fold_in(key, batch["index"]),
            conditioned(e, e.clip, params, key_cond, batch),
            e.schedule,
            batch["x"],
            e.config.time_steps,
            variance=variance,
            levels=levels,
            samples=samples,
        ).nats

    return bound


def flow_bound(e: Experiment, levels: int | None, steps: int = 50) -> Bound:
    """The same by the probability flow, on dequantised data, with Hutchinson's estimate.

    Its denoiser is not clipped, because the flow of a clipped one has no density.

    Args:
      e: the experiment.
      levels: as in `variational_bound`.
      steps: of the flow.
    """

    def bound(params, batch):
        _, key, key_cond = jax.random.split(e.keys().held_out, 3)
        denoise = conditioned(e, lambda denoise: denoise, params, key_cond, batch)
        key_cell, key_signs = (keys.fold_in(k, batch["index"]) for k in jax.random.split(key))
        x, log_volume = batch["x"], 0.0
        if levels is not None:
            x, log_volume = likelihood.dequantise(key_cell, x, levels)
        log_p = likelihood.flow_log_likelihood(denoise, e.schedule, x, key_signs, steps=steps)
        return -log_p - log_volume

    return bound
