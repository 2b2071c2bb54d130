r"""Exact denoisers of data whose noised densities are known, for tests, teaching and first steps.

If the data is a mixture of Gaussians, so is x_t at every t:

    p(x_0) = sum_k w_k N(m_k, C_k)    =>    p_t(x) = sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)

and E[x_0 | x_t], E[eps | x_t], the score and the density follow in closed form. A single Gaussian
is one component; a finite data set has components of zero width, and its exact denoiser is the
optimal one for that training set (Karras et al. 2022, appendix B.3), which reproduces its examples.

Everything is computed in float32 or wider, at the highest matrix precision the platform has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from . import keys, ode
from .process import scales_at
from .schedules import Schedule
from .targets import decode
from .types import Array, Cond, Data, Key, Prediction, Real, Time, known, select


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """A known distribution of data under a schedule; an oracle is itself a `FlowMap`.

    Attributes:
      denoise: (x_t, t, cond) -> the `Prediction` E[x_0 | x_t], E[eps | x_t]; cond is ignored.
      score: (x_t, t) -> grad log p_t(x_t), of the shape of x_t.
      log_density: (x_t, t) -> log p_t(x_t) in nats, `[batch]`.
      sample: (key, n) -> n draws of x_0; key is one key, or one per example `[n]`.
      flow_map: (x_t, t, s) -> the point to which the probability-flow ODE takes x_t from time t to
        time s, in either direction. It is in closed form for a Gaussian, and else takes 1,000
        steps of the fourth-order Runge-Kutta method.
      schedule: the schedule.
    """

    denoise: Callable[..., Prediction]
    score: Callable[[Data, Time], Data]
    log_density: Callable[[Data, Time], Array]
    sample: Callable[[Key, int], Data]
    flow_map: Callable[[Data, Time, Time], Data]
    schedule: Schedule

    def __call__(self, x_t: Data, t: Time, cond: Cond = None, s: Time | None = None) -> Prediction:
        """The exact prediction at x_t; this method makes an oracle a `Denoiser` and a `FlowMap`.

        With s, it is the (x_0, eps) whose step to s, alpha_s x_0 + sigma_s eps, is `flow_map`.
        """
        if s is None:
            return self.denoise(x_t, t, cond)
        # x_t and x_s are two equations for x_0 and eps, which are the same where s = t.
        apart = jnp.asarray(s != t)
        s = jnp.where(apart, s, jnp.where(jnp.asarray(t) > 0.5, 0.0, 1.0))
        at_s = scales_at(self.schedule, s, x_t)
        x_s = self.flow_map(x_t, t, s)
        step = decode(lambda *_: at_s, x_s, x_t, *scales_at(self.schedule, t, x_t))
        return select(apart, step, self.denoise(x_t, t, cond))


def gaussian(
    schedule: Schedule, mean: Float[Real, " d"] | Any, cov: Float[Real, "d d"] | Any
) -> Oracle:
    """Data x_0 ~ N(mean, cov), `[batch, d]`.

    Args:
      schedule: a `Schedule`.
      mean: `[d]`.
      cov: `[d, d]`, symmetric and positive semi-definite; `[d]` for a diagonal, `[]` for a
        multiple of the identity.

    Raises:
      ValueError: if the shapes do not agree, or `cov` is not such a matrix.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> denoise = gaussian(schedule, jnp.zeros(2), jnp.eye(2))
    >>> bool(jnp.allclose(denoise(jnp.ones((1, 2)), 0.5).x_0, schedule(0.5)[0]))
    True
    """
    mean = jnp.asarray(mean)
    oracle = gaussian_mixture(schedule, jnp.ones(1), mean[None], jnp.asarray(cov)[None])
    variances, axes = _principal(cov, mean.shape[-1])

    def flow_map(x_t, t, s):
        # Along each principal axis x keeps its distance to the mean in standard deviations.
        _check_shape(x_t, mean.shape)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (scales_at(schedule, u, x_t) for u in (t, s))
        std = lambda alpha, sigma: jnp.sqrt(alpha**2 * variances[None] + sigma**2)
        z = _dot("bd,de->be", x_t - alpha_t * mean[None], axes) / std(alpha_t, sigma_t)
        x_s = alpha_s * mean[None] + _dot("be,de->bd", z * std(alpha_s, sigma_s), axes)
        return x_s.astype(jnp.result_type(x_t))

    return dataclasses.replace(oracle, flow_map=flow_map)


def gaussian_mixture(
    schedule: Schedule,
    weights: Float[Real, " k"] | Any,
    means: Float[Real, "k d"] | Any,
    covs: Float[Real, "k d d"] | Any,
) -> Oracle:
    """Data from a mixture of Gaussians, `[batch, d]`.

    Args:
      schedule: a `Schedule`.
      weights: `[k]`, positive; they are divided by their sum.
      means: `[k, d]`.
      covs: `[k, d, d]`, or `[k, d]` for diagonals, or `[k]` for multiples of the identity.

    Raises:
      ValueError: if the shapes do not agree, a weight is not positive, or a covariance is not
        symmetric and positive semi-definite.
    """
    weights, means, covs = (jnp.asarray(a, float) for a in (weights, means, covs))
    if means.ndim != 2 or not len(weights) == len(means) == len(covs):
        raise ValueError(
            f"weights {weights.shape}, means {means.shape}, covariances {covs.shape}: need [k], "
            "[k, d] and [k, d, d], [k, d] or [k]"
        )
    if known(weights) and not (weights > 0).all():
        raise ValueError(f"{weights=}: must be positive")
    log_weights = jnp.log(weights) - jnp.log(weights.sum())
    pairs = [_principal(cov, means.shape[1]) for cov in covs]
    variances, axes = (jnp.stack(parts) for parts in zip(*pairs, strict=True))

    def posterior(x_t, t):
        """Log-weights [b, k], and E[x_0] and E[eps] of each component [b, k, d]."""
        _check_shape(x_t, means.shape[1:])
        centre = means[None]
        x = x_t[:, None].astype(jnp.result_type(x_t, centre))
        alpha, sigma = scales_at(schedule, t, x)
        z = _dot("bkd,kde->bke", x - alpha * centre, axes)
        spread = alpha**2 * variances[None] + sigma**2
        log_joint = log_weights[None] - 0.5 * (z**2 / spread + jnp.log(spread)).sum(-1)
        back = lambda parts: _dot("bke,kde->bkd", parts, axes)
        return (
            log_joint,
            centre + back(alpha * variances[None] * z / spread),
            back(sigma * z / spread),
        )

    def denoise(x_t, t, cond=None):
        log_joint, *parts = posterior(x_t, t)
        share = jax.nn.softmax(log_joint, axis=-1)
        return Prediction(
            *(_dot("bk,bkd->bd", share, p).astype(jnp.result_type(x_t)) for p in parts)
        )

    def log_density(x_t, t):
        log_joint = posterior(x_t, t)[0]
        return jax.nn.logsumexp(log_joint, axis=-1) - x_t.shape[1] / 2 * jnp.log(2 * jnp.pi)

    def sample(key, n):
        def one(key):
            which, where = jax.random.split(key)
            k = jax.random.categorical(which, log_weights)
            z = jax.random.normal(where, means.shape[1:]) * jnp.sqrt(variances[k])
            return means[k] + _dot("e,de->d", z, axes[k])

        return jax.vmap(one)(keys.per_example(key, n))

    return _oracle(schedule, denoise, log_density, sample)


def dataset(schedule: Schedule, x: Float[Real, "n ..."]) -> Oracle:
    """Data uniform over n given examples, whose denoiser is the optimal one of a training set.

    The density is that of x_t for sigma_t > 0: a mixture of n Gaussians N(alpha x_i, sigma^2 I).
    Each call compares all n examples with one example of the batch after the other, so that memory
    grows only with n.

    Args:
      schedule: a `Schedule`.
      x: the examples, `[n, ...]`.

    Raises:
      ValueError: if there are no examples.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or not len(x):
        raise ValueError(f"examples of shape {x.shape}: need [n, ...] with n at least 1")
    flat = x.reshape(len(x), -1)

    def log_joint(x_t, alpha, sigma):
        distance = ((x_t.reshape(1, -1) - alpha * flat) ** 2).sum(-1)  # |x|^2 - 2xy + |y|^2 cancels
        return -0.5 * distance / sigma**2 - jnp.log(len(x))

    def each(f, x_t, t):
        _check_shape(x_t, x.shape[1:])
        scales = [jnp.broadcast_to(scale, x_t.shape[:1]) for scale in schedule(t)]
        wide = x_t.astype(jnp.result_type(x_t, flat))
        return jax.lax.map(lambda args: f(*args), (wide, *scales))

    def denoise(x_t, t, cond=None):
        def one(x_t, alpha, sigma):
            share = jax.nn.softmax(log_joint(x_t, alpha, sigma))
            x_0 = _dot("n,nd->d", share, flat)
            # The mean of eps_i, not (x_t - alpha x_0) / sigma, which loses precision.
            eps = _dot("n,nd->d", share, (x_t.reshape(1, -1) - alpha * flat) / sigma)
            return x_0.reshape(x_t.shape), eps.reshape(x_t.shape)

        return Prediction(*(a.astype(jnp.result_type(x_t)) for a in each(one, x_t, t)))

    def log_density(x_t, t):
        def one(x_t, alpha, sigma):
            normaliser = flat.shape[1] / 2 * jnp.log(2 * jnp.pi * sigma**2)
            return jax.nn.logsumexp(log_joint(x_t, alpha, sigma)) - normaliser

        return each(one, x_t, t)

    def sample(key, n):
        choose = lambda key: x[jax.random.randint(key, (), 0, len(x))]
        return jax.vmap(choose)(keys.per_example(key, n))

    return _oracle(schedule, denoise, log_density, sample)


def _oracle(schedule, denoise, log_density, sample):
    def score(x_t, t):
        return -denoise(x_t, t).eps / scales_at(schedule, t, x_t)[1]

    def flow_map(x_t, t, s):
        slope = lambda y, t: ode.velocity(denoise, schedule, y, t)[0]
        y = ode.solve(slope, schedule, x_t / ode.radius(schedule, t, x_t), t, s, 1000)
        return y * ode.radius(schedule, s, x_t)

    return Oracle(denoise, score, log_density, sample, flow_map, schedule)


def _principal(cov, d):
    """Variances `[d]` along the principal axes, and the axes as the columns of `[d, d]`."""
    cov = jnp.asarray(cov, float)
    if cov.shape not in ((), (d,), (d, d)):
        raise ValueError(f"a covariance of shape {cov.shape} for {d} dimensions: need [d, d]")
    if cov.ndim < 2:
        variances, axes = jnp.broadcast_to(cov, (d,)), jnp.eye(d)
    elif not known(cov):
        variances, axes = jnp.linalg.eigh(cov)
    else:
        if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-7):
            raise ValueError(f"covariance {cov} is not symmetric")
        # In float64, because the small variances of an ill-conditioned matrix matter near t = 0.
        variances, axes = map(jnp.asarray, np.linalg.eigh(np.asarray(cov, np.float64)))
    if known(variances) and not variances.min() >= -1e-6 * jnp.abs(variances).max():
        raise ValueError(f"covariance {cov} is not positive semi-definite")
    return jnp.maximum(variances, 0), axes


def _check_shape(x_t, shape):
    if jnp.shape(x_t)[1:] != shape:
        raise ValueError(f"x_t of shape {jnp.shape(x_t)}: the oracle's data are [batch, *{shape}]")


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, precision="highest")
