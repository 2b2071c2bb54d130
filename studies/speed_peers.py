"""PyTorch's side of the comparison, a process that `speed.py` starts and gives work.

    python studies/speed_peers.py WORKLOAD VARIANT FOLDER [THREADS]

It reads and prints the same lines as `speed_ours.py`, and runs in an environment of its own.
diffusers' UNet2DModel gets our parameters and must give our outputs. lucidrains' Unet has another
architecture, so that only its speed is compared.
"""

import time

BEGAN = time.perf_counter()

import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import resource
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import torch

from speed_workloads import CLIP, DDIM_STEPS, EMA, IMAGES, LEARNING_RATE, WORKLOADS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT = dict(layout=torch.channels_last, autocast=False, compiled=None, own=False)
VARIANTS = {
    "eager": dict(layout=torch.contiguous_format),
    "channels_last": dict(),
    "channels_last bf16": dict(autocast=True),
    "compile": dict(compiled="default"),
    "compile bf16": dict(compiled="default", autocast=True),
    "compile bf16, graphs": dict(compiled="reduce-overhead", autocast=True),
    "compile bf16, autotuned": dict(compiled="max-autotune", autocast=True),
    "lucidrains": dict(own=True),
}


def diffusers_unet(w):
    """UNet2DModel of a workload: DDPM's blocks, or ADM's."""
    from diffusers import UNet2DModel

    heights = [w.size // 2**level for level in range(len(w.mults))]
    resample, plain = "conv", "{}Block2D"
    if w.resblock_updown:
        resample, plain = "resnet", "Resnet{}sampleBlock2D"
    kind = lambda h, way: ("Attn{}Block2D" if h in w.attention else plain).format(way)
    return UNet2DModel(
        sample_size=w.size,
        in_channels=w.channels,
        out_channels=w.channels,
        layers_per_block=w.blocks,
        block_out_channels=[w.width * mult for mult in w.mults],
        down_block_types=[kind(h, "Down") for h in heights],
        up_block_types=[kind(h, "Up") for h in reversed(heights)],
        downsample_type=resample,
        upsample_type=resample,
        downsample_padding=0,
        norm_num_groups=w.groups,
        attn_norm_num_groups=w.groups,
        norm_eps=1e-6,
        attention_head_dim=w.head_width,
        resnet_time_scale_shift="scale_shift" if w.scale_shift else "default",
        flip_sin_to_cos=False,
        freq_shift=0,
        dropout=w.dropout,
        num_class_embeds=w.labels + 1 if w.labels else None,
    )


def converted(params, names):
    """Our parameters as diffusers' state dict, by the names that speed_ours.py has written."""
    modules, layers, state = names["modules"], names["layers"], {}
    for path, value in params.items():
        *inside, leaf = path.split("/")
        layer = None if "/".join(inside) in modules else inside.pop()
        module = modules["/".join(inside)]
        kind = "bias" if leaf == "bias" else "weight"
        if layer == "qkv":
            for each, part in zip(("to_q", "to_k", "to_v"), np.split(value, 3, -1), strict=True):
                state[f"{module}.{each}.{kind}"] = part.T
            continue
        if leaf == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            if layer == "shortcut":
                value = value[:, :, None, None]
        state[".".join([module, *([layers[layer]] if layer else []), kind])] = value
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()}


def same_as_ours(net, w, file):
    """The largest difference from our outputs, relative to the largest of them."""
    ours = np.load(file)
    prefix = "params/"
    params = {k.removeprefix(prefix): ours[k] for k in ours.files if k.startswith(prefix)}
    names = json.loads(Path(file).with_name("names.json").read_text())
    net.load_state_dict(converted(params, names))
    x = torch.from_numpy(ours["x"]).permute(0, 3, 1, 2)
    label = torch.from_numpy(ours["label"]).long() if w.labels else None
    with torch.no_grad():
        out = net.eval()(x, torch.from_numpy(25 * ours["log_snr"]), label).sample
    expected = ours["out"]
    return float(np.abs(out.permute(0, 2, 3, 1).numpy() - expected).max() / np.abs(expected).max())


def cosine_log_snr(t):
    """The cosine schedule on t, log-SNR between -15 and 15."""
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    return -2 * torch.log(torch.tan(a + t * (b - a)))


class Side:
    """A network, its training step and its sampler."""

    def __init__(self, name, variant, folder):
        self.o = DEFAULT | VARIANTS[variant]
        self.w = w = WORKLOADS[name]
        self.difference = None
        if self.o["own"]:
            # Its trainer imports torchvision, which not every build of PyTorch has; its network
            # works without.
            if importlib.util.find_spec("torchvision") is None:
                for module in ("torchvision", "torchvision.transforms", "torchvision.utils"):
                    sys.modules[module] = unittest.mock.MagicMock()
            from denoising_diffusion_pytorch import Unet

            # 1.50 M parameters where the fashion network has 1.58.
            net = Unet(dim=44, dim_mults=(1, 2), channels=w.channels)
        else:
            net = diffusers_unet(w)
            if os.path.exists(f"{folder}/ours.npz"):
                self.difference = same_as_ours(net, w, f"{folder}/ours.npz")
        net = net.to(DEVICE, memory_format=self.o["layout"]).train()
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in net.parameters())
        mode = self.o["compiled"]
        compiled = functools.partial(torch.compile, mode=mode) if mode else lambda net: net
        self.net, self.sampled = compiled(net), compiled(self.average)
        self.pairs = list(self.average.parameters()), list(net.parameters())
        self.adam = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
        self.x = self.images(w.batch).uniform_(-1, 1)
        self.label = torch.arange(w.batch, device=DEVICE) % max(w.labels, 1)

    def images(self, n):
        shape = (n, self.w.channels, self.w.size, self.w.size)
        return torch.randn(shape, device=DEVICE).to(memory_format=self.o["layout"])

    def eps(self, net, x_t, log_snr, label):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.o["autocast"]):
            if self.o["own"]:
                return net(x_t, 25 * log_snr)
            return net(x_t, 25 * log_snr, label if self.w.labels else None).sample

    def train(self):
        n = self.w.batch
        t = (torch.arange(n, device=DEVICE) + torch.rand((), device=DEVICE)) / n
        log_snr = cosine_log_snr(t)
        alpha, sigma = (torch.sigmoid(s * log_snr).sqrt()[:, None, None, None] for s in (1, -1))
        noise = torch.randn_like(self.x)
        label = self.label
        if self.w.labels:
            label = torch.where(torch.rand(n, device=DEVICE) < 0.1, self.w.labels, label)
        out = self.eps(self.net, alpha * self.x + sigma * noise, log_snr, label)
        loss = torch.nn.functional.mse_loss(out.float(), noise)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP, foreach=True)
        self.adam.step()
        torch._foreach_lerp_(*self.pairs, 1 - EMA)
        return loss

    @torch.no_grad()
    def sample(self):
        label = torch.arange(IMAGES, device=DEVICE) % max(self.w.labels, 1)
        x = self.images(IMAGES)
        ts = torch.linspace(1, 0, DDIM_STEPS + 1, device=DEVICE)
        for t, s in itertools.pairwise(ts):
            at, to = cosine_log_snr(t), cosine_log_snr(s)
            out = self.eps(self.sampled, x, at.expand(IMAGES), label).float()
            x_0 = (x - torch.sigmoid(-at).sqrt() * out) / torch.sigmoid(at).sqrt()
            x_0 = x_0.clamp(-1, 1)
            out = (x - torch.sigmoid(at).sqrt() * x_0) / torch.sigmoid(-at).sqrt()
            x = torch.sigmoid(to).sqrt() * x_0 + torch.sigmoid(-to).sqrt() * out
        return x


def load(side, batches):
    """Load batches as PyTorch's tutorials do: a data set of examples, a loader in the process."""
    w = side.w
    images = torch.randint(0, 256, (20_000, w.channels, w.size, w.size), dtype=torch.uint8)

    class Flipped(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            x = images[i].float() / 127.5 - 1
            return x.flip(-1) if torch.rand(()) < 0.5 else x

    loader = torch.utils.data.DataLoader(Flipped(), w.batch, shuffle=True, drop_last=True)
    for i, _ in enumerate(loader):
        if i == batches:
            break


DO = {
    "train": lambda side, n: [side.train() for _ in range(n)],
    "sample": lambda side, n: [side.sample() for _ in range(n)],
    "load": load,
}


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(name, variant, folder, threads=None):
    if threads:
        torch.set_num_threads(int(threads))
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    side = Side(name, variant, folder)
    side.train()
    wait()
    first_step = time.perf_counter() - BEGAN
    began = time.perf_counter()
    side.sample()
    wait()
    ready = {
        "first_step": first_step,
        "first_image": time.perf_counter() - began,
        "parameters": side.parameters,
        "difference": side.difference,
        "version": f"torch {torch.__version__}",
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        what, times = line.split()
        began = time.perf_counter()
        DO[what](side, int(times))
        wait()
        taken = time.perf_counter() - began
        print(json.dumps({"seconds": taken, "memory": memory()}), flush=True)


def memory():
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
