"""Summaries of a stream of images in a feature space: sums on the devices, not the features.

Means and covariances of a network's features are summed in float32, with products of the highest
precision, around the mean of the first batch, which makes rounding harmless: of 50,000 features of
2,048 numbers it changes a Frechet distance by less than 1e-6 of it. The rest is in float64 on the
host.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import data
from ..training import preemption
from ..training.runners import Runner
from ..types import Array
from .distances import Moments, Summary, moments
from .features import Network, Space

IMAGES = 64
"""The most images in one call on a device."""
PART = 5000
"""The number of samples, one after another, that have one score of classes."""


class Sums(NamedTuple):
    """The sums of n vectors, less a shift, and of their outer products."""

    n: Array
    shift: Array
    first: Array
    second: Array


def summariser(space: Space, runner: Runner) -> Callable[..., Summary]:
    """A function (parts, keep=0) -> `Summary`, for a stream of samples or examples in parts.

    The parts are uint8 images, or float32 examples `[n, ...]`, the same in every process, and at
    least two in all. A network is given bytes, and only `keep` of its features are kept, the first
    ones. The function compiles once for parts of one size.

    Args:
      space: the feature space.
      runner: maps over the devices.
    """
    if space.network is None:
        return functools.partial(_at_once, space)
    return _by_sums(space.network, runner)


def _at_once(space: Space, parts: Iterable[np.ndarray], keep: int = 0) -> Summary:
    """The summary by the features of all parts, which are in memory at once."""
    x = np.concatenate(list(parts))
    features = space.features(data.take(data.Examples(x), np.arange(len(x)))["x"])
    return Summary(features, moments(features))


def _by_sums(network: Network, runner: Runner) -> Callable[..., Summary]:
    """The function that sums the features of a network on the devices."""
    shapes = network.shapes()
    summed = [name for name in ("features", "spatial") if name in shapes]

    def add(state, batch, axis_name=None):
        params, sums = state
        found = network.outputs(params, batch["x"])
        total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
        every = lambda x: x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)
        added = {name: _added(sums[name], found[name], batch["weight"], total) for name in summed}
        single = {name: every(found[name]) for name in ("features", "logits") if name in found}
        return (params, added), single

    step = runner.step(add)

    def in_sums(parts, keep=0):
        state = network.params, {name: _zero(shapes[name][-1]) for name in summed}
        kept, logits, scores, size = [], [], [], 0
        for part in parts:
            part = part if part.dtype == np.uint8 else data.to_bytes(part)
            size = size or min(IMAGES, -(-len(part) // jax.device_count())) * jax.device_count()
            for start in range(0, len(part), size):
                rows = start + runner.slots(size)
                x = part[np.minimum(rows, len(part) - 1)]
                batch = {"x": x, "weight": np.float32(rows < len(part))}
                state, single = step(state, runner.put(batch))
                n = min(size, len(part) - start)
                if sum(map(len, kept)) < keep:
                    kept.append(np.asarray(single["features"])[:n])
                if "logits" in single:
                    logits.append(np.asarray(single["logits"])[:n])
                if sum(map(len, logits)) >= PART:
                    whole = np.concatenate(logits)
                    scores.append(class_score(whole[:PART]))
                    logits = [whole[PART:]]
                preemption.report_progress()
        if any(map(len, logits)):
            scores.append(class_score(np.concatenate(logits)))
        found = {name: _moments(sums) for name, sums in jax.device_get(state[1]).items()}
        return Summary(
            moments=found["features"],
            pool=np.concatenate(kept)[:keep] if keep else None,
            spatial=found.get("spatial"),
            scores=tuple(scores) or None,
        )

    return in_sums


def class_score(logits: np.ndarray) -> float:
    """exp of the mean KL divergence of the classes of one sample from those of all, `[n, classes]`.

    >>> class_score(np.zeros((4, 10)))
    1.0
    >>> print(f"{class_score(1e3 * np.eye(10)):.4f}")
    10.0000
    """
    logits = np.asarray(logits, np.float64)
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_mean)).sum(1).mean()))


def _zero(d):
    return Sums(jnp.zeros(()), jnp.zeros(d), jnp.zeros(d), jnp.zeros((d, d)))


def _added(sums: Sums, x: Array, weight: Array, total: Callable[[Any], Any]) -> Sums:
    """The sums with a batch `[n, d]` of weights 0 or 1, over all devices."""
    weight = weight[:, None]
    n = total(weight.sum())
    mean = total((weight * x).sum(0)) / n
    shift = jnp.where(sums.n == 0, mean, sums.shift)
    rest = weight * (x - shift[None])
    second = jnp.matmul(rest.T, rest, precision="highest")
    return Sums(sums.n + n, shift, sums.first + total(rest.sum(0)), sums.second + total(second))


def _moments(sums: Sums) -> Moments:
    n, shift, first, second = (np.asarray(x, np.float64) for x in sums)
    return Moments(shift + first / n, (second - np.outer(first, first) / n) / (n - 1))
