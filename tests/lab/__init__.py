"""What the tests, tests/try and the benchmarks stand on: a network, servers, a cluster, clients, clocks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import epok`
