"""EDM2's U-Net: the paper's sizes, the numbers of its network, and what keeps magnitudes at one."""

import dataclasses
import functools
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from catalogue import slow
from diffjax.experiment import Config, resolve
from diffjax.experiment.config import Optimizer
from diffjax.models import MLPConfig, apply, edm2_config
from diffjax.models.edm2_unet import (
    EDM2UNet,
    EDM2UNetConfig,
    join,
    mix,
    normalised,
    silu,
)

TINY = EDM2UNetConfig(
    *(8, (1, 2), 1, (4,)), head_width=8, labels=5, null_label=True
)  # width, mults, blocks, attention
PUBLISHED = dataclasses.replace(TINY, width=64, head_width=64)


def inputs(batch=2, shape=(8, 8, 3)):
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    return x, jnp.linspace(-5, 5, batch), {"label": jnp.arange(batch) % 3}


def init(config, gain=0.3, like=None):
    """Standard normal filters, as at the start, with gains that are not 0: every path matters."""
    like = jax.eval_shape(EDM2UNet(config).init, jax.random.key(1), *(like or inputs()))["params"]
    rng = np.random.default_rng(2)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype)
    return jax.tree.map(lambda p: draw(p) if p.ndim else jnp.asarray(gain, p.dtype), like)


def count(config, side, channels):
    make = functools.partial(EDM2UNet(config).init, jax.random.key(0))
    params = dict(jax.eval_shape(make, *inputs(1, (side, side, channels)))["params"])
    # They are not trained, and the paper does not count them.
    del params["frequencies"], params["phases"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


COUNTS = {
    "XS": 124_713_125,
    "S": 280_212_709,
    "M": 497_807_653,
    "L": 777_497_957,
    "XL": 1_119_283_621,
    "XXL": 1_523_164_645,
}
SLOW = slow(*(size for size in COUNTS if size != "XS"))


@pytest.mark.parametrize("size", ["XS", *SLOW])
def test_it_is_the_papers_network_of_each_size(size):
    """On latents of 64 x 64 x 4 with 1000 classes, without the layer of the uncertainty."""
    assert count(edm2_config(size, labels=1000, null_label=True), 64, 4) == COUNTS[size]


def drawn(name, shape):
    """The array of a published name, whose draws depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("phases"):
        return 2 * np.pi * rng.uniform(size=shape)
    return rng.standard_normal(shape) * (2 * np.pi if name.endswith("freqs") else 1)


def with_published_arrays(config, size):
    """Our parameters, filled with `drawn` arrays in the layout of PyTorch."""
    like = jax.eval_shape(EDM2UNet(config).init, jax.random.key(0), *inputs())["params"]
    at = lambda level: f"{size >> int(level)}x{size >> int(level)}"
    layers = dict(conv_0="conv_res0", conv_1="conv_res1", shortcut="conv_skip", embed="emb_linear")
    layers |= dict(qkv="attn_qkv", out="attn_proj", gain="emb_gain", kernel="")
    outside = dict(frequencies="emb_fourier.freqs", phases="emb_fourier.phases")
    outside |= dict(embed_noise="emb_noise.weight", embed_label="emb_label.weight")
    outside |= dict(conv_in=f"enc.{at(0)}_conv.weight", conv_out="out_conv.weight")
    outside |= dict(gain_out="out_gain")

    def theirs(module, *layer):
        if module in outside:
            return "unet." + outside[module]
        way, level, what = (*module.split("_"), "")[:3]
        coder = "enc" if way == "down" else "dec"
        block = f"{at(level)}_block{what}"
        if way == "middle":
            block = f"{at(len(config.mults) - 1)}_in{level}"
        elif what == "half":
            block = f"{at(int(level) + 1)}_down"
        elif what == "double":
            block = f"{at(int(level) - 1)}_up"
        name = f"unet.{coder}.{block}.{layers[layer[0]]}"
        return name if layer[0] == "gain" else f"{name}.weight"

    def value(path, leaf):
        name = theirs(*path)
        if leaf.ndim == 0:
            return jnp.asarray(1.0 if path == ("gain_out",) else 0.5)
        if leaf.ndim == 1:
            return jnp.asarray(drawn(name, leaf.shape), jnp.float32)
        *window, n, features = leaf.shape
        array = drawn(name, (features, n, *window))
        return jnp.asarray(np.moveaxis(array, (0, 1), (-1, -2)), jnp.float32)

    flat = flax.traverse_util.flatten_dict(like)
    return flax.traverse_util.unflatten_dict({p: value(p, leaf) for p, leaf in flat.items()})


def test_it_computes_the_numbers_of_the_published_network():
    """Six digits of EDM2's own network, with weights drawn by their names."""
    params = with_published_arrays(PUBLISHED, 8)
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    log_snr = -2 * jnp.log(jnp.array([0.01, 0.5, 20.0]))
    cond = {"label": jnp.array([0, 3, 5])}
    network = functools.partial(apply, EDM2UNet(PUBLISHED), params)
    out = np.moveaxis(jax.jit(network)(x.transpose(0, 2, 3, 1), log_snr, cond), -1, 1)
    at = [[f[0, 0, 0], f[2, 7, 7], f[1, 3, 5]] for f in out]
    expected = [
        [0.204468, 0.709266, -0.176070, 0.181480, 0.951901],
        [0.099590, 0.762674, -0.374659, 0.486069, -0.687875],
        [0.157778, 0.735816, 0.332909, 0.553932, -0.632156],
    ]
    found = [[f.mean(), f.std(), *a] for f, a in zip(out, at, strict=True)]
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.faults
def test_magnitudes_are_near_one_at_the_start():
    config = EDM2UNetConfig(64, (1, 2), 2, (4,), labels=3)
    x, log_snr, cond = inputs(4)
    params = {"params": init(config, 0.0, (x, log_snr, cond))}

    def blocks(x, log_snr, cond):
        keep = lambda module, name: type(module).__name__ == "Block" and name == "__call__"
        model = EDM2UNet(config)
        return model.apply(params, x, log_snr, cond, capture_intermediates=keep)[1]

    seen = jax.tree.leaves(jax.jit(blocks)(x, log_snr, cond))
    rms = [float(jnp.sqrt((h**2).mean())) for h in seen]
    assert len(rms) == 4 + 1 + 2 + 1 + 6
    assert min(rms) > 0.7 and max(rms) < 1.05, rms


@pytest.mark.faults
def test_only_the_directions_of_filters_matter():
    params = init(TINY)
    f = jax.jit(lambda p: apply(EDM2UNet(TINY), p, *inputs()))
    longer = jax.tree.map(lambda p: 10 * p if p.ndim > 1 else p, params)
    base = f(params)
    np.testing.assert_allclose(f(longer), base, rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(f(normalised(params)), base, rtol=1e-2, atol=2e-3)
    for leaf, before in zip(*map(jax.tree.leaves, (normalised(longer), params)), strict=True):
        if leaf.ndim > 1:
            rms = jnp.sqrt((leaf**2).mean(range(leaf.ndim - 1)))
            np.testing.assert_allclose(rms, 1, atol=1e-3)
        else:
            np.testing.assert_array_equal(leaf, before)


@pytest.mark.faults
def test_gradients_are_orthogonal_to_filters_and_spare_the_frequencies():
    params = init(TINY)
    loss = lambda p: (apply(EDM2UNet(TINY), p, *inputs()) ** 2).mean()
    grads = jax.jit(jax.grad(loss))(params)
    assert not jnp.any(grads["frequencies"]) and not jnp.any(grads["phases"])
    for g, p in zip(*map(jax.tree.leaves, (grads, params)), strict=True):
        if p.ndim > 1:
            over = tuple(range(p.ndim - 1))
            along = (g * p).sum(over)
            size = jnp.sqrt((g**2).sum(over) * (p**2).sum(over))
            assert (jnp.abs(along) < 1e-3 * size + 1e-9).all()
            assert jnp.any(g)


@pytest.mark.faults
def test_training_keeps_filters_at_length_one_and_moves_them_where_adam_would():
    """From the first parameters on; directions are those of plain Adam, gains are free."""
    shape = (8, 8, 3)
    config = dataclasses.replace(TINY, mults=(1,), attention=())
    e = resolve(Config(model=config, optimizer=Optimizer(learning_rate=0.1, warmup=0, clip=None)))
    params = jax.jit(functools.partial(e.init, shape=shape))(jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(7 * p), params)
    step = lambda tx: optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    new, free = step(e.optimizer), step(optax.adam(0.1))
    for before, after, there in zip(*map(jax.tree.leaves, (params, new, free)), strict=True):
        if before.ndim < 2:
            np.testing.assert_allclose(after, there, rtol=1e-5)
            continue
        over = tuple(range(before.ndim - 1))
        rms = lambda p, over=over: jnp.sqrt((p**2).mean(over))
        np.testing.assert_allclose(rms(before), 1, atol=1e-3)
        np.testing.assert_allclose(rms(after), 1, atol=1e-3)
        assert (jnp.abs(rms(there) - 1) > 1e-3).any()
        np.testing.assert_allclose((after * there).mean(over), rms(after) * rms(there), rtol=1e-4)


def test_a_fresh_network_says_zero():
    config = dataclasses.replace(TINY, mults=(1,), attention=())
    out, _ = jax.jit(EDM2UNet(config).init_with_output)(jax.random.key(0), *inputs())
    assert not out.any()


def test_sums_and_concatenations_keep_the_root_mean_square_and_halves_contribute_equally():
    a, b = jax.random.normal(jax.random.key(0), (2, 100_000, 4))
    rms = lambda x: float(jnp.sqrt((x**2).mean()))
    for part in (0.3, 0.5, 0.9):
        assert rms(mix(a, b, part)) == pytest.approx(1, abs=0.01)
    assert rms(silu(a)) == pytest.approx(1, abs=0.01)
    both = join(a, b[:, :1])
    assert rms(both) == pytest.approx(1, abs=0.01)
    assert float((both[:, :4] ** 2).sum(-1).mean()) == pytest.approx(2.5, abs=0.05)
    assert float((both[:, 4:] ** 2).sum(-1).mean()) == pytest.approx(2.5, abs=0.05)


@pytest.mark.faults
def test_every_input_matters_and_no_other_example_does():
    params, (x, log_snr, cond) = init(TINY), inputs()
    f = jax.jit(functools.partial(apply, EDM2UNet(TINY), params))
    base = f(x, log_snr, cond)
    assert base.shape == x.shape and base.dtype == jnp.float32
    for changed in (
        (x + 0.1, log_snr, cond),
        (x, log_snr + 1, cond),
        (x, log_snr, {"label": jnp.array([5, 5])}),
    ):
        assert (jnp.abs(f(*changed) - base).max(axis=(1, 2, 3)) > 1e-4).all()
    alone = f(x[:1], log_snr[:1], {"label": cond["label"][:1]})
    np.testing.assert_allclose(alone, base[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.faults
def test_learned_uncertainty_is_the_logarithm_of_the_mean_loss():
    """An exact denoiser of data N(0, 0.5^2) has loss 1 with EDM's weight, so u = 0 everywhere."""
    e = resolve(Config(model=MLPConfig(), learned_uncertainty=True))
    params = jax.jit(functools.partial(e.init, shape=(2,)))(jax.random.key(0))
    log_snr, tx = jnp.linspace(-8, 12, 64), optax.adam(0.03)
    for loss in (jnp.ones(64), jnp.exp(jnp.sin(log_snr / 8))):
        mean = lambda own, loss=loss: e.balance({"uncertainty": own}, log_snr, loss).mean()

        def step(_, carry, mean=mean):
            own, state = carry
            updates, state = tx.update(jax.grad(mean)(own), state)
            return optax.apply_updates(own, updates), state

        own = params["uncertainty"]
        own, _ = jax.jit(lambda c, step=step: jax.lax.fori_loop(0, 500, step, c))(
            (own, tx.init(own))
        )
        u = e.balance({"uncertainty": own}, log_snr, jnp.zeros(64))
        np.testing.assert_allclose(u, jnp.log(loss), atol=0.03)
    # The network does not see them.
    x = jnp.ones((1, 2))
    network = {k: v for k, v in params.items() if k != "uncertainty"}
    out = e.apply(params, x, jnp.zeros(1))
    np.testing.assert_array_equal(out, e.apply(network, x, jnp.zeros(1)))


@pytest.mark.faults
def test_remat_changes_memory_and_nothing_else():
    params = init(TINY)

    def value(remat):
        config = dataclasses.replace(TINY, remat=remat)
        loss = lambda p: (apply(EDM2UNet(config), p, *inputs(64)) ** 2).mean()
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (plain, most), (again, less) = value(False), value(True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), plain, again)
    assert less < most


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32():
    half = dataclasses.replace(TINY, bfloat16=True)
    params = init(TINY)
    assert {p.dtype for p in jax.tree.leaves(init(half))} == {jnp.dtype(jnp.float32)}
    wide, narrow = (
        jax.jit(functools.partial(apply, EDM2UNet(c)))(params, *inputs()) for c in (TINY, half)
    )
    assert narrow.dtype == jnp.float32
    assert 1e-4 < jnp.abs(wide - narrow).max() / jnp.abs(wide).max() < 0.1


@pytest.mark.faults
def test_dropout_of_an_example_depends_on_its_key_alone():
    config = dataclasses.replace(TINY, dropout=0.5)
    params, (x, log_snr, cond) = init(config), inputs(3)
    keys = jax.random.split(jax.random.key(7), 3)
    f = jax.jit(lambda keys, *a: apply(EDM2UNet(config), params, *a, dropout=keys))
    base = f(keys, x, log_snr, cond)
    other = f(keys.at[1].set(jax.random.key(8)), x, log_snr, cond)
    np.testing.assert_array_equal(base[::2], other[::2])
    assert (base[1] != other[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_width": 3}, r"head_width=3: must divide .* width 8 x 1 = 8"),
        ({"blocks": 0}, "sizes and counts must be at least 1"),
        ({"mults": ()}, "mults not empty"),
        ({"labels": 0}, "null_label=True needs labels"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be in"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_images_that_do_not_halve_or_lack_a_height_of_attention_are_refused():
    for shape in ((7, 8, 3), (8, 8), (8, 9, 1)):
        with pytest.raises(ValueError, match="height and width divisible by 2"):
            TINY.check_input(shape)
    with pytest.raises(ValueError, match=r"attention=\(4,\): the heights are \[16, 8\]"):
        TINY.check_input((16, 16, 3))
