"""A whole run as a job: python -m jobs.pipeline CONFIG.yaml [--set key=value] [--until STAGE] …, as `safer-ray run`."""

import sys

from safer_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["run"]
    main()
