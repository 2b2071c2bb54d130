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
        start=table(["workload", "", "first step", "first images"], start_rows(found)),
        load=table(["workload", "", "img/s"], load_rows(found)),
    )
    pairs = found["workloads"].get("digits", {}).get("rows", {}).get("diffjax float32", {})
    if "loop" in pairs:
        each = sorted(bare / loop for bare, loop in pairs["loop"])
        text += LOOP.format(median=statistics.median(each), low=each[0], high=each[-1])
    return text


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
        date=found["date"], cores=found["cores"], base=found["base"], rows=table(head, lines)
    )


NOT_MEASURED = """\
No GPU was at hand. `make bench-gpu` is there for a machine that has one: DDPM's network for
CIFAR-10 at batches of 128, 512 and 1024 and ADM's for ImageNet 64, in float32 and bfloat16, beside
PyTorch's channels_last in float32, with bfloat16 autocast, and compiled. The scripts were run on a
CPU only, and with the CPU's networks only; ADM's parameters have not been handed over yet.

"""

SPEED = """\
`benchmarks/run.py`, which `make bench{suffix}` calls, {date}: {processor}, {cores} cores,
Python {python}, {versions}. Medians of {rounds} interleaved rounds; a ratio is
PyTorch's seconds over the row's, paired by round, with its smallest and largest: above 1 is faster
than PyTorch in float32, channels_last. Cores that were busy meanwhile, by workload, other work on
the machine included: {busy}.

{speed}
A step is loss, gradient, clipping, Adam and moving average (PyTorch: fused Adam, `_foreach` for the
rest); 64 images are 50 steps of DDIM. The same architecture on both sides, but for lucidrains',
which has its own. With our parameters, PyTorch's outputs differ from ours by, relative to the
largest:

{checks}
Seconds from the start of the process to the end of the first step, imports included, and from there
to the first 64 images; "again" is with the compilation cache that the first start has filled:

{start}
Batches of 20,000 uint8 images, shuffled, flipped at random and scaled, on one thread:

{load}
"""

LOOP = """\
`train.py` in whole, logging every 50 steps and saving every 150, makes {median:.3f} of the bare
step's images per second (median of paired rounds, {low:.2f} to {high:.2f}, on the digits).

"""

SAMPLING = """\
## Samplers: seconds and quality

`PYTHONPATH=. python benchmarks/sampling.py --workdir=...`, {date}, {cores} CPU cores: {n} images of
each kind by a model of {data} ({steps} training steps, guidance {guidance}: each evaluation is one
call of the network with twice the batch). The Frechet distance is that of the images to one half of
the real ones in 24 principal components (as many of the other half: {real}); a label is right if
the nearest real image of that half has it ({right} of the real ones). One seed.

{rows}
"""

CURVES = """\
## As the work grows

`PYTHONPATH=. python benchmarks/curves.py`, {date}, {cores} CPU cores, one thing varied at a time
from {base}: a U-Net of two levels, attention at 8x8. "Temporary" is what the compiled step needs on
one device beside its state. With devices: [scaling](scaling.md).

{rows}
"""


def text():
    """The page."""
    parts = [compared("cpu"), compared("gpu"), sampled(), grown()]
    whole = "# Performance\n\nWritten by `python benchmarks/page.py`.\n\n" + "".join(parts)
    return whole.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
