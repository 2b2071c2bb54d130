"""Draw the picture of docs/plots.md, which shows what `diffjax.plots` draws.

    python studies/plots.py        # writes docs/images/plots.png; a minute on two cores

All denoisers in it are exact.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import diffjax
from diffjax import data, losses, oracles, plots, weightings

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "plots.png"
SCHEDULE = diffjax.cosine(-8, 8)
MIXTURE = oracles.gaussian_mixture(
    SCHEDULE,
    [0.4, 0.35, 0.25],
    [[-1.2, -0.6], [1.3, -0.4], [0.1, 1.4]],
    [[[0.12, 0.05], [0.05, 0.1]], [[0.1, -0.06], [-0.06, 0.15]], [[0.2, 0.0], [0.0, 0.06]]],
)
KEY = jax.random.key(4)


def walk(sampler, x_1, ts):
    """x_t, the estimate of x_0 and the time, after each step of a walk."""
    observe = lambda state, t: (state.x, state.x_0, t)
    return diffjax.sample(KEY, sampler, x_1, ts, observe)[1]


def strip():
    """A walk to two of the digits, with the best denoiser of the digits themselves."""
    digits, _ = data.all_examples(data.load("digits"))
    denoise = oracles.dataset(SCHEDULE, jnp.asarray(digits))
    x_1 = diffjax.prior_sample(KEY, SCHEDULE, (2, 8, 8, 1))
    observed = walk(diffjax.ddim(denoise, SCHEDULE), x_1, diffjax.uniform_times(60))
    return plots.denoising_strip(*observed, columns=16)


def one_step(ax):
    """The forward process and the posterior of one example, in the plane."""
    x_0, eps, t, s = jnp.array([[-1.4, -0.5]]), jnp.array([[2.0, 1.3]]), 0.6, 0.45
    alpha, sigma = (float(scale) for scale in SCHEDULE(t))
    x_t = alpha * x_0 + sigma * eps
    mean, std = diffjax.q_posterior(SCHEDULE, x_0, x_t, t, s)
    plots.density(lambda x: MIXTURE.log_density(x, 0.0), -2.2, 2.2, ax)
    plots.arrow(ax, alpha * x_0[0], x_t[0], r"$\sigma_t\,\epsilon$", plots.COLOURS[1])
    towards = x_t + sigma**2 * MIXTURE.score(x_t, t)
    plots.arrow(ax, x_t[0], towards[0], r"$\sigma_t^2\,\nabla\log p_t$", plots.COLOURS[2])
    plots.circle(ax, mean[0], float(std.ravel()[0]), r"$q(x_s\,|\,x_t, x_0)$", plots.COLOURS[3])
    for x, label, at in (
        (x_0, "$x_0$", (-8, -10)),
        (alpha * x_0, r"$\alpha_t x_0$", (8, -12)),
        (x_t, "$x_t$", (8, 4)),
    ):
        ax.plot(*x[0], "o", color=plots.INK, markersize=4)
        ax.annotate(label, x[0], at, textcoords="offset points", size=9, ha="center")


def figure():
    """Nine panels."""
    picture, axes = plots.panels(3, 3)
    names = ("cosine", "linear", "rectified_flow")
    plots.schedule_curves({name: diffjax.SCHEDULES[name]() for name in names}, axes[:3])

    names = ("constant", "elbo", "min_snr", "edm")
    choices = {name: weightings.WEIGHTINGS[name]() for name in names}
    choices["sigmoid"] = weightings.sigmoid(-1.0)
    weights = {k: diffjax.effective_weight(diffjax.cosine(), "eps", w) for k, w in choices.items()}
    plots.weight_curves(weights, ax=axes[3])

    n = 20_000
    x_0, t = MIXTURE.sample(KEY, n), diffjax.sample_times(jax.random.key(1), n)
    log_snr = SCHEDULE.log_snr(t)
    rows = {}
    for target in ("x_0", "eps", "v"):
        exact = lambda x_t, log_snr, cond, target=target: diffjax.encode(
            target, *MIXTURE(x_t, t), *diffjax.scales_at(SCHEDULE, t, x_t)
        )
        each = diffjax.diffusion_loss(KEY, exact, SCHEDULE, target, x_0, t=t)
        sums, counts = np.asarray(losses.by_log_snr(log_snr, each))
        means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
        rows[f"{target}, exact"] = {"loss_by_log_snr": means}
    plots.loss_by_log_snr(rows, axes[4])

    times, x = jnp.linspace(0.01, 0.99, 99), x_0[:2000]
    eps = jax.random.normal(jax.random.key(2), x.shape)
    term = jax.jit(lambda t: diffjax.denoising_term(MIXTURE, SCHEDULE, x, eps, t, None))
    plots.bound_terms(times, {"exact": np.stack([term(t) for t in times])}, axes[5])
    axes[5].set_ylabel("denoising, nats per unit of t")

    one_step(axes[6])

    noised = lambda x: MIXTURE.log_density(x, 0.35)
    plots.density(noised, -2.6, 2.6, axes[7])
    plots.vector_field(lambda x: MIXTURE.score(x, 0.35), -2.6, 2.6, ax=axes[7])
    x_1 = diffjax.prior_sample(jax.random.key(3), SCHEDULE, (12, 2))
    walked, _, _ = walk(diffjax.heun(MIXTURE, SCHEDULE), x_1, diffjax.uniform_times(50))
    plots.trajectories(np.concatenate([x_1[None], walked]), axes[7])

    errors = {}
    exact = MIXTURE.flow_map(x_1, 1.0, 0.0)
    for name, evaluations in (("ddim", 1), ("heun", 2), ("dpm_solver_pp_2m", 1)):
        make = diffjax.SAMPLERS[name].make
        counts, found = (16, 32, 64, 128), []
        for count in counts:
            ts = diffjax.log_snr_times(SCHEDULE, count // evaluations)
            x_0 = diffjax.sample(KEY, make(MIXTURE, SCHEDULE), x_1, ts)[0]
            found.append(float(jnp.abs(x_0 - exact).max()))
        errors[name] = counts, found
    plots.convergence(errors, axes[8])
    return picture


def main():
    """Write the picture: the strip above, the panels below."""
    above, below = strip(), figure()
    for part in (above, below):
        part.set_dpi(100)
    above, below = plots.rendered(above), plots.rendered(below)
    picture = Image.new("RGB", (below.width, above.height + below.height), "white")
    picture.paste(above, (0, 0))
    picture.paste(below, (0, above.height))
    picture.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
