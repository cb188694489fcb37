"""Pictures of a finished run's report and of the service's page, for README and docs/: RUN [FOLDER].

    PYTHONPATH=.:tests python scripts/screenshots.py runs/demo docs/images

The page shows that of its examples whose label is swapped.
"""

import argparse
import base64
import sys
import tempfile
from pathlib import Path

from browser.driving import Browser, listening, started, texts_of

from safer_ray.errors import UserError
from safer_ray.service.http import create_api
from safer_ray.service.render import examples
from safer_ray.service.service import LocalService
from safer_ray.storage.artifacts import Artifact, open_artifact

WIDTH = 1120  # pixels; a picture in a page is read at about half of it
MOST_BYTES = 200_000


def newest(run: Path, stage: str) -> Artifact:
    """Return the stage's artifact that was made last."""
    found = sorted(run.glob(f"{stage}-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {stage} in {run}; give the folder of a finished run, as `make demo` leaves it")
    return open_artifact(found[-1].parent)


def picture(browser: Browser, path: Path, height: int) -> None:
    """Save the top of the page.

    Raises:
        UserError: it is too large a file to lie in the repository.
    """
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    data = base64.b64decode(shot["data"])
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} has {len(data):,} bytes, more than {MOST_BYTES:,}; show less of the page")
    path.write_bytes(data)
    print(f"{path}: {len(data):,} bytes")


def main(run: Path, folder: Path) -> None:
    service = LocalService(newest(run, "auditor").path)
    with (
        tempfile.TemporaryDirectory() as profile,
        listening(create_api(service)) as base,
        started(Path(profile)) as browser,
    ):
        browser.base = base
        browser.size(WIDTH, 1300)
        browser.look()
        browser.open("/")
        browser.fill(**texts_of(next(example for example in examples() if example.name == "swapped")))
        browser.score()
        browser.reveal()
        picture(browser, folder / "service.png", 1300)
        browser.driver.get((run / "report.html").resolve().as_uri())
        picture(browser, folder / "report.png", 1060)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    given = parser.parse_args()
    try:
        main(given.run, given.folder)
    except UserError as error:
        sys.exit(f"screenshots: {error}")
