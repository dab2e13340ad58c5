"""Settings that libraries read as they are loaded, so they come before any import of torch or Numba."""

import os
from pathlib import Path

# OpenMP's idle threads spin; where several processes share the cores, they must let go of them soon.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Numba numbers the files of its cache without a lock: workers that compile at the same time need their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    folder = Path(__file__).parent.parent / ".pytest_cache" / "numba" / worker
    os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))
