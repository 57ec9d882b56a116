"""What all tests share: the lab, once for each backend, and what to do when a machine lacks a tool."""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `import epok`

from gateway import gate, must_pass  # noqa: E402
from lab import Lab  # noqa: E402
from sshd import Sshd  # noqa: E402

import epok  # noqa: E402

settings.register_profile("epok", deadline=None)  # a busy machine is no failure
settings.load_profile("epok")

BACKENDS = ("nft", "legacy")
Tally = Callable[[str, int, int], None]


def need(tool: str, how: str) -> str:
    """The tool's path. Without it the test is skipped, naming it; where everything must run (CI) it fails."""
    found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return found or lacking(f"{tool} is missing: {how}")


def lacking(why: str) -> str:
    if os.environ.get("EPOK_TEST_ALL") == "1":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proof: what can be tried as often as one likes; EPOK_TEST_BIG=1: very often")
    config.addinivalue_line("markers", "faults(what): counts the test as one of these faults")


def often(times: int, big: int) -> int:
    """How often something is tried; `big` with EPOK_TEST_BIG=1, which takes hours, a tenth of it with 0.1."""
    return max(times, round(big * float(os.environ.get("EPOK_TEST_BIG") or 0)))


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """tally(what, tried, lost): the sums over all tests are a table at the end of the run. It asserts nothing."""
    return lambda what, tried, lost: record_property("tally", (what, tried, lost))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """figure(line): the lines of all tests stand at the end of the run."""
    return lambda line: record_property("figure", line)


def faults(what: str) -> pytest.MarkDecorator:
    """For tests with a fault in each: the table has them as tried, and as lost when any of what they assert fails."""
    return pytest.mark.faults(what)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    mark = item.get_closest_marker("faults")
    if mark and report.when == "call" and not report.skipped:
        report.user_properties.append(("tally", (mark.args[0], 1, int(report.failed))))
    return report  # type: ignore[return-value]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of `tally` and `faults`, and what `figure` was given."""
    tried, lost, figures = Counter[str](), Counter[str](), []
    for report in (each for reports in terminalreporter.stats.values() for each in reports):
        # the report of the teardown has the properties too
        for name, value in report.user_properties if getattr(report, "when", "") == "call" else ():
            if name == "tally":
                tried[value[0]] += value[1]
                lost[value[0]] += value[2]
            if name == "figure":
                figures.append(value)
    if figures:
        terminalreporter.section("what was measured")
        terminalreporter.write_line("\n".join(figures))
    if tried:
        terminalreporter.section("what was tried")
        for what in tried:
            terminalreporter.write_line(f"{what}: {tried[what]:,} times, {lost[what]:,} lost")


def until(condition: Callable[[], bool], what: str, seconds: float = 10, pause: float = 0.01) -> None:
    """Wait for something that happens soon, without an event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds: {what}"
        time.sleep(pause)


def busy() -> float:
    """How much longer than on a quiet machine everything takes here, by the processes that wait for a processor."""
    return max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


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


@pytest.fixture(scope="module", params=BACKENDS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """One lab for the tests of a file, for each backend in turn; what goes into iptables is kept, and passes the gate.

    Unless the file says `RECORD = False`.
    """
    need_lab(request.param)
    with Lab(backend=request.param, record=getattr(request.module, "RECORD", True)) as made:
        yield made
        for tool, text in made.inputs() if made.record else ():
            if not text.endswith("COMMIT\n"):  # a test broke the connection
                text = text[: text.rfind("\n") + 1] + "COMMIT\n"
            if text != "COMMIT\n":
                must_pass(text, 6 if tool.startswith("ip6") else 4)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Sshd:
    """The sshd of the lab's host; it ends with the lab."""
    for tool, package in (("sshd", "openssh-server"), ("ssh", "openssh-client"), ("sudo", "sudo")):
        need(tool, f"apt-get install {package}")
    return Sshd(lab.host)


@pytest.fixture(autouse=True)
def no_input_that_the_gate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in the tests without a host: cron/epok-gate lets through whatever epok would send."""
    make = epok.restore_inputs

    def made_and_checked(*args: Any) -> list[str]:
        inputs = make(*args)
        for text in inputs:
            try:
                must_pass(text, 4)
            except gate.Refused:
                must_pass(text, 6)
        return inputs

    monkeypatch.setattr(epok, "restore_inputs", made_and_checked)


@pytest.fixture(autouse=True)
def flushed(request: pytest.FixtureRequest) -> None:
    """Each test that uses the lab finds the host without rules and without tracked connections."""
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").flush()
