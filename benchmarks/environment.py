"""The machine and the software that results were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
CSV = ("--format=csv,noheader", "--id=0")  # how nvidia-smi is to answer

Environment = dict[str, str | int | float | bool | None]


def describe_environment(device: str) -> Environment:
    """What a reader needs to judge or repeat the results, and nothing private."""
    commit, dirty = git_state(ROOT)
    environment: Environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cache": cache_sizes(),
        "memory_gib": total_memory_gib(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "embed_ext_cpu_capability": _capability(),
        "cuda": torch.version.cuda,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = properties.name
        environment["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        environment["gpu_capability"] = f"sm_{properties.major}{properties.minor}"
        environment["gpu_driver"] = _run("nvidia-smi", "--query-gpu=driver_version", *CSV)
    return environment


def _capability() -> str | None:
    try:
        from embed_ext import build_info
    except ImportError:  # rivals can be measured without it
        return None
    return build_info().cpu_capability


def without_folders(message: str) -> str:
    """The message with each path cut down to its last part: folders say who ran it, not what."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:()']+/)+", "", message)


def cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_sizes() -> str | None:
    """Such as ``L1 32K, L2 1024K, L3 32768K``, of the first core."""
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and level and size:
            caches.append(f"L{level} {size}")
    return ", ".join(caches) or None


def total_memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):
        return None


def available_memory_bytes(device: str) -> int | None:
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for later tensors is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def load_average() -> float | None:
    """Runnable tasks over the last minute: what else the machine was doing."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit, and whether anything but results differs from it; None if it is not known.

    A copy of the sources without their repository can say it in EMBED_EXT_COMMIT.
    """
    commit = _run("git", "rev-parse", "HEAD", folder=root)
    if commit is None:
        return os.environ.get("EMBED_EXT_COMMIT"), None
    changes = _run("git", "status", "--porcelain", "--", ".", f":(exclude){RESULTS}", folder=root)
    return commit, None if changes is None else bool(changes)


def _run(*command: str, folder: Path = ROOT) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
