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
# # Three ways, one walk
#
# A diffusion model can learn to predict the clean data, the noise, or the score. This notebook
# shows why these are one problem. It works in the plane, where every distribution is known exactly,
# and has each equation beside the line of code that computes it.
#
# The notation is the same throughout. Time is $t \in [0, 1]$, where 0 is data and 1 is noise;
# $s < t$ is the earlier, cleaner time; and $x_t = \alpha_t x_0 + \sigma_t \epsilon$. The
# $\bar\alpha_t$ of the DDPM paper is $\alpha_t^2$, and its $t - 1$ is our $s$.

# %%
# !python -c "import diffjax" || pip install -q "..[plots]"
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

import diffjax
from diffjax import plots

matplotlib.rcParams.update({"axes.titlesize": 9.5, "legend.fontsize": 8, "legend.frameon": False})
X_0, EPS, SCORE, POSTERIOR = plots.COLOURS[:4]  # each has the same colour in all notebooks
SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", "#A0A0A0"])

# %% [markdown]
# ## 1. The encoder has no parameters
#
# The data is a slightly blurred curve in the plane. An *oracle* knows its density at every noise
# level: if $p(x_0)$ is a mixture of Gaussians, so is every $p_t$.
#
# $$ p_t(x) = \sum_k w_k\, \mathcal N(x;\ \alpha_t m_k,\ \alpha_t^2 C_k + \sigma_t^2 I) $$

# %%
turn = jnp.sqrt(jnp.linspace(0.07, 1.0, 100))
curve = 2.2 * turn[:, None] * jnp.stack([jnp.cos(9 * turn), jnp.sin(9 * turn)], axis=-1)

schedule = diffjax.cosine(-10, 10)
data = diffjax.oracles.gaussian_mixture(schedule, jnp.ones(100), curve, jnp.full(100, 0.06**2))


def ground(ax, t):
    """The plane, with the density of p_t."""
    plots.density(lambda x: data.log_density(x, t), -2.6, 2.6, ax=ax)
    ax.collections[-1].set_cmap(SHADES)
    ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), title=f"$p_t$ at $t = {t:g}$")


def planes(*times, size=3.0):
    """Planes side by side, one for each of these times."""
    figure, axes = plots.panels(1, len(times), size, size)
    for ax, t in zip(axes, times, strict=True):
        ground(ax, t)
    return figure, axes


def write(ax, text, at, offset, colour=plots.INK):
    ax.annotate(text, at, offset, textcoords="offset points", color=colour, size=10)


figure, _ = planes(0.0, 0.2, 0.5, 1.0, size=2.5)
figure

# %% [markdown]
# Take one point $x_0$, and shrink it to the mean of $x_t$. Draw a noise $\epsilon$, scale it to the
# red vector, and add it to the mean: the sum is $x_t$. The circle is one standard deviation of
# $q(x_t \mid x_0)$.
#
# $$ q(x_t \mid x_0) = \mathcal N(\alpha_t x_0,\ \sigma_t^2 I), \qquad
#    x_t = \alpha_t x_0 + \sigma_t \epsilon $$

# %%
t = 0.36
x_0 = curve[None, 54]  # [batch, 2]: every array has a batch
eps = jnp.array([[0.6, 1.7]])

alpha, sigma = schedule(t)
x_t = diffjax.q_sample(schedule, x_0, t, eps)  # alpha x_0 + sigma eps

figure, (ax,) = planes(0.0, size=4.8)
ax.plot(*jnp.stack([alpha * x_0[0], x_0[0]]).T, ":", color=X_0)
plots.arrow(ax, jnp.zeros(2), alpha * x_0[0], r"$\alpha_t x_0$", X_0)
plots.arrow(ax, alpha * x_0[0], x_t[0], "", EPS)
plots.circle(ax, alpha * x_0[0], sigma.item(), "", EPS)
ax.plot(*x_0[0], "o", color=X_0)
ax.plot(*x_t[0], "o", color=plots.INK)
write(ax, "$x_0$", x_0[0], (7, -4), X_0)
write(ax, "$x_t$", x_t[0], (7, -2))
write(ax, r"$\sigma_t \epsilon$", x_t[0], (-34, -14), EPS)
ax.set_title(rf"$t = {t:g}$: $\alpha_t = {alpha:.2f}$, $\sigma_t = {sigma:.2f}$")
figure

# %% [markdown]
# ## 2. What is there to learn? The bound
#
# The encoder leads from clean to noisy. A decoder $p(x_s \mid x_t)$ leads back. Three terms bound
# the likelihood of the data from below:
#
# $$ \log p(x_0) \ge
#    \underbrace{\mathbb E \log p(x_0 \mid x_{1/T})}_{\text{reconstruction}}
#    - \underbrace{\mathrm{KL}\big(q(x_1 \mid x_0)\,\|\,p(x_1)\big)}_{\text{prior matching}}
#    - \sum_{t > 1/T} \underbrace{\mathbb E\, \mathrm{KL}\big(q(x_s \mid x_t, x_0)\,\|\,
#      p(x_s \mid x_t)\big)}_{\text{denoising matching}} $$
#
# The first two are those of any variational autoencoder. The third is new. There $q$ is given the
# answer $x_0$ and $p$ is given $x_t$ only, so that $q$ is the ground truth that $p$ learns to
# imitate.

# %%
denoise = data  # an oracle is a denoiser: x_t, t -> the best prediction of x_0 and eps
x = data.sample(jax.random.key(0), 2000)
for steps in (1000, None):
    bound = diffjax.elbo(jax.random.key(1), denoise, schedule, x, steps, levels=None)
    terms = (bound.reconstruction, bound.prior, bound.denoising, bound.nats)
    print(f"T = {steps}:".ljust(12), *(f"{term.mean():7.3f}" for term in terms), "nats")
print(f"-log p(x_0), which the oracle knows: {-data.log_density(x, 0.0).mean():.3f} nats")

# %% [markdown]
# From left to right these are reconstruction, prior, denoising, and their sum, which bounds
# $-\log p(x_0)$ from above. With 1,000 steps a gap remains, because the decoder has the variance of
# $q$, which is right if the data is a point and too small for a blurred curve. With infinitely many
# steps (`None`) the gap vanishes, and the bound of a perfect denoiser is exact up to the sampling
# error.
#
# ## 3. The posterior: circles of one radius
#
# By Bayes' rule the posterior is also a Gaussian. With $c = \mathrm{snr}_t / \mathrm{snr}_s$,
#
# $$ q(x_s \mid x_t, x_0) = \mathcal N\Big(
#    \underbrace{\alpha_s \big(x_0 + c\,(x_t / \alpha_t - x_0)\big)}_{\mu_q(x_t, x_0)},\
#    \underbrace{\sigma_s^2 (1 - c)}_{\sigma_q^2}\, I \Big). $$
#
# Its mean lies between $x_t$ and $x_0$. Its variance depends on the two times only, and neither on
# $x_0$ nor on $x_t$, so that all circles on the left have one size.

# %%
s = 0.2
mean, std = diffjax.q_posterior(schedule, x_0, x_t, t, s)

many = jnp.concatenate([x_t, jnp.array([[-0.3, 1.4], [-1.2, -0.9], [1.2, -1.9]])])
means, _ = diffjax.q_posterior(schedule, jnp.tile(x_0, (4, 1)), many, t, s)

figure, (left, right) = plots.panels(1, 2, 4, 4)
ground(left, s)
left.plot(*x_0[0], "o", color=X_0)
write(left, "$x_0$", x_0[0], (8, -8), X_0)
for x, centre in zip(many, means, strict=True):
    left.plot(*x, "o", color=plots.INK, markersize=4)
    plots.arrow(left, x, centre, "", plots.INK)
    plots.circle(left, centre, std.item(), "", POSTERIOR)
write(left, "$x_t$", x_t[0], (6, 2))
left.set_title(rf"$q(x_s \mid x_t, x_0)$ for four $x_t$, $s = {s:g}$: four circles of one size")

for steps, dash in ((10, "-"), (50, "--"), (1000, ":")):
    times, one = jnp.linspace(1 / steps, 1, 200), jnp.ones((200, 2))
    deviation = diffjax.q_posterior(schedule, one, one, times, times - 1 / steps)[1]
    right.plot(times, deviation[:, 0], dash, color=POSTERIOR, label=f"$s = t - 1/{steps}$")
right.set(xlabel="$t$", title=r"their radius $\sigma_q$, a function of the times alone")
right.set_box_aspect(1)
right.legend()
figure

# %% [markdown]
# This checks Bayes' rule,
# $q(x_s \mid x_t, x_0)\, q(x_t \mid x_0) = q(x_t \mid x_s)\, q(x_s \mid x_0)$, at random points.


# %%
def log_normal(x, mean, std):
    """log N(x; mean, std^2 I) of points in the plane."""
    return jax.scipy.stats.norm.logpdf(x, mean, std).sum(-1)


x_s = jax.random.normal(jax.random.key(2), (1000, 2))
alpha_s, sigma_s = schedule(s)
left = log_normal(x_s, mean, std) + log_normal(x_t, alpha * x_0, sigma)
right = log_normal(x_t, *diffjax.q_transition(schedule, x_s, s, t)) + log_normal(
    x_s, alpha_s * x_0, sigma_s
)
print(f"largest difference of the logs: {jnp.abs(left - right).max():.1e}")

# %% [markdown]
# ## 4. Matching two such Gaussians is matching their means
#
# Give the decoder the variance of $q$. Then only its mean remains to be learned:
#
# $$ \mathrm{KL}\big(q(x_s \mid x_t, x_0)\,\|\,p(x_s \mid x_t)\big)
#    = \frac{\|\mu_q(x_t, x_0) - \mu(x_t)\|^2}{2 \sigma_q^2} $$
#
# The decoder's mean is that of the posterior, with an estimate of $x_0$ in place of $x_0$.

# %%
estimate = denoise(x_t, t)  # from x_t only
mean_of_p, _ = diffjax.q_posterior(schedule, estimate.x_0, x_t, t, s)

kl = ((mean - mean_of_p) ** 2).sum(-1) / (2 * std**2)
print("by hand   ", kl[0, 0], "nats")
print("by diffjax", diffjax.denoising_term(denoise, schedule, x_0, eps, t, s)[0], "nats")

figure, (ax,) = planes(s, size=4)
plots.circle(ax, mean[0], std.item(), "", POSTERIOR)
plots.circle(ax, mean_of_p[0], std.item(), "", plots.INK)
plots.arrow(ax, mean_of_p[0], mean[0], "", plots.INK)
write(ax, r"$\mu_q(x_t, x_0)$", mean[0], (26, -22), POSTERIOR)
write(ax, r"$\mu(x_t)$", mean_of_p[0], (-58, 16))
ax.plot(*x_t[0], "o", color=plots.INK)
write(ax, "$x_t$", x_t[0], (6, 2))
ax.set(xlim=(0.4, 2.6), ylim=(-0.3, 1.9), title="two circles of one size differ by an arrow")
figure

# %% [markdown]
# ## 5. Three ways to write the mean, three networks
#
# Write $r = \alpha_t / \alpha_s$ and $\beta = \sigma_t^2 (1 - c)$ for the mean's factor and the
# variance of $q(x_t \mid x_s)$; in DDPM they are $\sqrt{1 - \beta_t}$ and $\beta_t$. Insert
# $x_0 = (x_t - \sigma_t \epsilon) / \alpha_t$ into $\mu_q$, and then
# $\nabla \log q(x_t \mid x_0) = -\epsilon / \sigma_t$:
#
# | the network predicts | the mean of the next step | its output points |
# |---|---|---|
# | $x_0$ | $\mu = \alpha_s (\hat x_0 + c\,(x_t / \alpha_t - \hat x_0))$ | to the clean data |
# | $\epsilon$ | $\mu = (x_t - \beta\,\hat\epsilon / \sigma_t) / r$ | along the noise to remove |
# | score | $\mu = (x_t + \beta\,\nabla \log p_t(x_t)) / r$ | to higher density |

# %%
x_0_hat, eps_hat = denoise(x_t, t)
score = data.score(x_t, t)  # grad log p_t
r, root_beta = diffjax.q_transition(schedule, jnp.ones((1, 2)), s, t)

by_x_0, _ = diffjax.q_posterior(schedule, x_0_hat, x_t, t, s)
by_eps = (x_t - root_beta**2 / sigma * eps_hat) / r
by_score = (x_t + root_beta**2 * score) / r
for name, mu in (("x_0", by_x_0), ("eps", by_eps), ("score", by_score)):
    print(f"mu by {name:<5} = ({mu[0, 0]:.6f}, {mu[0, 1]:.6f})")

# %%
figure, axes = planes(t, t, t)
for ax, name in zip(axes, (r"$x_0$", r"$\epsilon$", "the score"), strict=True):
    ax.plot(*x_t[0], "o", color=plots.INK)
    write(ax, "$x_t$", x_t[0], (6, 2))
    ax.plot(*by_x_0[0], "x", color=POSTERIOR, markersize=8, markeredgewidth=2, zorder=5)
    write(ax, r"$\mu$", by_x_0[0], (7, -8), POSTERIOR)
    ax.set_title(f"a network that predicts {name}")
noiseless = x_t[0] - sigma * eps_hat[0]
plots.arrow(axes[0], x_t[0], x_0_hat[0], "", X_0)
write(axes[0], r"$\hat x_0$", x_0_hat[0], (-16, -2), X_0)
plots.arrow(axes[1], jnp.zeros(2), noiseless, r"$\alpha_t \hat x_0$", X_0)
plots.arrow(axes[1], noiseless, x_t[0], r"$\sigma_t \hat\epsilon$", EPS)
plots.arrow(axes[2], x_t[0], x_t[0] + sigma**2 * score[0], "", SCORE)
write(axes[2], r"$\sigma_t^2 \nabla \log p_t(x_t)$", noiseless, (-78, -4), SCORE)
figure

# %% [markdown]
# The three arrows differ, and the cross is in one place: whichever of the three the network
# predicts, the mean of the next step is the same. On the whole plane each of the three is a vector
# field, which training fits by least squares.

# %%
figure, axes = planes(t, t, t)
fields = (
    (r"$\hat x_0(x_t, t) - x_t$", X_0, lambda x: denoise(x, t).x_0 - x),
    (r"$\hat\epsilon(x_t, t)$", EPS, lambda x: denoise(x, t).eps),
    (r"$\nabla \log p_t(x_t)$", SCORE, lambda x: data.score(x, t)),
)
for ax, (title, colour, field) in zip(axes, fields, strict=True):
    plots.vector_field(field, -2.4, 2.4, 15, ax=ax)
    ax.collections[-1].set_color(colour)
    ax.set_title(title)
figure

# %% [markdown]
# ## 6. The three are one
#
# Given $x_t$ and $t$, each of the three is an affine function of any other. A target is one row of
# a table, $\text{target} = a\,x_0 + b\,\epsilon$. A prediction of any target, together with $x_t$,
# gives two equations for $x_0$ and $\epsilon$:
#
# $$ \begin{pmatrix} x_t \\ \text{target} \end{pmatrix} =
#    \begin{pmatrix} \alpha_t & \sigma_t \\ a & b \end{pmatrix}
#    \begin{pmatrix} x_0 \\ \epsilon \end{pmatrix} $$

# %%
for source in ("x_0", "eps", "score"):
    out = diffjax.encode(source, x_0_hat, eps_hat, alpha, sigma)  # the output of such a network
    for to in ("x_0", "eps", "score"):
        same = diffjax.convert(out, x_t, alpha, sigma, source, to)
        print(f"{source:>5} -> {to:<5} ({same[0, 0]:9.5f}, {same[0, 1]:9.5f})", end="   ")
    print()

# %% [markdown]
# ## 7. The walk
#
# Now take three networks, each a function of $(x_t, \text{log-SNR})$ with one output: the first
# predicts $x_0$, the second $\epsilon$, the third the score. `denoiser` converts each output to
# $(\hat x_0, \hat\epsilon)$, and DDPM's sampler draws from the decoder, from $t = 1$ to $t = 0$:
#
# $$ x_s = \mu(x_t) + \sigma_q z, \qquad z \sim \mathcal N(0, I) $$


# %%
def network_of(target):
    """The best possible network that predicts `target`."""

    def network(x_t, log_snr, cond):
        t = diffjax.time_at(schedule, log_snr)
        return diffjax.encode(target, *data(x_t, t), *diffjax.scales_at(schedule, t, x_t))

    return network


walk = jax.jit(diffjax.sample, static_argnums=(1, 4))
x_1 = diffjax.prior_sample(jax.random.key(3), schedule, (300, 2))
ts = diffjax.uniform_times(200)
where = lambda state, t: state.x

walks = {}
for target in ("x_0", "eps", "score"):
    denoise = diffjax.denoiser(network_of(target), schedule, target)
    sampler = diffjax.ancestral(denoise, schedule)
    _, path = walk(jax.random.key(4), sampler, x_1, ts, where)
    walks[target] = jnp.concatenate([x_1[None], path])  # [steps + 1, 300, 2]

figure, axes = planes(0.0, 0.0, 0.0)
for ax, (target, path), colour in zip(axes, walks.items(), (X_0, EPS, SCORE), strict=True):
    ax.plot(*path[-1].T, ".", color=plots.INK, markersize=1.5)
    ax.plot(path[:, :3, 0], path[:, :3, 1], "-", color=colour, linewidth=0.8)
    ax.plot(*path[0, :3].T, "o", color=colour, markerfacecolor="white", markersize=5)
    ax.plot(*path[-1, :3].T, "o", color=colour, markersize=5)
    ax.set_title(f"300 walks by {target}, three of them drawn")
figure

# %%
for a, b in (("x_0", "eps"), ("eps", "score"), ("score", "x_0")):
    apart = jnp.linalg.norm(walks[a][-1] - walks[b][-1], axis=-1)
    print(f"{a:>5} and {b:<5} land {jnp.median(apart):.0e} apart, {apart.max():.0e} at most")

# %% [markdown]
# The walks end in the same places. The differences are rounding errors of float32, which the 200
# steps amplify; they are largest where two parts of the curve are close together.

# %%
steps = (0, 100, 140, 170, 200)
figure, axes = planes(*(float(ts[step]) for step in steps), size=2.2)
for ax, step in zip(axes, steps, strict=True):
    # The dots lie on top of each other, so each walk has smaller ones than the walk before.
    for path, colour, size in zip(walks.values(), (X_0, EPS, SCORE), (60, 28, 8), strict=True):
        ax.scatter(*path[step, :40].T, s=size, color=colour, linewidth=0, zorder=3)
figure

# %% [markdown]
# ## 8. The theorem
#
# Now replace the oracle by any network. With the weights of the bound, *the same function* has the
# same loss and the same gradient, whichever of the three targets it is trained with:
#
# $$ \tfrac{\text{rate}}{2}\,\|\epsilon - \hat\epsilon\|^2
#    = \tfrac{\text{rate}}{2}\,\mathrm{snr}\,\|x_0 - \hat x_0\|^2
#    = \tfrac{\text{rate}}{2}\,\sigma_t^2\,\|\nabla \log q(x_t \mid x_0) - \hat s\|^2,
#    \qquad \text{rate} = -\frac{d\,\text{log-SNR}}{dt} $$
#
# Here is a small network with random parameters. It predicts $\epsilon$, and `convert` turns its
# output into each of the other two. The next cell computes its loss and, by automatic
# differentiation, its gradient with each of the three targets:


# %%
def predicting(params, target):
    """The same network for every target, except that its output is converted to `target`."""

    def network(x_t, log_snr, cond):
        inputs = jnp.concatenate([x_t, log_snr[:, None] / 4], axis=-1)
        eps = jnp.tanh(inputs @ params["in"]) @ params["out"]
        scales = diffjax.scales_at(schedule, diffjax.time_at(schedule, log_snr), x_t)
        return diffjax.convert(eps, x_t, *scales, source="eps", to=target)

    return network


def losses(params, target, x_0, weight):
    net, t = predicting(params, target), jnp.linspace(0, 1, len(x_0))
    return diffjax.diffusion_loss(jax.random.key(7), net, schedule, target, x_0, None, weight, t)


def compute(dtype, weight):
    """The losses of 1,600 examples and the gradient of their mean, with each target."""
    key_in, key_out = jax.random.split(jax.random.key(6))
    params = {
        "in": jax.random.normal(key_in, (3, 64), dtype),
        "out": jax.random.normal(key_out, (64, 2), dtype) / 8,
    }
    x_0 = jnp.tile(jnp.asarray(curve, dtype), (16, 1))
    mean = lambda params, target: losses(params, target, x_0, weight).mean()
    results = {
        target: (losses(params, target, x_0, weight), jax.grad(mean)(params, target))
        for target in ("x_0", "eps", "score")
    }
    return jax.device_get(results)


def compare(results):
    """Print the relative differences of each loss and gradient from those of eps."""
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    reference, gradient = results["eps"]
    for target, (each, grad) in results.items():
        loss = abs(each.mean() / reference.mean() - 1)
        change = np.linalg.norm(flat(grad) - flat(gradient)) / np.linalg.norm(flat(gradient))
        print(
            f"  {target:<5} loss {each.mean():.9g} differs by {loss:.0e}, gradient {change:.0e}, "
            f"loss of the worst example {abs(each / reference - 1).max():.0e}"
        )


with jax.enable_x64(True):
    print("float64")
    double = compute(jnp.float64, diffjax.weightings.elbo())
    compare(double)
print("float32, with other noise")
single = compute(jnp.float32, diffjax.weightings.elbo())
compare(single)

# %% [markdown]
# They are equal up to rounding. The differences of single examples grow towards both ends of
# log-SNR, where the contribution of $x_0$ or of $\epsilon$ to $x_t$ is as small as the rounding
# error of the other.

# %%
log_snr = schedule.log_snr(jnp.linspace(0, 1, 1600))
figure, (ax,) = plots.panels(1, 1, 5.5, 3)
for results, name, mark in ((single, "float32", "o"), (double, "float64", "s")):
    for target, colour in (("x_0", X_0), ("score", SCORE)):
        apart = abs(results[target][0] / results["eps"][0] - 1)
        ax.semilogy(log_snr, apart, mark, color=colour, ms=1.5, label=f"{target}, {name}")
ax.set(xlabel="log-SNR", ylabel="relative difference to eps' loss", ylim=(1e-17, 1))
ax.legend(ncols=2, markerscale=3)
figure

# %% [markdown]
# They are equal because of the weights. By default (`weight=None`) each target is scaled to unit
# variance instead, as in most implementations. These objectives differ, and have the same optimum:

# %%
compare(compute(jnp.float32, None))

log_snr = jnp.linspace(-9.9, 9.9, 300)
figure, (ax,) = plots.panels(1, 1, 5.5, 3.2)
styles = (("x_0", X_0, "-", 5), ("eps", EPS, "--", 3), ("score", SCORE, ":", 1.8))
for target, colour, dash, width in styles:
    bound = diffjax.effective_weight(schedule, target, diffjax.weightings.elbo())
    unit = diffjax.effective_weight(schedule, target)
    ax.semilogy(log_snr, bound(log_snr), color=colour, linewidth=width, label=f"{target}, bound")
    ax.semilogy(log_snr, unit(log_snr), dash, color=colour, label=f"{target}, unit variance")
ax.set(xlabel="log-SNR", ylabel=r"weight of $\|x_0 - \hat x_0\|^2$")
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
figure

# %% [markdown]
# The three solid lines coincide: the objective is one. (So do the lines of $\epsilon$ and of the
# score at unit variance, for which the weight of the score is the $\sigma_t^2$ of Song et al.) So
# choose the target for its numerical behaviour, or because your network learns it easily; the model
# that it defines is the same. The next notebook trains one.
