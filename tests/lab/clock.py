"""A wall clock that somebody sets while epok runs, each time it is read; the kernel's own stays as it is.

env = set_clock(tmp_path, hours=-6)
"""

from pathlib import Path

TIMES = 30
SETTING = f"""
import itertools, time
real, readings = time.time, itertools.count()
time.time = lambda: real() + HOURS * 3600 * min(next(readings), {TIMES})
"""


def set_clock(directory: Path, hours: int) -> dict[str, str]:
    """The environment in which a Python's clock is set by so many hours, TIMES times from its start."""
    (directory / "sitecustomize.py").write_text(SETTING.replace("HOURS", str(hours)))
    return {"PYTHONPATH": str(directory)}
