"""many_runs.py EPOK: runs epok again and again in this one process, and tells what the process holds after each run.

A line of standard input is a list of epok's arguments, as JSON; a line of standard output is what is held and the exit
status. After the line "at once" epok waits for nothing between two tries, and what is held is told at each of them too.
The standard output of epok goes nowhere.

    with ManyRuns(lab.host, EPOK, log) as process:
        print(process.run("-i", "eth0", "--snapshot", "cluster.json", "local").files)
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from lab.network import Namespace  # which the child, run without a path, does not find

PAGE = os.sysconf("SC_PAGE_SIZE")
THRESHOLD = 100_000  # as the last lines of epok.py have it
AT_ONCE = "at once"


class Held(NamedTuple):
    """What a process holds: open files by kind, threads, child processes, resident bytes, objects that refer to others.

    Objects are counted after a run, when those that nothing refers to have gone. Before that, `status` is None.
    """

    status: int | None
    files: dict[str, int]
    threads: list[str]
    children: list[str]
    resident: int
    objects: int = 0

    def beside_memory(self) -> tuple[dict[str, int], list[str], list[str]]:
        return self.files, self.threads, self.children

    def counts(self) -> list[int]:
        """How many files, threads, children."""
        return [sum(self.files.values()), len(self.threads), len(self.children)]


class ManyRuns:
    """A process in `space` that runs epok as often as it is told to; its log goes to the file."""

    def __init__(self, space: "Namespace", epok: Path, log: Path) -> None:
        from lab.network import bare_environment  # which the child, run without a path, does not find

        self.log = log
        with log.open("w") as file:
            self.child = space.popen(
                ["env", "-C", str(epok.parent), sys.executable, "-s", __file__, str(epok)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=bare_environment(),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.child.stdin
        with self.child:
            self.child.stdin.close()

    def tell(self, line: object) -> None:
        assert self.child.stdin
        self.child.stdin.write(json.dumps(line) + "\n")
        self.child.stdin.flush()

    def tries(self, *argv: str) -> Iterator[Held]:
        """What is held at each try of a run, and when it is over."""
        assert self.child.stdout
        self.tell(argv)
        while line := self.child.stdout.readline():
            yield (held := Held(**json.loads(line)))
            if held.status is not None:
                return
        raise RuntimeError(f"the process ended:\n{self.log.read_text()[-2000:]}")

    def run(self, *argv: str) -> Held:
        """What is held after a run."""
        *_, last = self.tries(*argv)
        return last


# ------------------------------------------------ the child


def look() -> dict[str, Any]:
    """What is held now, as Held has it."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * PAGE
    return {
        "files": Counter(map(kind_of, os.listdir("/proc/self/fd"))),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": [pid for task in os.listdir("/proc/self/task") for pid in children_of(task)],
        "resident": resident,
    }


def kind_of(descriptor: str) -> str:
    """What it is open for: "socket", "pipe", or a path."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").split(":")[0]
    except OSError:  # the directory that was read
        return "/proc"


def children_of(task: str) -> list[str]:
    try:
        with open(f"/proc/self/task/{task}/children") as file:
            return file.read().split()
    except OSError:  # a thread that has just ended
        return []


def look_when_done() -> dict[str, Any]:
    """The same after a run: its last threads, and those that they start, have a while to end."""
    end = time.monotonic() + 60
    while (others := [each for each in threading.enumerate() if each is not threading.current_thread()]) and (
        time.monotonic() < end
    ):
        others[0].join(1)
    gc.collect()
    return {**look(), "objects": len(gc.get_objects())}


def load(path: str) -> Any:
    """epok.py as a module."""
    spec = importlib.util.spec_from_file_location("epok", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["epok"] = module  # which dataclasses look their module up in
    spec.loader.exec_module(module)
    return module


def try_at_once(between: Callable[[float], None]) -> None:
    """Instead of sleeping between two tries `between` is called."""
    import tenacity.nap

    class Time:
        sleep = staticmethod(between)

    vars(tenacity.nap)["time"] = Time


def main(path: str) -> None:
    lock = threading.Lock()

    def tell(status: int | None, what: dict[str, Any]) -> None:
        with lock:
            print(json.dumps({"status": status, **what}), file=answers, flush=True)

    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        epok = load(path)
        gc.set_threshold(THRESHOLD)
        for line in map(json.loads, sys.stdin):
            if line == AT_ONCE:
                try_at_once(lambda seconds: tell(None, look()))
            else:
                tell(epok.main(line), look_when_done())


if __name__ == "__main__":
    main(sys.argv[1])
