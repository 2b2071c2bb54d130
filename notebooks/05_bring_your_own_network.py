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
# # Bring your own network
#
# For diffjax a network is a function `network(x_t, log_snr, cond)` of noisy data `[batch, ...]`,
# log-SNR `[batch]` and any conditioning, with an output of the shape of `x_t`. It may be written
# with any library. Here are four networks, all trained by the same function.

# %%
# !python -c "import diffjax, equinox" || pip install -q "..[plots]" equinox
# %matplotlib inline
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import optax
from flax import nnx

import diffjax
from diffjax import data, plots

matplotlib.rcParams.update({"axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
moons = jnp.asarray(data.load("two_moons").train.x)
schedule = diffjax.cosine(-10, 10)

# %% [markdown]
# ## Training and sampling
#
# The function below has a loss, an optimiser, a step and a sampler. Its `network` is a function
# `(params, x_t, log_snr, cond)`, and `params` any pytree.


# %%
def fit(network, params, target="v", steps=2000):
    """Train on two moons, and return 1,500 samples and the losses."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, key):
        key_data, key_loss = jax.random.split(key)
        x_0 = jax.random.choice(key_data, moons, (256,))
        net = lambda *inputs: network(params, *inputs)
        return diffjax.diffusion_loss(key_loss, net, schedule, target, x_0).mean()

    def step(carry, key):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def train_and_sample(params):
        keys = jax.random.split(jax.random.key(1), steps)
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        denoise = diffjax.denoiser(lambda *inputs: network(params, *inputs), schedule, target)
        x_1 = diffjax.prior_sample(jax.random.key(2), schedule, (1500, 2))
        walk = diffjax.heun(denoise, schedule)
        return diffjax.sample(jax.random.key(3), walk, x_1, diffjax.uniform_times(30))[0], losses

    return train_and_sample(params)


results = {}


def features(x_t, log_snr):
    """Sines and cosines of a point and a noise level, `[batch, 22]`: the input of all networks.

    From these a network learns fine detail much sooner than from the numbers themselves.
    """
    angles = [x_t, 2 * x_t, 4 * x_t, *(log_snr[:, None] / 20 * 2.0**k for k in range(4))]
    angles = jnp.concatenate([2 * x for x in angles], axis=-1)
    return jnp.concatenate([x_t, jnp.sin(angles), jnp.cos(angles)], axis=-1)


# %% [markdown]
# ## A bare function
#
# This network is a few products of matrices, and its parameters are a dictionary.


# %%
def bare(params, x_t, log_snr, cond):
    h = features(x_t, log_snr)
    for w, b in params["hidden"]:
        h = jax.nn.silu(h @ w + b)
    return h @ params["out"]


def matrix(key, n, m):
    return jax.random.normal(key, (n, m)) / n**0.5


keys = jax.random.split(jax.random.key(0), 4)
params = {
    "hidden": [
        (matrix(key, n, 128), jnp.zeros(128)) for key, n in zip(keys, (22, 128, 128), strict=False)
    ],
    "out": matrix(keys[3], 128, 2) / 10,
}
results["a bare function"] = fit(bare, params)

# %% [markdown]
# ## A Linen module
#
# `module.apply` already is a function of parameters and inputs. (`functools.partial(models.apply,
# module)` is the same, and accepts keys for dropout.)


# %%
class Linen(nn.Module):
    @nn.compact
    def __call__(self, x_t, log_snr, cond):
        h = features(x_t, log_snr)
        for _ in range(3):
            h = nn.silu(nn.Dense(128)(h))
        return nn.Dense(2)(h)


module = Linen()
inputs = (moons[:1], jnp.zeros(1), None)
params = module.init(jax.random.key(0), *inputs)
results["Flax Linen"] = fit(module.apply, params)

# %% [markdown]
# ## An NNX module
#
# An NNX module holds its own parameters. `nnx.split` takes them out, and `nnx.merge` puts them
# back.


# %%
class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(22, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.third = nnx.Linear(128, 128, rngs=rngs)
        self.out = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x_t, log_snr, cond):
        h = features(x_t, log_snr)
        for layer in (self.first, self.second, self.third):
            h = nnx.silu(layer(h))
        return self.out(h)


graph, params = nnx.split(NNX(nnx.Rngs(0)))
results["Flax NNX"] = fit(lambda params, *inputs: nnx.merge(graph, params)(*inputs), params)

# %% [markdown]
# ## An Equinox module
#
# An Equinox module is a pytree that contains its parameters. `eqx.partition` separates the arrays
# from everything else, which the optimiser must not see. The module takes one example, so `vmap`
# maps it over the batch.

# %%
mlp = eqx.nn.MLP(22, 2, 128, 3, activation=jax.nn.silu, key=jax.random.key(0))
params, rest = eqx.partition(mlp, eqx.is_inexact_array)


def equinox(params, x_t, log_snr, cond):
    return jax.vmap(eqx.combine(params, rest))(features(x_t, log_snr))


results["Equinox"] = fit(equinox, params)

# %% [markdown]
# ## The samples

# %%
figure, axes = plots.panels(1, 4, 2.7, 2.7)
for ax, (name, (x_0, losses)), colour in zip(axes, results.items(), plots.COLOURS, strict=False):
    ax.plot(*x_0.T, ".", color=colour, markersize=1.2)
    ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    ax.set_title(f"{name}: loss {losses[-200:].mean():.3f}")
figure

# %% [markdown]
# ## Bring your own target
#
# A target is one row of a table, $\text{target} = a\,x_0 + b\,\epsilon$. The residual $x_0 - x_t$,
# which must be added to $x_t$ to obtain clean data, has no name in diffjax; it has
# $a = 1 - \alpha_t$ and $b = -\sigma_t$. The loss and the sampler need nothing else.

# %%
residual = lambda alpha, sigma: (1 - alpha, -sigma)
x_0, losses = fit(module.apply, module.init(jax.random.key(0), *inputs), residual)

figure, (ax,) = plots.panels(1, 1, 2.7, 2.7)
ax.plot(*x_0.T, ".", color=plots.COLOURS[4], markersize=1.2)
ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", title="by the residual, $x_0 - x_t$")
figure
