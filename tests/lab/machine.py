"""The machine that the tests run on: what it lacks, and how long to wait when it is busy."""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

BACKENDS = ("nft", "legacy")


def need(tool: str, how: str) -> str:
    """The tool's path. Without it the test is skipped, naming it; where everything must run (CI) it fails."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return found or lacking(f"{tool} is missing: {how}")


def lacking(why: str) -> str:
    import pytest  # which tests/try and the benchmarks run without

    if os.environ.get("EPOK_TEST_ALL") == "1":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


def need_lab(backend: str) -> None:
    """All that a lab takes."""
    if os.geteuid():
        lacking("network namespaces need root: run the tests with sudo")
    for tool, package in (
        ("nsenter", "util-linux"),
        ("setpriv", "util-linux"),
        ("ip", "iproute2"),
        (f"iptables-{backend}", "iptables"),
        ("conntrack", "conntrack"),
    ):
        need(tool, f"apt-get install {package}")


def stretched(seconds: float) -> int:
    """Seconds that a test is about, on a machine as busy as now; EPOK_TEST_SLOW is the least factor.

    Two processes for each processor, which the tests alone keep busy, are no reason for more.
    """
    average, _, _, now, _ = Path("/proc/loadavg").read_text().split()
    processes = max(float(average), int(now.split("/")[0])) / (os.cpu_count() or 1)
    return math.ceil(seconds * max(1, processes / 2, float(os.environ.get("EPOK_TEST_SLOW") or 1)))


def latest_end(timeout: int) -> int:
    """The most seconds of a run with that --timeout: epok also has to start and to end."""
    return timeout + stretched(15)


def until(condition: Callable[[], bool], what: str, seconds: float = 60, pause: float = 0.01) -> None:
    """Wait for something that happens soon, without an event to wait for. The limit is for what never happens."""
    limit = stretched(seconds)
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} seconds: {what}"
        time.sleep(pause)
