"""Rows that one core reads a second, by whichever safer_ray comes first: `python bench/reading_rate.py FOLDER`.

`bench.data` runs it on the code at hand and on that of an earlier commit in turn, so it knows the older names, too.
"""

import json
import sys
import time
from pathlib import Path

try:
    from safer_ray.config.sections import SourceConfig
    from safer_ray.data.sources import NormalisePairs, plan_sources, read_raw
except ImportError:  # before the packages
    from safer_ray.sources import NormalisePairs, plan_sources, read_raw  # type: ignore[no-redef]

    from safer_ray.config import SourceConfig  # type: ignore[attr-defined,no-redef]


def main(folder: Path) -> None:
    """Print rows, and CPU seconds of the better of two turns, of each file."""
    told = {}
    for path in sorted(folder.iterdir()):
        source = SourceConfig(path=str(path))
        seconds, rows = [], 0
        for _ in range(3):  # the first turn imports what it needs
            began, rows = time.process_time(), 0
            normalise = NormalisePairs([source], 20_000)
            for fragment in plan_sources([source]):
                read = normalise(read_raw(fragment, source))
                assert read["refused"].null_count == len(read)
                rows += len(read)
            seconds.append(time.process_time() - began)
        told[path.name] = {"rows": rows, "seconds": min(seconds[1:])}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
