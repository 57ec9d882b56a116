"""requirements.txt: that it is the whole lock of what epok imports. `tests/lock` makes it."""

import ast
import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lab.network import EPOK

LOCK = (EPOK.parent / "requirements.txt").read_text()
DIRECT = [line for line in (EPOK.parent / ".requirements.in").read_text().splitlines() if not line.startswith("#")]
PINNED = dict(re.findall(r"^([\w.-]+)==([\w.]+)", LOCK, re.MULTILINE))
MAKE_IT = "run tests/lock"


def pulled_in(names: list[str]) -> set[str]:
    """All packages that those pull in, themselves included, as their own metadata say it, for this Python."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name not in found:
            found.add(name)
            needed = [Requirement(text) for text in metadata.requires(name) or ()]
            todo += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def test_epok_imports_the_direct_dependencies_and_no_others() -> None:
    tree = ast.parse(EPOK.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        )
    }  # fmt: skip
    packages = metadata.packages_distributions()
    others = {canonicalize_name(packages[name][0]) for name in imported if name in packages}
    # PyYAML and urllib3 are the Kubernetes client's own, which cannot do without them
    assert others - {"pyyaml", "urllib3"} == set(DIRECT)
    assert {"pyyaml", "urllib3"} <= pulled_in(["kubernetes"])


def test_the_lock_has_all_that_the_direct_dependencies_pull_in_and_nothing_else() -> None:
    # tzdata and the like may be for other platforms alone; what has no marker is for all
    everywhere = {name for name in PINNED if not re.search(rf"^{re.escape(name)}==\S+ ;", LOCK, re.MULTILINE)}
    needed = pulled_in(DIRECT)
    assert everywhere <= needed <= set(PINNED), MAKE_IT


def test_what_is_installed_here_is_what_is_locked() -> None:
    assert {name: metadata.version(name) for name in pulled_in(DIRECT)}.items() <= PINNED.items(), "run tests/setup"


def test_every_package_has_hashes_and_no_address_to_take_it_from() -> None:
    entries = re.split(r"(?m)^(?=[\w.-]+==)", LOCK)[1:]
    assert len(entries) == len(PINNED)
    assert all("--hash=sha256:" in entry for entry in entries), MAKE_IT
    assert "://" not in LOCK and not re.search(r"(?m)^-", LOCK)


@pytest.mark.parametrize("change", ["attrs", "paramiko"])
def test_a_package_that_is_missing_from_the_lock_would_be_noticed(change: str) -> None:
    assert not pulled_in(DIRECT) <= PINNED.keys() - {change}
