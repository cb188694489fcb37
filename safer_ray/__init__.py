"""Find the pairs that teach a reward model the wrong thing: SAFER (arXiv 2507.00665) as a scaling service."""

import os

__version__ = "0.2.0"

# OpenMP threads that spin while they wait make torch 20 times slower as soon as another process wants a core.
# It is read when torch is loaded, and costs about a tenth on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
