"""epok.py as a book: chapters that stand on those before them, tables that are right, and who relies on them."""

import ast
import inspect
import itertools
import os
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator

import paramiko

import epok
from lab.gateway import gate
from lab.network import EPOK

SOURCE = EPOK.read_text()
SECTIONS = {
    number: found.groups()
    for number, line in enumerate(SOURCE.splitlines(), 1)
    if (found := re.fullmatch(r"# -{48} (\w+): (.+)", line))
}


def section(line: int) -> int:
    """The line at which the section begins that a line is in, 0 before the first."""
    return max((start for start in SECTIONS if start <= line), default=0)


def definitions() -> dict[str, int]:
    """The names of the module, and the sections that define them."""
    found: dict[str, int] = {}
    for node in ast.parse(SOURCE).body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.Assign():
                names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id)):
                names = [id]
            case _:
                names = []
        found |= {name: section(node.lineno) for name in names if name not in found}
    return found


def uses() -> Iterator[tuple[int, str]]:
    """Each use of a name of the module: the line where what uses it begins, and the name."""
    tables = symtable.symtable(SOURCE, "epok.py", "exec").get_children()
    todo = [(table, table.get_lineno()) for table in tables]
    while todo:
        table, line = todo.pop()
        yield from ((line, symbol.get_name()) for symbol in table.get_symbols() if symbol.is_global())
        todo += [(inner, line) for inner in table.get_children()]
    for node in ast.walk(ast.parse(SOURCE)):  # annotations are no code
        notes = [note for note in (getattr(node, "annotation", None), getattr(node, "returns", None)) if note]
        for name in (name for note in notes for name in ast.walk(note) if isinstance(name, ast.Name)):
            yield name.lineno, name.id
    for node in ast.parse(SOURCE).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ((node.lineno, name.id) for name in ast.walk(node) if isinstance(name, ast.Name))


def test_a_section_uses_only_names_of_the_sections_before_it() -> None:
    defined = definitions()
    ahead = {(line, name) for line, name in uses() if section(line) and defined.get(name, 0) > section(line)}
    assert not ahead
    assert len(defined) > 300 and len(SECTIONS) > 10


def test_the_contents_are_the_sections() -> None:
    contents = SOURCE[SOURCE.index("# Contents.") : SOURCE.index("from __future__")]
    assert re.findall(r"(?m)^#   (\w+) +(.+)$", contents) == list(SECTIONS.values())


def test_the_private_names_of_other_packages_are_still_there() -> None:
    """What epok knows of paramiko's insides, in one place; a new version may do it in another way."""
    names = {node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute)}
    documented = {"_exit", "_fields", "_replace"}
    private = {name for name in names if re.match("_[a-z]", name)} - documented
    assert private == {"_send_eof", "_send_user_message"}
    assert list(inspect.signature(paramiko.Transport._send_user_message).parameters) == ["self", "data"]
    channel = paramiko.Channel(1)
    with channel.lock:
        assert isinstance(channel._send_eof(), paramiko.Message)
        assert channel._send_eof() is None, "it is sent once"


# ---- the table of commands

VALUES = {
    "TOOL": ("iptables", "ip6tables"),
    "BACKEND": ("legacy", "nft"),
    "TABLE": ("nat", "filter"),
    "FAMILY": ("ip", "ip6", "inet"),
    "CHAIN": ("FORWARD", "wall-in_2.a"),
    "ADDRESS": ("192.0.2.1", "2001:db8::1"),
    "PORT": ("1", "65535"),
    "IF": ("eth0", "br-lan.5"),
}


def forms(command: epok.Command) -> list[str]:
    """What epok may send of a command, without sudo."""
    names = re.findall(r"\b[A-Z]{2,}\b", command.value)
    every = [command.argv((), *values) for values in itertools.product(*(VALUES[name] for name in names))]
    flows = command in (epok.Command.END_FLOWS, epok.Command.END_FLOWS_6)
    own = VALUES["ADDRESS"][command is not epok.Command.END_FLOWS]
    return [" ".join(argv) for argv in every if not flows or {argv[5], argv[9]} == {own}]


FORMS = {form: command for command in epok.Command for form in forms(command)}


def sudoers() -> list[re.Pattern[str]]:
    """What cron/sudoers lets through: words, or anchored regular expressions of the arguments."""
    text = re.sub(r"(?m)^#.*\n|\\\n", "", (EPOK.parent / "cron/sudoers").read_text())
    entries = [entry.strip() for line in re.findall("(?m)^Cmnd_Alias .*= (.*)$", text) for entry in line.split(", ")]
    pairs = [entry.removeprefix("/usr/sbin/").removesuffix(' ""').partition(" ") for entry in entries]
    return [re.compile(f"{tool}{blank}{args if args[:1] == '^' else re.escape(args)}".replace(" ^", " "))
            for tool, blank, args in pairs]  # fmt: skip


def test_the_gate_lets_each_command_through_and_has_no_other() -> None:
    assert [form for form in FORMS if not gate.COMMAND.fullmatch(form)] == []
    for pattern in (gate.SAVE, gate.RESTORE, *gate.OTHERS):
        assert any(re.fullmatch(pattern, form) for form in FORMS), pattern


def test_sudoers_has_what_takes_root_and_nothing_else() -> None:
    entries = sudoers()
    assert len(entries) > 10
    for form, command in FORMS.items():
        assert command.as_root == any(entry.fullmatch(form) for entry in entries), form
    for entry in entries:
        assert any(entry.fullmatch(form) for form in FORMS), entry.pattern


def test_the_readme_says_each_command_and_no_other() -> None:
    text = (EPOK.parent / "README.md").read_text().partition("| what runs on the host | |\n|---|---|\n")[2]
    rows = [line.strip("| ").split(" | ") for line in text.partition("\n\n")[0].splitlines()]
    told = {words: "no sudo" not in purpose for cell, purpose in rows for words in re.findall("`(.*?)`", cell)}
    assert told.pop("ip6tables-") and told.pop("-f ipv6")
    short = {"TOOL": ("iptables",), "BACKEND": VALUES["BACKEND"], "TABLE": VALUES["TABLE"]}
    expected = {}
    for command in epok.Command:
        names = re.findall(r"\b[A-Z]{2,}\b", command.value)
        given = {"FAMILY": ("FAMILY",), **short, **({"TABLE": ("TABLE",)} if "FAMILY" in names else {})}
        every = itertools.product(*(given.get(name, (name,)) for name in names))
        expected |= {
            " ".join(command.argv((), *values)): command.as_root for values in every if "-f" not in command.value
        }
    assert told == expected


def test_the_policy_has_the_annotations_that_epok_reads_and_no_other() -> None:
    text = (EPOK.parent / "cron/policy.yaml").read_text()
    names = re.findall(r'"((?:epok\.)?getbetter\.ro/[a-z-]+)"', text)
    assert sorted(set(names) - {"getbetter.ro/epok"}) == sorted(epok.SERVICE_ANNOTATIONS)


def test_the_readme_names_the_limits() -> None:
    text = " ".join((EPOK.parent / "README.md").read_text().split())
    for limit in (
        f"{epok.MAX_MAPPINGS:,} mappings a Service, {epok.MAX_SOURCES:,} rules for the networks of its",
        f"{epok.MAX_RULES:,} rules for each IP version",
        f"at most {epok.MAX_LINES} lines",
    ):
        assert limit in text, limit


def test_no_command_stands_beside_the_table() -> None:
    beginnings = {tuple(form.split()[:2]) for form in FORMS}
    for node in ast.walk(ast.parse(SOURCE)):
        words = node.elts[:2] if isinstance(node, ast.Tuple | ast.List) else []
        assert tuple(getattr(word, "value", None) for word in words) not in beginnings, ast.dump(node)


def test_what_tests_try_runs_needs_no_package_of_the_tests() -> None:
    """It installs those of requirements.txt alone."""
    absent = "import sys, importlib; sys.modules |= dict.fromkeys(('pytest', 'hypothesis', 'prometheus_client')); "
    argv = [sys.executable, "-B", "-c", f"{absent}importlib.import_module('lab.try')"]
    subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(EPOK.parent / "tests")}, check=True)
