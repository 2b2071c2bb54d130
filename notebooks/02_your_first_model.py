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
# # Your first model
#
# This notebook trains a model of points in the plane and one of handwritten digits, and samples
# from both, in a few lines of pure functions: a schedule, a network, a loss, an optimiser, a step,
# a sampler. There is no trainer class. At the end the same step runs on two devices.

# %%
# !python -c "import diffjax" || pip install -q "..[plots]"
# %matplotlib inline
import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import diffjax
from diffjax import data, keys, models, plots
from diffjax.training import ema_warmup, init_state, train_step

jax.config.update("jax_num_cpu_devices", 2)  # uses two cores of a CPU; must come before JAX starts
matplotlib.rcParams.update({"axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
X_0, EPS, SCORE, POSTERIOR = plots.COLOURS[:4]  # each has the same colour in all notebooks

# %% [markdown]
# ## Two moons
#
# **The schedule** says how much noise there is at time $t$:
# $x_t = \alpha_t x_0 + \sigma_t \epsilon$.

# %%
train_set = data.load("two_moons").train
moons = train_set.x  # [16384, 2], within [-1, 1]
schedule = diffjax.cosine(-10, 10)

figure, axes = plots.panels(1, 5, 2.1, 2.1)
noise = jax.random.normal(jax.random.key(0), moons[:1500].shape)
for ax, t in zip(axes, (0.0, 0.1, 0.25, 0.5, 1.0), strict=True):
    x_t = diffjax.q_sample(schedule, moons[:1500], t, noise)
    ax.plot(*x_t.T, ".", color=plots.INK, markersize=1)
    ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=f"$x_t$, $t = {t:g}$")
figure

# %% [markdown]
# **The network** is any function of $(x_t, \text{log-SNR}, \text{cond})$. This one comes with
# diffjax. It takes two numbers and the noise level, and returns two numbers.

# %%
mlp = models.MLP(models.MLPConfig(width=128, blocks=3))
network = functools.partial(models.apply, mlp)  # (params, x_t, log_snr, cond) -> [batch, 2]
params = mlp.init(jax.random.key(1), jnp.zeros((1, 2)), jnp.zeros(1), None)["params"]
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# **The loss** draws a time and a noise for each example, and takes a squared error. One word,
# `target`, chooses what the network predicts.
#
# $$ L = \mathbb E_{t, \epsilon}\ \|\epsilon - \hat\epsilon(x_t, t)\|^2 $$


# %%
def loss_fn(key, params, batch, target="eps"):
    key_times, key_noise = jax.random.split(key)
    net = functools.partial(network, params)
    own = keys.fold_in(key_noise, batch["index"])  # each example has a key of its own
    t = diffjax.sample_times(key_times, 256, index=batch["index"])
    return diffjax.diffusion_loss(own, net, schedule, target, batch["x"], t=t)


# %% [markdown]
# **The step** is a pure function from a state and a batch to the next state and metrics. The
# optimiser is from `optax`.

# %%
tx = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))
state = init_state(jax.random.key(2), params, tx)
step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=ema_warmup(0.995)))

moons_losses = []
for i in range(2000):
    batch = data.train_batch(train_set, seed=0, step=i, batch_size=256)  # x, and index
    state, metrics = step(state, batch)
    moons_losses.append(metrics["loss"])
print(f"loss {np.mean(moons_losses[-200:]):.3f}")

# %% [markdown]
# **The sampler** walks from noise, $t = 1$, to data, $t = 0$. It calls a denoiser, and does not
# depend on what the network predicts.

# %%
denoise = diffjax.denoiser(functools.partial(network, state.ema_params), schedule, "eps")
walk = diffjax.heun(denoise, schedule)
x_1 = diffjax.prior_sample(jax.random.key(3), schedule, (2000, 2))
ts = diffjax.uniform_times(40)
sample = jax.jit(diffjax.sample, static_argnums=(1, 4))
x_0, path = sample(jax.random.key(4), walk, x_1, ts, lambda state, t: state.x)

figure, axes = plots.panels(1, 4, 2.7, 2.7)
axes[0].plot(moons_losses, color=EPS, linewidth=0.3)
axes[0].set(xlabel="step", title="loss", ylim=(0, 1))
path = jnp.concatenate([x_1[None], path])
axes[1].plot(path[:, :60, 0], path[:, :60, 1], "-", color=EPS, linewidth=0.5)
axes[1].plot(*path[-1, :60].T, ".", color=plots.INK, markersize=3, zorder=3)
axes[1].set(title="60 walks", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
for ax, x, title in ((axes[2], x_0, "2,000 samples"), (axes[3], moons[:2000], "2,000 of the data")):
    ax.plot(*x.T, ".", color=plots.INK, markersize=1)
    ax.set(title=title, xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
figure

# %% [markdown]
# ## Handwritten digits
#
# These are the same parts for images `[batch, 8, 8, 1]`, with a U-Net and labels. One label in ten
# is replaced by "none" (class 10), so that the network learns to predict with and without a label,
# which guidance needs.

# %%
train_set = data.load("digits").train  # x [1497, 8, 8, 1], label [1497]
schedule = diffjax.cosine(-8, 7)
unet = models.UNet(
    models.UNetConfig(
        width=32, mults=(1, 1), blocks=1, attention=(4,), groups=8, dropout=0.0,
        labels=10, null_label=True,
    )
)  # fmt: skip
network = functools.partial(models.apply, unet)


def digits_loss(key, params, batch, target="v"):
    key_times, key_label, key_noise = jax.random.split(key, 3)
    drop = jax.vmap(jax.random.uniform)(keys.fold_in(key_label, batch["index"])) < 0.1
    cond = {"label": jnp.where(drop, 10, batch["label"])}
    t = diffjax.sample_times(key_times, 128, index=batch["index"])
    weight = diffjax.weightings.min_snr(5.0)
    net = functools.partial(network, params)
    own = keys.fold_in(key_noise, batch["index"])
    return diffjax.diffusion_loss(own, net, schedule, target, batch["x"], cond, weight, t)


# %% [markdown]
# ## On two devices
#
# `pmap` runs the step on every device, each with its share of the batch. The step needs only the
# name of the axis, `axis_name`. The cores of a CPU can be devices, which for a U-Net is faster than
# one device with several threads.

# %%
rate = optax.warmup_cosine_decay_schedule(0, 4e-3, 30, 300)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
first = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), {"label": jnp.zeros(1, int)}
params = jax.jit(unet.init)(jax.random.key(5), *first)["params"]
state = init_state(jax.random.key(6), params, tx)

pure = functools.partial(train_step, loss_fn=digits_loss, tx=tx, ema_decay=ema_warmup(0.95))
parallel = functools.partial(pure, axis_name="devices")
step = jax.pmap(parallel, axis_name="devices", in_axes=(None, 0), out_axes=None)

devices = jax.local_device_count()
split = lambda batch: jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)

# %% [markdown]
# First we check that the step is the same on one device and on two, from the same state.

# %%
batch = data.train_batch(train_set, seed=0, step=0, batch_size=128)  # x, label and index
alone, alone_metrics = jax.jit(pure)(state, batch)
together, metrics = step(state, split(batch))
print(f"devices: {devices}")
print(f"loss     {alone_metrics['loss']:.7f} on one, {metrics['loss']:.7f} on all")
print(f"gradient {alone_metrics['grad_norm']:.7f} on one, {metrics['grad_norm']:.7f} on all")

# %% [markdown]
# Every example draws its noise from a key of its own, which depends on its position in the whole
# batch, so that it does not matter which device it is on. Only the order of a sum differs. Now
# train:

# %%
digits_losses = []
for i in range(300):
    batch = data.train_batch(train_set, seed=0, step=i, batch_size=128)
    state, metrics = step(state, split(batch))
    # float() waits for the step to end, because the devices of one CPU share its threads.
    digits_losses.append(float(metrics["loss"]))
print(f"loss {np.mean(digits_losses[-50:]):.3f}")

# %% [markdown]
# Then draw ten samples of each digit. Guidance and clipping take a denoiser and return a denoiser.

# %%
denoise = diffjax.denoiser(functools.partial(network, state.ema_params), schedule, "v")
guided = diffjax.classifier_free(denoise, 1.5, null={"label": 10})
guided = diffjax.clip_x_0(guided, schedule)

label = jnp.arange(100) % 10
walk = diffjax.ddim(functools.partial(guided, cond={"label": label}), schedule)
x_1 = diffjax.prior_sample(jax.random.key(8), schedule, (100, 8, 8, 1))
ts = diffjax.uniform_times(25)
observe = lambda state, t: (state.x, state.x_0)
x_0, (x_t, estimates) = sample(jax.random.key(9), walk, x_1, ts, observe)
plots.samples(x_0, classes=10)

# %%
shown = jnp.array([3, 8])
plots.denoising_strip(x_t[:, shown], estimates[:, shown], ts[1:], columns=10)

# %% [markdown]
# The upper rows show $x_t$, and the lower ones the estimate of $x_0$ at that time. Training took
# about a minute. `python train.py` does the same with checkpoints, metrics and resumption, and
# trains a better model in two minutes. To predict something else, change `target` to `"x_0"`,
# `"eps"`, `"score"` or `"v"`, in the loss and in `denoiser`.
