# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Schedules, weightings, likelihood
#
# How fast is noise added, which noise levels does a loss emphasise, and how many bits does an image
# need? These are three questions about one quantity, log-SNR.

# %%
# !python -c "import diffjax" || pip install -q "..[plots]"
# %matplotlib inline
import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import diffjax
from diffjax import data, plots, weightings
from diffjax.checkpoint import load
from diffjax.experiment import resolve

matplotlib.rcParams.update({"axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
X_0, EPS, SCORE, POSTERIOR = plots.COLOURS[:4]  # each has the same colour in all notebooks

# %% [markdown]
# ## Schedules
#
# A schedule is two functions: one says how fast noise is added, the other how $x_t$ is normalised.
#
# $$ \text{log-SNR}(t) = \log \frac{\alpha_t^2}{\sigma_t^2}, \qquad
#    (\alpha, \sigma) = \text{scales}(\text{log-SNR}) $$

# %%
SCHEDULES = {
    "cosine": diffjax.cosine(-10, 10),
    "linear (VP-SDE)": diffjax.linear(),
    "DDPM's 1,000 betas": diffjax.from_betas(diffjax.linear_betas(1000)),
    "rectified flow": diffjax.rectified_flow(),
    "log-uniform (VE)": diffjax.log_uniform(),
}
plots.schedule_curves(SCHEDULES)

# %% [markdown]
# All are finite on the whole of $[0, 1]$, so that nothing divides by zero at the ends. (DDPM's
# betas are the linear schedule at 1,000 times, so that the two lines coincide.) The scales are a
# convention: at equal log-SNR, one schedule's $x_t$ is a multiple of another's, and a perfect
# denoiser has the same output for both.

# %%
weights, means, widths = jnp.ones(3), jnp.array([[-1.0], [0.2], [1.2]]), jnp.array([0.1, 0.02, 0.2])
x_0, eps = jnp.array([[1.0]]), jnp.array([[-0.7]])
for name, schedule in SCHEDULES.items():
    t = diffjax.time_at(schedule, 1.0)  # where its log-SNR is 1
    x_t = diffjax.q_sample(schedule, x_0, t, eps)
    denoise = diffjax.oracles.gaussian_mixture(schedule, weights, means, widths)
    guess = denoise(x_t, t).x_0
    print(f"{name:20} t = {t:.3f}   x_t = {x_t[0, 0]:.3f}   E[x_0 | x_t] = {guess[0, 0]:.5f}")

# %% [markdown]
# ## Weightings
#
# A loss is described by a schedule, a target, a weighting and a density of times, and yet depends
# on one function only: the expected loss is an integral over log-SNR of the error of $\hat x_0$
# times a weight. Two objectives are the same if and only if these weights are.
#
# $$ L = \int w(\lambda)\ \mathbb E \|x_0 - \hat x_0\|^2\, d\lambda, \qquad
#    \lambda = \text{log-SNR} $$

# %%
cosine, linear = SCHEDULES["cosine"], SCHEDULES["linear (VP-SDE)"]
weight_of = diffjax.effective_weight

figure, (left, right) = plots.panels(1, 2, 4.8, 3.4)
plots.weight_curves(
    {
        "bound, cosine": weight_of(cosine, "eps", weightings.elbo()),
        "bound, linear": weight_of(linear, "x_0", weightings.elbo()),
        "L_simple, cosine": weight_of(cosine, "eps", weightings.constant()),
        "L_simple, linear": weight_of(linear, "eps", weightings.constant()),
        "x_0 as it is, cosine": weight_of(cosine, "x_0"),
    },
    low=-9.9, high=9.9, ax=left,
)  # fmt: skip
plots.weight_curves(
    {
        "bound": weight_of(cosine, "eps", weightings.elbo()),
        "min-SNR 5": weight_of(cosine, "eps", weightings.min_snr(5.0)),
        "P2": weight_of(cosine, "eps", weightings.p2()),
        "sigmoid": weight_of(cosine, "eps", weightings.sigmoid(0.0)),
        "EDM": weight_of(cosine, "F", weightings.edm()),
        "truncated SNR": weight_of(cosine, "v", weightings.truncated_snr()),
    },
    low=-9.9, high=9.9, ax=right,
)  # fmt: skip
left.set_title("the bound ignores the schedule; L_simple does not")
right.set_title("weightings, on the cosine schedule")
figure

# %% [markdown]
# The bound is the same line for every schedule and target. The "simple" loss is another objective
# with each schedule, because there the schedule is a part of the weighting.
#
# ## The bound of an oracle is its likelihood
#
# In continuous time the bound is an integral over log-SNR, and it is tight if the denoiser is
# perfect. The probability flow gives a density in another way, by the change of variables along an
# ODE. The oracle knows the true density.
#
# $$ -\log p(x_0) \le \text{prior} + \text{reconstruction} + \tfrac12 \int \mathrm{snr}\
#    \mathbb E \|x_0 - \hat x_0\|^2\, d\lambda $$

# %%
schedule = cosine
weights, widths = jnp.array([0.3, 0.5, 0.2]), jnp.array([0.05, 0.1, 0.02])
means = jnp.array([[-1.2, 0.0], [0.8, 0.8], [0.6, -1.0]])
denoise = diffjax.oracles.gaussian_mixture(schedule, weights, means, widths)
x_0 = denoise.sample(jax.random.key(0), 400)

truth = -denoise.log_density(x_0, 0.0)
bound = diffjax.elbo(jax.random.key(1), denoise, schedule, x_0, levels=None, samples=128)
flow = -diffjax.flow_log_likelihood(denoise, schedule, x_0)
for name, nats in (("exact", truth), ("bound", bound.nats), ("flow", flow)):
    print(f"{name}: {nats.mean():.4f} nats, {diffjax.bits_per_dim(nats.mean(), (2,)):.4f} bits/dim")
print(f"standard error of the bound: {jnp.sqrt((bound.standard_error**2).mean() / 400):.4f} nats")

some = jnp.arange(120)
figure, (ax,) = plots.panels(1, 1, 4.2, 3.6)
line = jnp.array([truth[some].min(), truth[some].max()])
ax.errorbar(
    truth[some], bound.nats[some], bound.standard_error[some], fmt=".", color=POSTERIOR,
    elinewidth=0.6, label="bound, with its standard error",
)  # fmt: skip
ax.plot(truth[some], flow[some], ".", color=X_0, label="probability flow")
ax.plot(line, line, color=plots.INK, linewidth=0.7, zorder=0)
ax.set(xlabel="exact $-\\log p(x_0)$, nats", ylabel="nats", title="120 points")
ax.legend()
figure

# %% [markdown]
# The flow is exact for each point, and needs an integration. The bound is an average over noise: it
# is rough for one point, and suits a data set.
#
# ## Where the bits go
#
# The integrand says at which noise levels the nats are needed. For the oracle, the next picture
# shows the mean of `denoising_term` per unit of log-SNR.


# %%
def spent(denoise, schedule, x_0, levels, key):
    """Denoising terms `[levels, batch]`, in nats per unit of log-SNR."""
    rate = jax.vmap(jax.grad(schedule.log_snr))

    def at(inputs):
        log_snr, key = inputs
        t = diffjax.time_at(schedule, log_snr)
        eps = jax.random.normal(key, x_0.shape)
        per_time = diffjax.denoising_term(denoise, schedule, x_0, eps, t, s=None)
        return per_time / -rate(t[None])

    return jax.jit(lambda: jax.lax.map(at, (levels, jax.random.split(key, len(levels)))))()


levels = jnp.linspace(-7.9, 9.9, 60)
x_0 = denoise.sample(jax.random.key(3), 4000)
nats = spent(denoise, schedule, x_0, levels, jax.random.key(4))

figure, (ax,) = plots.panels(1, 1, 6, 3)
ax.fill_between(levels, nats.mean(1), color=POSTERIOR, alpha=0.25)
ax.plot(levels, nats.mean(1), color=POSTERIOR)
ax.axhline(1.0, color=plots.INK, linewidth=0.7)
ax.annotate("1 = d / 2: resolving Gaussians", (-7.8, 1.02), color=plots.INK, size=8)
ax.set(xlabel="log-SNR (noise on the left, data on the right)", ylabel="nats per unit of log-SNR")
figure

# %% [markdown]
# On the left $x_t$ says nothing about $x_0$, and no nats are needed. Then it is decided which of
# the three components $x_0$ is from. Then the curve is at $d / 2$: every further unit of log-SNR
# costs the same, as it must for a density, because the uncertainty of $x_0$ shrinks by $e^{1/2}$ in
# each dimension. (For this reason `reconstruction` is negative: it returns these nats.)
#
# The next picture is for images, with a network that comes with diffjax. The images have 17 grey
# levels, so that there is a finite number of bits to learn.

# %%
network, params, config = load("digits")
e = resolve(config)  # the functions that the config means
schedule = e.schedule
denoise = e.clip(e.denoiser(functools.partial(network, params)))

batch = data.first(data.load("digits").test, 200)
images, label = jnp.asarray(batch["x"]), jnp.asarray(batch["label"])
labelled = lambda x_t, t: denoise(x_t, t, {"label": label})
unlabelled = lambda x_t, t: denoise(x_t, t, {"label": jnp.full_like(label, 10)})  # 10: no label

ends = schedule.log_snr(1.0), schedule.log_snr(0.0)
levels = jnp.linspace(*ends, 32)[1:-1]
nats = [spent(d, schedule, images, levels, jax.random.key(5)) for d in (labelled, unlabelled)]
bits, without = (diffjax.bits_per_dim(x, (8, 8, 1)) for x in nats)

figure, (top, bottom) = plots.panels(2, 1, 7, 2.4)
for values, colour, name in ((bits, POSTERIOR, "given the label"), (without, X_0, "without")):
    mean, error = values.mean(1), values.std(1) / 200**0.5
    top.plot(levels, mean, color=colour, label=name)
    top.fill_between(levels, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
top.set(ylabel="bits/dim per log-SNR", xlim=ends)
top.legend()
shown = jnp.linspace(*ends, 13)
noise = jax.random.normal(jax.random.key(6), (3, 8, 8, 1))
rows = []
for level in shown:
    t = diffjax.time_at(schedule, level)
    rows.append(diffjax.q_sample(schedule, images[2:5], t, noise))
picture = plots.image_grid(np.stack(rows, 1).reshape(-1, 8, 8, 1), columns=13)
bottom.imshow(picture, cmap="gray", aspect="auto", extent=(*ends, 0, 1))
bottom.set(yticks=[], xlabel="log-SNR, and $x_t$ of three images there")
bottom.grid(visible=False)
figure

# %% [markdown]
# Most bits are needed on the right, where the digit is already recognisable, for the exact greys of
# its pixels. *Which* digit it is needs few bits, and is decided on the left, where the two curves
# differ. The area between them is the number of bits that the label saves this network:

# %%
saved = 64 * jnp.trapezoid(without - bits, levels, axis=0)  # bits, of each image
print(f"saved {saved.mean():.1f} +- {saved.std() / 200**0.5:.1f} bits an image")
print(f"a label of ten holds {np.log2(10):.2f}")

# %% [markdown]
# A perfect model could not save more bits than the label holds. This one was trained without labels
# on only one image in ten, so that it predicts worse without a label than it could.

# %%
bound = diffjax.elbo(jax.random.key(7), labelled, schedule, images, levels=17)
for term in ("prior", "reconstruction", "denoising", "nats"):
    nats = getattr(bound, term).mean()
    print(f"{term:>15} {diffjax.bits_per_dim(nats, (8, 8, 1)):7.3f} bits/dim")

# %% [markdown]
# A loss for good pictures rather than few bits should therefore give the left more weight, as the
# weightings above do, and the bound does not.
