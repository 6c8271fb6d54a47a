"""Growth of peak memory over a few calls, measured in fresh processes.

A process keeps what it once had, so one process can measure one provider only; and where malloc
happens to place a buffer decides whether it can be used again, so that the least of a few processes
is what counts. On the CPU the
figure is the peak resident size less the resident size once the table, the indices and
grad_output are in place; on CUDA it is the peak of allocated memory over the same moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, CaseData, make_data
from benchmarks.modes import Mode, deterministic, get_mode, make_call
from benchmarks.processes import output_of
from benchmarks.providers import Provider, get_provider
from benchmarks.steps import LEARNING_RATE, make_step_data, training_step

CALLS = 3
PROCESSES = 3


def measure_memory(
    case: Case, provider: str, mode: str, *, threads: int, device: str, seed: int
) -> int:
    """Bytes by which peak memory grows, in processes of its own; RuntimeError if one fails."""
    job = {
        "case": asdict(case),
        "provider": provider,
        "mode": mode,
        "threads": threads,
        "device": device,
        "seed": seed,
    }
    return min(_measure_in_process(job) for _ in range(PROCESSES))


def _measure_in_process(job: dict[str, object]) -> int:
    try:
        return int(output_of(sys.executable, "-m", "benchmarks.memory", json.dumps(job)))
    except RuntimeError as error:
        raise RuntimeError(f"memory not measured: {error}") from None


def _peak_growth(case: Case, provider: Provider, mode: Mode, device: str, seed: int) -> int:
    # A first call on a table of one row loads libraries and starts threads.
    small = Case(1, 1, 1, "uniform", case.dtype, case.index_dtype)
    _run(small, provider, mode, device, seed, calls=1)
    data = make_data(case, batches=CALLS, device=device, seed=seed)
    call, batches = _prepare(data, provider, mode, device, seed)
    with torch.set_grad_enabled(mode.grad):
        if provider.compiles:
            call(batches[0])
        baseline = resident_bytes(device)
        reset_peak(device)
        for batch in batches:
            call(batch)
    return max(0, peak_bytes(device) - baseline)


def _run(case: Case, provider: Provider, mode: Mode, device: str, seed: int, calls: int) -> None:
    data = make_data(case, batches=calls, device=device, seed=seed)
    call, batches = _prepare(data, provider, mode, device, seed)
    with torch.set_grad_enabled(mode.grad):
        for batch in batches:
            call(batch)


def _prepare(
    data: CaseData, provider: Provider, mode: Mode, device: str, seed: int
) -> tuple[Callable[[Any], object], Sequence[Any]]:
    lookup = provider.build(data.weight, data.case.padding_idx)
    if mode.step is None:
        return make_call(lookup, mode, data.grad_output), data.batches
    calls = len(data.batches)
    tensors = make_step_data(data, mode.step, batches=calls, seed=seed, device=device)
    return training_step(lookup, tensors, LEARNING_RATE), tensors.batches


def resident_bytes(device: str) -> int:
    """What this process holds now; on CUDA what is allocated there."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS") or _max_resident_bytes()


def reset_peak(device: str) -> None:
    """Let ``peak_bytes`` forget what was held before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak resident size
    except OSError:
        # Not allowed: then the peak is that of the set-up, if that was higher. Not Linux: then so
        # is resident_bytes, and growth is a floor.
        return


def peak_bytes(device: str) -> int:
    """The most that this process held at once since ``reset_peak``."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") or _max_resident_bytes()


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(ln.split()[1]) * 1024 for ln in lines if ln.startswith(f"{name}:")), None)


def _max_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    provider, mode = get_provider(job["provider"]), get_mode(job["mode"])
    with deterministic(provider.deterministic):
        growth = _peak_growth(Case(**job["case"]), provider, mode, job["device"], job["seed"])
    print(growth)


if __name__ == "__main__":
    main()
