"""Published networks, beside those who published them: `make test-peers`.

The weights are random, every one of them away from its initial value, so that nothing is hidden by
zeros; the architectures are the published ones, narrower where that is enough.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pickle
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import checkpoint, models, published
from diffjax.evaluation import dinov2, distances, features, inception, summing
from diffjax.experiment import resolve
from diffjax.latents import LATENTS
from diffjax.models import dit_config
from diffjax.published import arrays, autoencoder_kl, openai, weights
from diffjax.training.runners import RUNNERS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from azula.plugins.adm._src.unet import SuperResModel, UNetModel
    from diffusers import (
        AutoencoderKL,
        DDIMPipeline,
        DDIMScheduler,
        DDPMScheduler,
        DiTTransformer2DModel,
        UNet2DModel,
    )
    from physicsnemo.diffusion.preconditioners import EDMPrecond, VEPrecond, VPPrecond
    from physicsnemo.models.diffusion_unets import DhariwalUNet, SongUNet

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def shaken(net):
    """The same network, away from where it was initialised."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def inputs(shape, n=3):
    """Images, and their labels."""
    x = np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)
    return x, np.arange(n, dtype=np.int32)


def theirs(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1))


def difference(ours, peers):
    """The largest, relative to the largest output."""
    peers = np.moveaxis(peers.detach().numpy(), 1, -1)
    assert peers.std() > 0.1
    found = np.abs(np.asarray(ours) - peers).max() / np.abs(peers).max()
    print(f" {found:.1e}", end=" ")  # for those who ask, by ARGS=-sv
    return found


def said(loaded, x, i, cond):
    """What our network says of x at step i of the grid 0..T-1 of its training."""
    params, config = loaded
    t = (i + 1) / np.float32(config.time_steps)
    e = resolve(config)
    return jax.jit(e.apply)(params, x, e.schedule.log_snr(t), cond)


def autoencoder(**options):
    """Diffusers' autoencoder, away from where it was initialised, and its folder's arrays."""
    kinds = dict(
        down_block_types=("DownEncoderBlock2D",) * len(options["block_out_channels"]),
        up_block_types=("UpDecoderBlock2D",) * len(options["block_out_channels"]),
    )
    return shaken(AutoencoderKL(**kinds, **options))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_autoencoder_of_stable_diffusion(full, safe, tmp_path):
    small = dict(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=16)
    whole = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    net = autoencoder(**(whole if full else small))
    net.save_pretrained(tmp_path, safe_serialization=safe)
    if not safe:  # and with the names of older files
        state = torch.load(tmp_path / "diffusion_pytorch_model.bin")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    ours = autoencoder_kl.load(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        found = net.encode(theirs(x)).latent_dist
    moments = torch.cat([found.mean, found.std], 1)
    assert difference(jax.jit(ours.encode, static_argnums=1)(x, LATENTS["sd"]), moments) < 1e-5
    z = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    images = net.decode(theirs(z) / 0.18215).sample
    assert difference(jax.jit(ours.decode, static_argnums=1)(z, LATENTS["sd"]), images) < 1e-5


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_the_autoencoder_by_the_names_of_compvis(prefix, tmp_path):
    """What diffusers makes of our file with those names is what it was made from."""
    net = autoencoder(block_out_channels=(32, 64, 64), layers_per_block=1)
    net.save_pretrained(tmp_path)
    ours = autoencoder_kl.load(tmp_path)
    names = autoencoder_kl.names_of_compvis(ours.config)
    convs = autoencoder_kl.expected(ours.config)
    state = {}
    for path in convs:
        module, _, leaf = path.rpartition("/")
        block, _, layer = module.rpartition("/")
        name = names.modules.get(module) or f"{names.modules[block]}.{names.layers[layer]}"
        x = np.asarray(functools.reduce(lambda tree, key: tree[key], path.split("/"), ours.params))
        if leaf == "kernel":
            x = x[None, None] if x.ndim == 2 else x
            x = np.moveaxis(x, (-1, -2), (0, 1))
        name += ".bias" if leaf == "bias" else ".weight"
        apart = zip("qkv", np.split(x, 3), strict=True) if layer == "qkv" else [("", x)]
        for which, rows in apart:
            state[name.replace("to_qkv", which)] = torch.from_numpy(np.ascontiguousarray(rows))
    torch.save({"state_dict": {prefix + n: x for n, x in state.items()}}, tmp_path / "model.ckpt")
    again = autoencoder_kl.load(tmp_path / "model.ckpt")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    single = importlib.import_module("diffusers.loaders.single_file_utils")
    named = {"first_stage_model." + name: x for name, x in state.items()}
    converted = single.convert_ldm_vae_checkpoint(named, dict(net.config))
    for name, x in net.state_dict().items():
        np.testing.assert_array_equal(converted[name].numpy().squeeze(), x.numpy().squeeze())


DDPM = dict(
    sample_size=16,
    layers_per_block=2,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=16,
    # These four as google/ddpm-cifar10-32 has them.
    attention_head_dim=None,
    downsample_padding=0,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
)
DEFAULT = {name: DDPM[name] for name in list(DDPM)[:6]}
ADM = DEFAULT | dict(
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=16,
    num_class_embeds=7,
    out_channels=6,
)


@pytest.mark.parametrize("options", [DDPM, DEFAULT, ADM], ids=["ddpm", "default", "adm"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_diffusers(options, safe, tmp_path):
    net = shaken(UNet2DModel(**options))
    DDPMScheduler().save_pretrained(tmp_path)
    net.save_pretrained(tmp_path, safe_serialization=safe)
    if not safe:  # and with the names of older files
        state = torch.load(tmp_path / "diffusion_pytorch_model.bin")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    x, label = inputs((16, 16, 3))
    i = np.array([0, 500, 999])
    given = [torch.from_numpy(label)] if "num_class_embeds" in options else []
    peers = net(theirs(x), torch.from_numpy(i), *given).sample
    loaded = published.load(tmp_path)
    assert difference(said(loaded, x, i, {"label": label}), peers) < 1e-4
    assert loaded[1].bound_weight == (0.001 if "out_channels" in options else None)


OPENAI = {
    "improved": dict(model_channels=32, num_heads=4, use_scale_shift_norm=True),
    "bedroom": dict(model_channels=32),
    "adm": dict(
        model_channels=64,
        num_head_channels=32,
        resblock_updown=True,
        use_scale_shift_norm=True,
        num_classes=7,
    ),
}


def of_openai(theirs, low=None):
    """Our config of a narrow network of theirs, 16 x 16, by way of a published one's."""
    resblock = theirs.get("resblock_updown", False)
    make = openai.guided if resblock else openai.improved
    config = make(32, theirs["model_channels"], 2, betas="cosine_betas", low=low)
    model = dataclasses.replace(
        config.model,
        mults=(1, 2, 2),
        attention=(8, 4),
        heads=theirs.get("num_heads", 1),
        head_width=theirs.get("num_head_channels"),
        scale_shift=theirs.get("use_scale_shift_norm", False),
        labels=theirs.get("num_classes", 0),
    )
    data = dataclasses.replace(config.data, size=16, shape=(16, 16, 3))
    return dataclasses.replace(config, model=model, data=data)


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize("order", ["khc", "hkc"])
def test_improved_and_guided_diffusion(name, order, tmp_path):
    net = shaken(
        UNetModel(
            image_size=16,
            in_channels=3,
            out_channels=6,
            num_res_blocks=2,
            attention_resolutions=(2, 4),
            channel_mult=(1, 2, 2),
            use_new_attention_order=order == "khc",
            **OPENAI[name],
        )
    )
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = openai.load(tmp_path / "net.pt", openai.OpenAI(of_openai(OPENAI[name]), order))
    x, label = inputs((16, 16, 3))
    steps = loaded[1].time_steps
    i = np.array([0, steps // 2, steps - 1])
    scaled = torch.from_numpy(i * np.float32(1000 / steps))
    y = torch.from_numpy(label).long() if "num_classes" in OPENAI[name] else None
    peers = net(theirs(x), scaled, y)
    assert difference(said(loaded, x, i, {"label": label}), peers) < 1e-4


def test_an_upsampler_of_guided_diffusion(tmp_path):
    adm = OPENAI["adm"]
    options = dict(image_size=16, in_channels=3, out_channels=6, num_res_blocks=2)
    options |= dict(attention_resolutions=(2, 4), channel_mult=(1, 2, 2))
    net = shaken(SuperResModel(**options, **adm))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = openai.load(tmp_path / "net.pt", openai.OpenAI(of_openai(adm, low=8)))
    x, label = inputs((16, 16, 3))
    small, _ = inputs((8, 8, 3))
    i = np.array([0, 500, 999])
    peers = net(
        theirs(x), torch.from_numpy(i), low_res=theirs(small), y=torch.from_numpy(label).long()
    )
    large = torch.nn.functional.interpolate(theirs(small), (16, 16), mode="bilinear")
    cond = {"label": label, "image": np.moveaxis(large.numpy(), 1, -1)}
    assert difference(said(loaded, x, i, cond), peers) < 1e-4


DIT = dict(
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    sample_size=16,
    num_embeds_ada_norm=7,
    out_channels=8,
)
PUBLISHED_DIT = dict(labels=1000, null_label=True, out_channels=8, log_snr_scale=1.0)


def as_the_paper_has_it(net):
    """diffusers' DiT, with the published one's frequencies and epsilon, and one embedding."""
    first = net.transformer_blocks[0].norm1.emb
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return net


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_transformer_of_diffusers(safe, tmp_path):
    net = as_the_paper_has_it(shaken(DiTTransformer2DModel(**DIT)))
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    net.save_pretrained(tmp_path / "transformer", safe_serialization=safe)
    x, label = inputs((16, 16, 4))
    label = label + 5  # the last of which is none
    i = np.array([0, 500, 999])
    peers = net(theirs(x), torch.from_numpy(i), torch.from_numpy(label).long()).sample
    loaded = published.load(tmp_path)
    params, config = loaded
    assert difference(said(loaded, x, i, {"label": label}), peers) < 1e-4
    # Without the rounding of the time, which comes from log-SNR.
    network = functools.partial(models.apply, models.make_module(config.model), params)
    ours = jax.jit(network)(x, i.astype(np.float32), {"label": label})
    assert difference(ours, peers) < 1e-5


@pytest.fixture(scope="module")
def jit_of_azula():
    """azula's module of JiT, whose blocks would be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: f)
        return importlib.import_module("azula.plugins.jit._src.model")


def test_a_jit_of_azula(jit_of_azula, tmp_path):
    options = dict(hidden_size=64, num_heads=4, depth=4, bottleneck_dim=12, num_classes=7)
    options |= dict(input_size=32, patch_size=8, in_context_len=3, in_context_start=1)
    net = shaken(jit_of_azula.JiT(**options))
    positions = jit_of_azula.get_2d_sincos_pos_embed(64, 4)
    net.pos_embed.data.copy_(torch.from_numpy(positions)[None])
    average = {f"net.{name}": p for name, p in net.state_dict().items()}
    newest = {name: 2 * p for name, p in average.items()}
    file = tmp_path / "checkpoint-last.pth"
    torch.save({"model": newest, "model_ema1": average, "model_ema2": newest, "epoch": 3}, file)
    loaded = published.load(file)
    x, label = inputs((32, 32, 3))
    label = label + 5
    t = np.array([0.02, 0.5, 0.98], np.float32)
    peers = net(theirs(x), torch.from_numpy(t), torch.from_numpy(label).long())
    params, config = loaded
    log_snr = 2 * np.log(t / (1 - t))
    ours = jax.jit(resolve(config).apply)(params, x, log_snr, {"label": label})
    assert config.target == "x_0"
    assert difference(ours, peers) < 1e-5


def test_the_published_transformer_of_diffusers_has_as_many_parameters(tmp_path):
    """Without the copies of the embedding that all blocks but the first have."""
    with torch.device("meta"):
        net = DiTTransformer2DModel(out_channels=8)
    net.save_config(tmp_path)
    config = published.diffusers.make_dit_config(tmp_path, tmp_path)
    copies = sum(p.numel() for b in net.transformer_blocks[1:] for p in b.norm1.emb.parameters())
    assert count(config) == net.num_parameters() - copies
    assert config.model == dit_config("XL", **PUBLISHED_DIT)


def edm_pickle(net, path, monkeypatch):
    """Written as EDM's are: objects with the source of their classes, by a function of its own."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("never called")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing):
            if not isinstance(thing, torch.nn.Module) or isinstance(thing, torch.nn.ModuleDict):
                return NotImplemented
            name, modules = type(thing).__name__, dict(thing._modules)
            if attention := modules.pop("attn", None):  # theirs is part of its block
                layers = dict(attention.named_children())
                modules |= {"norm2": layers["norm"], "qkv": layers["qkv"], "proj": layers["proj"]}
            # Sinusoids have none with theirs.
            kept = {"resample_filter"} | ({"freqs"} if name == "FourierEmbedding" else set())
            buffers = {k: v for k, v in thing._buffers.items() if k in kept}
            state = dict(_parameters=thing._parameters, _buffers=buffers, _modules=modules)
            state |= {k: v for k, v in vars(thing).items() if isinstance(v, int | float)}
            state |= {"skip_scale": np.sqrt(0.5)}  # a number of NumPy, as theirs is
            meta = dict(type="class", version=6, module_src="1 / 0", class_name=name, state=state)
            return _reconstruct_persistent_obj, (meta,)

    with path.open("wb") as file:
        Pickler(file).dump({"ema": net, "loss_fn": None, "augment_pipe": None})


DDPMPP = dict(
    model_type="SongUNet",
    embedding_type="positional",
    encoder_type="standard",
    channel_mult_noise=1,
    resample_filter=[1, 1],
)
NCSNPP = dict(
    model_type="SongUNet",
    embedding_type="fourier",
    encoder_type="residual",
    channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1],
)
"""The two as EDM's training script has them."""
CIFAR = dict(img_resolution=32, label_dim=10, channel_mult=[2, 2, 2], attn_resolutions=[16])
"""With these, of their full size."""
SMALL = dict(img_resolution=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
ADM_OF_EDM = SMALL | dict(model_type="DhariwalUNet", model_channels=128, label_dim=7)
NARROW = SMALL | dict(model_channels=32, channel_mult=[1, 3, 2], num_blocks=2, label_dim=7)
EDMS = {
    "adm": (EDMPrecond, ADM_OF_EDM),
    "ddpm++": (EDMPrecond, DDPMPP | CIFAR),
    "ncsn++": (EDMPrecond, NCSNPP | CIFAR),
    "vp": (VPPrecond, DDPMPP | NARROW),
    "ve": (VEPrecond, NCSNPP | NARROW),
    "no labels": (EDMPrecond, DDPMPP | NARROW | {"label_dim": 0, "augment_dim": 0}),
}


@pytest.mark.parametrize("name", EDMS)
def test_edm(name, tmp_path, monkeypatch):
    make, options = EDMS[name]
    options = dict(img_channels=3, augment_dim=9, dropout=0.0) | options
    net = shaken(make(**options))
    # In evaluation its normalisations divide by n - 1, which EDM's do not: 5e-4 here.
    net.train()
    edm_pickle(net, tmp_path / "edm.pkl", monkeypatch)
    params, config = published.load(tmp_path / "edm.pkl")
    size = options["img_resolution"]
    x, label = inputs((size, size, 3))
    t = np.array([0.02, 0.5, 0.98], np.float32)
    e = resolve(config)
    alpha, sigma = (np.asarray(scale) for scale in e.schedule(t))
    x = x * np.hypot(0.5, sigma / alpha)[:, None, None, None]  # theirs have alpha = 1
    denoise = e.denoiser(functools.partial(e.apply, params))
    x_0 = jax.jit(denoise)(x * alpha[:, None, None, None], t, {"label": label}).x_0
    given = {"class_labels": torch.eye(options["label_dim"])[label]} if config.model.labels else {}
    peers = net(theirs(x), torch.from_numpy(sigma / alpha), **given)
    for ours, each in zip(x_0, peers, strict=True):  # whose sizes span those of sigma
        assert difference(ours[None], each[None]) < 1e-4


def count(config):
    return sum(int(np.prod(x.shape)) for x in weights.expected(config).values())


def parameters(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("name", openai.PUBLISHED)
def test_the_published_networks_of_openai_have_as_many_parameters(name):
    config = openai.PUBLISHED[name].config
    c, size = config.model, config.data.size
    make = SuperResModel if c.image_cond else UNetModel
    net = lambda: make(
        image_size=size,
        in_channels=3,
        out_channels=6,
        model_channels=c.width,
        num_res_blocks=c.blocks,
        channel_mult=c.mults,
        attention_resolutions=[size // height for height in c.attention],
        num_classes=c.labels or None,
        num_heads=c.heads,
        use_scale_shift_norm=c.scale_shift,
        resblock_updown=c.resblock_updown,
    )
    assert count(config) == parameters(net)


def config_of_edms(net, **options):
    """What we read off the names and shapes of a network of theirs, and its parameters."""
    make = lambda: net(in_channels=3, out_channels=3, **options)
    with torch.device("meta"):
        state = make().state_dict()
    state = {name.replace(".attn", ""): np.ones(x.shape, "f2") for name, x in state.items()}
    if options.get("embedding_type") == "positional":
        del state["map_noise.freqs"]  # EDM's does not keep them
    return published.edm.make_config(None, state, "EDMPrecond", net.__name__), parameters(make)


def test_the_network_of_edm_for_imagenet_has_as_many_parameters():
    config, expected = config_of_edms(DhariwalUNet, img_resolution=64, label_dim=1000)
    assert config.model.mults == (1, 2, 3, 4) and config.model.attention == (32, 16, 8)
    assert count(config) == expected


@pytest.mark.parametrize("options", [DDPMPP, NCSNPP], ids=["ddpm++", "ncsn++"])
def test_the_networks_of_edm_for_faces_have_as_many_parameters(options):
    """FFHQ and AFHQ, 64 x 64, without labels."""
    options = {k: v for k, v in options.items() if k != "model_type"}
    config, expected = config_of_edms(SongUNet, img_resolution=64, **options)
    assert config.model.mults == (1, 2, 2, 2) and config.model.attention == (16,)
    # Random frequencies are no parameters of theirs, but a buffer.
    assert count(config) == expected + config.model.fourier * config.model.width


def celeba(size=256):
    types = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
    return DDPM | dict(
        sample_size=size,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=types,
        up_block_types=[kind.replace("Down", "Up") for kind in types[::-1]],
        norm_num_groups=32,
    )


def cifar():
    types = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    return celeba() | dict(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=types,
        up_block_types=[kind.replace("Down", "Up") for kind in types[::-1]],
    )


@pytest.mark.parametrize("options", [cifar(), celeba()], ids=["cifar", "celeba"])
def test_the_published_networks_of_diffusers_have_as_many_parameters(options, tmp_path):
    with torch.device("meta"):
        net = UNet2DModel(**options)
    net.save_config(tmp_path)
    assert count(published.diffusers.make_config(tmp_path, tmp_path)) == net.num_parameters()


def test_ddpms_network_for_cifar_10_walks_as_its_own_pipeline(tmp_path):
    """At full width, by an exported file: DDIM's steps, ours and diffusers', from one noise."""
    net = shaken(UNet2DModel(**cifar()))
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipeline = DDIMPipeline(net, scheduler)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    walked = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=5,
        use_clipped_model_output=True,
        output_type="np",
    ).images
    params, config = published.load(tmp_path)
    weights.save(tmp_path / "ours.safetensors", params, config)
    network, params, config = checkpoint.load(tmp_path / "ours.safetensors")
    e = resolve(config)
    denoise = e.clip(e.denoiser(functools.partial(network, params)))
    walk = diffjax.ddim(denoise, e.schedule)
    x_1 = jnp.asarray(np.moveaxis(noise.numpy(), 1, -1))
    x_0, _ = jax.jit(diffjax.sample, static_argnums=1)(
        jax.random.key(0), walk, x_1, diffjax.uniform_times(5)
    )
    ours = np.clip(np.asarray(x_0) / 2 + 0.5, 0, 1)
    assert walked.std() > 0.1
    print(f" {np.abs(ours - walked).max():.1e}", end=" ")
    np.testing.assert_allclose(ours, walked, atol=1e-3)


@pytest.fixture(scope="module")
def fidelity():
    """The modules of torch-fidelity that need PyTorch alone: as a package it needs torchvision."""
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", package)
        utilities = types.ModuleType("torch_fidelity.utils")  # of which nothing here is called
        utilities.__dict__["__getattr__"] = lambda name: None
        patch.setitem(sys.modules, utilities.__name__, utilities)
        yield lambda name: importlib.import_module(f"torch_fidelity.{name}")


@pytest.fixture(scope="module")
def extractor(fidelity, tmp_path_factory):
    """torch-fidelity's Inception network with random weights, and the file that holds them."""
    make = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:  # it is made with weights only
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(make, "load_state_dict", lambda *_: None)
        shapes = make("x", ["2048"], "none").state_dict()
    rng = np.random.default_rng(0)
    state = {}
    for name, like in shapes.items():
        x = rng.standard_normal(like.shape)
        if name.endswith("conv.weight") or name == "fc.weight":
            x *= np.sqrt(2 / x[0].size)
        elif name.endswith(("bn.weight", "running_var")):
            x = np.exp(0.2 * x)
        else:
            x *= 0.1
        if not name.endswith("num_batches_tracked"):
            state[name] = torch.from_numpy(np.asarray(x, np.float32))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    names = ["2048", "logits_unbiased"]
    return make("x", names, str(path)), path


def pixels(seed, n=6, side=32, channels=3):
    """uint8 images with edges and gradients."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, side // 4, side // 4, channels))
    return np.uint8(
        np.clip(coarse.repeat(4, 1).repeat(4, 2) + rng.normal(0, 20, (side, side, 1)), 0, 255)
    )


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (64, 1), (320, 3)])
def test_inception_sees_what_torch_fidelitys_sees(extractor, side, channels):
    net, path = extractor
    params = inception.convert(path, arrays.read(path))
    x = pixels(0, 3, side, channels)
    peers = net(torch.from_numpy(np.moveaxis(x.repeat(3 // channels, -1), -1, 1)))
    ours = jax.jit(inception.outputs)(params, x)
    for found, peer in zip((ours["features"], ours["logits"]), peers, strict=True):
        assert difference(found, peer) < 1e-4


def test_a_frechet_distance_end_to_end_is_torch_fidelitys(extractor, fidelity):
    """Of images, by their extractor and their distance, and by ours in sums on eight devices."""
    net, path = extractor
    x, y = pixels(1, 40), pixels(2, 48)
    metric = fidelity("metric_fid")

    def peer(statistics):
        name = metric.KEY_METRIC_FID
        return metric.fid_statistics_to_metric(*statistics, False)[name]

    statistics = []
    for images in (x, y):
        found = [net(theirs(part))[0].double() for part in np.array_split(images, 4)]
        statistics.append(metric.fid_features_to_statistics(torch.cat(found)))
    space = features.named("inception", np.zeros((1, 32, 32, 3), np.float32), path)
    assert space.name == "inception of unknown weights"
    summarise = summing.summariser(space, RUNNERS["pmap"](1))
    seen = [summarise([images]).moments for images in (x, y)]
    ours, theirs_ = distances.frechet_distance(*seen), peer(statistics)
    print(f" {ours:.6f} {theirs_:.6f} {abs(ours / theirs_ - 1):.1e}", end=" ")
    # With fewer images than features, the roots of rounding errors are a part of either number.
    assert ours == pytest.approx(theirs_, rel=2e-4)
    few = slice(24)
    part = [{"mu": s["mu"][few], "sigma": s["sigma"][few, few]} for s in statistics]
    moments = [distances.Moments(s["mu"], s["sigma"]) for s in part]
    seen = [distances.Moments(m.mean[few], m.covariance[few, few]) for m in seen]
    for found, rel in ((moments, 1e-6), (seen, 1e-5)):
        ours = distances.frechet_distance(*found)
        print(f" {abs(ours / peer(part) - 1):.1e}", end=" ")
        assert ours == pytest.approx(peer(part), rel=rel)


def test_dinov2_is_that_of_transformers():
    """A narrow one, from its names in the published file, with positions of the final size."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    net = shaken(Dinov2Model(config))
    state = {name: x.numpy() for name, x in net.state_dict().items()}
    renamed = {}
    for name, x in state.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("layernorm", "norm"),
        ):
            name = name.replace(old, new)
        renamed[name] = x
    for i in range(2):
        for leaf in ("weight", "bias"):
            parts = [renamed.pop(f"blocks.{i}.attention.{part}_proj.{leaf}") for part in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
    params = dinov2.convert("here", renamed)
    x = pixels(0, 3, 64)
    ours = jax.jit(dinov2.outputs)(params, x)["features"]
    seen = torch.from_numpy(np.moveaxis(np.array(dinov2.scaled(x)), -1, 1))
    peers = net(pixel_values=seen).last_hidden_state[:, 0]
    assert difference(ours, peers) < 1e-4
    resized = torch.nn.functional.interpolate(
        theirs(x).float(), size=(224, 224), mode="bicubic", antialias=True
    )
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (dinov2.MEAN, dinov2.STD))
    assert difference(dinov2.scaled(x), (resized / 255 - mean) / std) < 1e-4


def test_positions_are_interpolated_as_dinov2_does():
    grid = np.random.default_rng(0).standard_normal((1, 1 + 37 * 37, 8)).astype(np.float32)
    square = torch.from_numpy(grid[:, 1:].reshape(1, 37, 37, 8)).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / 37
    peers = torch.nn.functional.interpolate(
        square, scale_factor=(scale, scale), mode="bicubic", antialias=False
    )
    ours = dinov2.positions(grid)[:, 1:].reshape(1, 16, 16, 8)
    assert difference(ours, peers) < 1e-5
