"""Count the CPUs that there are for this process: fewer than the machine has, where an affinity or a container says
so."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the CPUs that this process may use, at least 1: those of its affinity, or as many as a control group's
    quota is worth, rounded down."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    own = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([own, *_quotas()])))


def own_groups(kind: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the control groups of this process that limit `kind`, from its own up, as a container sees
    them, each with whether it is of version 2."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, kinds, path = line.split(":", 2)
        second = kinds == ""
        if not second and kind not in kinds.split(","):
            continue
        root = CGROUPS if second else CGROUPS / kind
        own = root / path.strip("/")
        yield from ((group, second) for group in (own, *own.parents) if group.is_relative_to(root))


def _quotas() -> Iterator[float]:
    """Yield what the control groups of this process allow, in CPUs."""
    for group, second in own_groups("cpu"):
        names = ("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        match " ".join(_read(group / name) for name in names).split():
            case [quota, period] if quota.isdigit() and int(period) > 0:
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
