"""Other versions than the machine's own: the tests of other files, run with each of them, two at a time."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import Tally, often
from lab.container import output
from lab.network import EPOK
from lab.versions import iptables, iptables_version, python, pythons, suites, unpacked

pytestmark = pytest.mark.proof
# Files, or tests of files; all of them in the whole proof.
IPTABLES = ("test_iptables.py", "test_lab.py::test_plain_names_mean_the_backend_whatever_the_path")
KUBERNETES = ("test_apiserver.py", "test_cluster.py", "test_cron.py", "test_kube_proxy.py")
PYTHON = (
    "test_transaction.py",
    "test_cluster.py::test_the_token_is_sent",
    "test_ssh.py::test_a_forward_lives_from_annotation_to_clean",
)
PYTHON_BIG = tuple(f"test_{name}.py" for name in ("plan", "ruleset", "stages", "iptables", "traffic", "status"))
PYTHON_BIG += ("test_options.py", "test_transaction.py", "test_cluster.py", "test_ssh.py", "test_gate.py")
# What Python says will change must not be in epok.py, neither as a program nor as a module.
STRICT = ",".join(
    f"error::{kind}:{module}"
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "SyntaxWarning")
    for module in ("__main__", "epok")
)


class Outcome(NamedTuple):
    """What became of the tests of one run of pytest."""

    passed: list[str]
    others: list[str]
    output: str


def run_tests(
    what: Iterable[str], interpreter: Path | str = sys.executable, options: Sequence[str] = (), **variables: str
) -> Outcome:
    """Run files or tests of this folder."""
    argv = ["setpriv", "--pdeathsig", "KILL", str(interpreter), "-B", "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    argv += [*options, *(f"tests/{name}" for name in what)]
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
    """Without EPOK_TEST_BIG=1 with the oldest and the newest, and those tests that could tell them apart."""
    chosen, options = (suites(), []) if often(0, 1) else ((suites()[0], suites()[-1]), ["-m", "not any_version"])
    roots = [unpacked(suite) for suite in chosen]
    outcomes = side_by_side(
        lambda root: run_tests(IPTABLES, options=options, EPOK_TEST_IPTABLES=str(iptables(root))), roots
    )
    for root, outcome in zip(roots, outcomes, strict=True):
        for backend in ("nft", "legacy"):
            passed, others = ([name for name in names if backend in name] for names in outcome[:2])
            what = f"a test with iptables {iptables_version(root)}, {backend}"
            tally(what, len(passed) + len(others), len(others))
    all_passed(outcomes)


def test_epok_and_its_tests_run_with_every_python(tally: Tally) -> None:
    """From 3.11, this Python excepted, and what it warns of in epok.py is an error.

    Without EPOK_TEST_BIG=1 the newest alone, and few examples of Hypothesis's show that the code runs; what it
    computes, other tests show.
    """
    found = {version: root for suite in reversed(suites()) for root in [unpacked(suite)] for version in pythons(root)}
    found.pop(f"3.{sys.version_info[1]}", None)
    what, options = PYTHON_BIG, []
    if not often(0, 1):
        newest = max(found, key=lambda version: int(version.partition(".")[2]))
        what, options, found = PYTHON, ["--hypothesis-profile", "few"], {newest: found[newest]}
    interpreters = [python(root, version) for version, root in found.items()]
    for interpreter in interpreters:
        output([str(interpreter), "-W", "error", "-c", "import ast; ast.parse(open('epok.py').read(), 'epok.py')"])
    outcomes = side_by_side(lambda one: run_tests(what, one, options, PYTHONWARNINGS=STRICT), interpreters)
    for version, outcome in zip(found, outcomes, strict=True):
        tally(f"a test with Python {version}", len(outcome.passed) + len(outcome.others), len(outcome.others))
    all_passed(outcomes)


if often(0, 1):  # no test that is skipped: it takes ten minutes to build

    def test_the_tests_that_need_kubernetes_pass_with_the_oldest(tally: Tally) -> None:
        """The oldest that can be built; .ci/run has the newest."""
        output([str(EPOK.parent / "tests" / "setup"), "all", "oldest"])
        folder = EPOK.parent / ".venv" / "kubernetes-oldest"
        version = output([str(folder / "kube-apiserver"), "--version"]).split()[1]
        outcome = run_tests(KUBERNETES, KUBEBUILDER_ASSETS=str(folder))
        tally(f"a test with Kubernetes {version}", len(outcome.passed) + len(outcome.others), len(outcome.others))
        all_passed([outcome])
