"""The story that tests/try tells: epok on the lab's host, step by step. Exits 1 when something did not happen."""

from pathlib import Path
from typing import Any

import yaml

from lab.network import HOST, Lab

SNAPSHOT = "tests/lab/snapshot.yaml"
ARGS = ("-i", "eth0", "--snapshot", SNAPSHOT, "local")
TRIES = 60  # three nodes at random: one of them is missed about once in ten thousand million times
ANNOTATION = "getbetter.ro/externalport"
FIREWALL = ["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT"]
LEFT_OVER = "iptables-save | grep -e '^-' -e EPOK"


def say(text: str) -> None:
    print(text.rstrip("\n"), flush=True)


def must(happened: bool, what: str) -> None:
    if not happened:
        raise SystemExit(f"tests/try: this did not happen: {what}")


def show_cluster(cluster: dict[str, Any]) -> None:
    say(f"The cluster has three nodes and, in {SNAPSHOT}, these annotations {ANNOTATION}:")
    for item in cluster["items"]:
        meta = item["metadata"]
        if item["kind"] == "Service" and ANNOTATION in meta["annotations"]:
            say(f'  {meta["namespace"]}/{meta["name"]}: "{meta["annotations"][ANNOTATION]}"')


def run_epok(lab: Lab, why: str, *args: str) -> str:
    """Show the command and what it says, which is also handed back."""
    say(f"\n$ ./epok.py {' '.join(args)}     # {why}")
    done = lab.epok(*args)
    said = done.stderr + done.stdout
    say(said)
    must(done.returncode == 0, f"epok ends with exit status 0 (it was {done.returncode})")
    return said


def meet_all_nodes(lab: Lab) -> int:
    """How many connections it took."""
    say(f"\nThe client connects to {HOST}:25, and gets to know each node when it answers for the first time:")
    met: set[str] = set()
    for number in range(1, TRIES + 1):
        answer = lab.ask(25)
        if answer.name not in met:
            say(f"  connection {number}: {answer.name} saw {answer.saw} {answer.sport} on {answer.port}")
        met.add(answer.name)
        if len(met) == len(lab.nodes):
            break
    must(len(met) == len(lab.nodes), f"all nodes answer within {TRIES} connections; {', '.join(sorted(met))} did")
    return number


def nobody_answers(lab: Lab) -> bool:
    try:
        lab.ask(25)
    except ConnectionRefusedError:
        return True
    return False


def main() -> None:
    cluster = yaml.safe_load(Path(SNAPSHOT).read_text())
    with Lab() as lab:
        lab.flush()
        say(f"The lab: a client 192.0.2.10, a host {HOST} (eth0) and nodes 10.0.0.11 to 13, as network namespaces.")
        show_cluster(cluster)
        say(f"\n$ {' '.join(FIREWALL)}     # the host's own firewall")
        lab.host.run(FIREWALL)
        before = lab.saved()
        must(nobody_answers(lab), "the port is closed before")

        log = run_epok(lab, "make it so", *ARGS)
        must("htps" in log, "epok tells why 443:htps is rejected")
        must(not nobody_answers(lab), "the port is open")
        rules = lab.saved()
        run_epok(lab, "again: nothing to do", *ARGS)
        must(lab.saved() == rules, "the second run leaves the rules alone")

        run_epok(lab, "take it all away", "--clean", "local")
        must(nobody_answers(lab), "the port is closed after --clean")
        must(lab.saved() == before, "the rules are as before")
        say(f"\n$ {LEFT_OVER}\n{lab.host.run(['sh', '-c', LEFT_OVER]).stdout}")
        say("That is what was there before, and port 25 is closed again.")

        run_epok(lab, "and back", *ARGS)
        count = meet_all_nodes(lab)
        table = run_epok(lab, "what is forwarded, and how many came", "--status", *ARGS)
        lines = [line.split() for line in table.splitlines() if "default/mail:smtp" in line]
        must(lines[0][-2:-1] == [f"{count}"], f"the status table counts {count} connections to port 25")


if __name__ == "__main__":
    main()
