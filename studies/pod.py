"""Show that a run survives a failure: two processes train, one is killed, and the run goes on.

    make pod        # or: python studies/pod.py; about two minutes on two cores

The processes have four devices each, and communicate as those of a pod do; the killed one stands
for a preempted machine. The launcher starts the processes again, and they resume from the newest
checkpoint. runs/pod.log has what is left out here: the connections that the processes report, and
the errors of the process whose peer was killed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
WORKDIR = ROOT / "runs" / "pod"
LOG = ROOT / "runs" / "pod.log"
TRAIN = ["train.py", "--config=configs/digits.py:smoke", "--config.steps=120"]
LAUNCH = [sys.executable, "-m", "diffjax.launch", "--processes=2", "--devices=4", "--"]
VICTIM = 1
GLOO = re.compile(r"\[Gloo\]|peer ranks|^\d*$")
"""Lines that Gloo prints of each connection; those of two processes may be mixed."""


def main() -> int:
    """Train, kill a process after the second checkpoint, and return the launcher's exit status."""
    shutil.rmtree(WORKDIR, ignore_errors=True)
    LOG.parent.mkdir(exist_ok=True)
    command = [*LAUNCH, *TRAIN, f"--workdir={WORKDIR}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    launcher = subprocess.Popen(command, cwd=ROOT, **pipes)
    killed = threading.Event()
    with LOG.open("w") as log:
        telling = threading.Thread(target=tell, args=(launcher.stdout, log, killed))
        telling.start()
        while launcher.poll() is None and not saved(40):
            time.sleep(0.1)
        for pid in process_of(launcher, VICTIM):
            killed.set()
            print(f"pod: kill -9 {pid}, process {VICTIM} of 2", flush=True)
            os.kill(pid, signal.SIGKILL)
        status = launcher.wait()
        telling.join()
    if status == 0:
        found = ", ".join(str(step) for step in range(0, 121, 20) if saved(step))
        print(f"pod: the run was resumed and ended normally; it has checkpoints of steps {found}")
    else:
        print(f"pod: the launcher ended with status {status}; see {LOG}")
    return status


def saved(step: int) -> bool:
    """Whether the checkpoint of a step is complete."""
    return (WORKDIR / "checkpoints" / str(step) / "seal.json").exists()


def tell(output: Iterable[str], log: TextIO, killed: threading.Event) -> None:
    """Print the story of a run, and write all of its output into a log.

    Args:
      output: lines of the launcher and its processes.
      log: a file.
      killed: is set when a process was killed. What the other one reports of its loss is left out,
        until the launcher's next line, which clears it.
    """
    for line in output:
        log.write(line)
        if line.startswith("launch:"):
            killed.clear()
        if not (killed.is_set() or GLOO.search(line)):
            print(line, end="", flush=True)


def process_of(launcher: subprocess.Popen, index: int) -> list[int]:
    """The process ids of one of the launcher's processes; none if it has ended."""
    pattern = f"distributed.process={index}"
    command = ["pgrep", "-P", str(launcher.pid), "-f", pattern]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
