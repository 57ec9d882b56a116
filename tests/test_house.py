"""epok.py as a book: chapters that stand on those before them, and a table of contents that is right."""

import ast
import re
import symtable
from collections.abc import Iterator

from lab import EPOK

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


def test_no_line_is_longer_than_100_columns() -> None:
    """But for what the formatter leaves alone, which would not say it."""
    assert not [number for number, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100]
