r"""Measure the arithmetic: every schedule over the whole of t in [0, 1] against 50 digits.

    python studies/numerics.py        # writes docs/numerics.md

The references below are the textbook definitions in mpmath. They share no code with diffjax, and do
not avoid cancellation as diffjax does, because with 50 digits they need not. A float32 time,
log-SNR or number of the data enters its reference as the exact real number that it is. Every error
is the largest one found. `tests/test_numerics.py` bounds the errors at about twice their
recorded values.
"""

import datetime
import itertools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import diffjax
from diffjax.types import expand
from markdown_table import table

ROOT = Path(__file__).parents[1]

mp = mpmath.MPContext()  # a context of its own, so that the precision elsewhere does not change
mp.dps = 50
each = lambda f: np.frompyfunc(f, 1, 1)
exact = each(lambda x: mp.mpf(float(x)))
exp, log, tan, cos, sqrt = map(each, (mp.exp, mp.log, mp.tan, mp.cos, mp.sqrt))

# The references: time to log-SNR, and log-SNR to (alpha, sigma).


def cosine(low, high):
    """alpha = cos(a), sigma = sin(a), the angle a linear in t from one log-SNR to the other."""
    first, last = (mp.acot(mp.exp(mp.mpf(end) / 2)) for end in (high, low))
    return lambda t: -2 * log(tan(first + t * (last - first)))


def linear(beta_min, beta_max, high):
    """alpha^2 = exp(-B), B the integral of beta from 0 to u, u linear in t from `high` to 1."""
    beta, rise = mp.mpf(beta_min), mp.mpf(beta_max) - mp.mpf(beta_min)
    first = (mp.sqrt(beta**2 + 2 * rise * mp.log(1 + mp.exp(-high))) - beta) / rise
    log_snr = lambda u: -log(exp(beta * u + rise * u**2 / 2) - 1)
    return lambda t: log_snr(first + t * (1 - first))


def sigmoid(start, end, tau, low, high):
    """alpha^2 = (S(end) - S(u)) / (S(end) - S(start)), u linear in t between two log-SNRs."""
    logistic = lambda u: 1 / (1 + exp(-u / mp.mpf(tau)))
    top, drop = logistic(mp.mpf(end)), logistic(mp.mpf(end)) - logistic(mp.mpf(start))

    def u_at(log_snr):
        value = top - drop / (1 + mp.exp(-log_snr))
        return mp.mpf(tau) * mp.log(value / (1 - value))

    abar = lambda t: (top - logistic(u_at(high) + t * (u_at(low) - u_at(high)))) / drop
    return lambda t: log(abar(t) / (1 - abar(t)))


def log_uniform(sigma_min, sigma_max):
    """sigma / alpha = sigma_min^(1 - t) sigma_max^t."""
    low, high = mp.mpf(sigma_min), mp.mpf(sigma_max)
    return lambda t: -2 * log(low ** (1 - t) * high**t)


def rectified_flow(low, high):
    """sigma = u = 1 - alpha, u linear in t from one log-SNR to the other."""
    first, last = (1 / (1 + mp.exp(mp.mpf(end) / 2)) for end in (high, low))
    u = lambda t: first + t * (last - first)
    return lambda t: 2 * log((1 - u(t)) / u(t))


def monotone(width, low, high):
    """A line and sigmoids at the middles of equal parts, of heights e^-3 and slopes e^2."""
    centres, one = exact((np.arange(width) + 0.5) / width), mp.mpf(1)
    bumps = lambda t: sum(mp.exp(-3) / (1 + exp(mp.exp(2) * (c - t))) for c in centres)
    g = lambda t: t + bumps(t)
    return lambda t: high - (high - low) * (g(t) - g(0 * one)) / (g(one) - g(0 * one))


def discrete(abar, low=-24, high=24):
    """The log-SNR of the cumulative products abar at t = i / T, straight lines between."""
    nodes = [mp.mpf(high), *(mp.log(a / (1 - a)) if a else mp.mpf(low) for a in abar)]

    def one(t):
        i = min(int(t * len(abar)), len(abar) - 1)
        return nodes[i] + (t * len(abar) - i) * (nodes[i + 1] - nodes[i])

    return each(one)


def cosine_abar(steps, max_beta):
    """Nichol & Dhariwal's abar, its betas clipped."""
    f = cos((exact(np.arange(steps + 1)) / steps + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2)
    return np.cumprod(1 - np.minimum(1 - (f[1:] / f[:-1]) ** 2, mp.mpf(max_beta)))


def zero_terminal(abar):
    """Lin et al.: sqrt(abar) shifted to end at 0 and scaled to keep its first value."""
    alpha = sqrt(abar)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


RAMP = exact(np.arange(1000)) / 999
DDPM = np.cumprod(1 - (mp.mpf("0.0001") * (1 - RAMP) + mp.mpf("0.02") * RAMP))
LATENT = np.cumprod(1 - (mp.sqrt("0.00085") * (1 - RAMP) + mp.sqrt("0.012") * RAMP) ** 2)
VP = lambda snr: (sqrt(snr / (1 + snr)), sqrt(1 / (1 + snr)))
VE = lambda snr: (snr**0, 1 / sqrt(snr))
FLOW = lambda snr: (sqrt(snr) / (1 + sqrt(snr)), 1 / (1 + sqrt(snr)))
TABLE = diffjax.from_betas
WIDE = diffjax.log_uniform(0.001, 1000.0, scales=diffjax.vp)
ZERO = TABLE(diffjax.zero_terminal_snr(diffjax.linear_betas(1000)))

SCHEDULES = {
    "cosine": (diffjax.cosine(), cosine(-15, 15), VP),
    "cosine_short": (diffjax.cosine(-10.0, 10.0), cosine(-10, 10), VP),
    "linear": (diffjax.linear(), linear("0.1", 20, 20), VP),
    "sigmoid": (diffjax.sigmoid(), sigmoid(-3, 3, 1, -15, 15), VP),
    "sigmoid_sharp": (diffjax.sigmoid(0.0, 3.0, 0.5), sigmoid(0, 3, 0.5, -15, 15), VP),
    "log_uniform": (diffjax.log_uniform(), log_uniform("0.002", 80), VE),
    "log_uniform_vp": (WIDE, log_uniform("0.001", 1000), VP),
    "rectified_flow": (diffjax.rectified_flow(), rectified_flow(-14, 14), FLOW),
    "monotone": (diffjax.monotone(diffjax.monotone_params()), monotone(32, -10, 10), VP),
    "shift": (diffjax.shift(diffjax.cosine(), -2.0), lambda t: cosine(-15, 15)(t) - 2, VP),
    "linear_betas": (TABLE(diffjax.linear_betas(1000)), discrete(DDPM), VP),
    "scaled_linear_betas": (TABLE(diffjax.scaled_linear_betas(1000)), discrete(LATENT), VP),
    "cosine_betas": (TABLE(diffjax.cosine_betas(100)), discrete(cosine_abar(100, "0.999")), VP),
    "zero_terminal_snr": (ZERO, discrete(zero_terminal(DDPM)), VP),
}


def rows(alpha, sigma):
    """The factors of the data and of the noise in x_t and each target, as the papers write them."""
    zero, one = 0 * alpha, alpha**0
    std, half = sigma / alpha, mp.mpf("0.5")  # Karras et al. 2022, equation 7: of x_0 + std eps
    c_skip, c_out = half**2 / (std**2 + half**2), std * half / sqrt(std**2 + half**2)
    return {
        "x_t": (alpha, sigma),
        "x_0": (one, zero),
        "eps": (zero, one),
        "score": (zero, -1 / sigma),
        "v": (-sigma, alpha),
        "flow": (-one, one),
        "F": ((1 - c_skip) / c_out, -c_skip * std / c_out),
    }


TARGETS = [name for name in rows(mp.mpf(1), mp.mpf(1)) if name != "x_t"]


def times():
    """Both ends, their neighbourhoods, and the middle, in float32."""
    near = np.geomspace(1e-12, 0.1, 67)
    t = np.concatenate([[0], near, np.linspace(0.1, 0.9, 161), 1 - near, [1]])
    return np.unique(np.float32(t))


def pairs(steps):
    """Times s < t: neighbours on a grid of so many steps, at most 200 of them."""
    i = np.unique(np.linspace(0, steps - 1, min(steps, 200)).astype(int))
    return np.float32(i / steps), np.float32((i + 1) / steps)


FAR = np.float32([[0, 1], [0, 0.5], [0.5, 1], [1e-6, 1], [0, 1 - 1e-6], [1e-6, 0.9]]).T
PAIRS = {"far": FAR, "10": pairs(10), "100": pairs(100), "1000": pairs(1000)}


def data(n, dtype):
    """x_0 and eps of n examples, the same at every call."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, n, 4)), dtype)


def error(got, want, size=None):
    """|got - want| in units of `size`, by default of `want`; not finite where `got` is not."""
    want = np.float64(want)
    return np.abs(np.float64(got) - want) / np.abs(np.float64(want if size is None else size))


def scale_errors(name, dtype):
    """Of log-SNR, and of alpha and sigma for a given time and for a given float32 log-SNR."""
    schedule, log_snr, split = SCHEDULES[name]
    t = times()
    got, want = schedule.log_snr(jnp.asarray(t)), log_snr(exact(t))
    found = {"log_snr": error(got, want, 1)}
    scales = [scale.astype(dtype) for scale in schedule.scales(got)]
    for suffix, true in ("", want), ("_of_log_snr", exact(got)):
        for i, wanted in enumerate(split(exp(true))):
            found[("alpha", "sigma")[i] + suffix] = error(scales[i], wanted)
    return found


def posterior_errors(name, dtype):
    """Of q_posterior, x_t being exact: the mean in units of sqrt(alpha_s^2 + sigma_s^2)."""
    schedule, log_snr, split = SCHEDULES[name]
    found = {"mean": np.zeros(0)}
    for key, (s, t) in PAIRS.items():
        x_0, eps = data(len(t), dtype)
        alpha_s, sigma_s = split(exp(log_snr(exact(s)))[:, None])
        alpha, sigma = split(exp(log_snr(exact(t)))[:, None])
        x_t = jnp.asarray(np.float64(alpha * exact(x_0) + sigma * exact(eps)), dtype)
        mean, std = diffjax.q_posterior(schedule, x_0, x_t, jnp.asarray(t), jnp.asarray(s))
        # Bayes' rule as it stands, precisions add: x_t = ratio x_s + sqrt(spread) noise.
        ratio, spread = alpha / alpha_s, sigma**2 - (alpha / alpha_s * sigma_s) ** 2
        variance = 1 / (1 / sigma_s**2 + ratio**2 / spread)
        wanted = variance * (alpha_s * exact(x_0) / sigma_s**2 + ratio * exact(x_t) / spread)
        size = sqrt(alpha_s**2 + sigma_s**2)
        found["mean"] = np.append(found["mean"], error(mean, wanted, size))
        found[f"std_{key}"] = error(std, sqrt(variance))
    return found


def conversion_errors(name, dtype):
    """Of every target turned into every other, in units of the result's sqrt(a^2 + b^2).

    x_0 and eps are mixed at float32 log-SNRs spread evenly over the schedule's range; x_t and the
    network's output are the exact mixtures, rounded to `dtype`.

    Returns:
      The log-SNRs `[n]`, the errors `[source, to, n]`, and the errors divided by what one rounding
      of x_t and of the output does to the exact answer, which no arithmetic can avoid.
    """
    schedule, _, split = SCHEDULES[name]
    log_snr = jnp.linspace(schedule.log_snr(0.0), schedule.log_snr(1.0), 201)
    x_0, eps = data(len(log_snr), dtype)
    mix = rows(*split(exp(exact(log_snr))))
    true = {k: a[:, None] * exact(x_0) + b[:, None] * exact(eps) for k, (a, b) in mix.items()}
    given = {k: jnp.asarray(np.float64(x), dtype) for k, x in true.items()}
    alpha, sigma = (expand(scale, x_0) for scale in schedule.scales(log_snr))

    mix = {k: np.float64(row) for k, row in mix.items()}  # enough for sizes and conditions
    size = {k: np.hypot(a, b) for k, (a, b) in mix.items()}
    cross = lambda p, q: mix[p][0] * mix[q][1] - mix[p][1] * mix[q][0]
    errors, roundings = np.empty((2, len(TARGETS), len(TARGETS), len(log_snr)))
    for (i, source), (j, to) in itertools.product(enumerate(TARGETS), repeat=2):
        got = diffjax.convert(given[source], given["x_t"], alpha, sigma, source, to)
        errors[i, j] = error(got, true[to], size[to][:, None]).max(1)
        of_x_t, of_out = np.abs([cross(to, source), cross("x_t", to)] / cross("x_t", source))
        condition = (of_x_t * size["x_t"] + of_out * size[source]) / size[to]
        roundings[i, j] = errors[i, j] / condition / (jnp.finfo(dtype).eps / 2)
    return np.asarray(log_snr), errors, roundings


def measure(name, dtype="float32"):
    """The largest errors of a schedule with data of a dtype, and how many values are not finite."""
    found = scale_errors(name, dtype) | posterior_errors(name, dtype)
    log_snr, errors, found["roundings"] = conversion_errors(name, dtype)
    for end in (5, 10):
        found[f"convert_{end}"] = errors[:, :, np.abs(log_snr) <= end]
    found["convert"] = errors

    schedule, t = SCHEDULES[name][0], jnp.linspace(0, 1, 2**16 + 1)
    x = jnp.ones((2**16, 1), dtype)
    dense = schedule.log_snr(t), *schedule(t), *diffjax.q_posterior(schedule, x, x, t[1:], t[:-1])
    bad = sum(int(np.sum(~np.isfinite(np.float64(x)))) for x in (*dense, *found.values()))
    return {key: float(np.max(x)) for key, x in found.items()} | {"non_finite": bad}


def two_digits(x):
    """A number in a cell of a table."""
    return f"{x:.2g}".replace("e-0", "e-")


PAGE = """\
# Numerics

This page has the largest errors of diffjax's arithmetic over the whole of t in [0, 1], compared
with 50 digits. The times are both ends, others at distances from 1e-12 on from them, and many
between. Each float32 time, log-SNR and number of the data is taken as the exact real number that it
is. `tests/test_numerics.py` bounds every number here.

Written by `python studies/numerics.py` on {date}: JAX {jax}, CPU. That file has the textbook
references, and defines exactly what is measured.

## Schedules and the posterior

- log-SNR: the absolute error. float32 itself rounds by up to 4.8e-7 at 15 and 9.5e-7 at 24.
- alpha and sigma: the relative error, first for a given time, then for a given log-SNR. They are
  computed in float32 and cast to the data's dtype, which rounds by 6e-8 in float32 and 4e-3 in
  bfloat16.
- mean and std of q(x_s | x_t, x_0): the error of the mean, for normal data, in units of
  sqrt(alpha_s^2 + sigma_s^2); the relative error of std, for s and t far apart (0 and 1 among them)
  and for neighbours on grids of 10, 100 and 1000 steps, where std depends on a small difference of
  log-SNRs.
- not finite: how many values were NaN or infinite, also on a grid of 65536 steps.

float32 data:

{float32_scales}
bfloat16 data:

{bfloat16_scales}
## Conversions between targets

Each number is the worst of all 36 conversions, from any of x_0, eps, score, v, flow and F to any,
for log-SNRs in a range, in units of sqrt(a^2 + b^2) of the resulting target a x_0 + b eps. Far from
log-SNR 0 some conversions are ill-conditioned, such as that from x_0 to eps where there is hardly
any noise: the rounding errors of the inputs are amplified by exp(|log-SNR| / 2) in any
implementation. The last column divides the error by the effect of one rounding of x_t and of the
network's output on the exact answer.

float32 data:

{float32_conversions}
bfloat16 data:

{bfloat16_conversions}
Each conversion by itself, from the target of the row to that of the column, for the cosine schedule
in float32, for log-SNRs in [-10, 10] / [-15, 15]:

{pairwise}"""
SCALES = {"log_snr": "log-SNR", "alpha": "alpha", "sigma": "sigma"}
SCALES |= {"alpha_of_log_snr": "alpha of log-SNR", "sigma_of_log_snr": "sigma of log-SNR"}
SCALES |= {"mean": "mean", **{f"std_{k}": f"std, {k}" for k in PAIRS}, "non_finite": "not finite"}
CONVERSIONS = {"convert_5": "[-5, 5]", "convert_10": "[-10, 10]", "convert": "all of its range"}
CONVERSIONS |= {"roundings": "in roundings"}


def main():
    """Write docs/numerics.md."""
    tables = {}
    for dtype in ("float32", "bfloat16"):
        measured = {name: measure(name, dtype) for name in SCHEDULES}
        for part, heads in (("scales", SCALES), ("conversions", CONVERSIONS)):
            cells = lambda found, heads=heads: (two_digits(found[key]) for key in heads)
            lines = [[name, *cells(found)] for name, found in measured.items()]
            tables[f"{dtype}_{part}"] = table(["schedule", *heads.values()], lines)
    log_snr, errors, _ = conversion_errors("cosine", "float32")
    within, overall = errors[:, :, np.abs(log_snr) <= 10].max(2), errors.max(2)
    cells = np.vectorize(lambda x, y: f"{x:.0e} / {y:.0e}".replace("e-0", "e-"))(within, overall)
    lines = [[source, *line] for source, line in zip(TARGETS, cells, strict=True)]
    tables["pairwise"] = table(["", *TARGETS], lines)
    page = PAGE.format(date=datetime.date.today(), jax=jax.__version__, **tables)
    (ROOT / "docs" / "numerics.md").write_text(page)


if __name__ == "__main__":
    main()
