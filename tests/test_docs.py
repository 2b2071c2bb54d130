"""The site: every block of Python on its pages runs, and what it says of other code is so."""

import ast
import doctest
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import each
from diffjax import keys
from diffjax.evaluation import distances  # noqa: F401, a page adds to its table
from diffjax.process import decoder
from diffjax.samplers import State
from diffjax.training import ema_warmup

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page):
    """The blocks of Python on a page, each with the line it begins on."""
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        yield text.count("\n", 0, found.start()) + 1, found[1]


@pytest.fixture
def tables():
    """Every table of diffjax; the rows that a page adds are removed after it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("diffjax")]
    names = [(m, name) for m in modules for name, x in vars(m).items() if isinstance(x, dict)]
    before = [(vars(m)[name], dict(vars(m)[name])) for m, name in names if name.isupper()]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


PAGES = {str(p.relative_to(DOCS)): p for p in sorted(DOCS.rglob("*.md")) if list(blocks(p))}
LONG = {"howto/images.md", "theory.md"}


@pytest.mark.parametrize("page", each(PAGES, *PAGES.keys() - LONG))
def test_what_a_page_shows_is_what_happens(page, tables, tmp_path, monkeypatch):
    """Blocks share their names, in order; one with prompts is a doctest, another is executed."""
    monkeypatch.chdir(tmp_path)
    scope, told = {"__name__": page.stem}, []
    for line, block in blocks(page):
        if not block.startswith(">>>"):
            exec(compile("\n" * line + block, page, "exec"), scope)
            continue
        test = doctest.DocTestParser().get_doctest(block, scope, page.name, str(page), line)
        doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
        scope |= test.globs
    assert not told, "".join(told)


def names_with_docstrings(path):
    """The functions, classes and values of a module that `:members:` puts into the reference."""
    body = ast.parse(path.read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            yield ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])


def test_the_reference_has_every_module_and_every_public_name():
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. automodule:: (\S+)\n   :members:", reference, re.M))
    names = {name.removeprefix("diffjax.") for name in documented}
    for path in (ROOT / "diffjax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        assert module in documented or module == "diffjax", module
        names |= set(names_with_docstrings(path))
    for name in diffjax.__all__:
        assert name in names, name


# What docs/coming_from.md marks with a tick: formulas of others' code and papers, against ours.

BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)
DDPM = diffjax.from_betas(diffjax.linear_betas(1000))
close = functools.partial(np.testing.assert_allclose, rtol=1e-9)


@pytest.fixture
def one_step(x64):
    """The scales of a step from t to s on cosine; x_t; an estimate (x_0, eps) of what made it."""
    schedule, t, s = diffjax.cosine(), 0.6, 0.5
    x_0, eps = np.array([[0.3, -0.8]]), np.array([[1.1, 0.4]])
    (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
    denoise = lambda x_t, t, cond=None: diffjax.Prediction(x_0, eps)
    walk = lambda sampler, key=jax.random.key(0): (
        sampler(denoise, schedule).step(key, State(alpha * x_0 + sigma * eps, 0 * x_0), t, s).x
    )
    return x_0, eps, alpha, sigma, alpha_s, sigma_s, walk


def test_zero_based_steps_are_the_grid_from_one(x64):
    i = np.array([0, 499, 999])
    close(DDPM((i + 1) / 1000)[0] ** 2, ABAR[i])
    rescaled = 1000 / 250 * np.array([1e-4, 0.02])
    close(diffjax.linear_betas(250, 0.1 / 250, 20 / 250), np.linspace(*rescaled, 250))


def test_ddpms_two_variances(x64):
    i, x = 500, jnp.zeros((1, 2))  # zero-based
    small = BETAS[i] * (1 - ABAR[i - 1]) / (1 - ABAR[i])
    for variance, theirs in (("posterior", small), ("beta", BETAS[i])):
        at = (i + 1) / 1000, i / 1000
        std = decoder(DDPM, diffjax.Prediction(x, x), x, *at, variance)[1]
        close(std**2, theirs, rtol=1e-7)


def test_k_diffusions_euler_is_ddim_and_its_ancestral_euler_is_ddim_of_that_eta(one_step):
    x_0, eps, alpha, sigma, alpha_s, sigma_s, walk = one_step
    before, after = sigma / alpha, sigma_s / alpha_s  # their sigmas
    x = x_0 + before * eps
    d = (x - x_0) / before
    close(d, eps)
    close(walk(diffjax.ddim) / alpha_s, x + d * (after - before))
    key = jax.random.key(1)
    for eta in (0.5, 1.0):
        up = min(after, eta * (after**2 * (before**2 - after**2) / before**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        theirs = x + d * (down - before) + up * keys.normal(key, x.shape)
        close(walk(functools.partial(diffjax.ddim, eta=eta), key) / alpha_s, theirs)


def test_vdms_step_is_ancestral(one_step):
    x_0, eps, alpha, sigma, alpha_s, sigma_s, walk = one_step
    g_t, g_s = 2 * np.log(sigma / alpha), 2 * np.log(sigma_s / alpha_s)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    a, b, c = sigmoid(-g_s), sigmoid(-g_t), -np.expm1(g_s - g_t)
    z_t, fresh = alpha * x_0 + sigma * eps, keys.normal(jax.random.key(0), x_0.shape)
    theirs = np.sqrt(a / b) * (z_t - np.sqrt(1 - b) * c * eps) + np.sqrt((1 - a) * c) * fresh
    close(walk(diffjax.ancestral), theirs)


def test_vdms_fixed_gamma_is_log_uniform(x64):
    t = np.linspace(0, 1, 5)
    schedule = diffjax.log_uniform(np.exp(-13.3 / 2), np.exp(5.0 / 2), scales=diffjax.vp)
    close(schedule.log_snr(t), 13.3 - (13.3 + 5.0) * t)


def test_flow_matching_is_rectified_flow_walked_by_ddim(x64):
    schedule = diffjax.rectified_flow()
    sigma = schedule(np.array([0.6, 0.5]))[1]
    x_0, eps = np.array([[0.3, -0.8]]), np.array([[1.1, 0.4]])
    x = (1 - sigma[0]) * x_0 + sigma[0] * eps
    ours = diffjax.ddim(lambda *_: diffjax.Prediction(x_0, eps), schedule)
    step = ours.step(jax.random.key(0), State(x, x), 0.6, 0.5).x
    close(step, x + (sigma[1] - sigma[0]) * (eps - x_0))
    shifted = diffjax.shift(schedule, -2 * np.log(3.0))(np.array([0.6, 0.5]))[1]
    close(shifted, 3 * sigma / (1 + 2 * sigma))


def test_the_targets_of_diffusers_and_edm(one_step):
    x_0, eps, alpha, sigma, *_ = one_step
    abar = alpha**2
    close(diffjax.encode("v", x_0, eps, alpha, sigma), abar**0.5 * eps - (1 - abar) ** 0.5 * x_0)
    close(diffjax.encode("flow", x_0, eps, alpha, sigma), eps - x_0)
    s, s_data, out = 1.7, 0.5, np.array([[0.2, -0.4]])  # EDM's sigma; alpha = 1
    x, r = x_0 + s * eps, s**2 + s_data**2
    denoised = s_data**2 / r * x + s * s_data / r**0.5 * out
    close(diffjax.decode("F", out, x, 1.0, s).x_0, denoised)
    seen = diffjax.unit_input(lambda x, log_snr, cond: x, diffjax.log_uniform())
    log_snr = jnp.full(1, -2 * np.log(s))
    close(seen(x, log_snr, None), x / r**0.5)
    close(-log_snr / 8, np.log(s) / 4)


@pytest.mark.parametrize("n", [10, 50, 1000])
def test_discrete_times_are_trailing(n):
    theirs = np.round(np.arange(1000, 0, -1000 / n)) - 1
    close(diffjax.discrete_times(1000, n)[:-1], (theirs + 1) / 1000, rtol=1e-6)


def test_karras_times_are_their_sigmas(x64):
    n, rho, low, high = 18, 7.0, 0.002, 80.0
    ramp = high ** (1 / rho) + np.arange(n) / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))
    schedule = diffjax.log_uniform(low, high)
    ts = diffjax.karras_times(schedule, n - 1, rho)
    close(np.exp(-schedule.log_snr(ts) / 2), ramp**rho)


def test_guidance_weights_of_two_conventions(x64):
    denoise = lambda x_t, t, cond: diffjax.Prediction(x_t * cond["c"][:, None], x_t)
    x, given, null = jnp.ones((1, 2)), {"c": jnp.array([3.0])}, {"c": jnp.array(2.0)}
    guided = lambda w: diffjax.classifier_free(denoise, w, null)(x, 0.5, given).x_0
    close(guided(7.5), 2.0 + 7.5 * (3.0 - 2.0) + 0 * x)
    close(guided(1 + 0.5), (1 + 0.5) * 3.0 - 0.5 * 2.0 + 0 * x)


def test_the_warm_up_of_the_average():
    for n in (0, 9, 10**6):
        close(ema_warmup(0.9999)(jnp.array(n)), min(0.9999, (1 + n) / (10 + n)), rtol=1e-6)
