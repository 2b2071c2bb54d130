"""docs/performance.md from the files in benchmarks/results: `python benchmarks/page.py`."""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
AGAINST = "torch channels_last"
"""What the others are compared with: PyTorch in float32 at its best layout."""


def table(head, lines):
    lines = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(str(x) for x in line) + " |\n" for line in lines)


def ratio(row, other, what):
    """The median over rounds of the other's seconds to this one's: above 1, this one is faster."""
    pairs = zip(row[what], other[what], strict=True)
    each = sorted(theirs / ours for ours, theirs in pairs)
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def speed_rows(found):
    for name, part in found["workloads"].items():
        n = part["workload"]["batch"]
        other = part["rows"][AGAINST]
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
    for name, part in found["workloads"].items():
        for label, row in part["rows"].items():
            kinds = {"": row}
            if "cold" in row:
                kinds = {", first time": row["cold"], ", again": row}
            for kind, seconds in kinds.items():
                step, image = seconds["first_step"], seconds["first_image"]
                yield [name, label + kind, f"{step:.1f} s", f"{image:.1f} s"]


def load_rows(found):
    for name, part in found["workloads"].items():
        rows = {k: row["load"] for k, row in part["rows"].items() if "load" in row}
        for label, seconds in rows.items():
            yield [name, label, f"{part['workload']['batch'] / statistics.median(seconds):,.0f}"]


def rate_rows(found):
    """What our training steps reach of what the hardware can do."""
    for name, part in found["workloads"].items():
        n = part["workload"]["batch"]
        for label, row in part["rows"].items():
            if "product_tflop_per_s" not in row:
                continue
            step = statistics.median(row["train"])
            speed = row["gflop_per_image"] * n / step / 1e3
            moved = row["gbyte_per_step"] / step
            yield [
                f"{name}, {label.removeprefix('diffjax ')}",
                f"{row['gflop_per_image']:.2f}",
                f"{speed:.3g}",
                f"{row['product_tflop_per_s']:.3g}",
                f"{speed / row['product_tflop_per_s']:.0%}",
                f"{moved:.3g}",
                f"{row['copy_gb_per_s']:.3g}",
            ]


def checks(found):
    """What the outputs of both sides differ by."""
    for name, part in found["workloads"].items():
        row = part["rows"][AGAINST]
        yield [name, f"{row['parameters']:,}", f"{row['difference']:.1e}"]


def compared(device):
    """The section on one kind of device, or that it was not measured."""
    path = RESULTS / f"{device}.json"
    if not path.exists():
        return f"## On a {device.upper()}: not measured\n\n" + NOT_MEASURED
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
            str(n) for n in sorted({len(p["rows"][AGAINST]["train"]) for p in parts})
        ),
        busy=", ".join(f"{part['cores busy']:.1f}" for part in parts),
        speed=table(
            ["workload", "", "parameters", "train, img/s", "ratio", "64 images", "ratio", "memory"],
            speed_rows(found),
        ),
        checks=table(["workload", "parameters on both sides", "difference"], checks(found)),
        rates=table(
            ["", "GFLOP an image", "TFLOP/s", "a product's", "of it", "GB/s", "a copy's"],
            rate_rows(found),
        ),
        start=table(["workload", "", "first step", "first images"], start_rows(found)),
        load=table(["workload", "", "img/s"], load_rows(found)),
    )
    pairs = found["workloads"].get("digits", {}).get("rows", {}).get("diffjax float32", {})
    if "loop" in pairs:
        each = sorted(bare / loop for bare, loop in pairs["loop"])
        low, _, high = statistics.quantiles(each, n=4)
        text += LOOP.format(n=len(each), median=statistics.median(each), low=low, high=high)
    return text


def broken_down():
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
    lines.append(["the whole, by the clock", *(f"{part['wall']:.1f}" for _, part in columns)])
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
No GPU was at hand. `make bench-gpu` is there for a machine that has one: DDPM's network for
CIFAR-10 at batches of 128, 512 and 1024 and ADM's for ImageNet 64, in float32 and bfloat16, beside
PyTorch's channels_last in float32, with bfloat16 autocast, and compiled. The scripts were run on a
CPU only. Of ADM's network a narrower one was handed over to PyTorch (3,074,435 parameters, outputs
within 2.8e-6). What XLA would be given to compile for a GPU is read by `tests/test_gpu_program.py`:
every convolution in bfloat16 on images as they lie, no image transposed, statistics in float32,
attention and its gradient by cuDNN's kernel, the state given away, nothing that calls the host.

"""

SPEED = """\
`benchmarks/run.py`, which `make bench{suffix}` calls, {date}: {processor}, {cores} cores,
Python {python}, {versions}. Medians of {rounds} interleaved rounds; a ratio is
PyTorch's seconds over the row's, paired by round, with its smallest and largest: above 1 is faster
than PyTorch in float32, channels_last. Cores that were busy meanwhile, by workload, other work on
the machine included: {busy}.

{speed}
A step is loss, gradient, clipping, Adam and moving average (PyTorch: fused Adam, `_foreach` for the
rest); 64 images are 50 steps of DDIM. Memory is the most that the process held, for our digits with
the runs of `train.py` below. The same architecture on both sides, but for lucidrains', which has
its own. With our parameters, PyTorch's outputs differ from ours by, relative to the
largest:

{checks}
What a training step reaches of what the same cores or device do at a product of two large matrices
and at a copy. Operations are XLA's count of the program before it optimises it, so that fewer are
done where it finds a way; bytes are its count of what the fused operations read and write, caches
left out of account, so that more than a copy's may be reached:

{rates}
Seconds from the start of the process to the end of the first step, imports included, and from there
to the first 64 images; "again" is with the compilation cache that the first start has filled:

{start}
Batches of 20,000 uint8 images, shuffled, flipped at random and scaled, on one thread:

{load}
"""

LOOP = """\
`train.py` in whole, logging every 50 steps and saving every 150, makes {median:.3f} of the bare
step's images per second (median of {n} paired rounds, quartiles {low:.3f} and {high:.3f}, on the
digits).

"""

BREAKDOWN = """\
## Where the milliseconds go

`PYTHONPATH=. python benchmarks/breakdown.py`, {date}, {cores} CPU cores: milliseconds of a training
step and of one step of a walk, by XLA's own trace, a mean over the devices, which are the cores;
in brackets GFLOP/s of the convolutions on all cores. A product of two 2048x2048 matrices reaches
{product} GFLOP/s on the same cores.

{rows}
So the convolutions run near what the cores can do in float32, and are {low} to {high} of a walk:
with all else for nothing, a walk of the two larger networks could be 1.4 times as fast and no more.
That is why sampling is no further ahead of PyTorch, and why PyTorch's bfloat16, for which these
cores have instructions of twice the speed, overtakes it: XLA's convolutions make no use of them (a
product of matrices does, at about twice the speed; a convolution takes as long as in float32).
Group normalisation by sums over pixels before those over channels makes a walk 1.05 to 1.12 times
faster and a training step 0.87 to 1.04 times as fast (interleaved, three networks), so Linen's is
kept.

"""

SAMPLING = """\
## Samplers: seconds and quality

`PYTHONPATH=. python benchmarks/sampling.py --workdir=...`, {date}, {cores} CPU cores: {n} images of
each kind by a model of {data} ({steps} training steps, guidance {guidance}: each evaluation is one
call of the network with twice the batch). The Frechet distance is that of the images to one half of
the real ones in 24 principal components (as many of the other half: {real}); a label is right if
the nearest real image of that half has it ({right} of the real ones). One seed.

{rows}
Samplers that draw noise end nearer to the data here, DPM-Solver++ 2M SDE soonest: ten evaluations
are enough. The others converge to the flow's own end, 11.7 from the data for this network, and the
multistep ones are there after ten evaluations too; `heun` on uniform times needs fifty.

"""

CURVES = """\
## As the work grows

`PYTHONPATH=. python benchmarks/curves.py`, {date}, {cores} CPU cores, one thing varied at a time
from {base}, without rematerialisation: a U-Net of two levels, attention at 8x8. A step is the
fastest of five, on a machine that did other work as well. "Temporary" is what the compiled step
needs on one device beside its state. With devices: [scaling](scaling.md).

{rows}
Time and memory follow the operations: none grows faster than they do, but for a batch of 256, where
a fifth of the speed is lost. Small batches, images and widths leave the cores idle. Compiling grows
with the number of blocks, from 15 s to 36 s for eight times as many, so that there is no scan over
equal blocks. Rematerialisation (of blocks, four to a level) costs 1.3
times the time and saves nothing on this CPU; on GPUs and TPUs it was not tried.
"""


def text():
    """The page."""
    parts = [compared("cpu"), broken_down(), compared("gpu"), sampled(), grown()]
    whole = "# Performance\n\nWritten by `python benchmarks/page.py`.\n\n" + "".join(parts)
    return whole.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
