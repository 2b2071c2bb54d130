"""Provenance of a number: versions, device and git revision."""

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax

from .. import __version__


def program() -> dict[str, Any]:
    """Versions, device, and git revision if diffjax is a checkout.

    Returns:
      `diffjax`, `jax`, `device`, `devices` (how many), `git` (None outside a checkout) and
      `git_dirty`, whether tracked files differ from it. On a CPU, the device is `processor`.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    kind = jax.devices()[0].device_kind
    return {
        "diffjax": __version__,
        "jax": jax.__version__,
        "device": processor() if kind == "cpu" else kind,
        "devices": jax.device_count(),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def processor() -> str:
    """The name of this machine's CPU, and its instructions for bfloat16."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return platform.processor() or platform.machine()
    text = table.read_text()
    name = re.search(r"^model name\s*: (.*)", text, re.M)
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return (name[1] if name else platform.machine()) + (f" ({', '.join(found)})" if found else "")


def _git(*words):
    root = Path(__file__).parents[2]
    # If diffjax is installed inside another repository, that one's revision does not describe it.
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
