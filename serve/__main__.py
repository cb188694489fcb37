"""`python -m serve auditor=DIR [KEY=VALUE …]` is `safer-ray serve`, in a checkout."""

import sys

from safer_ray.service.main import main

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
