"""What every bench shares: the machine's description and the JSON it writes."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import psutil


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
