"""What Ray, torch and transformers read from the environment: imported before any of them."""

import os
import secrets
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is loaded
os.environ["RAY_AUTH_MODE"] = "token"  # no Ray of ours lets strangers in, those that tests start least of all
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else one would be written into the home directory
os.environ.pop("RAY_ADDRESS", None)  # a cluster of somebody's
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # of checkpoints' own code; else in the home
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

from safer_ray.service.serve_settings import settings

SOCKETS = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
os.environ.update(settings(SOCKETS))  # before anything starts a Ray; workers that give way to tests come to nothing
