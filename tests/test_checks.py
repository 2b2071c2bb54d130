"""What a newcomer passes by mistake: the error names the mistake and what to pass instead."""

import functools
import re
import traceback

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import diffjax

KEY = jax.random.key(0)
SCHEDULE = diffjax.cosine()
X = jnp.ones((4, 2))
LABEL = {"label": jnp.arange(4)}
TS = diffjax.uniform_times(3)


def network(x_t, log_snr, cond):
    return 0 * x_t


def optional(x_t, log_snr, cond=None):
    """A network whose arguments could be those of a denoiser."""
    return 0 * x_t


def conditional(x_t, log_snr, cond):
    return x_t * cond["label"][:, None]


DENOISE = diffjax.denoiser(network, SCHEDULE, "eps")
WALK = diffjax.ddim(DENOISE)
ORACLE = diffjax.oracles.gaussian(SCHEDULE, jnp.zeros(2), 1.0)


def loss(**changed):
    given = dict(key=KEY, network=network, schedule=SCHEDULE, target="eps", x_0=X) | changed
    return diffjax.diffusion_loss(**given)


def walk(denoise, schedule=SCHEDULE, sampler=diffjax.ddim):
    return diffjax.sample(KEY, sampler(denoise, schedule), X, TS)


def elbo(denoise, **changed):
    given = dict(key=KEY, denoise=denoise, schedule=SCHEDULE, x_0=X) | changed
    return diffjax.elbo(**given)


# What is done, and the words of the mistake and of its remedy.
TO_DENOISER = r"need a denoiser.* network.*diffjax\.denoiser\(network, schedule, target\)"
NOT_PREDICTED = r"not a Prediction.*diffjax\.denoiser\(network, schedule, target\)"
NO_SCHEDULE = r"need a Schedule, such as diffjax\.cosine\(\), got"
CALL_IT = r"which makes one: call it, "
NO_KEY = r"such as jax\.random\.key\(0\), got 0"
NO_WEIGHTING = r"need a weighting, such as diffjax\.weightings\.min_snr\(\), got"
NO_SAMPLER = r"need a Sampler, such as diffjax\.ddim\(denoise, schedule\), got"
NO_COND = r"cond=None.*functools\.partial\(denoise, cond=\.\.\.\)"
BATCH = r"of shape \(2,\): need \[batch, \.\.\.\].*x\[None\]"
BYTES = r"floating point, got uint8.*x / 127\.5 - 1"
BY_NAME = r"names are for configs, here call the function of that name"

MISTAKES = {
    "network for denoiser": (lambda: walk(network), TO_DENOISER),
    "network for denoiser, clipped": (
        lambda: walk(diffjax.clip_x_0(network, SCHEDULE)),
        TO_DENOISER,
    ),
    "network for denoiser, guided": (
        lambda: diffjax.classifier_free(lambda x_t, log_snr, c: x_t, 2.0, {"label": 3}),
        TO_DENOISER,
    ),
    "network for denoiser, guided by cond": (
        lambda: diffjax.classifier_free(network, 2.0, LABEL)(X, 0.5, LABEL),
        NOT_PREDICTED,
    ),
    "network for denoiser, which needs one log-SNR for each example": (
        lambda: walk(lambda x_t, log_snr, cond=None: x_t * log_snr[:, None]),
        r"was called as denoise\(x_t, t.*diffjax\.denoiser\(network, schedule, target\)",
    ),
    "network for denoiser, elbo": (lambda: elbo(network), TO_DENOISER),
    "network for denoiser, flow": (
        lambda: diffjax.flow_log_likelihood(network, SCHEDULE, X),
        TO_DENOISER,
    ),
    **{
        f"network that looks like a denoiser, {name}": (
            functools.partial(walk, optional, sampler=row.make),
            NOT_PREDICTED,
        )
        for name, row in diffjax.SAMPLERS.items()
        if not row.two_times  # which do not look like networks
    },
    "swapped in a denoiser": (
        lambda: diffjax.denoiser(SCHEDULE, network, "eps"),
        "need a network.*got a schedule; the network comes before the schedule",
    ),
    "swapped in a loss": (
        lambda: loss(network=SCHEDULE, schedule=network),
        "need a network.*got a schedule; the network comes before the schedule",
    ),
    "swapped in a sampler": (
        lambda: diffjax.ddim(SCHEDULE, DENOISE),
        f"{NO_SCHEDULE} the function .*; network or denoiser come before the schedule",
    ),
    "uncalled schedule": (
        lambda: diffjax.denoiser(network, diffjax.cosine, "eps"),
        rf"{NO_SCHEDULE} the function cosine, {CALL_IT}cosine\(",
    ),
    "uncalled schedule in a loss": (lambda: loss(schedule=diffjax.linear), NO_SCHEDULE),
    "uncalled schedule, noise": (
        lambda: diffjax.prior_sample(KEY, diffjax.ve, (4, 2)),
        NO_SCHEDULE,
    ),
    "uncalled schedule, grid": (lambda: diffjax.log_snr_times(diffjax.cosine, 5), NO_SCHEDULE),
    "uncalled schedule, process": (
        lambda: diffjax.q_posterior(diffjax.cosine, X, X, 0.5, 0.2),
        NO_SCHEDULE,
    ),
    **{
        f"uncalled weighting {name}": (
            functools.partial(loss, weight=make),
            rf"{NO_WEIGHTING} the function \w+, {CALL_IT}\w+\(",
        )
        for name, make in diffjax.weightings.WEIGHTINGS.items()
    },
    "name of a weighting": (lambda: loss(weight="elbo"), f"{NO_WEIGHTING} .*'elbo': {BY_NAME}"),
    "name of a schedule": (lambda: loss(schedule="cosine"), f"{NO_SCHEDULE} .*'cosine': {BY_NAME}"),
    "name of a sampler": (
        lambda: diffjax.sample(KEY, "ddim", X, TS),
        f"{NO_SAMPLER} .*'ddim': {BY_NAME}",
    ),
    "integer for a key in a loss": (lambda: loss(key=0), NO_KEY),
    "integer for a key in sampling": (lambda: diffjax.sample(0, WALK, X, TS), NO_KEY),
    "integer for a key in a bound": (lambda: elbo(DENOISE, key=0), NO_KEY),
    "integers for a key": (lambda: loss(key=jnp.arange(2)), r"such as jax\.random\.key\(0\)"),
    "unbatched sampling": (lambda: diffjax.sample(KEY, WALK, jnp.ones(2), TS), f"x_1 {BATCH}"),
    "unbatched loss": (lambda: loss(x_0=jnp.ones(2)), f"x_0 {BATCH}"),
    "bytes in a loss": (lambda: loss(x_0=np.ones((4, 2), np.uint8)), BYTES),
    "bytes in a bound": (lambda: elbo(DENOISE, x_0=X.astype(np.uint8)), BYTES),
    "bytes in sampling": (lambda: diffjax.sample(KEY, WALK, X.astype(np.uint8), TS), BYTES),
    "no condition in a loss": (lambda: loss(network=conditional), NO_COND),
    "no condition in sampling": (
        lambda: walk(diffjax.denoiser(conditional, SCHEDULE, "eps")),
        NO_COND,
    ),
    "uncalled sampler": (
        lambda: diffjax.sample(KEY, diffjax.heun, X, TS),
        rf"{NO_SAMPLER} the function heun, {CALL_IT}heun\(",
    ),
    "denoiser for a sampler": (lambda: diffjax.sample(KEY, DENOISE, X, TS), NO_SAMPLER),
    **{
        f"{name} for a network in a {where}": (
            functools.partial(use, denoise),
            "need a network, got a denoiser.*pass the network that it was made from",
        )
        for name, denoise in {"denoiser": DENOISE, "oracle": ORACLE}.items()
        for where, use in {
            "loss": lambda denoise: loss(network=denoise),
            "denoiser": lambda denoise: diffjax.denoiser(denoise, SCHEDULE, "eps"),
        }.items()
    },
    "denoiser of one's own for a network": (
        lambda: loss(network=lambda x_t, t, cond: diffjax.Prediction(x_t, x_t)),
        r"the network returned a Prediction: need one array of shape \(4, 2\)",
    ),
    "network of two arguments": (
        lambda: loss(network=lambda x_t, t: x_t),
        r"\(x_t, log_snr, cond\)",
    ),
    "grid that rises": (
        lambda: diffjax.sample(KEY, diffjax.ancestral(DENOISE), X, TS[::-1]),
        r"times rise from 0.* to 1.*give times from 1 to 0 \(ts\[::-1\]\)",
    ),
    "misspelt target": (
        lambda: loss(target="epsilon"),
        "unknown target 'epsilon': one of x_0, eps",
    ),
    "step for a time": (lambda: DENOISE(X, 500), r"must lie in \[0, 1\].*the time i / T"),
    "number of steps for a grid": (
        lambda: diffjax.sample(KEY, WALK, X, 50),
        r"at least two times, such as uniform_times\(50\)",
    ),
    "no steps": (lambda: diffjax.uniform_times(0), "0 steps: need at least 1"),
    "keys of another batch": (
        lambda: diffjax.sample(jax.random.split(KEY, 3), WALK, X, TS),
        r"keys of shape \(3,\) for a batch of 4: need one key, or keys \[batch\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(name, monkeypatch):
    mistake, words = MISTAKES[name]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        jax.block_until_ready(mistake())
    shown = "".join(traceback.format_exception_only(raised.value))
    assert re.search(words, shown, re.DOTALL), shown


def test_what_only_looks_unusual_is_accepted(monkeypatch):
    """Callables of all kinds are networks and denoisers, traced or not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    class Net:
        schedule = SCHEDULE  # of its own

        def __call__(self, *inputs):
            return 0 * inputs[0]

    for any_network in (Net(), jax.jit(network), functools.partial(network), lambda *a: 0 * a[0]):
        assert loss(network=any_network).shape == (4,)
        denoise = diffjax.denoiser(any_network, SCHEDULE, "eps")
        plain = lambda *inputs, denoise=denoise: denoise(*inputs)
        for same in (denoise, jax.jit(denoise), functools.partial(denoise), plain):
            assert walk(same)[0].shape == X.shape
    by_cond = lambda x_t, t, cond: DENOISE(x_t, t, cond)
    clipped = diffjax.clip_x_0(by_cond, SCHEDULE)
    assert clipped(X, 0.5, {"label": 0}).x_0.shape == X.shape
    jitted = jax.jit(lambda schedule, key: loss(schedule=schedule, key=key))
    assert jitted(SCHEDULE, jax.random.PRNGKey(0)).shape == (4,)
