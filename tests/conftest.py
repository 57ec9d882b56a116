"""What all tests share: the lab, once for each backend, and what to do when a machine lacks a tool."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import epok
from lab.gateway import gate, must_pass
from lab.machine import BACKENDS, need, need_lab
from lab.network import Lab
from lab.sshd import Sshd

# A busy machine is no failure.
settings.register_profile("epok", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", settings.get_profile("epok"), max_examples=10)  # for test_versions.py
settings.load_profile("epok")

Tally = Callable[[str, int, int], None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proof: what can be tried as often as one likes; EPOK_TEST_BIG=1: very often")
    config.addinivalue_line("markers", "faults(what): counts the test as one of these faults")
    config.addinivalue_line("markers", "long: its file starts first")
    config.addinivalue_line("markers", "any_version: what no version of iptables changes, see test_versions.py")


def often(times: int, big: int) -> int:
    """How often something is tried; `big` with EPOK_TEST_BIG=1, which takes hours, a tenth of it with 0.1."""
    return max(times, round(big * float(os.environ.get("EPOK_TEST_BIG") or 0)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long start first, or a worker is alone with one in the end; of equals those with most tests.

    With --no-loadscope-reorder pytest-xdist keeps to that order.
    """
    tests = Counter(item.path for item in items)
    kinds = [
        {item.path for item in items if item.get_closest_marker("long")},
        {item.path for item in items if item.get_closest_marker("proof")},
        {item.path for item in items if "lab" in getattr(item, "fixturenames", ())},
    ]
    items.sort(key=lambda item: ([item.path not in kind for kind in kinds], -tests[item.path], item.path))


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
        inputs = list(make(*args))
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
