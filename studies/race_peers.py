"""An entrant of race.py from another package: it trains until a budget is spent, and draws samples.

    python studies/race_peers.py NAME BUDGET SEED SAMPLES DATA.npz OUT.npz

BUDGET is in CPU-seconds of this process, imports included. The last line of what it prints is JSON:
the CPU-seconds that were spent, and the training steps. It runs in an environment of its own.
"""

import copy
import importlib.util
import itertools
import json
import math
import sys
import time
import unittest.mock
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from race_settings import EVALUATIONS, GUIDANCE, GUIDED, LOG_SNR, NULL, Recipe
from speed_peers import diffusers_unet
from speed_workloads import Workload

BATCH = 500
"""Samples that are drawn at a time."""


class Entrant(NamedTuple):
    """What a package trains, and how.

    Attributes:
      net: its network.
      loss: (images `[batch, 1, 28, 28]` in [-1, 1], labels `[batch]`) -> the loss.
      optimizer: of the network's parameters.
      rate: the part of the budget that is spent -> a factor on the optimizer's learning rate.
      average: (the average, the network, step) -> None; moves the average towards the network.
      draw: (the average, labels) -> samples like the images.
      batch: examples of a step.
    """

    net: torch.nn.Module
    loss: Callable
    optimizer: torch.optim.Optimizer
    rate: Callable[[float], float]
    average: Callable
    draw: Callable
    batch: int


def by_decay(decay: Callable[[int], float], every: int = 1) -> Callable:
    """The moving average whose decay depends on the number of its updates."""

    def update(average, net, step):
        if step % every == 0:
            pairs = list(average.parameters()), list(net.parameters())
            torch._foreach_lerp_(*pairs, 1 - decay(step // every))

    return update


def warm_up(fraction: float, by: float = 0.05) -> float:
    """A linear rise over a part of the budget."""
    return min(1.0, fraction / by)


def tutorial(rate: float = 1e-3) -> Entrant:
    """diffusers' tutorial: UNet2DModel, DDPMScheduler, AdamW with a cosine decay, EMA, DDIM."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    net = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    noise = DDPMScheduler(num_train_timesteps=1000)

    def loss(x, label):
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        return torch.nn.functional.mse_loss(net(noise.add_noise(x, eps, t), t).sample, eps)

    def draw(average, label):
        walk = DDIMScheduler(num_train_timesteps=1000)
        walk.set_timesteps(EVALUATIONS)
        x = torch.randn(len(label), 1, 28, 28)
        for t in walk.timesteps:
            x = walk.step(average(x, t).sample, t, x).prev_sample
        return x

    return Entrant(
        net,
        loss,
        torch.optim.AdamW(net.parameters(), lr=rate),
        lambda part: warm_up(part) * (1 + math.cos(math.pi * part)) / 2,
        by_decay(lambda n: min(0.9999, 1 - (1 + n) ** -0.75)),
        draw,
        64,
    )


def with_our_recipe(recipe: Recipe) -> Entrant:
    """diffusers' UNet2DModel with the parameters and the recipe of a network of ours.

    Images are folded 2 x 2; labels are dropped for guidance; the loss has the min-SNR weight, and
    samples are drawn by SDE-DPM-Solver++ 2M, uniform in log-SNR (Lu et al. 2022, algorithm 2).
    """
    net = diffusers_unet(Workload(14, 4, 32, (1, 2), 1, (7,), 8, recipe.batch, labels=NULL))
    low, high = LOG_SNR
    a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    of_image = lambda scale: scale.sqrt()[:, None, None, None]
    scales = lambda log_snr: (of_image(torch.sigmoid(log_snr)), of_image(torch.sigmoid(-log_snr)))
    call = lambda net, x, log_snr, label: pixel_shuffle(
        net(pixel_unshuffle(x, 2), 25 * log_snr, label).sample, 2
    )

    def loss(x, label):
        n = len(x)
        t = (torch.arange(n) + torch.rand(())) / n
        log_snr = -2 * torch.log(torch.tan(a + t * (b - a)))
        (alpha, sigma), eps = scales(log_snr), torch.randn_like(x)
        label = torch.where(torch.rand(n) < 0.1, NULL, label)
        out = call(net, alpha * x + sigma * eps, log_snr, label)
        aim = alpha * eps - sigma * x if recipe.target == "v" else eps
        square = ((out - aim) ** 2).mean((1, 2, 3))
        of_eps = (
            torch.sigmoid(log_snr) if recipe.target == "v" else 1
        )  # eps changes by alpha times v
        return (torch.clamp(5 / log_snr.exp(), max=1) * of_eps * square).mean()

    def x_0_of(average, x, log_snr, label):
        every = log_snr.expand(len(x))
        alpha, sigma = scales(every)
        out = call(average, x, every, label)
        if GUIDED[0] <= log_snr <= GUIDED[1]:
            without = call(average, x, every, torch.full_like(label, NULL))
            out = without + GUIDANCE * (out - without)
        return alpha * x - sigma * out if recipe.target == "v" else (x - sigma * out) / alpha

    def draw(average, label):
        x, before = torch.randn(len(label), 1, 28, 28), None
        grid = torch.linspace(low, high, EVALUATIONS + 1)
        for i, (log_snr, to) in enumerate(itertools.pairwise(grid)):
            x_0, h = x_0_of(average, x, log_snr, label).clamp(-1, 1), (to - log_snr) / 2
            ahead = x_0 if before is None else x_0 + (x_0 - before) / 2  # an even grid
            (alpha, sigma), sigma_t = scales(to[None]), scales(log_snr[None])[1]
            x = sigma / sigma_t * torch.exp(-h) * x - alpha * torch.expm1(-2 * h) * ahead
            if i < EVALUATIONS - 1:
                x += sigma * (-torch.expm1(-2 * h)).sqrt() * torch.randn_like(x)
            before = x_0
        return x

    return Entrant(
        net,
        loss,
        torch.optim.Adam(net.parameters(), lr=recipe.rate, fused=True),
        lambda part: warm_up(part) * ((1 + math.cos(math.pi * part)) / 2 if recipe.decays else 1),
        by_decay(lambda n: min(recipe.ema, (1 + n) / (10 + n))),
        draw,
        recipe.batch,
    )


def lucidrains(rate: float = 1e-4) -> Entrant:
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion, and what its Trainer does."""
    if importlib.util.find_spec("torchvision") is None:  # which only its pictures need
        for module in ("torchvision", "torchvision.transforms", "torchvision.utils"):
            sys.modules[module] = unittest.mock.MagicMock()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    # 1.50 M parameters; its defaults are 64 channels and four levels, which 28 pixels do not allow.
    net = Unet(44, dim_mults=(1, 2), channels=1)
    diffusion = GaussianDiffusion(net, image_size=28, sampling_timesteps=EVALUATIONS)

    def loss(x, label):
        mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
        return diffusion((torch.where(mirrored, x.flip(-1), x) + 1) / 2)

    def draw(average, label):
        diffusion.model = average
        return 2 * diffusion.sample(len(label)) - 1

    return Entrant(
        net,
        loss,
        torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.99)),
        lambda part: 1.0,
        by_decay(lambda n: 0.0 if n < 10 else 0.995, every=10),
        draw,
        16,
    )


def azula(rate: float = 1e-3) -> Entrant:
    """azula's UNet in its KarrasDenoiser on its cosine schedule, drawn by its DDIMSampler."""
    from azula.denoise import KarrasDenoiser
    from azula.nn.layers import SineEncoding
    from azula.nn.unet import UNet
    from azula.noise import CosineSchedule
    from azula.sample import DDIMSampler

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Sequential(
                SineEncoding(64), torch.nn.Linear(64, 128), torch.nn.SiLU()
            )
            self.unet = UNet(
                1, 1, hid_channels=(32, 64, 64), hid_blocks=(2, 2, 2), mod_features=128
            )

        def forward(self, x, t):
            return self.unet(x, self.embed(t))

    denoiser = KarrasDenoiser(Backbone(), CosineSchedule())

    def draw(average, label):
        sampler = DDIMSampler(average, steps=EVALUATIONS, silent=True)
        return sampler(sampler.init((len(label), 1, 28, 28)))

    return Entrant(
        denoiser,
        lambda x, label: denoiser.loss(x, torch.rand(len(x))).mean(),
        torch.optim.Adam(denoiser.parameters(), lr=rate),
        lambda part: warm_up(part),
        by_decay(lambda n: min(0.999, (1 + n) / (10 + n))),
        draw,
        64,
    )


ENTRANTS = {
    "diffusers": tutorial,
    "diffusers, our recipe": lambda: with_our_recipe(Recipe()),
    "lucidrains": lucidrains,
    "lucidrains, tuned": lambda: lucidrains(1e-3),
    "azula": azula,
}
"""Entrants by name."""


def main(name, budget, seed, samples, data, out):
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)
    given = np.load(data)
    images = torch.from_numpy(given["x"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(given["label"]).long()
    e = ENTRANTS[name]()
    average = copy.deepcopy(e.net).eval().requires_grad_(False)
    rates, order, step = [group["lr"] for group in e.optimizer.param_groups], torch.empty(0), 0
    while (spent := time.process_time()) < float(budget):
        if len(order) < e.batch:
            order = torch.randperm(len(images))
        index, order = order[: e.batch], order[e.batch :]
        for group, rate in zip(e.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * e.rate(spent / float(budget))
        e.optimizer.zero_grad(set_to_none=True)
        e.loss(images[index], labels[index]).backward()
        torch.nn.utils.clip_grad_norm_(e.net.parameters(), 1.0)
        e.optimizer.step()
        e.average(average, e.net, step)
        step += 1
    label = torch.arange(int(samples)) % NULL
    with torch.no_grad():
        x = torch.cat([e.draw(average, each) for each in label.split(BATCH)])
    x = (127.5 * (x.clamp(-1, 1) + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(out, x=x.numpy())
    print(json.dumps({"cpu_s": spent, "steps": step}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
