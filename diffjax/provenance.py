"""Where a number comes from: hashes of what it was made of, and of the program that made it."""

import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np


def digest(tree: Any) -> str:
    """The SHA-256 of a pytree of arrays: of each one's place in it, dtype, shape and bytes.

    >>> a = {"w": np.arange(3), "b": np.zeros(2)}
    >>> digest(a) == digest({"b": np.zeros(2), "w": np.arange(3)})
    True
    >>> digest(a) == digest(a | {"b": np.ones(2)})
    False
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        x = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
        found.update(x.tobytes())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def program() -> dict[str, Any]:
    """What computes here: versions, device, and the git revision where diffjax is a checkout.

    Returns:
      `diffjax`, `jax`, `device`, `devices` (how many), `git` (None outside of a checkout) and
      `git_dirty`, whether tracked files differ from it. A CPU's device is `processor`.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    kind = jax.devices()[0].device_kind
    return {
        "diffjax": importlib.metadata.version("diffjax"),
        "jax": jax.__version__,
        "device": processor() if kind == "cpu" else kind,
        "devices": jax.device_count(),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def processor() -> str:
    """The name of this machine's CPU, and what instructions it has for bfloat16."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return platform.processor() or platform.machine()
    text = table.read_text()
    name = re.search(r"^model name\s*: (.*)", text, re.M)
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return (name[1] if name else platform.machine()) + (f" ({', '.join(found)})" if found else "")


def _git(*words):
    root = Path(__file__).parents[1]
    # Installed into somebody else's repository, its revision would say nothing of this program.
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
