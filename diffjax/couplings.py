r"""Couplings of data and noise: which noise each example of a batch is given in training.

Where every example draws its own noise, the lines x_t = alpha x_0 + sigma eps from noise to data
cross everywhere. A coupling gives an example noise that lies near it, so that fewer lines cross,
and the flow that the network learns is straighter:

    loss = diffusion_loss(key, network, schedule, target, x_0, coupling=couplings.ot())

Whatever the coupling, the network learns E[x_0 | x_t] and E[eps | x_t] of the coupled pairs, and
their flow, which deterministic samplers follow, carries the noise to the data (Pooladian et al.
2023, proposition 3.1). Only with independent noise is -E[eps | x_t] / sigma the score. Stochastic
samplers, the variational bound and classifier guidance need this: they need independent noise.

A coupling is a function (key, x_0, eps, cond) -> eps. Examples exchange noise only with examples of
the same conditioning: a label would otherwise tell the network something about the noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from . import keys
from .types import Array, Cond, Data, Key, Real, whole

Coupling = Callable[[Key, Data, Data, Cond], Data]
"""(keys `[batch]`, x_0, eps, cond) -> the noise of each example, of the shape of eps."""


def independent() -> Coupling:
    """Each example keeps the noise that was drawn for it."""
    return lambda key, x_0, eps, cond: eps


def ot(
    axis_name: str | None = None, exact: int = 512, epsilon: float = 0.02, iterations: int = 100
) -> Coupling:
    """Optimal transport within the batch: exchange its noise so that sum |x_0 - eps|^2 is least.

    Up to `exact` examples the assignment is exact, by SciPy on the host, and the noise is permuted.
    A larger batch draws from the plan of entropic optimal transport, by Sinkhorn's iterations on
    the device. Some noise is then given to several examples and some to none; its distribution is
    still the normal one.

    As the batch grows, the pairs approach those of the optimal map between the distributions, and
    slowly so in many dimensions (docs/howto/couplings.md has numbers).

    Args:
      axis_name: a mapped axis of `pmap` or `shard_map` over which the batch is split. It is
        gathered, so that the pairs do not depend on the layout of the devices.
      exact: the largest batch with an exact assignment, whose time grows with its cube.
      epsilon: the strength of the entropic term, in standard deviations of <x_0, eps>. With 0.02 in
        3,072 dimensions, an example has about two noises to choose from.
      iterations: the number of Sinkhorn's iterations.

    Raises:
      ValueError: unless `exact >= 0`, `epsilon > 0` and `iterations >= 1`.

    Source: Pooladian et al. 2023, "Multisample flow matching"; Tong et al. 2023, arXiv 2302.00482.
    The assignment is also that of immiscible diffusion (Li et al. 2024, arXiv 2406.12303).

    >>> x_0, eps = jnp.array([[2.0], [1.0], [3.0]]), jnp.array([[0.0], [-1.0], [1.0]])
    >>> ot()(jax.random.key(0), x_0, eps, None).T
    Array([[ 0., -1.,  1.]], dtype=float32)
    """
    if not (whole(exact, 0) and epsilon > 0 and whole(iterations)):
        raise ValueError(
            f"{exact=}, {epsilon=}, {iterations=}: need exact >= 0, epsilon > 0, iterations >= 1, "
            "the first and the last whole numbers"
        )

    def couple(key, x_0, eps, cond):
        share = len(x_0)
        first = 0 if axis_name is None else share * jax.lax.axis_index(axis_name)
        whole = lambda a: a if axis_name is None else jax.lax.all_gather(a, axis_name, tiled=True)
        x_0, eps, cond = jax.lax.stop_gradient(jax.tree.map(whole, (x_0, eps, cond)))
        mine = first + jnp.arange(share)
        x, e = (a.reshape(len(a), -1) for a in (x_0, eps))
        same = _same(cond, len(x_0))
        if len(x_0) <= exact:
            result = jax.ShapeDtypeStruct((len(x_0),), jnp.int32)
            source = jax.pure_callback(_assign, result, x, e, same, vmap_method="sequential")[mine]
        else:
            plan = _sinkhorn(x, e, same, epsilon, iterations)[mine]
            choose = jax.vmap(lambda key, row: jax.random.categorical(key, row))
            source = choose(keys.per_example(key, share), plan)
        return eps[source]

    return couple


def immiscible(k: int = 4) -> Coupling:
    """Each example draws k noises and keeps the one that is nearest to it.

    This needs no other example. The noise that is kept is no longer normal: its distribution is
    drawn towards the data, and the more so the larger k is.

    Raises:
      ValueError: if `k` is below 1.

    Source: Li et al. 2025, "Improved immiscible diffusion", arXiv 2505.18521.
    """
    if not whole(k):
        raise ValueError(f"{k=}: must be a whole number, at least 1, of noises to choose from")

    def nearest(key, x_0, eps):
        fresh = jax.random.normal(key, (k - 1, *eps.shape), eps.dtype)
        each = jnp.concatenate([eps[None], fresh])
        distance = jnp.sum((each - x_0[None]) ** 2, axis=tuple(range(1, each.ndim)))
        return each[jnp.argmin(distance)]

    return lambda key, x_0, eps, cond: jax.vmap(nearest)(keys.per_example(key, len(eps)), x_0, eps)


def _same(cond: Cond, n: int) -> Bool[Array, "n n"]:
    """Whether two examples have the same conditioning."""
    same = jnp.ones((n, n), bool)
    for leaf in jax.tree.leaves(cond):
        flat = leaf.reshape(n, -1)
        same &= (flat[:, None] == flat[None]).all(-1)
    return same


def _assign(
    x_0: Float[Real, "n d"], eps: Float[Real, "n d"], same: Bool[Real, "n n"]
) -> Int[np.ndarray, " n"]:
    """The permutation of eps with the largest sum of <x_0, eps>, on the host."""
    from scipy.optimize import linear_sum_assignment

    product = np.nan_to_num(np.asarray(x_0) @ np.asarray(eps).T)
    forbidden = np.where(same, product, -np.inf)
    return linear_sum_assignment(forbidden, maximize=True)[1].astype(np.int32)


def _sinkhorn(x_0, eps, same, epsilon, iterations):
    """The logarithm of the entropic plan, up to a constant in each row; its columns sum to one."""
    product = jnp.einsum("id,jd->ij", x_0, eps, precision="highest")
    scale = epsilon * jnp.std(product, where=same)
    log_plan = jnp.where(same, product / jnp.maximum(scale, 1e-30), -jnp.inf)

    def step(_, log_plan):
        for axis in (1, 0):
            log_plan = log_plan - jax.nn.logsumexp(log_plan, axis=axis, keepdims=True)
        return log_plan

    return jax.lax.fori_loop(0, iterations, step, log_plan)


COUPLINGS: dict[str, Callable[..., Coupling]] = {
    "independent": independent,
    "ot": ot,
    "immiscible": immiscible,
}
"""Couplings by name, as configs and the command line choose them: functions of their options."""
