"""Shared by all benches: the machine's description, its paths, and the JSON it writes."""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from safer_ray.errors import UserError
from safer_ray.storage.locations import on_disk


def local_path(text: str) -> Path:
    """Return the path that an argument names, refused as argparse tells it where it is a URI."""
    try:
        return on_disk(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def write(path: Path | None, figures: dict[str, float | None], rows: list[dict[str, Any]]) -> None:
    """Write `{"machine", "figures", "rows"}` to `path`, if one is given."""
    if path is not None:
        text = json.dumps({"machine": machine(), "figures": figures, "rows": rows}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
