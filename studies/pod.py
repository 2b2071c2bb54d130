"""Show that a run survives a failure: two processes train, one is killed, and the run goes on.

    make pod        # or: python studies/pod.py; about two minutes on two cores

The processes have four devices each, and communicate as those of a pod do; the killed one stands
for a preempted machine. The launcher starts the processes again, and they resume from the newest
checkpoint.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKDIR = ROOT / "runs" / "pod"
TRAIN = ["train.py", "--config=configs/digits.py:smoke", "--config.steps=120"]
LAUNCH = [sys.executable, "-m", "diffjax.launch", "--processes=2", "--devices=4", "--"]
VICTIM = 1


def main() -> int:
    """Train, kill a process after the second checkpoint, and return the launcher's exit status."""
    shutil.rmtree(WORKDIR, ignore_errors=True)
    launcher = subprocess.Popen([*LAUNCH, *TRAIN, f"--workdir={WORKDIR}"], cwd=ROOT)
    while launcher.poll() is None and not (WORKDIR / "checkpoints" / "40" / "seal.json").exists():
        time.sleep(0.1)
    for pid in process_of(launcher, VICTIM):
        print(f"pod: kill -9 {pid}, process {VICTIM} of 2", flush=True)
        os.kill(pid, signal.SIGKILL)
    status = launcher.wait()
    if status == 0:
        subprocess.run([sys.executable, "-m", "diffjax.inspect", str(WORKDIR)], cwd=ROOT)
        print("pod: the run was resumed and ended normally")
    return status


def process_of(launcher: subprocess.Popen, index: int) -> list[int]:
    """The process ids of one of the launcher's processes; none if it has ended."""
    pattern = f"distributed.process={index}"
    command = ["pgrep", "-P", str(launcher.pid), "-f", pattern]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
