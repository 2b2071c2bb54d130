"""Measure the speed of diffjax beside PyTorch's on the same work, in interleaved rounds.

    make bench        # on a CPU; or: python studies/speed.py
    make bench-gpu    # on an NVIDIA GPU; or: python studies/speed.py --device=gpu

Each side runs in a process of its own, and they take turns: in every round each process does a few
steps while the others wait. Both sides have the allocator settings of `make train`. The times of
every round go to studies/results/cpu.json or gpu.json, of which `speed_page.py` writes medians, and
medians of the rounds' ratios, into docs/performance.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from diffjax.evaluation import provenance
from diffjax.training.telemetry import ALLOCATOR, TUNABLES
from speed_workloads import CPU, GPU, WORKLOADS

HERE = Path(__file__).parent
PLANS = {
    "cpu": {
        "digits": ["channels_last", "channels_last bf16"],
        "fashion": ["channels_last", "eager", "channels_last bf16", "compile", "lucidrains"],
        "32x32": ["channels_last", "channels_last bf16"],
    },
    "gpu": {
        name: ["channels_last bf16"]
        + [f"compile bf16{how}" for how in ("", ", graphs", ", autotuned")]
        for name in GPU
    },
}
OURS = {"cpu": ["float32"], "gpu": ["bfloat16"]}
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""Several processes share a GPU, of which JAX would otherwise take three quarters at its start."""
SECONDS = 2.5
"""About how long a side works in one turn."""


class Worker:
    """A process of one side, which does the work that it is given."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env={TUNABLES: ALLOCATOR} | SHARED | os.environ | environment,
        )
        self.ready = self._line()

    def _line(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def do(self, what, times):
        assert self.process.stdin is not None
        print(what, times, file=self.process.stdin, flush=True)
        return self._line()

    def close(self):
        self.process.communicate(timeout=60)


def busy():
    """Seconds that the machine's cores have been busy since it started, added up."""
    with open("/proc/stat") as file:
        user, nice, system, *_ = (int(word) for word in file.readline().split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def timed(workers, what, rounds):
    """Seconds of one `what` by each worker, round by round."""
    once = {name: worker.do(what, 1)["seconds"] for name, worker in workers.items()}
    times = {name: max(1, round(SECONDS / seconds)) for name, seconds in once.items()}
    found = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.do(what, times[name])["seconds"] / times[name])
    return found


def compare(name, device, python, cores, rounds):
    """The seconds and the memory of all variants on one workload."""
    affinity = ["taskset", "-c", f"0-{cores - 1}"] if device == "cpu" else []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for variant in OURS[device]:
            command = [*affinity, sys.executable, "speed_ours.py", name, variant, folder]
            paths = os.pathsep.join(["..", os.environ.get("PYTHONPATH", "")])
            cold = {"JAX_COMPILATION_CACHE_DIR": folder + "/compiled", "PYTHONPATH": paths}
            first = Worker(command, cold)
            stack.callback(first.close)
            second = Worker(command, cold)
            stack.callback(second.close)
            workers[f"diffjax {variant}"] = second
            second.ready["cold"] = {k: first.ready[k] for k in ("first_step", "first_image")}
        for variant in PLANS[device][name]:
            command = [*affinity, python, "speed_peers.py", name, variant, folder, str(cores)]
            workers[f"torch {variant}"] = Worker(command, {})
            stack.callback(workers[f"torch {variant}"].close)
        rows = {label: worker.ready for label, worker in workers.items()}
        for what in ("train", "sample"):
            for label, seconds in timed(workers, what, rounds).items():
                rows[label][what] = seconds
        if device == "cpu":
            pair = {k: workers[k] for k in ("diffjax float32", "torch channels_last")}
            for label, seconds in timed(pair, "load", rounds).items():
                rows[label]["load"] = seconds
        if name == "digits":
            worker = workers["diffjax float32"]
            rows["diffjax float32"]["loop"] = [
                (worker.do("train", 50)["seconds"], worker.do("loop", 50)["seconds"])
                for _ in range(2 * rounds)
            ]
        for label, worker in workers.items():
            rows[label]["memory"] = worker.do("train", 1)["memory"]
            if label.startswith("diffjax"):
                rows[label] |= worker.do("peaks", 1)
    return {"workload": WORKLOADS[name]._asdict(), "rows": rows}


def main():
    """Measure the workloads of a device, and write each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--peers", default="../.venv-peers/bin/python", help="Python with PyTorch")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="workloads; by default all of the device's")
    args = parser.parse_args()
    out = HERE / "results" / f"{args.device}.json"
    out.parent.mkdir(exist_ok=True)
    found = json.loads(out.read_text()) if out.exists() and args.only else {"workloads": {}}
    for name in args.only or (CPU if args.device == "cpu" else GPU):
        load = os.getloadavg()[0]
        began, before = datetime.datetime.now(), busy()
        found["workloads"][name] = compare(name, args.device, args.peers, args.cores, args.rounds)
        seconds = (datetime.datetime.now() - began).total_seconds()
        found["workloads"][name] |= {
            "date": began.date().isoformat(),
            "load before": load,
            "cores busy": (busy() - before) / seconds,
        }
        found |= {
            "cores": args.cores,
            "processor": provenance.processor(),
            "python": platform.python_version(),
        }
        out.write_text(json.dumps(found, indent=1) + "\n")
        for label, row in found["workloads"][name]["rows"].items():
            times = {k: statistics.median(row[k]) for k in ("train", "sample")}
            print(name, label, *(f"{k} {v:.3f} s" for k, v in times.items()), flush=True)


if __name__ == "__main__":
    main()
