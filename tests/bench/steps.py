"""steps.py EPOK STARTED ARGUMENTS: runs epok and prints, as JSON, when each step of the run began and what it took.

EPOK is the path of epok.py and STARTED the time.monotonic() at which this process was started. Standard output gets a
list of [step, seconds from the start to its beginning, its seconds, its seconds of CPU in its own thread]; steps of
different threads overlap.
"""

import contextlib
import functools
import gc
import io
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# what epok.py calls it -> what a person does
STEPS = {
    "parse_options": "options",
    "Cluster.__init__": "log in, import kubernetes",
    "SnapshotFile.__init__": "snapshot file",
    "Reader.read": "list",
    "read_facts": "host's facts",
    "read_all_tables": "host's rules",
    "Saved.take": "read rules",
    "make_plan": "plan",
    "render": "ruleset",
    "converge": "transaction, swap",
    "changes_between": "changes",
    "report_swap": "report",
}


def main() -> None:
    path, started, *arguments = sys.argv[1:]
    began: list[tuple[str, float, float, float]] = []

    def timed(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kw: Any) -> Any:
            start, cpu = time.monotonic(), time.thread_time()
            try:
                return function(*args, **kw)
            finally:
                name = f"{step} {args[1].name}s" if step == "list" else step
                began.append((name, start - float(started), time.monotonic() - start, time.thread_time() - cpu))

        return wrapper

    began.append(("Python starts", 0.0, time.monotonic() - float(started), time.process_time()))
    epok = types.ModuleType("epok")
    sys.modules["epok"] = epok  # which dataclasses look their module up in
    # from its source, as for a script, which has no cache of byte code
    code = timed("compile epok.py", compile)(Path(path).read_text(), path, "exec")
    timed("import what it needs", exec)(code, vars(epok))
    for name, step in STEPS.items():
        *outer, last = name.split(".")
        owner = functools.reduce(getattr, outer, epok)
        setattr(owner, last, timed(step, getattr(owner, last)))
    gc.set_threshold(100_000)  # as the last lines of epok.py do
    with contextlib.redirect_stdout(io.StringIO()):
        status = timed("run", epok.main)(arguments)
    print(json.dumps(began))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
