"""The machine that the tests run on: what it lacks, and how to wait for it when it is busy."""

import os
import shutil
import time
from collections.abc import Callable

import pytest

BACKENDS = ("nft", "legacy")


def need(tool: str, how: str) -> str:
    """The tool's path. Without it the test is skipped, naming it; where everything must run (CI) it fails."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return found or lacking(f"{tool} is missing: {how}")


def lacking(why: str) -> str:
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


def until(condition: Callable[[], bool], what: str, seconds: float = 10, pause: float = 0.01) -> None:
    """Wait for something that happens soon, without an event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds: {what}"
        time.sleep(pause)


def busy() -> float:
    """How much longer than on a quiet machine everything takes here, by the processes that wait for a processor."""
    return max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
