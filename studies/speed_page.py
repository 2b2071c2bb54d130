"""Write docs/performance.md from the records of the speed studies.

    python studies/speed_page.py

Nothing is measured here. The records are cpu.json, gpu.json, breakdown.json, sampling.json and
curves.json in studies/results.
"""

import json
import statistics
from pathlib import Path

from diffjax.training import telemetry
from markdown_table import table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"


def baseline(part):
    """The row that the others are compared with: the first of PyTorch's, which is not compiled."""
    return next(label for label in part["rows"] if label.startswith("torch"))


def ratio(row, other, what):
    """The median over rounds of the other's seconds to this one's: above 1, this one is faster."""
    pairs = zip(row[what], other[what], strict=True)
    each = sorted(theirs / ours for ours, theirs in pairs)
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def speed_rows(found):
    """Rows of images per second, seconds to sample, and memory."""
    for name, part in found["workloads"].items():
        n = part["workload"]["batch"]
        other = part["rows"][baseline(part)]
        for label, row in part["rows"].items():
            step, images = statistics.median(row["train"]), statistics.median(row["sample"])
            yield [
                name,
                label,
                f"{row['parameters']:,}",
                f"{n / step:,.0f}",
                ratio(row, other, "train"),
                f"{images:.2f} s",
                ratio(row, other, "sample"),
                f"{row['memory'] / 1e9:.2f} GB",
            ]


def start_rows(found):
    """Rows of the time from the start of a process to its first step and its first images."""
    for name, part in found["workloads"].items():
        for label, row in part["rows"].items():
            kinds = {"": row}
            if "cold" in row:
                kinds = {", first time": row["cold"], ", again": row}
            for kind, seconds in kinds.items():
                step, image = seconds["first_step"], seconds["first_image"]
                yield [name, label + kind, f"{step:.1f} s", f"{image:.1f} s"]


def load_rows(found):
    """Rows of how many images per second are loaded."""
    for name, part in found["workloads"].items():
        rows = {k: row["load"] for k, row in part["rows"].items() if "load" in row}
        for label, seconds in rows.items():
            yield [name, label, f"{part['workload']['batch'] / statistics.median(seconds):,.0f}"]


def rate_rows(found):
    """Rows of the speed of our training steps, beside what the hardware can do."""
    for name, part in found["workloads"].items():
        n = part["workload"]["batch"]
        for label, row in part["rows"].items():
            if "product_tflop_per_s" not in row:
                continue
            step = statistics.median(row["train"])
            speed = row["gflop_per_image"] * n / step / 1e3
            moved = row["gbyte_per_step"] / step
            peak = telemetry.peak_flops(row["devices"][0])
            yield [
                f"{name}, {label.removeprefix('diffjax ')}",
                f"{row['gflop_per_image']:.2f}",
                f"{speed:.3g}",
                f"{speed * 1e12 / peak / len(row['devices']):.0%}" if peak else "",
                f"{row['product_tflop_per_s']:.3g}",
                f"{moved:.3g}",
                f"{row['copy_gb_per_s']:.3g}",
            ]


def checks(found):
    """Rows of the difference between the outputs of both sides."""
    for name, part in found["workloads"].items():
        row = part["rows"][baseline(part)]
        yield [name, f"{row['parameters']:,}", f"{row['difference']:.1e}"]


def compared(device):
    """The section on one kind of device, which may say that it was not measured."""
    path = RESULTS / f"{device}.json"
    if not path.exists():
        return f"## PyTorch on a {device.upper()}: not measured\n\n" + NOT_MEASURED
    found = json.loads(path.read_text())
    parts = found["workloads"].values()
    text = f"## On a {device.upper()}\n\n" + SPEED.format(
        suffix="" if device == "cpu" else f"-{device}",
        date=", ".join(sorted({part["date"] for part in parts})),
        cores=found["cores"],
        processor=found["processor"],
        python=found["python"],
        versions=", ".join(sorted({r["version"] for p in parts for r in p["rows"].values()})),
        rounds=" to ".join(
            str(n) for n in sorted({len(p["rows"][baseline(p)]["train"]) for p in parts})
        ),
        baseline=", ".join(sorted({baseline(part) for part in parts})),
        busy=", ".join(f"{part['cores busy']:.1f}" for part in parts),
        speed=table(
            ["workload", "", "parameters", "train, img/s", "ratio", "64 images", "ratio", "memory"],
            speed_rows(found),
        ),
        checks=table(["workload", "parameters on both sides", "difference"], checks(found)),
        rates=table(
            ["", "GFLOP an image", "TFLOP/s", "MFU", "a product's", "GB/s", "a copy's"],
            rate_rows(found),
        ),
        start=table(["workload", "", "first step", "first images"], start_rows(found)),
    )
    if loaded := list(load_rows(found)):
        text += LOAD.format(load=table(["workload", "", "img/s"], loaded))
    pairs = found["workloads"].get("digits", {}).get("rows", {}).get("diffjax float32", {})
    if "loop" in pairs:
        each = sorted(bare / loop for bare, loop in pairs["loop"])
        low, _, high = statistics.quantiles(each, n=4)
        text += LOOP.format(n=len(each), median=statistics.median(each), low=low, high=high)
    return text


def broken_down():
    """The section on where the time goes."""
    path = RESULTS / "breakdown.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    columns = [
        (f"{name}, {what}", part)
        for name, parts in found["workloads"].items()
        for what, part in parts.items()
    ]
    total = {kind: 0.0 for _, part in columns for kind in part["kinds"]}
    for _, part in columns:
        for kind, spent in part["kinds"].items():
            total[kind] += spent / part["wall"]
    lines = []
    for kind in sorted(total, key=lambda kind: -total[kind]):
        cells = []
        for _, part in columns:
            speed = part["gflop_per_s"].get(kind)
            cells.append(f"{part['kinds'].get(kind, 0):.1f}" + (f" ({speed:.0f})" if speed else ""))
        lines.append([kind, *cells])
    lines.append(["whole step, wall time", *(f"{part['wall']:.1f}" for _, part in columns)])
    walks = [part for name, part in columns if name.endswith("sample")]
    shares = [part["kinds"]["convolution"] / part["wall"] for part in walks]
    return BREAKDOWN.format(
        date=found["date"],
        cores=found["cores"],
        product=f"{found['product_gflop_per_s']:.0f}",
        low=f"{min(shares):.0%}",
        high=f"{max(shares):.0%}",
        rows=table(["", *(name for name, _ in columns)], lines),
    )


def sampled():
    """The section on samplers."""
    path = RESULTS / "sampling.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    rows = (
        [
            row["sampler"],
            row["times"],
            row["evaluations"],
            f"{row['seconds per 1000']:.1f}",
            f"{row['frechet_pca24']:.3f}",
            f"{row['accuracy']:.1%}",
        ]
        for row in found["rows"]
    )
    head = ["sampler", "times", "evaluations", "s per 1,000", "distance", "labels right"]
    real = found["rows"][0]
    return SAMPLING.format(
        **{k: found[k] for k in ("date", "n", "guidance", "cores", "data")},
        steps=found["training steps"],
        real=f"{real['frechet_pca24_real']:.3f}",
        right=f"{real['accuracy_real']:.1%}",
        rows=table(head, rows),
    )


def grown():
    """The section on how the cost grows with the work."""
    path = RESULTS / "curves.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    lines = []
    for name, points in found["curves"].items():
        for at in points:
            lines.append(
                [
                    name,
                    at["at"],
                    f"{at['gflop']:.1f}",
                    f"{at['step'] * 1e3:.0f}",
                    f"{at['gflop'] / at['step']:.0f}",
                    f"{at['temporary'] / 1e6:.0f}",
                    f"{at['compile']:.1f}",
                ]
            )
    head = ["varied", "value", "GFLOP", "step, ms", "GFLOP/s", "temporary, MB", "compile, s"]
    return CURVES.format(
        date=found["date"],
        cores=found["cores"],
        base=", ".join(f"{name} {value}" for name, value in found["base"].items() if value),
        rows=table(head, lines),
    )


NOT_MEASURED = """\
The speed of PyTorch on a GPU was not measured; [Programs for accelerators](accelerators.md) has
what our training steps take on an H100. `make bench-gpu` compares both: DDPM's network for CIFAR-10
at batches of 128, 512 and 1024 and ADM's for ImageNet 64, in bfloat16, with PyTorch's channels_last
and autocast, plain and compiled, with CUDA graphs and autotuning too. That script was run on a CPU
only. A narrower version of ADM's network was converted to PyTorch there (3,074,435 parameters,
outputs within 2.8e-6). `tests/test_gpu_program.py` checks the program that XLA would compile for a
GPU: every convolution is in bfloat16 and takes images in the layout they have, no image is
transposed, statistics are in float32, attention and its gradient use cuDNN's kernel, the state is
donated, and nothing calls the host.

"""

SPEED = """\
Measured by `studies/speed.py`, which `make bench{suffix}` calls, on {date}: {processor}, {cores}
cores, Python {python}, {versions}. The numbers are medians of {rounds} interleaved rounds. A ratio
is the time of {baseline} divided by that of the row in the same round, with the smallest and the
largest in brackets; above 1 the row is faster. Rows without bf16 are in float32. The numbers of
cores that were busy at the same time, for each workload, including other work on the machine:
{busy}.

{speed}
A step is the loss, its gradient, clipping, Adam and the moving average (in PyTorch: fused Adam, and
`_foreach` for the rest). The 64 images are drawn by 50 steps of DDIM. Memory is the peak of the
process, which for our digits includes the runs of `train.py` below. Both sides have the same
architecture, except lucidrains', which has its own. With our parameters, PyTorch's outputs differ
from ours, relative to the largest output, by:

{checks}
The next table has the speed of a training step, and beside it that of a product of two large
matrices, and of a copy, on the same cores or device. Operations are those of convolutions and
matrix products (`telemetry.flops`); records of before 2026-11-26 have XLA's count of the whole
program before it optimises it. MFU is their fraction of the dense bfloat16 operations per second
that the manufacturer states (`telemetry.PEAK_FLOPS`), in float32 too, as in the metrics of a run;
there is no such figure of a CPU. Bytes are XLA's count of what the fused operations read and write;
it ignores caches, so that a step may be faster than a copy:

{rates}
The times to start are from the start of the process to the end of the first step, imports included,
and from there to the first 64 images. "Again" is with the compilation cache that the first start
has filled:

{start}"""

LOAD = """
Loading is of batches from 20,000 uint8 images, shuffled, flipped at random and scaled, on one
thread:

{load}
"""

LOOP = """\
All of `train.py`, logging every 50 steps and saving every 150, processes {median:.3f} times as many
images per second as the step alone (median of {n} paired rounds, quartiles {low:.3f} and
{high:.3f}, on the digits).

"""

BREAKDOWN = """\
## Where the milliseconds go

Measured by `PYTHONPATH=. python studies/speed_breakdown.py` on {date}, {cores} CPU cores. The table
has the milliseconds of a training step and of a sampling step, by XLA's own trace, averaged over
the devices, which are the cores; and in brackets the GFLOP/s of the convolutions on all cores. A
product of two 2048x2048 matrices reaches {product} GFLOP/s on the same cores.

{rows}
The convolutions run close to the peak of the cores in float32, and take {low} to {high} of the time
of sampling. If everything else took no time, sampling with the two larger networks would be 1.4
times as fast. This is why sampling is no further ahead of PyTorch. It also explains why PyTorch's
bfloat16 is faster: these cores have bfloat16 instructions of twice the speed, which XLA uses for
products of matrices, at about twice the speed, and not for convolutions, which take as long as in
float32. Group normalisation that sums over pixels before channels samples 1.05 to 1.12 times as
fast and trains 0.87 to 1.04 times as fast (interleaved, three networks), so that Linen's is kept.

"""

SAMPLING = """\
## Samplers: seconds and quality

Measured by `python studies/speed_sampling.py --workdir=...` on {date}, {cores} CPU cores: {n}
images for each row, drawn by a model of {data} ({steps} training steps, guidance {guidance}; with
guidance each evaluation is one call of the network with twice the batch), with one seed. The
distance is the Frechet distance of the images from one half of the real ones, in 24 principal
components; that of as many images of the other half is {real}. A label is right if the nearest real
image of the other half has it, as it is for {right} of the real ones.

{rows}
Here the stochastic samplers end nearer to the data, and DPM-Solver++ 2M SDE needs the fewest
evaluations, ten. The others converge to the end of the probability flow, which is 11.7 from the
data for this network. The multistep samplers are close to it after ten evaluations; `heun` on
uniform times needs fifty.

"""

CURVES = """\
## As the work grows

Measured by `PYTHONPATH=. python studies/speed_curves.py` on {date}, {cores} CPU cores. One
parameter at a time is varied from {base}, without rematerialisation, of a U-Net of two levels with
attention at 8x8. A step is the fastest of five, on a machine that did other work too. "Temporary"
is the memory that the compiled step needs on one device beside its state. [Scaling](scaling.md) has
the cost against the number of devices.

{rows}
GFLOP are those of convolutions and matrix products; records of before 2026-11-26 have XLA's count
of the whole program, recomputation included. Time and memory grow no faster than the number of
operations, except at a batch of 256, where a fifth of the speed is lost. Small batches, images and
widths leave the cores idle. The time to compile grows with the number of blocks, but only from 15 s
to 36 s for eight times as many, so that the network does not scan over equal blocks.
Rematerialisation (of blocks, four to a level) takes 1.3 times as long and saves no memory on this
CPU. On an H100, [accelerators](accelerators.md) has it for DiT (`remat=dots`).
"""


def text():
    """The text of the page."""
    parts = [compared("cpu"), broken_down(), compared("gpu"), sampled(), grown()]
    whole = "# Performance\n\nWritten by `python studies/speed_page.py`.\n\n" + "".join(parts)
    return whole.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
