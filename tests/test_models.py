import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import slow
from diffjax.experiment import command_line
from diffjax.models import (
    MLP,
    DiT,
    DiTConfig,
    EDM2UNet,
    EDM2UNetConfig,
    MLPConfig,
    SongUNet,
    SongUNetConfig,
    UNet,
    UNetConfig,
    apply,
    song_unet,
)
from diffjax.models.layers import (
    DoubleConv,
    attention,
    double,
    fold,
    halve,
    noise_embedding,
    unfold,
)

COSINE = diffjax.cosine()
TINY = UNetConfig(width=8, mults=(1, 2), blocks=1, attention=(4,), groups=4, dropout=0.0)


SMALL = dataclasses.replace(TINY, mults=(1,), attention=(8,))


def inputs(shape, batch=2, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(0), (batch, *shape), dtype)
    return x, jnp.linspace(-5, 5, batch)


def init(config, shape, cond=None):
    """Noise for every parameter, also where a network starts at zero: every path matters."""
    like = jax.eval_shape(UNet(config).init, jax.random.key(1), *inputs(shape), cond)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), like)


@functools.cache
def count(config, size, channels=3):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32), "image": x, "image_log_snr": one}
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), x, one, cond)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


ADM_64 = UNetConfig(
    width=192,
    mults=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
    head_width=64,
    scale_shift=True,
    resblock_updown=True,
    out_channels=6,
    labels=1000,
)


def test_it_is_ddpms_network_for_cifar_10():
    assert count(UNetConfig(), 32) == 35_746_307


def test_it_is_adms_network_for_imagenet_64():
    assert count(ADM_64, 64) == 295_904_454


def test_the_null_label_is_one_more_row():
    with_null = dataclasses.replace(ADM_64, null_label=True)
    assert count(with_null, 64) - count(ADM_64, 64) == 4 * 192


def test_the_conditioning_image_is_more_input_channels_and_a_second_level():
    with_image = dataclasses.replace(UNetConfig(), image_cond=True)
    assert count(with_image, 32) - count(UNetConfig(), 32) == 3 * 3 * 3 * 128 + 128 * 512


@pytest.mark.parametrize(
    "change",
    [
        {"scale_shift": True},
        {"resblock_updown": True},
        {"mults": (1, 1, 2)},
        {"patch": 2},
        *slow(
            *({}, {"pad_both": True}, {"heads": 2}, {"head_width": 4}),
            *({"mults": (1,)}, {"attention": ()}, {"out_channels": 5}),
        ),
    ],
    ids=str,
)
def test_any_option_any_size(change):
    for shape in ((8, 8, 1), (28, 28, 3), (12, 8, 2)):
        config = dataclasses.replace(TINY, **change)
        if config.attention:
            lowest = shape[0] // config.patch // 2 ** (len(config.mults) - 1)
            config = dataclasses.replace(config, attention=(lowest,))
        x, log_snr = inputs(shape)
        out = jax.eval_shape(
            lambda x, l, c=config: UNet(c).init_with_output(jax.random.key(0), x, l, None)[0],
            x,
            log_snr,
        )
        assert out.shape == (2, *shape[:2], config.out_channels or shape[2])
        assert out.dtype == jnp.float32


def test_every_input_matters():
    """The output changes with x_t, the noise level, the label, the image and its own level."""
    extras = dict(scale_shift=True, resblock_updown=True, labels=3, null_label=True)
    config = dataclasses.replace(TINY, image_cond=True, **extras)
    x, log_snr = inputs((8, 8, 1))
    cond = {"label": jnp.array([0, 1]), "image": jnp.ones((2, 4, 4, 2)), "image_log_snr": log_snr}
    params = init(config, (8, 8, 1), cond)
    f = jax.jit(lambda *a: apply(UNet(config), params, *a))
    base = f(x, log_snr, cond)
    for changed in (
        (x + 0.1, log_snr, cond),
        (x, log_snr + 1, cond),
        (x, log_snr, cond | {"label": jnp.array([3, 3])}),
        (x, log_snr, cond | {"image": 0 * cond["image"]}),
        (x, log_snr, cond | {"image_log_snr": log_snr + 1}),
    ):
        assert (jnp.abs(f(*changed) - base).max(axis=(1, 2, 3)) > 1e-4).all()


def test_a_fresh_network_says_zero():
    x, log_snr = inputs((8, 8, 1))
    make = jax.jit(lambda: UNet(SMALL).init_with_output(jax.random.key(0), x, log_snr, None)[0])
    assert not make().any()


def test_an_example_does_not_depend_on_its_batch_mates():
    params = init(SMALL, (8, 8, 1))
    x, log_snr = inputs((8, 8, 1), batch=4)
    f = jax.jit(lambda x, l: apply(UNet(SMALL), params, x, l))
    whole, part = f(x, log_snr), f(x[2:3], log_snr[2:3])
    np.testing.assert_allclose(whole[2:3], part, atol=1e-5)


@pytest.mark.faults
def test_remat_changes_memory_and_nothing_else():
    params = init(SMALL, (8, 8, 1))
    x, log_snr = inputs((8, 8, 1))

    def loss(config):
        return jax.jit(jax.grad(lambda p: jnp.mean(apply(UNet(config), p, x, log_snr) ** 2)))

    plain, remat = loss(SMALL)(params), loss(dataclasses.replace(SMALL, remat=True))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


@pytest.mark.faults
def test_the_network_of_vdm_starts_as_the_identity_at_every_noise_level():
    """Its parameters are the paper's, without 4 x 128 of a conditioning that is always zero."""
    config = command_line.from_file("configs/vdm_cifar10.py")
    assert count(config.model, 32, 3 * 5) == 30_578_181 - 2 - 4 * 128
    model = dataclasses.replace(config.model, width=8, blocks=1, groups=4, dropout=0.0)
    module = UNet(model)
    x_t = jax.random.normal(jax.random.key(0), (2, 8, 8, 15))
    log_snr = jnp.array([-5.0, 13.3])
    params = module.init(jax.random.key(1), x_t, log_snr, None)["params"]
    np.testing.assert_array_equal(
        module.apply({"params": params}, x_t, log_snr, None), x_t[..., :3]
    )
    levels = [block["level"] for block in params.values() if "level" in block]
    assert len(levels) == 5 and all(list(level) == ["kernel"] for level in levels)
    assert not any(level["kernel"].any() for level in levels)
    # The sinusoids have frequencies 1 to 1 / 10000 of 0 to 1000 between the ends.
    embedded = model.log_snr_scale * log_snr + model.log_snr_shift
    np.testing.assert_allclose(embedded, [1000, 0], atol=1e-3)
    period = config.model.embedding_period
    np.testing.assert_allclose(period ** (-63 / 64), 1e-4, rtol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32():
    config = dataclasses.replace(SMALL, bfloat16=True)
    params = init(config, (8, 8, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x, log_snr = inputs((8, 8, 1))
    low, high = (jax.jit(lambda c=c: apply(UNet(c), params, x, log_snr))() for c in (config, SMALL))
    assert low.dtype == jnp.float32
    gap = jnp.abs(low - high).max() / jnp.abs(high).max()
    assert 1e-6 < gap < 0.05
    text = jax.make_jaxpr(lambda p: apply(UNet(config), p, x, log_snr))(params).pretty_print()
    convolutions = [line for line in text.splitlines() if "conv_general_dilated" in line]
    assert convolutions and all("bf16" in line for line in convolutions)


def test_dropout_of_an_example_depends_on_its_key_alone():
    config = dataclasses.replace(SMALL, dropout=0.5)
    params = init(config, (8, 8, 1))
    x, log_snr = inputs((8, 8, 1), batch=4)
    keys = jax.random.split(jax.random.key(3), 4)
    f = jax.jit(lambda x, l, keys: apply(UNet(config), params, x, l, dropout=keys))
    whole = f(x, log_snr, keys)
    part = f(x[1:3], log_snr[1:3], keys[1:3])
    np.testing.assert_allclose(whole[1:3], part, atol=1e-5)
    without = jax.jit(lambda: apply(UNet(config), params, x, log_snr))()
    assert jnp.abs(whole - without).max() > 1e-2
    assert jnp.abs(f(x, log_snr, keys[::-1]) - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((30, 32, 3), "height and width divisible by 4"),
        ((32, 31, 3), "height and width divisible by 4"),
        ((2,), "examples of shape"),
    ],
)
def test_an_image_that_does_not_halve_is_refused(shape, message):
    config = dataclasses.replace(TINY, mults=(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        config.check_input(shape)
    with pytest.raises(ValueError, match=message):
        UNet(config).init(jax.random.key(0), *inputs(shape), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "groups=3 must divide"),
        ({"groups": 0}, "at least 1"),
        ({"mults": ()}, "mults not empty"),
        ({"null_label": True}, "null_label=True needs labels"),
        ({"heads": 3}, "heads=3"),
        ({"head_width": 5}, "head_width=5"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"log_snr_scale": np.nan}, "log_snr_scale=nan: must be finite"),
        ({"epsilon": -1.0}, "epsilon=-1.0: must be positive and finite"),
    ],
)
def test_a_config_that_does_not_divide_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_convolution_of_the_doubled_image_is_just_that(x64):
    """And so are its gradients, edges included."""
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 5, 4), (6,)]))
    conv = nn.Conv(6, (3, 3), param_dtype=jnp.float64)
    params = jax.tree.map(lambda p: p + 0.1, conv.init(jax.random.key(2), double(x)))
    either = lambda f: jax.value_and_grad(
        lambda p, x: jnp.sum(jnp.sin(f(p, x)) * w[None, None, None]), (0, 1)
    )
    expected = either(lambda p, x: conv.apply(p, double(x)))(params, x)
    got = either(DoubleConv(6, jnp.dtype(jnp.float64)).apply)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)


def test_attention_is_jaxs_own():
    qkv = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 5))
    expected = jax.nn.dot_product_attention(*qkv)
    np.testing.assert_allclose(attention(*qkv), expected, atol=1e-6)
    half = attention(*qkv.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(float), expected, atol=0.03)


def test_halve_inverts_double():
    x, _ = inputs((6, 4, 3))
    assert double(x).shape == (2, 12, 8, 3)
    np.testing.assert_allclose(halve(double(x)), x, rtol=1e-6)


def test_unfold_inverts_fold_and_keeps_neighbours_together():
    x = jnp.arange(2 * 6 * 4 * 3.0).reshape(2, 6, 4, 3)
    folded = fold(x, 2)
    assert folded.shape == (2, 3, 2, 12)
    assert sorted(folded[1, 2, 1].tolist()) == sorted(x[1, 4:6, 2:4].ravel().tolist())
    assert jnp.array_equal(unfold(folded, 2), x)


def test_noise_embedding_tells_levels_apart():
    emb = np.asarray(noise_embedding(25 * jnp.linspace(-20, 20, 401), 32))
    gaps = np.linalg.norm(emb[:, None] - emb[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    assert gaps.min() > 0.2


NCSNPP = SongUNetConfig(taps=(1.0, 3.0, 3.0, 1.0), fourier=True, residual_input=True, labels=10)
TINY_SONG = dataclasses.replace(
    NCSNPP, width=32, mults=(1, 2), blocks=1, attention=(4,), labels=3, null_label=True, dropout=0.5
)


@pytest.mark.parametrize(
    ("config", "parameters"),
    # Those of the originals, in PyTorch; the frequencies are no parameters there.
    [(SongUNetConfig(labels=10), 55_734_147), (NCSNPP, 56_398_339 + 128)],
    ids=["ddpm++", "ncsn++"],
)
def test_they_are_edms_networks_for_cifar_10(config, parameters):
    x, one = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), jnp.zeros(1)
    cond = {"label": jnp.zeros(1, jnp.int32)}
    params = jax.eval_shape(SongUNet(config).init, jax.random.key(0), x, one, cond)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.faults
def test_every_input_of_ncsnpp_matters_and_its_frequencies_stay():
    x, log_snr = inputs((8, 8, 1))
    label, keys = jnp.array([0, 1]), jax.random.split(jax.random.key(3), 2)
    module = SongUNet(TINY_SONG)
    like = jax.eval_shape(module.init, jax.random.key(1), x, log_snr, {"label": label})["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.1 * rng.standard_normal(p.shape, np.float32), like)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def f(drawn, x, log_snr, label, keys):
        out = apply(
            module, params | {"frequencies": drawn}, x, log_snr, {"label": label}, dropout=keys
        )
        return jnp.sum(out**2), out

    (_, base), gradient = f(params["frequencies"], x, log_snr, label, keys)
    assert not gradient.any()
    assert base.shape == x.shape and base.dtype == x.dtype
    for changed in (
        (x + 0.1, log_snr, label, keys),
        (x, log_snr + 1, label, keys),
        (x, log_snr, jnp.array([3, 3]), keys),
        (x, log_snr, label, keys[::-1]),
    ):
        out = f(params["frequencies"], *changed)[0][1]
        assert (jnp.abs(out - base).max(axis=(1, 2, 3)) > 1e-4).all()


@pytest.mark.faults
def test_ncsnpp_computes_in_bfloat16_and_recomputes_its_blocks_where_asked_to():
    """Its parameters stay float32, and what is recomputed is the same."""
    x, log_snr = inputs((8, 8, 1))
    cond = {"label": jnp.array([0, 3])}
    like = jax.eval_shape(SongUNet(TINY_SONG).init, jax.random.key(1), x, log_snr, cond)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.1 * rng.standard_normal(p.shape, np.float32), like)

    def of(**options):
        module = SongUNet(dataclasses.replace(TINY_SONG, **options))
        made = jax.eval_shape(module.init, jax.random.key(1), x, log_snr, cond)["params"]
        assert made == like
        return lambda p: apply(module, p, x, log_snr, cond)

    wide, narrow = jax.jit(lambda p: [of(bfloat16=half)(p) for half in (False, True)])(params)
    assert narrow.dtype == jnp.float32
    assert 1e-4 < jnp.abs(wide - narrow).max() / jnp.abs(wide).max() < 0.1
    lines = str(jax.make_jaxpr(of(bfloat16=True))(params)).splitlines()
    convolutions = [line for line in lines if "conv_general_dilated[" in line]
    assert convolutions and all("bf16" in line for line in convolutions)
    losses = (lambda p, f=of(remat=remat): f(p).sum() for remat in (False, True))
    once, twice = (str(jax.make_jaxpr(jax.grad(loss))(params)) for loss in losses)
    assert once.count("conv_general_dilated[") < twice.count("conv_general_dilated[")


def test_resampling_is_interpolation_inside_and_sees_zeros_outside():
    """By (1, 1) that of ADM; by (1, 3, 3, 1) linear, and antialiased on the way down."""
    x, _ = inputs((8, 6, 3))
    np.testing.assert_allclose(song_unet.halve(x, (1, 1)), halve(x), atol=1e-6)
    np.testing.assert_allclose(song_unet.double(x, (1, 1)), double(x), atol=1e-6)
    taps, surrounded = (1, 3, 3, 1), jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for f, shape, edge in ((song_unet.halve, (6, 5), 1), (song_unet.double, (24, 20), 4)):
        linear = jax.image.resize(surrounded, (2, *shape, 3), "linear")
        expected = linear[:, edge:-edge, edge:-edge]
        np.testing.assert_allclose(f(x, taps), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, "width=48: must be a multiple of 32"),
        ({"blocks": 0}, "at least 1"),
        ({"labels": 0}, "null_label=True needs labels"),
        ({"taps": (1.0, 2.0, 1.0)}, r"taps=\(1\.0, 2\.0, 1\.0\)"),
        ({"taps": (1.0, 2.0)}, "symmetric"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_a_song_unet_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_SONG, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((7, 8, 3), "divisible by 2"), ((2,), "examples of"), ((16, 16, 3), r"heights are \[16, 8\]")],
)
def test_an_image_that_a_song_unet_cannot_take_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        TINY_SONG.check_input(shape)


def test_mlp_takes_labels_and_drops_out():
    config = MLPConfig(width=16, blocks=1, dropout=0.5, labels=3)
    x, log_snr = jnp.ones((4, 2)), jnp.zeros(4)
    label = {"label": jnp.array([0, 1, 2, 0])}
    params = MLP(config).init(jax.random.key(0), x, log_snr, label)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)
    out = apply(MLP(config), params, x, log_snr, label)
    np.testing.assert_allclose(out[0], out[3], rtol=1e-6)
    assert (jnp.abs(out[0] - out[1]) > 1e-5).any()
    keys = jax.random.split(jax.random.key(1), 4)
    assert (apply(MLP(config), params, x, log_snr, label, dropout=keys)[0] != out[0]).any()
    with pytest.raises(ValueError, match="an MLP needs vectors"):
        config.check_input((8, 8, 1))


@pytest.mark.parametrize(
    "config", [UNetConfig, SongUNetConfig, MLPConfig, DiTConfig, EDM2UNetConfig]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 0}, "out_channels=0: must be at least 1, or None"),
        ({"labels": -1}, "labels=-1: must be at least 0"),
        ({"null_label": True}, "null_label=True needs labels"),
        ({"dropout": 1.0}, "dropout=1.0: must be in"),
    ],
)
def test_the_options_of_all_networks_are_checked(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("module", "config", "shape", "null_label"),
    [
        (UNet, SMALL, (8, 8, 1), True),
        (SongUNet, TINY_SONG, (8, 8, 1), False),
        (MLP, MLPConfig(width=8, blocks=1), (2,), True),
        (MLP, MLPConfig(width=8, blocks=1), (2,), False),
        (DiT, DiTConfig(width=8, blocks=1, heads=1, patch=4), (8, 8, 1), True),
        (EDM2UNet, EDM2UNetConfig(8, (1,), 1, (), 8), (8, 8, 1), True),
    ],
    ids=["unet", "song_unet", "mlp", "mlp_without_null", "dit", "edm2_unet"],
)
def test_a_label_that_has_no_row_is_refused_by_every_network(module, config, shape, null_label):
    config = dataclasses.replace(config, labels=3, null_label=null_label)
    most, null = (3, ", or 3") if null_label else (2, "")
    of = lambda label: module(config).init(jax.random.key(0), *inputs(shape), {"label": label})
    make = lambda *label: jax.eval_shape(lambda: of(np.array(label)))
    make(0, most)
    for bad in (-1, most + 1):
        with pytest.raises(ValueError, match=f"the network has classes 0 to 2{null}"):
            make(0, bad)


def test_a_null_label_that_has_no_row_is_refused_inside_the_scan_of_a_walk():
    config = MLPConfig(width=8, blocks=1, labels=3, null_label=True)
    x, log_snr = inputs((2,))
    cond = {"label": jnp.array([0, 1])}
    like = jax.eval_shape(MLP(config).init, jax.random.key(0), x, log_snr, cond)["params"]
    params = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), like)
    denoise = diffjax.denoiser(functools.partial(apply, MLP(config), params), COSINE, "v")

    def draw(null):
        guided = diffjax.classifier_free(denoise, 2.0, {"label": null})
        walk = diffjax.ddim(functools.partial(guided, cond=cond))
        ts = diffjax.uniform_times(2)
        return jax.eval_shape(lambda: diffjax.sample(jax.random.key(0), walk, x, ts))

    draw(3)
    with pytest.raises(ValueError, match="labels from -1 to 1: the network has classes 0 to 2"):
        draw(-1)


def test_a_traced_label_below_zero_is_not_that_of_the_last_row():
    config = MLPConfig(width=8, blocks=1, labels=3, null_label=True)
    x, log_snr = inputs((2,))
    network = lambda label: MLP(config).init_with_output(
        jax.random.key(0), x, log_snr, {"label": label}, capture_intermediates=True
    )[1]["intermediates"]["Embed_0"]["__call__"][0]
    found = jax.jit(network)(jnp.array([-1, 3]))
    assert jnp.isnan(found[0]).all() and jnp.isfinite(found[1]).all()
