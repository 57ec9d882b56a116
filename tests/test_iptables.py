"""epok against real iptables, nft and legacy: what is foreign stays, what is epok's is mended."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import epok
from conftest import faults
from lab.gateway import OLDER_RULE
from lab.iptables import held_lock
from lab.machine import latest_end, stretched
from lab.network import HOST, HOST6, PROGRAM, Lab, warnings_in
from lab.objects import node, port, service, snapshot

LOCAL = ("-i", "eth0", "local")
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")], families=("IPv4", "IPv6"))
EVERY_FORM = [
    MAIL,
    service("dns", "53:30053", [port(53, 30053, "dns"), port(53, 30053, "udp", "UDP"), port(53, 30053, "sc", "SCTP")]),
    service("web", "8000-8009:30000-30009", [port(8000 + n, 30000 + n, f"w{n}") for n in range(10)]),
    service(
        "own",
        "81:30081",
        [port(81, 30081)],
        families=("IPv4", "IPv6"),
        sessionAffinity="ClientIP",
        annotations={
            "epok.getbetter.ro/internal": "",
            "epok.getbetter.ro/allow-range": "203.0.113.0/24, 192.0.2.1, 2001:db8::/32, 2001:db8:9::1",
        },
    ),
]
EVERY_OPTION = (
    "-i",
    "eth0,eth+,lo",
    "--external-interface",
    "eth0",
    "--addresses",
    "192.0.2.1,198.51.100.0/24,2001:db8:1::/64",
    "local",
)
FOREIGN = {
    "nat": """
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SEP-4H2YTQOTVPKJ5A3L - [0:0]
:EPOKAL - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 172.17.0.2:443
-A KUBE-SERVICES -m comment --comment "this jumps -j EPOK, but only in words" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SEP-4H2YTQOTVPKJ5A3L -p tcp -m comment --comment "default/mail:smtp" -m tcp -j DNAT --to-destination 10.42.0.7:25
-A EPOKAL -p tcp -m tcp --dport 9 -j RETURN
""",
    "filter": """
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
""",
}
OLDER = """*nat
-A PREROUTING -i eth0 -p tcp -m tcp --dport 25 -m state --state NEW -m comment --comment "epok_rule_id=a1" -m statistic --mode nth --every 2 --packet 0 -j DNAT --to-destination 10.0.0.11:2025
-A PREROUTING -i eth0 -p tcp -m tcp --dport 25 -m state --state NEW -m comment --comment "epok_rule_id=a2; epok_service_id=b" -j DNAT --to-destination 10.0.0.12:2025
-A PREROUTING -p tcp -m tcp --dport 26 -m comment --comment "not epok_rule of any id" -j DNAT --to-destination 10.0.0.12:2026
COMMIT
"""


OTHER = service("other", "26:30001", [port(26, 30001)])
fault = faults("host faults")
any_version = pytest.mark.any_version  # the tools are not there, or others, or have nothing to do with it
only_legacy = pytest.mark.parametrize("lab", ["legacy"], indirect=True)  # nft has no lock
only_nft = pytest.mark.parametrize("lab", ["nft"], indirect=True)  # legacy tables are no nft tables


def add_foreign(lab: Lab) -> None:
    """Docker's and kube-proxy's chains, and a policy, as a host would have them before epok comes."""
    text = "".join(f"*{table}{rules}COMMIT\n" for table, rules in FOREIGN.items())
    lab.host.run(["iptables-restore", "--noflush"], text)
    lab.host.run(["iptables", "-P", "FORWARD", "DROP"])


def foreign(saved: str) -> list[str]:
    """The lines that are not epok's."""
    return [
        line for line in saved.splitlines() if not re.match(r":EPOK[ -]|-A EPOK[ -]|-A [A-Z]+ .*-j EPOK(-\w+)?$", line)
    ]


def apply(lab: Lab, *services: dict[str, Any], argv: tuple[str, ...] = LOCAL) -> str:
    """One good run; what it logged."""
    done = lab.epok(*argv, snapshot=lab.cluster(*services))
    assert done.returncode == 0, done.stderr
    return done.stderr


def in_sync(log: str) -> bool:
    return "in sync" in log and len(log.splitlines()) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_every_rule_form_is_printed_back_word_for_word(lab: Lab, version: int) -> None:
    options = epok.parse_options([*EVERY_OPTION, "--snapshot", "-"], {})
    apply(lab, *EVERY_FORM, argv=EVERY_OPTION)
    plan = plan_of(lab, options)
    family = epok.FAMILIES[version == 6]
    wanted = epok.render(plan.forwards, family, options)
    for table in ("nat", "filter"):
        text = lab.host.run([f"{family.tool}-save", "-t", table]).stdout
        found = epok.Saved(table).read(text.split("\n")).whole
        assert found is not None
        assert found.chains == wanted[table].chains
    assert sum(len(rules) for rules in wanted["nat"].chains.values()) > 70


def plan_of(lab: Lab, options: epok.Options) -> epok.Plan:
    objects = lab.cluster(*EVERY_FORM)["items"]
    services = epok.needed(epok.SERVICES, (item for item in objects if item["kind"] == "Service"))
    nodes = epok.needed(epok.NODES, (item for item in objects if item["kind"] == "Node"))
    return epok.make_plan(epok.Snapshot(tuple(services), tuple(nodes), {}), options)


def test_a_second_run_sends_nothing(lab: Lab) -> None:
    apply(lab, *EVERY_FORM, argv=EVERY_OPTION)
    before = lab.saved(), lab.saved(6)
    assert in_sync(apply(lab, *EVERY_FORM, argv=EVERY_OPTION))
    assert (lab.saved(), lab.saved(6)) == before


def test_counters_outlive_a_run_that_changes_another_forward(lab: Lab) -> None:
    other = service("other", "26:30001", [port(26, 30001)])
    apply(lab, MAIL, other)
    for _ in range(5):
        lab.ask(25)
    leaf = [line for line in lab.saved(counters=True).splitlines() if "--set-xmark" in line and "tcp-25-" in line]
    assert leaf[0].startswith("[5:")
    apply(lab, MAIL)
    assert leaf[0] in lab.saved(counters=True)


@fault
def test_foreign_chains_rules_and_policies_survive_apply_and_clean(lab: Lab) -> None:
    add_foreign(lab)
    before = lab.saved()
    for services in ((MAIL,), (MAIL, *EVERY_FORM[1:]), EVERY_FORM, ()):
        apply(lab, *services)
        assert foreign(lab.saved()) == before.splitlines()
    lab.epok("--clean", "local", check=True)
    assert lab.saved() == before


def test_clean_removes_the_older_epoks_rules_too_and_again_does_nothing(lab: Lab) -> None:
    lab.host.run(["iptables-restore", "--noflush"], OLDER)
    apply(lab, MAIL)
    assert lab.saved().count("epok_rule_id") == 2
    log = lab.epok("--clean", "local", check=True).stderr
    assert "info: removed 2 rules of the older epok\n" in log and not re.search("put right|warning", log), log
    assert "epok_rule_id" not in lab.saved() and "EPOK" not in lab.saved()
    assert "not epok_rule of any id" in lab.saved()
    assert in_sync(lab.epok("--clean", "local", check=True).stderr)


def cure_of_older(log: str) -> str:
    """The command in the warning about rules of the older epok."""
    [cure] = re.findall(r"warning: this host has \d+ rules? of the older epok, .* as root on the host: (.*)\n", log)
    return str(cure)


def test_what_the_older_epok_left_is_warned_of_until_the_command_in_the_warning_takes_it_away(lab: Lab) -> None:
    lab.host.run(["iptables-restore", "--noflush"], f"{OLDER}*nat\n{OLDER_RULE}COMMIT\n")
    apply(lab, MAIL)
    assert "no longer forwarding tcp/25" in apply(lab) and lab.ask(25).name in ("node1", "node2")
    before = [line for line in lab.saved().splitlines() if "epok_rule_id" not in line]
    log = apply(lab)
    assert "warning: this host has 3 rules of the older epok, which forward whatever the annotations say; " in log
    lab.host.run(["sh", "-ec", cure_of_older(log)])
    assert lab.saved().splitlines() == before
    with pytest.raises(ConnectionRefusedError):
        lab.ask(25)
    assert in_sync(apply(lab))


def damage(lab: Lab, how: str) -> None:
    """Somebody's hand in epok's rules: shell words of iptables, CHAIN standing for a leaf's name."""
    leaf = next(
        line.split()[1] for line in lab.saved().splitlines() if line.startswith("-A EPOK-tcp-25-") and "DNAT" in line
    )
    for line in how.split(";"):
        lab.host.run(["iptables", *shlex.split(line.replace("CHAIN", leaf))])


DAMAGE = {
    "a leaf rule is deleted": "-t nat -D CHAIN 2",
    "a leaf is emptied": "-t nat -F CHAIN",
    "a stray rule in a leaf": "-t nat -I CHAIN -j ACCEPT",
    "a stray rule in EPOK": "-t nat -A EPOK -i eth9 -j ACCEPT",
    "EPOK is emptied": "-t nat -F EPOK",
    "the hook is deleted": "-t nat -D PREROUTING -m addrtype --dst-type LOCAL -j EPOK",
    "the hook is doubled": "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j EPOK",
    "a wrong hook": "-t nat -A PREROUTING -p tcp -j EPOK",
    "a hook where none belongs": "-t nat -A OUTPUT -j EPOK",
    "PREROUTING is emptied": "-t nat -F PREROUTING",
    "FORWARD is emptied": "-F FORWARD",
    "the filter chain is emptied": "-F EPOK-FORWARD",
    "masquerading is deleted": "-t nat -F EPOK-POSTROUTING",
    "a chain of ours that we do not know": "-t nat -N EPOK-tcp-9-abcdef;-t nat -A EPOK-tcp-9-abcdef -j ACCEPT",
}


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE)
@fault
def test_damage_is_mended_by_the_next_run(lab: Lab, how: str) -> None:
    apply(lab, MAIL)
    before = lab.saved()
    damage(lab, how)
    assert lab.saved() != before
    dry = lab.epok("--dry-run", *LOCAL, snapshot=lab.cluster(MAIL))
    assert dry.returncode == 3
    assert "in sync" not in apply(lab, MAIL)
    assert lab.saved() == before
    assert in_sync(apply(lab, MAIL))
    assert len(dry.stdout) < 1000  # that alone was sent


@fault
def test_a_wrong_hook_with_any_bytes_in_its_comment_is_deleted(lab: Lab) -> None:
    apply(lab, MAIL)
    before = lab.saved()
    text = '*nat\n-A PREROUTING -m comment --comment "L\\351on" -j EPOK\nCOMMIT\n'  # an e acute in Latin-1
    lab.host.run(["sh", "-c", f"printf '{text}' | iptables-restore --noflush"])
    apply(lab, MAIL)
    assert lab.saved() == before


@any_version
@fault
def test_runs_at_the_same_time_end_with_one_set_of_rules(lab: Lab) -> None:
    argv = [*PROGRAM, "--snapshot", "-", *LOCAL]
    runs = [lab.host.popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    text = json.dumps(lab.cluster(*EVERY_FORM))
    for child in runs:
        assert child.stdin
        child.stdin.write(text)
        child.stdin.close()
    logs = [child.stderr.read() for child in runs if child.stderr]
    assert [child.wait() for child in runs] == [0] * 4, logs
    assert in_sync(apply(lab, *EVERY_FORM))


@fault
def test_what_was_done_before_a_failure_is_said(lab: Lab) -> None:
    tool = "/run/alternatives/ip6tables-restore"
    script = f"mv {tool} /run/kept; printf '#!/bin/sh\\necho no way >&2; exit 1\\n' >{tool}; chmod +x {tool}"
    lab.host.run(["sh", "-c", script])
    try:
        done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL))
    finally:
        lab.host.run(["mv", "/run/kept", tool])
    assert done.returncode == 1 and done.stderr.count("error:") == 1
    assert "before that 1 input of iptables-restore took effect" in done.stderr
    assert lab.ask(25)


@fault
def test_a_rule_that_was_put_in_front_of_the_hook_stays_there(lab: Lab) -> None:
    apply(lab, MAIL)
    lab.host.run(["iptables", "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "9", "-j", "ACCEPT"])
    before = lab.saved()
    assert in_sync(apply(lab, MAIL))
    assert lab.saved() == before


@fault
def test_a_chain_that_a_foreign_rule_refers_to_is_emptied_and_kept(lab: Lab) -> None:
    apply(lab, MAIL)
    leaf = next(line.split()[1] for line in lab.saved().splitlines() if "tcp-25-" in line and "DNAT" in line)
    lab.host.run(["iptables", "-t", "nat", "-N", "SOMEBODY"])
    lab.host.run(["iptables", "-t", "nat", "-A", "SOMEBODY", "-p", "tcp", "-j", leaf])
    log = apply(lab)
    assert f":{leaf} " in lab.saved() and f"-A {leaf} " not in lab.saved()
    assert "-A SOMEBODY" in lab.saved()
    assert leaf in log and "warning" in log
    done = lab.epok("--clean", "local", check=True)
    assert leaf in done.stderr and "-A SOMEBODY" in lab.saved()


def test_a_dry_run_prints_what_a_person_could_feed_in_by_hand(lab: Lab) -> None:
    before = lab.saved()
    dry = lab.epok("--dry-run", *LOCAL, snapshot=lab.cluster(*EVERY_FORM))
    assert dry.returncode == 3 and lab.saved() == before
    assert dry.stdout.startswith("+ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes\n")
    for command, text in inputs(dry.stdout):
        lab.host.run(shlex.split(command), text)
    again = lab.epok("--dry-run", *LOCAL, snapshot=lab.cluster(*EVERY_FORM))
    assert (again.returncode, again.stdout) == (0, "")


def inputs(printed: str) -> Iterator[tuple[str, str]]:
    for part in printed.split("# ip")[1:]:
        command, _, text = part.partition("\n")
        yield f"ip{command}", text


@any_version
def test_verbose_names_every_command_and_quiet_nothing_that_is_well(lab: Lab) -> None:
    log = apply(lab, MAIL, argv=("-v", *LOCAL))
    assert log.count("debug: this host: iptables-restore --noflush --wait 5: exit status 0\n") == 1
    saves = re.findall(r"debug: this host: (ip\S+-save.*): exit status 0\n", apply(lab, MAIL, argv=("-v", *LOCAL)))
    assert set(saves) == {"iptables-save", "ip6tables-save"}, "one an IP version tells all"
    assert apply(lab, MAIL, argv=("-q", *LOCAL)) == ""


@only_nft
def test_beside_a_table_that_iptables_cannot_print_each_of_epoks_is_read_by_itself(lab: Lab) -> None:
    apply(lab, MAIL)
    native = (
        "add table ip raw; add chain ip raw mine { type filter hook input priority 5; }; add rule ip raw mine accept"
    )
    lab.host.run(["nft", native])
    try:
        log = apply(lab, MAIL, OTHER, argv=("-v", *LOCAL))
        assert log.count("debug: this host: iptables-save -t nat: exit status 0\n") == 2, "once before, once behind"
        assert "now forwarding tcp/26" in log and lab.ask(26).port == 30001
    finally:
        lab.host.run(["nft", "delete table ip raw"])


def fails(lab: Lab, *says: str, argv: Sequence[str] = (), env: "dict[str, str] | None" = None, limit: int = 20) -> None:
    """A run through `argv` that would change the rules, and leaves them, with one error that matches `says`, in time."""
    before = lab.saved() + lab.saved(6)
    limit, cluster = stretched(limit), lab.cluster(MAIL, OTHER)
    began = time.monotonic()
    done = lab.epok("--timeout", str(limit), *LOCAL, snapshot=cluster, env=env, through=argv)
    assert time.monotonic() - began < latest_end(limit), done.stderr
    assert lab.saved() + lab.saved(6) == before, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for words_of_cause in says:
        assert re.search(words_of_cause, errors[0]), f"not in the error: {words_of_cause}\n{errors[0]}"


@fault
@only_legacy
def test_a_lock_that_is_held_for_a_while_is_waited_for(lab: Lab) -> None:
    with held_lock(lab.host, 3):
        apply(lab, MAIL)
    assert lab.ask(25)


@fault
@only_legacy
def test_a_lock_that_is_never_given_back_ends_the_run_in_time(lab: Lab) -> None:
    apply(lab, MAIL)
    with held_lock(lab.host, 1000):
        fails(lab, "iptables-restore", "lock|no answer within --timeout", limit=4)


# The tool, what it does instead, what is said of it, and --timeout where it takes all of that.
BROKEN_TOOLS: dict[str, Any] = {
    "rules without end": (
        "iptables-save",
        "echo '*nat'; exec yes -- '-A INPUT -j ACCEPT'",
        "more than 64 MiB, or 700,000 lines",
    ),
    "addresses without end": ("ip", "exec cat /dev/zero", "ip -br addr.* more than 16 MiB"),
    "complaints without end": ("iptables-restore", "exec yes >&2", "more than 16 MiB"),
    "no rules": ("iptables-save", "exit 0", "iptables-save"),
    "a restore that does nothing": ("iptables-restore", "exit 0", "differ again"),
    "100 MB of rules": (
        "iptables-save",
        "echo '*nat'; yes -- '-A INPUT -j ACCEPT' | head -c 100000000; echo; echo COMMIT",
        "its rules|iptables-save",
    ),
    "no UTF-8": ("iptables-save", r"printf '*nat\n\377\376\n'", "iptables-save"),
    "NUL": ("iptables-save", r"printf '*nat\n\0\n'", "iptables-save"),
    "silence": ("iptables-save", "exec sleep 1000", "no answer within", 4),
    "a restore that is silent": ("iptables-restore", "exec sleep 1000", "no answer within", 4),
    "somebody who keeps the output open": ("iptables-save", "sleep 1000 & exit 0", "no answer within", 4),
    "a crash": ("iptables-save", "kill -SEGV $$", "iptables-save.*-11", 4),
    "a restore that crashes": ("iptables-restore", "kill -SEGV $$", "iptables-restore.*-11", 4),
}


@any_version
@pytest.mark.parametrize("tool, script, says, limit", [
    pytest.param(*fault, *([20] if len(fault) == 3 else []), id=name) for name, fault in BROKEN_TOOLS.items()
])  # fmt: skip
@fault
@only_nft
def test_a_tool_that_is_broken_leaves_the_rules_alone(
    lab: Lab, tmp_path: Path, tool: str, script: str, says: str, limit: int
) -> None:
    apply(lab, MAIL)
    (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / tool).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    fails(lab, says, argv=["prlimit", "--data=2000000000"], env=env, limit=limit)


@any_version
@only_nft
def test_a_table_that_is_never_epoks_may_have_any_size(lab: Lab, tmp_path: Path) -> None:
    apply(lab, MAIL)
    for tool in ("iptables-save", "ip6tables-save"):
        huge = "echo '*raw'; yes -- '-A PREROUTING -j ACCEPT' | head -n 1000000; echo COMMIT"
        real = lab.host.run(["sh", "-c", f"command -v {tool}"]).stdout.strip()
        (tmp_path / tool).write_text(f'#!/bin/sh\n[ "$*" ] || {{ {huge}; }}\nexec {real} "$@"\n')
        (tmp_path / tool).chmod(0o755)
    done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL, OTHER), env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0 and lab.ask(26).port == 30001, done.stderr
    assert warnings(done) == []


FULL = """mkdir -p /run/full; mount -t tmpfs -o nr_inodes=1 none /run/full; export TMPDIR=/run/full
export XTABLES_LOCKFILE=/run/full/lock EPOK_METRICS_FILE=/run/full/epok.prom; exec "$@" """


@any_version
@fault
def test_a_disk_that_is_full_keeps_from_the_host_only_what_needs_it(lab: Lab) -> None:
    """That is legacy's lock."""
    apply(lab, MAIL)
    full = ["unshare", "--mount", "sh", "-ec", FULL, "sh"]
    if lab.backend == "legacy":
        return fails(lab, "lock file.*No space left", argv=full)
    done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL, OTHER), check=True, through=full)
    [warning] = warnings(done)
    assert re.search("--metrics-file.*No space left", warning)
    assert lab.ask(26).port == 30001
    return None


@any_version
@pytest.mark.parametrize("to", ["2>/dev/full", ">/dev/full 2>&1", "2>&-"])
@fault
@only_nft
def test_a_log_that_nobody_can_write_does_not_keep_the_host_from_getting_right(lab: Lab, to: str) -> None:
    argv = shlex.join([*PROGRAM, "--snapshot", "-", "-v", *LOCAL])
    lab.host.run(["sh", "-c", f"{argv} {to}"], json.dumps(lab.cluster(MAIL)))
    assert lab.ask(25)


STRANGERS = """*nat
:EPOKAL - [0:0]
:EPOK_X - [0:0]
:EPOK-MINE - [0:0]
:SOMEBODY - [0:0]
-A PREROUTING -p tcp -m tcp --dport 7 -j EPOKAL
-A PREROUTING -p tcp -m tcp --dport 8 -j EPOK_X
-A PREROUTING -p tcp -m tcp --dport 9 -j EPOK-MINE
-A EPOKAL -j RETURN
-A EPOK-MINE -j RETURN
-A EPOK_X -j EPOKAL
-A SOMEBODY -j EPOK_X
COMMIT
"""


@fault
def test_of_a_strangers_chains_epok_takes_for_its_own_those_that_begin_with_its_name_and_a_dash(lab: Lab) -> None:
    """EPOK-* is what it says that it owns; whatever else begins with EPOK is somebody else's."""
    lab.host.run(["iptables-restore", "--noflush"], STRANGERS)
    theirs = [line for line in STRANGERS.splitlines() if "-A" in line and "EPOK-MINE" not in line]
    apply(lab, MAIL)
    assert set(theirs) <= set(lab.saved().splitlines())
    assert "EPOK-MINE" not in lab.saved()
    lab.epok("--clean", "local", check=True)
    assert [line for line in lab.saved().splitlines() if line.startswith("-A")] == theirs


@any_version
@fault
def test_another_writer_all_the_time_breaks_neither(lab: Lab) -> None:
    apply(lab, MAIL)
    rule = "PREROUTING -p tcp -m tcp --dport 7 -j ACCEPT"
    loop = f"while :; do iptables -w -t nat -I {rule}; iptables -w -t nat -D {rule}; done"
    writer = lab.host.popen(["sh", "-c", loop])
    try:
        for number in range(10):
            services = [MAIL] if number % 2 else EVERY_FORM
            apply(lab, *services)
    finally:
        writer.kill()
        writer.wait()
    lab.host.run(["iptables", "-w", "-t", "nat", "-D", *rule.split()], check=False)
    assert in_sync(apply(lab, MAIL))


@only_nft
@fault
def test_native_rules_in_nat_make_it_unreadable_and_nothing_is_changed(lab: Lab) -> None:
    apply(lab, MAIL)
    lab.host.run(["nft", "add rule ip nat PREROUTING meta mark set numgen inc mod 2"])
    before = lab.host.run(["nft", "list", "ruleset"]).stdout
    done = lab.epok(*LOCAL, snapshot=lab.cluster())
    assert done.returncode == 1 and "incompatible" in done.stderr
    assert lab.host.run(["nft", "list", "ruleset"]).stdout == before
    lab.host.run(["nft", "flush", "chain", "ip", "nat", "PREROUTING"])


WITHOUT = {
    "iptables": "mkdir -p /run/none; mount --bind /run/none /usr/sbin",
    "ip6tables": "rm -rf /run/less; cp -a /run/alternatives /run/less; rm /run/less/ip6tables*; "
    "mount --bind /run/less /etc/alternatives",
}


def without(tool: str) -> list[str]:
    """What runs a command on a host that lacks the tool."""
    return ["unshare", "--mount", "sh", "-ec", WITHOUT[tool] + '; exec "$@"', "sh"]


@any_version
@fault
def test_a_host_without_iptables_is_told_what_to_install(lab: Lab) -> None:
    apply(lab, MAIL)
    fails(lab, "apt-get install iptables", argv=without("iptables"))


@any_version
@fault
def test_a_host_without_ip6tables_gets_the_forwards_over_ipv4(lab: Lab) -> None:
    done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL), through=without("ip6tables"))
    assert done.returncode == 0 and lab.ask(25)
    assert done.stderr.count("warning:") == 1 and "IPv6" in done.stderr
    assert "over IPv6" not in re.sub("warning: .*", "", done.stderr), "what is not forwarded is not told"


@any_version
@fault
def test_who_may_not_is_told_what_to_do(lab: Lab) -> None:
    apply(lab, MAIL)
    drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]
    # a checkout, or its Python, may well be in a home directory that is closed to others
    drop += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    fails(lab, "apt-get install sudo|nobody ALL=\\(root\\) NOPASSWD: ", argv=drop)


def test_another_mark_is_taken_over_and_said(lab: Lab) -> None:
    apply(lab, MAIL)
    log = apply(lab, MAIL, argv=("--mark", "0xc000", *LOCAL))
    assert "--mark" in log and lab.ask(25)
    assert "0x30000000" not in lab.saved()


@any_version
def test_one_change_among_2700_forwards_is_a_small_input(lab: Lab) -> None:
    nodes = [node(f"node{n}", f"10.0.0.{10 + n}") for n in range(1, 11)]
    services = [service(f"s{n}", f"{10000 + n}:{20000 + n}", [port(80, 20000 + n)]) for n in range(2700)]
    lab.epok(*LOCAL, snapshot=snapshot(*nodes, *services), check=True)
    services[1300] = service("s1300", "11300:29999", [port(80, 29999)])
    changed = snapshot(*nodes, *services)
    dry = lab.epok("--dry-run", *LOCAL, snapshot=changed)
    sent = "".join(text for _, text in inputs(dry.stdout))
    assert dry.returncode == 3 and len(sent) <= 6000
    assert dry.stdout.startswith(
        "~ tcp/11300 -> default/s1300:80 (NodePort 29999) on 10 nodes: NodePort 21300 before\n"
    )
    lab.epok(*LOCAL, snapshot=changed, check=True)
    assert in_sync(lab.epok(*LOCAL, snapshot=changed).stderr)


# ---- what would make forwards fail without a word


@any_version
@pytest.mark.parametrize("version, sysctl", [(4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")])
def test_a_host_that_does_not_forward_is_told_the_command_that_mends_it(lab: Lab, version: int, sysctl: str) -> None:
    setting = Path("/proc/sys", *sysctl.split("."))
    lab.host.run(["sh", "-c", f"echo 0 >{setting}"])
    try:
        assert not warnings(lab.epok("-i", "eth0", "local", snapshot=lab.cluster()))
        other = service("mail", "25:2025", [port(25, 2025)], families=["IPv6" if version == 4 else "IPv4"])
        assert not warnings(lab.epok("-i", "eth0", "local", snapshot=lab.cluster(other)))
        mail = lab.cluster(service("mail", "25:2025", [port(25, 2025)], families=["IPv4", "IPv6"]))
        [warning] = warnings(lab.epok("-i", "eth0", "local", snapshot=mail))
        command = re.search(r"sysctl -w (\S+)=(1)$", warning)
        assert command
        assert command[1] == sysctl
        lab.host.run(["sh", "-c", f"echo {command[2]} >/proc/sys/{command[1].replace('.', '/')}"])
        assert not warnings(lab.epok("-i", "eth0", "local", snapshot=mail))
        assert lab.ask(25, to=HOST if version == 4 else HOST6).port == 2025
    finally:
        lab.host.run(["sh", "-c", f"echo 1 >{setting}"])


@any_version
@pytest.mark.parametrize("interfaces, missing", [("eth0,eth9", "eth9"), ("wlan+", r"wlan\+"), ("eth0,eth+,lo", "")])
def test_an_interface_that_is_not_there_is_told_with_those_that_are(lab: Lab, interfaces: str, missing: str) -> None:
    found = warnings(lab.epok("-i", interfaces, "local", snapshot=lab.cluster()))
    assert len(found) == bool(missing)
    assert all(re.search(rf"no interface {missing}: .*-i .*lo, eth1, eth0, eth2", line) for line in found)


@any_version
def test_the_far_end_of_a_link_is_not_the_hosts_own_address(lab: Lab) -> None:
    lab.host.wire("addr add 192.0.2.77 peer 203.0.113.50/32 dev eth0")
    try:
        cluster = snapshot(node("far", "203.0.113.50"), MAIL)
        assert not warnings(lab.epok(*LOCAL, snapshot=cluster))
        assert "--to-destination 203.0.113.50:2025" in lab.saved()
    finally:
        lab.host.wire("addr del 192.0.2.77 peer 203.0.113.50/32 dev eth0")


@pytest.mark.parametrize("name", ['EPOK-a"b', 'EPOK-"', "EPOK-'", "EPOK-\\", "EPOK-\x01"], ids=repr)
def test_a_chain_whose_name_cannot_stand_in_an_input_is_left_alone(lab: Lab, name: str) -> None:
    lab.host.run(["iptables", "-t", "nat", "-N", name])
    lab.host.run(["iptables", "-t", "nat", "-A", "PREROUTING", "-j", name])
    theirs = [line for line in lab.saved().splitlines() if name in line]
    assert len(theirs) == 2
    apply(lab, MAIL)
    assert in_sync(apply(lab, MAIL))
    assert lab.ask(25).port == 2025
    assert lab.epok("--clean", "local").returncode == 0
    assert [line for line in lab.saved().splitlines() if name in line] == theirs
    lab.host.run(["iptables", "-t", "nat", "-F", "PREROUTING"])


@any_version
@pytest.mark.parametrize("argv", [["--status"], ["--explain", "default/mail", "-i", "eth0"]], ids=["status", "explain"])
def test_a_comment_on_the_host_sends_no_codes_to_the_terminal(lab: Lab, argv: list[str]) -> None:
    apply(lab, MAIL)
    lab.host.run(["iptables", "-I", "FORWARD", "-m", "comment", "--comment", "\x1b[31mred\x07", "-j", "DROP"])
    shown = lab.epok(*argv, "local", snapshot=lab.cluster(MAIL)).stdout
    assert r"\x1b[31mred\x07" in shown
    assert "\x1b" not in shown


@any_version
@only_nft
def test_an_annotation_sends_no_codes_to_the_terminal(lab: Lab) -> None:
    bad = service("mail", "25:\x1b[31mred\x00", [port(25, 2025)])
    shown = lab.epok("--explain", "default/mail", "-i", "eth0", "local", snapshot=lab.cluster(bad)).stdout
    assert r"25:\x1b[31mred\x00  rejected" in shown
    assert not re.search(r"[^ -~\n]", shown)


@any_version
@fault
def test_flows_that_take_too_long_to_end_are_a_warning(lab: Lab, tmp_path: Path) -> None:
    """The real conntrack is never slow enough."""
    (tmp_path / "conntrack").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "conntrack").chmod(0o755)
    dns = service("dns", "53:30053", [port(53, 30053, protocol="UDP")])
    done = lab.epok(
        "--timeout",
        str(stretched(3)),
        *LOCAL,
        snapshot=lab.cluster(dns),
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    [warning] = warnings(done)
    assert "UDP clients" in warning
    assert lab.ask(53, "udp").port == 30053


@any_version
@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
@fault
def test_a_dry_run_that_cannot_be_written_is_one_error(lab: Lab, output: str) -> None:
    argv = shlex.join([*PROGRAM, "--snapshot", "-", "--dry-run", *LOCAL])
    done = lab.host.run(["sh", "-c", f"{argv} {output}"], json.dumps(lab.cluster(MAIL)), check=False)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch("error: standard output.*\n", done.stderr)


@any_version
@pytest.mark.parametrize(
    ("said", "advice", "other"),
    [
        ("sudo: iptables-save: command not found", "apt-get install iptables", "install sudo"),
        ("bash: line 1: sudo: command not found", "apt-get install sudo", "install iptables"),
        ("modprobe: FATAL: Module ip_tables not found in directory /lib/modules", "ip_tables", "apt-get"),
    ],
)
def test_what_is_missing_is_named_and_nothing_else(said: str, advice: str, other: str) -> None:
    result = epok.Result(1, "", said)
    error = str(epok.refusal(epok.LocalHost(), ("sudo", "-n", "iptables-save", "-t", "nat"), result))
    assert advice in error
    assert other not in error


def test_a_command_to_be_copied_has_the_words_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are: LINE stands for something in epok's own texts."""
    monkeypatch.setattr(sys, "argv", ["epok.py", "--kubeconfig", "ONLINE.yaml", "local"])
    result = epok.Result(1, "", "bash: line 1: sudo: command not found")
    error = str(epok.refusal(epok.LocalHost(), ("sudo", "-n", "iptables-restore"), result, "*nat\nCOMMIT\n"))
    assert error.endswith("epok.py --kubeconfig ONLINE.yaml local'")


def warnings(done: "subprocess.CompletedProcess[str]") -> list[str]:
    assert done.returncode == 0, done.stderr
    return warnings_in(done.stderr)
