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
# # Samplers, guidance, inverse problems
#
# This notebook begins with a mixture of Gaussians, whose denoiser is exact, so that all of the
# error is the sampler's, and every answer is known. It ends with a network that was trained on
# handwritten digits.

# %%
# !python -c "import diffjax" || pip install -q "..[plots]"
# %matplotlib inline
import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

import diffjax
from diffjax import data as datasets, inverse, plots
from diffjax.checkpoint import load
from diffjax.experiment import resolve

matplotlib.rcParams.update({"axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
X_0, EPS, SCORE, POSTERIOR = plots.COLOURS[:4]  # each has the same colour in all notebooks
SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", "#A0A0A0"])

schedule = diffjax.cosine(-7, 7)
weights = jnp.array([0.25, 0.15, 0.3, 0.2, 0.1])
means = jnp.array([[-1.5, -0.8], [-0.4, 1.5], [1.3, 0.9], [0.9, -1.4], [0.0, 0.0]])
widths = jnp.array([0.1, 0.05, 0.06, 0.12, 0.03])
data = diffjax.oracles.gaussian_mixture(schedule, weights, means, widths)
sample = jax.jit(diffjax.sample, static_argnums=(1, 4))


def ground(ax, oracle=data, t=0.0, title=""):
    """The plane, with a density."""
    plots.density(lambda x: oracle.log_density(x, t), -2.8, 2.8, ax=ax)
    ax.collections[-1].set_cmap(SHADES)
    ax.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), title=title)


# %% [markdown]
# ## Error against evaluations
#
# A deterministic sampler solves the probability-flow ODE. The oracle has the exact solution
# (`flow_map`). The cost of a step is its evaluations of the network, so the axis counts those:
# `heun` has two per step, the others one. On a log-log plot the slope is the order of convergence.
#
# $$ \frac{dx}{dt} = f(t)\, x - \tfrac12 g(t)^2\, \nabla \log p_t(x) $$

# %%
per_step = {"ddim": 1, "heun": 2, "dpm_solver_pp_2m": 1, "dpm_solver_pp_3m": 1, "unipc": 1}
evaluations = (16, 32, 64, 128)

with jax.enable_x64(True):  # in float32, rounding would hide the highest orders
    x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
    exact = jax.jit(data.flow_map)(x_1, 1.0, 0.0)
    errors = {}
    for name, cost in per_step.items():
        walk = diffjax.SAMPLERS[name].make(data, schedule)
        grids = [diffjax.log_snr_times(schedule, n // cost) for n in evaluations]
        ends = [sample(jax.random.key(1), walk, x_1, ts)[0] for ts in grids]
        distances = [jnp.linalg.norm(end - exact, axis=-1) for end in ends]
        errors[name] = evaluations, [float(jnp.median(d)) for d in distances]

figure, (ax,) = plots.panels(1, 1, 5.5, 3.6)
plots.convergence(errors, ax)
ax.set(title="median distance from the exact flow; steps of equal log-SNR")
figure

# %% [markdown]
# With many steps the order matters most. With few, the constants matter, and where the long steps
# are:

# %%
grids = {
    "equal log-SNR": diffjax.log_snr_times(schedule, 16),
    "equal t": diffjax.uniform_times(16),
    "Karras": diffjax.karras_times(schedule, 16),
}
x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (64, 2))
exact = jax.jit(data.flow_map)(x_1, 1.0, 0.0)
print("median distance after 16 steps", *(name.rjust(14) for name in grids))
for make in (diffjax.ddim, diffjax.dpm_solver_pp_2m, diffjax.unipc):
    ends = [sample(jax.random.key(1), make(data, schedule), x_1, ts)[0] for ts in grids.values()]
    row = [jnp.median(jnp.linalg.norm(end - exact, axis=-1)) for end in ends]
    print(make.__name__.rjust(30), *(f"{error:14.4f}" for error in row))

# %% [markdown]
# ## Trajectories
#
# Each picture shows walks from the same eight noises (rings), the first three with few steps. The
# exact flow is grey. The last sampler adds fresh noise at every step, so that its walks end
# elsewhere, with the same distribution.

# %%
x_1 = diffjax.prior_sample(jax.random.key(5), schedule, (8, 2))
where = lambda state, t: state.x


def path_of(make, n):
    ts = diffjax.uniform_times(n)
    _, path = sample(jax.random.key(6), make(data, schedule), x_1, ts, where)
    return jnp.concatenate([x_1[None], path])


exact = path_of(diffjax.heun, 100)
walks = {
    "ddim, 8 steps": path_of(diffjax.ddim, 8),
    "heun, 4 steps of 2 evaluations": path_of(diffjax.heun, 4),
    "dpm_solver_pp_2m, 8 steps": path_of(diffjax.dpm_solver_pp_2m, 8),
    "ancestral, 100 steps": path_of(diffjax.ancestral, 100),
}
figure, axes = plots.panels(1, 4, 2.8, 2.8)
for ax, (name, path), colour in zip(axes, walks.items(), plots.COLOURS, strict=False):
    ground(ax, title=name)
    ax.plot(exact[..., 0], exact[..., 1], color="#999999", linewidth=2.5, alpha=0.7)
    mark = "o-" if len(path) < 20 else "-"
    ax.plot(path[..., 0], path[..., 1], mark, markersize=2.5, color=colour, linewidth=0.9)
    ax.plot(*x_1.T, "o", markersize=4, color=colour, markerfacecolor="white", zorder=3)
figure

# %% [markdown]
# ## Guidance
#
# Let the mixture have labels: its components form three classes. Guidance extrapolates from the
# denoiser's output without a label to its output with one:
#
# $$ \hat x = (1 - w)\, \hat x(x_t) + w\, \hat x(x_t \mid y) $$
#
# $w = 0$ ignores the label, and $w = 1$ samples the conditional distribution $p(x \mid y)$. A
# larger $w$ samples neither $p(x \mid y)$ nor a sharper version of it. Both denoisers are exact
# here, so that the pictures show the effect of guidance alone.

# %%
classes = [
    diffjax.oracles.gaussian_mixture(schedule, weights[i], means[i], widths[i])
    for i in (jnp.array([0, 1]), jnp.array([2, 4]), jnp.array([3]))
]


def denoise(x_t, t, cond=None):  # cond is a class, or None for all of them
    return (data if cond is None else classes[cond])(x_t, t)


x_1 = diffjax.prior_sample(jax.random.key(7), schedule, (600, 2))
figure, axes = plots.panels(1, 4, 2.8, 2.8)
for ax, w in zip(axes, (0.0, 1.0, 2.0, 5.0), strict=True):
    guided = diffjax.classifier_free(denoise, w, null=None)
    walk = diffjax.heun(functools.partial(guided, cond=1), schedule)
    x_0, _ = sample(jax.random.key(8), walk, x_1, diffjax.uniform_times(50))
    ground(ax, title=f"class 1 of 3, $w = {w:g}$")
    ax.plot(*x_0.T, ".", color=X_0, markersize=2)
figure

# %% [markdown]
# With large weights the samples gather on the side away from the other classes. `within` guides in
# an interval of noise levels only, and the choice of the interval matters:

# %%
guided = diffjax.classifier_free(denoise, 5.0, null=None)
figure, axes = plots.panels(1, 3, 2.8, 2.8)
intervals = {"log-SNR in [-7, 7]": (-7, 7), "in [-7, -2]": (-7, -2), "in [-2, 1]": (-2, 1)}
for ax, (name, (low, high)) in zip(axes, intervals.items(), strict=True):
    some = diffjax.within(guided, denoise, schedule, low, high)
    walk = diffjax.heun(functools.partial(some, cond=1), schedule)
    x_0, _ = sample(jax.random.key(8), walk, x_1, diffjax.uniform_times(50))
    ground(ax, classes[1], title=f"$w = 5$, {name}")
    ax.plot(*x_0.T, ".", color=X_0, markersize=2)
figure

# %% [markdown]
# At high noise it is decided which component a sample belongs to. Guidance there suppresses the
# small component, which is near the other classes, and hardly changes the large one. Guidance at
# lower noise does the opposite: it keeps the components and distorts their shapes.

# %% [markdown]
# ## Guidance of a trained network
#
# `load` takes a run's directory, or the name of a network that comes with diffjax. This one was
# trained with labels, one in ten of them left out, so that it can predict both terms of the
# formula.

# %%
network, params, config = load("digits")
e = resolve(config)  # the functions that the config means
digits_schedule = e.schedule
denoise_digits = e.denoiser(functools.partial(network, params))
noise = diffjax.prior_sample(jax.random.key(9), digits_schedule, (40, 8, 8, 1))
ts = diffjax.uniform_times(20)
label = {"label": jnp.arange(40) % 10}


def draw(denoise, cond):
    """Samples from the same noises, clipped to the range of pixels."""
    clipped = diffjax.clip_x_0(denoise, digits_schedule)
    walk = diffjax.ddim(functools.partial(clipped, cond=cond), digits_schedule)
    return sample(jax.random.key(10), walk, noise, ts)[0]


gap = np.ones((1, 10, 8, 8, 1))
columns = []
for w in (0.0, 1.0, 2.0, 6.0):
    guided = diffjax.classifier_free(denoise_digits, w, null={"label": 10})
    columns += [draw(guided, label).reshape(4, 10, 8, 8, 1), gap]
rows = np.concatenate(columns[:-1]).swapaxes(0, 1)  # a row of each label
plots.image_grid(rows.reshape(-1, 8, 8, 1), columns=19, height=40)

# %% [markdown]
# Each row is a label. There are four columns for each of $w = 0, 1, 2, 6$, from the same noises.
# Without the label ($w = 0$) samples are of any digit; with $w = 1$ they are mostly of the right
# one; with larger weights they are clearer and more alike.
#
# ## Inverse problems
#
# A measurement $A x_0$ is known, and $x_0$ is to be found. The first example has an exact answer:
# the first coordinate of a point of the mixture is measured, and the second, $y$, is unknown.

# %%
seen = 1.1
points = jnp.linspace(-2.8, 2.8, 400)
log_p = data.log_density(jnp.stack([jnp.full(400, seen), points], axis=-1), 0.0)
truth = jnp.exp(log_p) / (jnp.exp(log_p).sum() * (points[1] - points[0]))

x_1 = diffjax.prior_sample(jax.random.key(11), schedule, (1000, 2))
first = lambda x: x[:, :1]  # A, any linear function
y = jnp.full((1000, 1), seen)
mask = jnp.array([1.0, 0.0])
step = diffjax.ancestral(data, schedule)
methods = {
    "pigdm": diffjax.ancestral(inverse.pigdm(data, schedule, first, y), schedule),
    "dps": inverse.dps(step, first, y, scale=0.1),
    "repaint": inverse.repaint(step, schedule, mask, jnp.tile(y, (1, 2)), repeats=5),
}
figure, axes = plots.panels(1, 4, 2.8, 2.8)
ground(axes[0], title=f"$x$ is measured to be {seen}, $y$ is unknown")
axes[0].axvline(seen, color=POSTERIOR)
for ax, (name, walk) in zip(axes[1:], methods.items(), strict=True):
    x_0, _ = sample(jax.random.key(12), walk, x_1, diffjax.uniform_times(200))
    ax.hist(x_0[:, 1], bins=40, range=(-2.8, 2.8), density=True, color=X_0, alpha=0.5, label=name)
    ax.plot(points, truth, color=plots.INK, label="exact")
    ax.set_title(f"{name}: $x$ is {x_0[:, 0].mean():.2f} $\\pm$ {x_0[:, 0].std():.2f}")
    ax.set(xlabel="$y$", ylim=(0, 1.5))
    ax.legend(loc="upper center")
figure

# %% [markdown]
# All three are approximations. They are good here, and bad where the measurement is improbable: at
# `seen = 0.6` the exact answer is nearly always below zero, and all three are far from it.
#
# In the next example half of a digit is hidden, and the network is not given the label:

# %%
truth = jnp.asarray(datasets.first(datasets.load("digits").test, 5)["x"])
mask = jnp.ones((8, 8, 1)).at[4:].set(0.0)  # the lower half is hidden
every = lambda x: jnp.repeat(x, 8, axis=0)  # eight samples for each digit
hide = inverse.inpainting(mask)

nothing = {"label": jnp.full(40, 10)}
anything = lambda x_t, t, cond=None: denoise_digits(x_t, t, nothing)
posterior = inverse.pigdm(anything, digits_schedule, hide, hide(every(truth)), sigma_data=0.7)
answers = draw(posterior, None)

rows = jnp.concatenate(
    [truth[:, None], jnp.where(mask == 1, truth, -0.3)[:, None], answers.reshape(5, 8, 8, 8, 1)], 1
)
plots.image_grid(np.asarray(rows).reshape(50, 8, 8, 1), columns=10)

# %% [markdown]
# Each row has a held-out digit, its visible half, and eight samples. Where the visible half does
# not determine the digit, the samples differ.
