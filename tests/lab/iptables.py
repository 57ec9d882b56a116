"""What iptables-save prints, read; and legacy's lock, held."""

import contextlib
import re
import subprocess
from collections.abc import Iterator

from lab.network import Namespace

Chains = dict[str, list[str]]
LOCK = "/run/xtables.lock"


def chains_in(text: str) -> Chains:
    """What iptables-save prints of a table: by chain its rules."""
    chains: Chains = {}
    for line in text.split("\n"):
        if line.startswith(":"):
            chains[line[1:].split(" ")[0]] = []
        elif line.startswith("-A "):
            chain, _, rule = line[3:].partition(" ")
            chains.setdefault(chain, []).append(rule)
    return chains


def tables_in(text: str) -> dict[str, Chains]:
    """What it prints of several."""
    return {table: chains_in(lines) for table, lines in re.findall(r"(?ms)^\*(\w+)\n(.*?)^COMMIT$", text)}


@contextlib.contextmanager
def held_lock(space: Namespace, seconds: float) -> Iterator[None]:
    """Somebody else holds legacy's lock, for so long or until the end."""
    hold = ["flock", "--close", LOCK, "sh", "-c", f"echo held; exec sleep {seconds}"]
    with space.popen(hold, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
        holder.kill()
