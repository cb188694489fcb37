"""An audit as a job: python -m jobs.audit --auditor DIR --pairs PATH --out DIR …, as `safer-ray audit`."""

import sys

from safer_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["audit"]
    main()
