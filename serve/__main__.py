"""`python -m serve auditor=DIR [KEY=VALUE …]` is `safer-ray serve`, in a checkout."""

import sys

from safer_ray.service.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
