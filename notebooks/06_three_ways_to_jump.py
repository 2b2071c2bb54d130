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
# # Three ways to jump
#
# A denoiser walks from noise to data in many steps, because each step takes its prediction for a
# constant. A *flow map* predicts the whole step: its network is given the time $t$ at which a step
# starts, and the time $s$ at which it ends. There are three equivalent ways to learn it, as there
# are three to learn a denoiser. This notebook has each beside its code, and trains all three.

# %%
# !python -c "import diffjax" || pip install -q "..[plots]"
# %matplotlib inline
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffjax
from diffjax import flow_maps, models, ode, plots
from diffjax.training import init_state, train_step

schedule = diffjax.rectified_flow()
turn = 2 * np.pi * np.arange(5) / 5
means = 1.5 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
data = diffjax.oracles.gaussian_mixture(schedule, np.ones(5), means, np.full(5, 0.02))

# %% [markdown]
# ## 1. One step of the exact map
#
# The data are five Gaussians, whose oracle knows the probability flow. Given $s$, it predicts the
# $(x_0, \epsilon)$ for which DDIM's step $x_s = \alpha_s x_0 + \sigma_s \epsilon$ is exact. So the
# sampler `jump` needs one step (right), where a walk needs many (left).

# %%
x_1 = diffjax.prior_sample(jax.random.key(0), schedule, (60, 2))
fine, once = diffjax.uniform_times(60), jnp.array([1.0, 0.0])
position = lambda state, t: state.x
_, path = diffjax.sample(jax.random.key(1), diffjax.ddim(data), x_1, fine, position)
ends = jax.jit(lambda x: diffjax.sample(jax.random.key(1), diffjax.jump(data), x, once)[0])(x_1)

figure, axes = plots.panels(1, 2, 3.6, 3.6)
plots.trajectories(jnp.concatenate([x_1[None], path]), axes[0])
plots.trajectories(jnp.stack([x_1, ends]), axes[1])
for ax, title in zip(axes, ("60 steps of DDIM", "one jump"), strict=True):
    ax.set(title=title)
figure

# %% [markdown]
# ## 2. Three identities
#
# On the circle $y = x_t / \sqrt{\alpha_t^2 + \sigma_t^2}$, with the angle
# $\varphi = \arctan(\sigma / \alpha)$ for a clock and $\delta = \varphi_t - \varphi_s$, the step is
#
# $$ Y(y, t, s) = \cos\delta\, y - \sin\delta\, u(y, t, s), \qquad u(y, t, t) = v(y, t), $$
#
# where $v = dy/d\varphi$ is the velocity of the flow. The exact map, and no other, has
#
# $$ \text{Eulerian:}\quad \cos\delta\,(u - v) + \sin\delta\,\Big(y + \frac{du}{d\varphi_t}\Big) = 0
# \qquad \text{the end stays while the start moves along the path} $$
# $$ \text{Lagrangian:}\quad \frac{\partial Y}{\partial \varphi_s} - v(Y, s) = 0
# \qquad \text{the end moves with the flow} $$
# $$ \text{semigroup:}\quad u - u_{\text{of two shorter steps}} = 0
# \qquad \text{two steps end where one does} $$
#
# The left sides are functions in `IDENTITIES`, in which a fourth, `progressive`, takes both steps
# of the semigroup by a teacher. Each returns $u$ and its residual:

# %%
three = "eulerian", "lagrangian", "semigroup"
for name in three:
    print(inspect.getsource(diffjax.IDENTITIES[name]))

# %% [markdown]
# At the exact map the residuals are zero but for rounding; a denoiser that ignores $s$ obeys none
# of the identities.

# %%
t, s, r = (jnp.full(60, time) for time in (0.8, 0.2, 0.5))
x_t = diffjax.q_sample(schedule, data.sample(jax.random.key(2), 60), t, x_1)
y = x_t / ode.radius(schedule, t, x_t)


def ignoring_s(x_t, t, cond=None, s=None):
    return data(x_t, t)


for name in three:
    identity, sizes = diffjax.IDENTITIES[name], []
    for mean in (data, ignoring_s):
        u = flow_maps.velocity_of(mean, schedule)
        _, residual = jax.jit(functools.partial(identity, schedule, u, u))(y, t, s, r)
        sizes.append(float(abs(residual).max()))
    print(f"{name:10}  exact map {sizes[0]:.0e}   denoiser {sizes[1]:.1f}")

# %% [markdown]
# ## 3. Train each
#
# The loss is $\lVert u - \mathrm{sg}(u - R) \rVert^2$ with the residual $R$, where sg stops the
# gradient. For three quarters of the batch the two times are equal, and it is the denoising loss of
# the same network, from which the velocity $v$ comes. The network embeds both times by the bounded
# angle, because two of the identities differentiate the embedding.

# %%
module = models.make_module(models.MLPConfig(width=64, embedding="angle", two_times=True))
apply = functools.partial(models.apply, module)
steps, batch_size = 2000, 256
tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
one = jnp.zeros(1)
params = module.init(jax.random.key(3), jnp.zeros((1, 2)), one, {"log_snr_s": one})["params"]


def learn(**options):
    """The flow map that is learned from the data with these options of the loss."""

    def loss(key, params, batch):
        x_0 = data.sample(jax.random.fold_in(key, 1), batch_size)
        network = functools.partial(apply, params)
        return diffjax.flow_map_loss(key, network, schedule, "flow", x_0, **options)

    step = functools.partial(train_step, loss_fn=loss, tx=tx, ema_decay=0.99)
    batch = {"index": jnp.arange(batch_size)}
    train = lambda state: jax.lax.scan(lambda s, _: (step(s, batch)[0], None), state, None, steps)
    state, _ = jax.jit(train)(init_state(jax.random.key(4), params, tx))
    return diffjax.flow_map(functools.partial(apply, state.ema_params), schedule, "flow")


learned = {"denoiser only": learn(diagonal=1.0)}
learned |= {name: learn(identity=name) for name in three}

# %% [markdown]
# Below are samples in one step, and the energy distance to exact samples, times 1,000, by the
# number of steps (1, 2, 4, 8). The network that only denoises is walked by the same steps: it
# predicts the mean of the data, and one step of it falls into the middle.


# %%
@jax.jit
def energy(x, y):
    apart = lambda a, b: jnp.linalg.norm(a[:, None] - b[None], axis=-1).mean()
    return 1000 * (2 * apart(x, y) - apart(x, x) - apart(y, y))


exact, again = (data.sample(jax.random.key(k), 2000) for k in (5, 6))
x_1 = diffjax.prior_sample(jax.random.key(7), schedule, (2000, 2))
print(f"{'exact samples':14}{float(energy(exact, again)):8.1f}")
figure, axes = plots.panels(1, len(learned), 2.4, 2.4)
for ax, (name, mean) in zip(axes, learned.items(), strict=True):
    sampler = diffjax.ddim(mean) if name == "denoiser only" else diffjax.jump(mean)
    draw = jax.jit(
        lambda ts, sampler=sampler: diffjax.sample(jax.random.key(8), sampler, x_1, ts)[0]
    )
    drawn = {n: draw(diffjax.uniform_times(n)) for n in (1, 2, 4, 8)}
    print(f"{name:14}" + "".join(f"{float(energy(x, exact)):8.1f}" for x in drawn.values()))
    ax.plot(*drawn[1].T, ".", markersize=1, color=plots.COLOURS[0])
    ax.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[])
figure

# %% [markdown]
# One network, one target, one table of identities. [The theory](../docs/theory.md) derives them and
# gives the row of each published method, and `docs/howto/few_steps.md` trains maps of images.
