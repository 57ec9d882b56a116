"""Other versions than the machine's own: the tests of other files, run with each of them, two at a time."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from conftest import Tally, often
from lab import EPOK
from versions import iptables, iptables_version, suites, unpacked

IPTABLES = ("test_iptables.py", "test_lab.py::test_plain_names_mean_the_backend_whatever_the_path")


class Outcome(NamedTuple):
    """What became of the tests of one run of pytest."""

    passed: list[str]
    others: list[str]
    output: str


def run_tests(what: Iterable[str], interpreter: Path | str = sys.executable, **variables: str) -> Outcome:
    """Run files or tests of this folder."""
    argv = ["setpriv", "--pdeathsig", "KILL", str(interpreter), "-B", "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    argv += [f"tests/{name}" for name in what]
    done = subprocess.run(argv, cwd=EPOK.parent, env={**os.environ, **variables}, capture_output=True, text=True)
    results = re.findall(r"(?m)^(tests/\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)\b", done.stdout)
    passed = [name for name, how in results if how == "PASSED"]
    others = [name for name, how in results if how != "PASSED"]
    if done.returncode and not others:
        others = [f"pytest: exit {done.returncode}"]
    return Outcome(passed, others, done.stdout + done.stderr)


def side_by_side(run: Callable[[Any], Outcome], versions: Iterable[Any]) -> list[Outcome]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, versions))


def all_passed(outcomes: Iterable[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.others or not outcome.passed]
    assert not failed, "\n".join(f"{outcome.output}\n{outcome.others}" for outcome in failed)


def test_the_iptables_tests_pass_with_every_iptables(tally: Tally) -> None:
    """Without EPOK_TEST_BIG=1 with the oldest and the newest."""
    chosen = suites() if often(0, 1) else (suites()[0], suites()[-1])
    roots = [unpacked(suite) for suite in chosen]
    outcomes = side_by_side(lambda root: run_tests(IPTABLES, EPOK_TEST_IPTABLES=str(iptables(root))), roots)
    for root, outcome in zip(roots, outcomes, strict=True):
        for backend in ("nft", "legacy"):
            passed, others = ([name for name in names if backend in name] for names in outcome[:2])
            what = f"a test with iptables {iptables_version(root)}, {backend}"
            tally(what, len(passed) + len(others), len(others))
    all_passed(outcomes)
