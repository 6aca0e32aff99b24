"""Memory of a process as Linux accounts for it; None where the system does not tell."""

from __future__ import annotations

from pathlib import Path


def rss() -> int | None:
    """Resident memory now, in bytes."""
    return resident("self", "VmRSS")


def peak_rss() -> int | None:
    """The most that was resident since the start, or since `forget_peak`, in bytes."""
    return resident("self", "VmHWM")


def forget_peak() -> bool:
    """Lets `peak_rss` begin anew; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(process: int | str, key: str) -> int | None:
    """What /proc/PROCESS/status has under a key, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
