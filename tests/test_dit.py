"""The transformer: the papers' sizes, and what its blocks, positions and gates must do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import apply, dit_config, jit_config
from diffjax.models.dit import Block, DiT, DiTConfig, stack
from diffjax.models.layers import angles, positions, rotate

OLD = DiTConfig(width=16, blocks=3, heads=2, labels=3, null_label=True)
MODERN = dataclasses.replace(
    *(OLD,),
    **dict(rms_norm=True, qk_norm=True, rope=True, swiglu=True, flow_time=True),
    **dict(bottleneck=4, class_tokens=2, class_tokens_from=1),
)
BOTH = pytest.mark.parametrize("config", [OLD, MODERN], ids=["dit", "jit"])


def inputs(batch=2, shape=(8, 12, 3)):
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    return x, jnp.linspace(-5, 5, batch), {"label": jnp.arange(batch) % 3}


def init(config):
    """Noise for every parameter, also where the network starts at zero: every path matters."""
    like = jax.eval_shape(DiT(config).init, jax.random.key(1), *inputs())["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), like)


def count(config, side, channels):
    make = functools.partial(DiT(config).init, jax.random.key(0))
    params = jax.eval_shape(make, *inputs(1, (side, side, channels)))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("size", "with_variance", "without"),
    [
        ("S", 32_865_056, 32_858_896),
        ("B", 130_315_808, 130_303_504),
        ("L", 457_840_672, 457_824_272),
        ("XL", 674_834_720, 674_816_272),
    ],
)
def test_it_is_the_papers_network_of_each_size(size, with_variance, without):
    """On latents of 32 x 32 x 4; the trainable parameters of the published files."""
    config = dit_config(size, 2, labels=1000, null_label=True)
    assert count(config, 32, 4) == without
    assert count(dataclasses.replace(config, out_channels=8), 32, 4) == with_variance


@pytest.mark.parametrize(
    ("size", "patch", "parameters"),
    [
        ("B", 16, 131_123_712),
        ("L", 16, 458_877_664),
        ("H", 16, 952_514_368),
        ("B", 32, 133_190_400),
        ("L", 32, 461_534_176),
        ("H", 32, 956_055_616),
    ],
)
def test_it_is_the_network_of_pixels_of_each_size(size, patch, parameters):
    assert count(jit_config(size, patch, labels=1000, null_label=True), 16 * patch, 3) == parameters


def test_a_token_knows_its_column_by_one_half_of_its_channels_and_its_row_by_the_other():
    at = positions(3, 5, 16).reshape(3, 5, 2, 8)
    assert (at[:1, :, 0] == at[:, :, 0]).all() and (at[:, :1, 1] == at[:, :, 1]).all()
    assert len(np.unique(at.reshape(15, 16), axis=0)) == 15
    # Each frequency has its sine and its cosine.
    np.testing.assert_allclose((at**2).sum(-1), 4)


def test_rotated_queries_and_keys_see_only_how_far_apart_they_are(x64):
    """The same vectors at every place: their products depend on differences of rows and columns."""
    rows, columns, width = 4, 5, 8
    query, key = jax.random.normal(jax.random.key(0), (2, width))
    turns = angles(rows, columns, width)
    everywhere = lambda v: rotate(jnp.tile(v, (1, rows * columns, 1, 1)), jnp.asarray(turns))[
        0, :, 0
    ]
    products = np.asarray(everywhere(query) @ everywhere(key).T)
    row, column = np.divmod(np.arange(rows * columns), columns)
    apart = np.stack([row[:, None] - row, column[:, None] - column], -1).reshape(-1, 2)
    for difference in np.unique(apart, axis=0):
        same = products.reshape(-1)[(apart == difference).all(-1)]
        np.testing.assert_allclose(same, same[0], rtol=1e-12)
    assert products.std() > 0.1
    # Lengths stay.
    np.testing.assert_allclose(jnp.linalg.norm(everywhere(query), axis=-1), jnp.linalg.norm(query))


@pytest.mark.faults
def test_stacked_blocks_are_blocks_one_after_another():
    params, rng = init(OLD)["blocks"], np.random.default_rng(3)
    h, emb = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 6, 16), (2, 16)))
    turns = jnp.asarray(angles(2, 3, 8))
    one, two = Block(OLD, h.dtype), stack(OLD, h.dtype, OLD.blocks, "blocks")
    assert {p.shape[0] for p in jax.tree.leaves(params)} == {OLD.blocks}
    together, _ = two.apply({"params": params}, h, emb, turns)
    for i in range(OLD.blocks):
        h, _ = one.apply({"params": jax.tree.map(lambda p, i=i: p[i], params)}, h, emb, turns)
    np.testing.assert_allclose(together, h, rtol=1e-4, atol=1e-5)


@BOTH
def test_every_input_matters_and_no_other_example_does(config):
    params, (x, log_snr, cond) = init(config), inputs()
    f = jax.jit(functools.partial(apply, DiT(config), params))
    base = f(x, log_snr, cond)
    assert base.shape == x.shape and base.dtype == jnp.float32
    for changed in (
        (x + 0.1, log_snr, cond),
        (x, log_snr + 1, cond),
        (x, log_snr, {"label": jnp.array([3, 3])}),
        (x.swapaxes(1, 2).reshape(x.shape), log_snr, cond),
    ):
        assert (jnp.abs(f(*changed) - base).max(axis=(1, 2, 3)) > 1e-4).all()
    alone = f(x[:1], log_snr[:1], {"label": cond["label"][:1]})
    np.testing.assert_allclose(alone, base[:1], rtol=1e-4, atol=1e-4)


def test_a_fresh_network_says_zero_and_its_blocks_pass_tokens_on():
    out, variables = jax.jit(DiT(MODERN).init_with_output)(jax.random.key(0), *inputs())
    assert not out.any()
    for name in ("blocks", "blocks_with_class"):
        assert not jnp.any(variables["params"][name]["modulation"]["kernel"])


@pytest.mark.faults
def test_remat_changes_memory_and_nothing_else():
    params = init(MODERN)

    def value(remat):
        config = dataclasses.replace(MODERN, remat=remat)
        loss = lambda p: (apply(DiT(config), p, *inputs()) ** 2).mean()
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    plain, most = value("none")
    for remat in ("full", "dots"):
        again, less = value(remat)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, plain, again)
        assert less < most


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32():
    half = dataclasses.replace(MODERN, bfloat16=True)
    like = jax.eval_shape(DiT(half).init, jax.random.key(0), *inputs())
    assert {p.dtype for p in jax.tree.leaves(like)} == {jnp.dtype(jnp.float32)}
    params = init(MODERN)
    wide, narrow = (
        jax.jit(functools.partial(apply, DiT(c)))(params, *inputs()) for c in (MODERN, half)
    )
    assert narrow.dtype == jnp.float32
    assert 1e-4 < jnp.abs(wide - narrow).max() / jnp.abs(wide).max() < 0.1


def test_dropout_of_an_example_depends_on_its_key_alone():
    config = dataclasses.replace(OLD, dropout=0.5)
    params, (x, log_snr, cond) = init(config), inputs(3)
    keys = jax.random.split(jax.random.key(7), 3)
    f = jax.jit(lambda keys, *a: apply(DiT(config), params, *a, dropout=keys))
    base = f(keys, x, log_snr, cond)
    other = f(keys.at[1].set(jax.random.key(8)), x, log_snr, cond)
    np.testing.assert_array_equal(base[::2], other[::2])
    assert (base[1] != other[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads=3: width=16 must be a multiple of 4 x 3"),
        ({"blocks": 0}, "sizes and counts must be at least 1"),
        ({"remat": "all"}, "remat='all': one of none, full, dots"),
        ({"labels": 0}, "null_label=True needs labels"),
        ({"class_tokens": 2, "class_tokens_from": 3}, r"class_tokens_from=3 in 0\.\.2"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be in"),
        ({"bottleneck": 0}, "sizes and counts must be at least 1"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OLD, **change)


def test_an_image_that_is_not_whole_patches_is_refused():
    for shape in ((7, 8, 3), (8, 8), (8, 9, 1)):
        with pytest.raises(ValueError, match="height and width divisible by 2"):
            OLD.check_input(shape)
