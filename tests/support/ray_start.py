"""Ray's own command, as of a version that may be another: VERSION start …"""

import sys

import ray
import ray.scripts.scripts

if __name__ == "__main__":
    ray.__version__ = sys.argv.pop(1)
    ray.scripts.scripts.main()
