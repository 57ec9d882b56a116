"""Command line and environment to Options, or exit status 2 and one line that says what would be accepted."""

import contextlib
import dataclasses
import io
import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import epok

HOME = str(Path.home())
PIN = "SHA256:" + "A" * 43
USAGE = epok.__doc__ or ""
Refused = Callable[..., str]


class Row(NamedTuple):
    """An option with a value: a text that it may have, what that means, and another such text."""

    option: str
    short: str
    variable: str
    text: str
    value: Any
    other: str


def networks(*texts: str) -> tuple[Any, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


ROWS = [
    Row("--interfaces", "-i", "EPOK_INTERFACES", " eth0, eth+ ,lo,eth0", ("eth0", "eth+", "lo"), "wan0"),
    Row("--external-interface", "", "EPOK_EXTERNAL_INTERFACE", "eth1", "eth1", "eth0"),
    Row("--addresses", "", "EPOK_ADDRESSES", "192.0.2.1, 2001:db8::/64", networks("192.0.2.1", "2001:db8::/64"), "::1"),
    Row("--batch-commands", "", "EPOK_BATCH_COMMANDS", "False", "false", "true"),
    Row("--batch-size", "", "EPOK_BATCH_SIZE", "2000000", 2_000_000, "1000000"),
    Row("--max-nodes", "", "EPOK_MAX_NODES", "3", 3, "100"),
    Row("--masquerade", "", "EPOK_MASQUERADE", "always", "always", "never"),
    Row("--ports", "", "EPOK_PORTS", "25, 80 - 90/TCP", (((25, 25), ""), ((80, 90), "tcp")), "1-65535"),
    Row("--publish", "", "EPOK_PUBLISH", "192.0.2.1, 2001:DB8::1", ("192.0.2.1", "2001:db8::1"), "gw.example.org"),
    Row("--mark", "", "EPOK_MARK", "0x3", (1, 2), "12"),
    Row("--kubeconfig", "", "KUBECONFIG", "/etc/k3s.yaml", "/etc/k3s.yaml", "/other"),
    Row("--context", "", "EPOK_CONTEXT", "home", "home", "work"),
    Row("--snapshot", "", "EPOK_SNAPSHOT", "-", "-", "/tmp/cluster.json"),
    Row("--timeout", "", "EPOK_TIMEOUT", "1.5", 1.5, "7"),
    Row("--explain", "", "", "default/mail", "default/mail", "default/web"),
    Row("--output", "-o", "", "TEXT", "text", "text"),
    Row("--metrics-file", "", "EPOK_METRICS_FILE", "~/epok.prom", f"{HOME}/epok.prom", "/other"),
    Row("--host", "-H", "EPOK_SSH_HOST", "root@192.0.2.1", (("root", "192.0.2.1", 22),), "epok@gateway"),
    Row("--port", "-p", "EPOK_SSH_PORT", "2222", 2222, "23"),
    Row("--key", "-k", "EPOK_SSH_KEY", "~/.ssh/epok", f"{HOME}/.ssh/epok", "/key"),
    Row("--known-hosts", "", "EPOK_SSH_KNOWN_HOSTS", "~/known", f"{HOME}/known", "/known"),
    Row(
        "--host-key",
        "",
        "EPOK_SSH_HOST_KEY",
        f"{PIN}, ssh-ed25519 AAAA/+== me",
        (PIN, "ssh-ed25519 AAAA/+== me"),
        "any",
    ),
]
SSH_ONLY = [row for row in ROWS if row.variable.startswith("EPOK_SSH_")]
WITH_VARIABLE = [row for row in ROWS if row.variable]
by_variable = pytest.mark.parametrize("row", WITH_VARIABLE, ids=[row.option for row in WITH_VARIABLE])
by_option = pytest.mark.parametrize("row", ROWS, ids=[row.option for row in ROWS])


def field(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def command_line(row: Row, *words: str, before: bool = True) -> list[str]:
    """A whole command line with these words about the option before or after the executor."""
    executor = "ssh" if row in SSH_ONLY else "local"
    rest = [] if row.option == "--interfaces" else ["--interfaces=eth0,eth1"]
    rest += ["--host=a@h"] if executor == "ssh" and row.option != "--host" else []
    return [*words, executor, *rest] if before else [*rest, executor, *words]


def parsed(argv: list[str], **environ: str) -> epok.Options:
    return epok.parse_options(argv, environ)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a command line ends with status 2 and one line on standard error; returns the line."""

    def check(argv: list[str], environ: dict[str, str] | None = None) -> str:
        with pytest.raises(epok.Fatal):  # first: what is not refused must not get as far as main
            epok.parse_options(argv, environ or {})
        for setting in epok.SETTINGS:
            monkeypatch.delenv(setting.variable, raising=False)
        for name, value in (environ or {}).items():
            monkeypatch.setenv(name, value)
        assert epok.main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("\n")
        assert re.fullmatch("[ -~]{1,900}", err[:-1]), "one line of printable ASCII that nobody has to scroll"
        return err

    return check


# ------------------------------------------------ where a value may come from


def test_the_table_of_this_file_has_every_setting() -> None:
    rows = {(row.option, row.variable) for row in ROWS} | {("--log-level", "EPOK_LOG_LEVEL")}
    assert rows == {(setting.option, setting.variable) for setting in epok.SETTINGS}


@by_option
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_option_may_stand_before_and_after_the_executor_long_and_short(row: Row, before: bool) -> None:
    short = [[row.short, row.text], [row.short + row.text]] if row.short else []
    for words in ([row.option, row.text], [f"{row.option}={row.text}"], *short):
        options = parsed(command_line(row, *words, before=before))
        assert getattr(options, field(row.option)) == row.value, words


@by_variable
def test_the_environment_counts_where_the_command_line_is_silent(row: Row) -> None:
    options = parsed(command_line(row), **{row.variable: row.text})
    assert getattr(options, field(row.option)) == row.value


@by_variable
@pytest.mark.parametrize("broken", [False, True], ids=["good", "bad"])
def test_the_command_line_beats_the_environment_good_or_bad(row: Row, broken: bool) -> None:
    options = parsed(command_line(row, row.option, row.text), **{row.variable: "\1;" if broken else row.other})
    assert getattr(options, field(row.option)) == row.value


DEFAULTS = {
    "executor": "local", "dry_run": False, "clean": False, "log_level": "info", "interfaces": ("eth0",),
    "external_interface": "", "addresses": (), "batch_commands": "true", "batch_size": 1_677_722, "max_nodes": 16,
    "ports": (((1, 21), ""), ((22, 22), "udp"), ((22, 22), "sctp"), ((23, 65535), "")),
    "masquerade": "auto", "publish": (), "mark": (0x10000000, 0x20000000), "kubeconfig": "", "context": "",
    "snapshot": "", "timeout": 50, "status": False, "explain": "", "output": "text", "metrics_file": "", "host": (),
    "port": 22, "key": "", "known_hosts": "", "host_key": (),
}  # fmt: skip


@pytest.mark.parametrize("environ", [{}, {setting.variable: "" for setting in epok.SETTINGS}], ids=["unset", "empty"])
def test_an_empty_variable_is_an_unset_one(environ: dict[str, str]) -> None:
    options = parsed(["-i", "eth0", "local"], **environ)
    assert {name: getattr(options, name) for name in DEFAULTS} == DEFAULTS


@by_option
def test_an_empty_value_on_the_command_line_is_refused_and_never_replaced(row: Row, refused: Refused) -> None:
    environ = {row.variable: row.text} if row.variable else {}
    assert row.option in refused(command_line(row, f"{row.option}="), environ)


@pytest.mark.parametrize(("words", "variable", "level"), [
    ([], "", "info"),
    (["-v"], "", "debug"),
    (["-q"], "", "warning"),
    ([], "debug", "debug"),
    ([], "WARNING", "warning"),
    ([], "error", "error"),
    ([], "warn", "warning"),
    ([], "TRACE", "debug"),
    (["-v"], "error", "debug"),
    (["-q"], "nonsense", "warning"),
])  # fmt: skip
def test_log_level(words: list[str], variable: str, level: str) -> None:
    for argv in (["-i", "eth0", *words, "local"], ["-i", "eth0", "local", *words]):
        assert parsed(argv, EPOK_LOG_LEVEL=variable).log_level == level


VARIABLES = {  # and what the warning names
    "EPOK_EXTRA_INTERNAL_IPS": "EPOK_ADDRESSES",
    "EPOK_INTERFACE": "EPOK_INTERFACES",
    "EPOK_ADDRESS": "EPOK_ADDRESSES",
    "EPOK_LOGLEVEL": "EPOK_LOG_LEVEL",
    "EPOK_KUBECONFIG": "KUBECONFIG",
    "EPOK_KEY": "EPOK_SSH_KEY",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_the_older_epok_knew_or_that_is_nearly_one_is_told(name: str) -> None:
    [line] = epok.strange_variables({name: "10.0.0.1"})
    assert line.startswith(f"{name} in the environment ") and VARIABLES[name] in line
    assert not list(epok.strange_variables({name: ""}))


def test_a_variable_of_another_purpose_is_not_told() -> None:
    config = Path(epok.__file__).parent / "cron" / "epok.config"
    configured = re.findall(r"(?m)^export (EPOK_\w+)=", config.read_text())
    assert {"EPOK_IMAGE", "EPOK_NS"} < set(configured)
    own = {setting.variable for setting in epok.SETTINGS} | {"EPOK_TEST_ALL", "EPOK_TEST_BIG", "EPOK_BENCH"}
    assert not list(epok.strange_variables(dict.fromkeys([*configured, *own, "EPOK_USER", "PATH"], "x")))


def test_the_line_that_asks_for_interfaces_tells_of_a_variable_that_is_nearly_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EPOK_INTERFACE", "eth0")
    assert epok.main(["local"]) == 2
    assert re.fullmatch("error: which interfaces .*; EPOK_INTERFACE in the environment .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["--dry-run", "--clean", "--status"])
def test_flags(flag: str) -> None:
    for argv in (
        [flag, "-i", "eth0", "local"],
        ["-i", "eth0", "local", flag],
        ["ssh", "-i", "eth0", "-H", "a@h", flag],
    ):
        assert getattr(parsed(argv), field(flag)) is True


@pytest.mark.parametrize("argv", [["local"], ["ssh", "-H", "a@h"], ["local", "--external-interface", "eth0"]])
def test_clean_needs_no_interfaces(argv: list[str]) -> None:
    assert parsed([*argv, "--clean"]).interfaces == ()
    assert parsed([*argv, "--clean", "--dry-run"]).dry_run


# ------------------------------------------------ values


@pytest.mark.parametrize(("option", "text", "value"), [
    ("--interfaces", "a@b-c_d.1", ("a@b-c_d.1",)),
    ("--interfaces", "abcdefghijklmno,abcdefghijklmn+", ("abcdefghijklmno", "abcdefghijklmn+")),
    ("--interfaces", ",eth0,,", ("eth0",)),
    ("--addresses", "192.0.2.9/24", networks("192.0.2.0/24")),
    ("--addresses", "0.0.0.0/0,::/0", networks("0.0.0.0/0", "::/0")),
    ("--addresses", "::1", networks("::1/128")),
    ("--addresses", "192.0.2.9/255.255.255.0", networks("192.0.2.0/24")),
    ("--masquerade", "NEVER", "never"),
    ("--masquerade", "auto", "auto"),
    ("--ports", ",25,\n53/ UDP , 25", (((25, 25), ""), ((53, 53), "udp"))),
    ("--ports", "1-65535/sctp", (((1, 65535), "sctp"),)),
    ("--publish", "auto", ("auto",)),
    ("--publish", "NONE", ()),
    ("--publish", "gw.example.ORG", ("gw.example.org",)),
    ("--publish", "203.0.113.5,2001:DB8:0::5 ,203.0.113.5", ("203.0.113.5", "2001:db8::5")),
    ("--mark", "3", (1, 2)),
    ("--mark", "0X80000001", (1, 1 << 31)),
    ("--mark", "3221225472", (1 << 30, 1 << 31)),
    ("--timeout", "999999", 999999),
    ("--timeout", "0.5", 0.5),
    ("--host", "a@h:2222", (("a", "h", 2222),)),
    ("--host", "a@h:22 , b.c-d_e@example.org", (("a", "h", 22), ("b.c-d_e", "example.org", 22))),
    ("--host", "a@[2001:db8::1]", (("a", "2001:db8::1", 22),)),
    ("--host", "a@[2001:db8::1]:2222", (("a", "2001:db8::1", 2222),)),
    ("--host", "a@h,a@h:23,a@i", (("a", "h", 22), ("a", "h", 23), ("a", "i", 22))),
    ("--port", "1", 1),
    ("--port", "65535", 65535),
    ("--host-key", "any", ("any",)),
    ("--host-key", PIN + "=", (PIN + "=",)),
    ("--host-key", "ecdsa-sha2-nistp256 AAAA", ("ecdsa-sha2-nistp256 AAAA",)),
    ("--host-key", "sk-ssh-ed25519@openssh.com  AAAA= a comment", ("sk-ssh-ed25519@openssh.com  AAAA= a comment",)),
])  # fmt: skip
def test_what_is_accepted(option: str, text: str, value: Any) -> None:
    row = next(row for row in ROWS if row.option == option)
    assert getattr(parsed(command_line(row, f"{option}={text}")), field(option)) == value


def test_hosts_may_be_repeated_and_take_their_port_from_the_option() -> None:
    options = parsed(["ssh", "-i", "eth0", "-H", "a@h", "-p", "2222", "--host", "b@h:23,c@k", "--host=d@[::2]"])
    assert options.executor == "ssh"
    assert options.host == (("a", "h", 2222), ("b", "h", 23), ("c", "k", 2222), ("d", "::2", 2222))


BAD = {  # option: what its message shows of what is accepted, and texts that are not
    "--interfaces": ("eth0", [
        "+", "eth0;reboot", "abcdefghijklmnop", "abcdefghijklmno+", "eth0 eth1", "e+h", "eth++", "!eth0", "eth0/1",
        "eth0\neth1", "eth\u0660", "eth\u00e9", "$(reboot)", "eth0,+", '"', "\\", "eth0:1", "*", "x" * 10_000]),
    "--addresses": ("192.0.2.0/24", [
        "192.0.2.256", "192.0.2.0/33", "2001:db8::/129", "example.org", "192.0.2.1-192.0.2.9", "fe80::1%eth0", "/24",
        "192.0.2.0/0.0.0.255", "192.0.2.0/255.0.255.0", "192.0.2.0/255.255.255", "2001:db8::/255.0.0.0",
        "192.0.2.0/", "192.0.2.0/+8", "\u0661.0.0.1", "3221225985", "0x7f.0.0.1",
        "!10.0.0.1", "192.0.2.1 192.0.2.2", "192.0.2.1,x", ",", " "]),
    "--batch-commands": ("true, false", ["yes", "1", "tru", " ", "true,false", "true\n", "x" * 10_000]),
    "--max-nodes": ("nodes", ["0", "-1", "all", "1.5", "\u0661", " ", "1,2"]),
    "--batch-size": ("bytes", [
        "0", "-1", "+1", "1M", "1e6", "1.5", "1_000_000", "0x100000", "\u0661" * 7, " ", "9" * 5_000]),
    "--masquerade": ("auto, always, never", ["yes", "true", "0", "au", "auto,never", " ", "auto\n", "x" * 101]),
    "--ports": ("8000-8999/tcp|1 to 65535|lower port first", [
        "0", "65536", "smtp", "25:tcp", "25/", "25/icmp", "/tcp", "9-8", "1-", "all", "025", "25/tcp/udp", "\u0662",
        "25,x", "-22", "!22", "*", "25 26", ",", " ", "9" * 5_000, "x" * 10_000]),
    "--mark": ("0x30000000", [
        "0", "1", "7", "0x1", "0xffffffff", "0x300000000", "0x100000003", "0x", "-3", "+3", "3.0", "3_0", "010",
        "0000000003", "0b11", "0o3", "three", "0x3/0x3", "\u0663", " ", "0x3 ", "9" * 5_000, "0x" + "f" * 5_000]),
    "--timeout": ("seconds", [
        "0", "0.0", "-1", "+1", "1e3", "nan", "inf", "5s", "1,5", "1 0", ".5", "5.", "\u0665", "0x10", " ",
        "1" * 5_000]),
    "--host": ("user@host|1 to 65535", [
        "192.0.2.1", "@h", "a@", "a@h:", "a@h:0", "a@h:65536", "a@h:ssh", "a@h:022222", "a@2001:db8::1", "a@[h]",
        "a@[2001:db8::1", "a@2001:db8::1]", "a@[1::2::3]", "a@[]", "a@[2001:db8::1]22", "a@@h", "a@h b@i", "a b@h",
        "a@h;reboot", "a@h/x", "a@h\u00e9", "\u00e9@h", "ssh://a@h", "a@h:\u0662\u0662", "a@h,b", "b,a@h",
        "a@" + "h" * 10_000 + "!"]),
    "--port": ("65535", [
        "0", "65536", "-1", "+22", "ssh", "22,23", "2 2", "\u0662\u0662", "0x16", "22.0", " ", "2" * 5_000]),
    "--host-key": ("SHA256:", [
        "none", "ANY", "SHA256:", "SHA256:short", PIN + "A", PIN + "==", "sha256:" + "A" * 43, "MD5:00:11", "AAAA",
        "ssh-ed25519", "ssh-ed25519 AA*A", "ssh-ed25519 AAAA===", "any,none", "SHA256:" + "\u00e9" * 43, "x" * 10_000]),
    "--publish": ("IP addresses", [
        "192.0.2.1,gw.example.org", "a.example.org,b.example.org", "auto,192.0.2.1", "none,auto", "192.0.2.256",
        "1.2.3", "127.0.0.1", "0.0.0.0", "fe80::1", "::1", "ff02::1", "::ffff:192.0.2.1", "192.0.2.0/24", "gw_1", "-gw",
        "gw.", "http://gw", "gw:80", "[2001:db8::1]", " ", ",", "g\u00e9", "x" * 64, "a." * 127 + "a", "x" * 10_000]),
    "--explain": ("namespace/name", [
        "mail", "default/", "/mail", "a/b/c", "default/mail ", "default mail", "default/m\u00e9l", "$(x)/y", "-/;",
        " ", "a/" + "b" * 254]),
    "--output": ("text, json", ["yaml", "jso", " ", "json,text", "json\n", "x" * 10_000]),
    "--log-level": ("debug, info, warning, error", ["off", "10", "info ", "\x1b[31m", "x" * 10_000]),
}  # fmt: skip
BAD_ITEMS = [(option, text) for option, (_, texts) in BAD.items() for text in texts]


@pytest.mark.parametrize(("option", "text"), BAD_ITEMS, ids=[f"{o} {ascii(t)[:30]}" for o, t in BAD_ITEMS])
def test_what_is_refused_is_named_with_its_value_and_what_is_accepted(option: str, text: str, refused: Refused) -> None:
    setting = next(setting for setting in epok.SETTINGS if setting.option == option)
    row = next((row for row in ROWS if row.option == option), ROWS[-1])
    lines = [(refused(command_line(row), {setting.variable: text}), setting.variable)] if setting.variable else []
    if row.option == option:
        lines.append((refused(command_line(row, f"{option}={text}")), option))
    for line, source in lines:
        words = line.removeprefix("error: ")
        assert words.startswith(source)
        assert json.dumps(text[:100])[:-1] in words, "the value, escaped"
        assert text[:101] not in words or len(text) <= 100, "and cut at 100 characters"
        assert re.search(BAD[option][0], words.replace(json.dumps(text), "")), "and what would be accepted"


@pytest.mark.parametrize("text", ["a\x00b", "\udcff", "\u2028", "\x1b[2J"])
def test_a_value_never_breaks_the_line(text: str, refused: Refused) -> None:
    for argv in (
        [f"--mark={text}", "local"],
        [f"--{text}", "local"],
        ["-i", "eth0", "local", text],
        ["-i", text, "local"],
        [f"-{text}", "local"],
        ["-i", "eth0", "--external-interface", text, "local"],
    ):
        refused(argv)


# ------------------------------------------------ words


WRONG = {  # what a person typed: what the line says
    "": ["local", "ssh"],
    "-i eth0": ["local", "ssh"],
    "-i eth0 --clean": ["local", "ssh"],
    "-i eth0 remote": ["local", "ssh"],
    "-i local": ["local", "ssh"],
    "-i eth0 local ssh": ["ssh"],
    "-i eth0 ssh --host a@h local": ["local"],
    "-i eth0 local local": ["local"],
    "-i eth0 local extra": ['"extra"'],
    "-i eth0 local -": ['"-"'],
    "-i eth0 eth1 local": ['"eth1"'],
    "-i eth0 local -x": ["-x"],
    "-i eth0 local --frobnicate": ['"--frobnicate"'],
    "-i eth0 local --frobnicate=7": ['"--frobnicate"'],
    "-i eth0 local --log-level=debug": ['"--log-level"'],
    "-i eth0 local --mark": ["--mark"],
    "-i eth0 ssh --host": ["--host"],
    "-i eth0 ssh -p": ["-p"],
    "-i eth0 local --clean=yes": ["--clean"],
    "-i eth0 local --dry-run=1": ["--dry-run"],
    "-i eth0 -i eth1 local": ["--interfaces"],
    "-i eth0 --interfaces=eth0 local": ["--interfaces"],
    "-v -v -i eth0 local": ["-v"],
    "--clean local --clean": ["--clean"],
    "-i eth0 local --dry-run --dry-run": ["--dry-run"],
    "-i eth0 local --status=yes": ["--status"],
    "local --status --explain a/b": ["--status", "--explain"],
    "local --clean --status": ["--status", "--clean"],
    "-i eth0 local --dry-run --status": ["--status", "--dry-run"],
    "-i eth0 local --dry-run --explain a/b": ["--explain", "--dry-run"],
    "-i eth0 local -o json": ["--output", "--status", "--explain", "--dry-run"],
    "--clean local -o json": ["--output"],
    "local --explain": ["--explain"],
    "--status ssh": ["--host", "EPOK_SSH_HOST"],
    "local": ["--interfaces", "EPOK_INTERFACES"],
    "-i , local": ["--interfaces", "EPOK_INTERFACES"],
    "--dry-run local": ["--interfaces", "EPOK_INTERFACES"],
    "-i eth0 ssh": ["--host", "EPOK_SSH_HOST"],
    "-i eth0 ssh -H ,": ["--host", "EPOK_SSH_HOST"],
    "--clean ssh": ["--host", "EPOK_SSH_HOST"],
    "-i eth0 ssh -H a@h -H a@h": ["--host", "twice"],
    "-i eth0 ssh -H a@h,b@h,a@h:22": ["--host", "twice"],
    "-i eth0 ssh -H a@h,a@h:2222 -p 2222": ["--host", "twice"],
    "-i eth0,eth1 --external-interface eth2 local": ["--external-interface", '"eth2"', "eth0,eth1"],
    "-i eth+ --external-interface eth0 local": ["--external-interface", '"eth0"', "eth+"],
    "-i eth0 --external-interface eth+ local": ["--external-interface", '"eth+"', "eth0"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_words_that_make_no_sense(typed: str, refused: Refused) -> None:
    line = refused(typed.split())
    for fragment in WRONG[typed]:
        assert fragment in line


@by_option
def test_an_option_with_a_value_cannot_be_repeated_but_for_host(row: Row, refused: Refused) -> None:
    argv = command_line(row, f"{row.option}={row.text}", f"{row.option}={row.other}")
    if row.option == "--host":
        assert len(parsed(argv).host) == 2
    else:
        assert row.option in refused(argv)


@pytest.mark.parametrize("row", SSH_ONLY, ids=[row.option for row in SSH_ONLY])
def test_options_of_ssh_say_nothing_to_local(row: Row, refused: Refused) -> None:
    assert row.option in refused(["-i", "eth0", "local", row.option, row.text])
    assert row.option in refused([f"{row.option}={row.text}", "local", "-i", "eth0"])
    assert parsed(["-i", "eth0", "local"], **{row.variable: row.text}).executor == "local"


KNOWN = sorted(set(re.findall(r"--[a-z][a-z-]*", USAGE)))
SHORTENED = sorted({option[:end] for option in KNOWN for end in range(3, len(option))} - set(KNOWN))


@pytest.mark.parametrize("word", ["--cle", "--interface", "--dry", "--hos", "--CLEAN", *SHORTENED])
def test_a_part_of_an_option_is_no_option(word: str, refused: Refused) -> None:
    for argv in (
        [word, "-i", "eth0", "local"],
        ["-i", "eth0", "local", word],
        [f"{word}=eth0", "local"],
        ["ssh", "-H", "a@h", "-i", "eth0", word, "eth1"],
    ):
        assert f'"{word}"' in refused(argv)


WORDS = st.one_of(
    st.sampled_from(["local", "ssh", "-i", "eth0", "-H", "a@h", "--clean", "--dry-run", "-q", "-v", "-h", "-V", "-p",
                     "--", "-", "", "--host=b@h", "-ieth1", "-vq", "--mark=3", "--mark", "--help", "'", '"']),
    st.text(max_size=8),
    st.text(max_size=5).map("-{}".format),
)  # fmt: skip


@given(st.lists(WORDS, max_size=7))
def test_any_words_are_options_or_one_line_and_status_2(argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            epok.parse_options(argv, {})
        except epok.Fatal as error:
            assert error.status == 2
            assert re.fullmatch("[ -~]{1,900}", str(error))
        except SystemExit as error:
            assert not error.code
            assert {"-h", "--help", "-V", "--version"} & set(argv) or re.search(r"-\w*[hV]", " ".join(argv))


# ------------------------------------------------ the program and its usage text


def start(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, epok.__file__, *argv], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_every_option_and_variable(word: str) -> None:
    done = start(word)
    assert (done.returncode, done.stderr) == (0, "")
    for setting in epok.SETTINGS:
        assert setting.variable in done.stdout
        assert re.search(rf"^  (-\w, )?{setting.option}\b", done.stdout, re.M) or setting.option == "--log-level"
    for row in ROWS:
        assert not row.short or f"  {row.short}, {row.option}=" in done.stdout
    for word in (*epok.PORT_ANNOTATIONS[:1], "internal", "allow-range", "exclude", "Exit status"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version(word: str) -> None:
    done = start(word)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"epok {epok.VERSION}\n", "")


def test_help_may_be_read_by_somebody_who_has_seen_enough() -> None:
    argv = [sys.executable, epok.__file__, "--help"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout and program.stderr
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", 0)


def test_the_program_exits_with_what_main_returns() -> None:
    done = start("--cle", "local")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_no_default_is_docopts() -> None:
    """docopt cannot tell its own default from a typed value: the environment would never count."""
    assert "[default:" not in USAGE.lower()


def test_no_option_is_accepted_and_then_ignored() -> None:
    described = set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", USAGE, re.M)) - {"help", "version"}
    fields = {made.name for made in dataclasses.fields(epok.Options)}
    assert {field(name) for name in described} == fields - {"executor", "log_level"}
    fields.remove("port")  # it is within the hosts already
    fields.remove("status")  # what only looks, and explains nothing: Options.looks
    program = Path(epok.__file__).read_text(encoding="utf-8")
    read_after_checks = program.partition("def check_combination")[2].partition("\n# -----")[2]
    assert [name for name in sorted(fields) if not re.search(rf"\boptions\.{name}\b", read_after_checks)] == []


def test_the_readme_lists_every_option_and_variable() -> None:
    readme = (Path(epok.__file__).parent / "README.md").read_text()
    usage = set(re.findall(r"--[a-z-]+", epok.__doc__ or ""))
    for setting in epok.SETTINGS:
        assert f"`{setting.variable}`" in readme
    assert {option for option in usage if f"`{option}`" not in readme} == {"--help", "--version"}


def test_the_readmes_examples_work_with_the_default_range_of_nodeports() -> None:
    readme = (Path(epok.__file__).parent / "README.md").read_text()
    told = re.findall(r"NodePorts?(?: of this Service are)? (\d+)", readme)
    told += re.findall(r'[`"]\d+(?:-\d+)?:(\d+)', readme)
    assert len(told) > 10 and all(30000 <= int(number) <= 32767 for number in told), told


SAID_BY_SUDO = "a password is required"


def test_the_messages_that_the_readme_tells_of_are_epoks() -> None:
    readme = (Path(epok.__file__).parent / "README.md").read_text()
    table = readme.partition("| it says | |\n|---|---|\n")[2].partition("\n\n")[0]
    told = [row.split("`")[1] for row in table.splitlines()]
    assert len(told) > 8 and SAID_BY_SUDO in told
    program = Path(epok.__file__).read_text(encoding="utf-8")
    for words in told:
        made = re.escape(words).replace("tcp/25", r"\{some\}").replace("eth0", r"\{name\}").replace("IPv4", "IPv.*")
        assert words == SAID_BY_SUDO or re.search(made, program), words


@pytest.mark.parametrize("timeout, seconds", [(5, 5), (50, 10), (100, 20), (600, 30)])
def test_looking_has_ten_seconds_or_a_fifth_of_the_whole_time(timeout: float, seconds: float) -> None:
    deadline = epok.Deadline(timeout)
    looking = deadline.to_look()
    assert seconds / 2 < looking.seconds <= seconds
    assert deadline.to_look(0.5).seconds <= timeout / 2
    told = str(looking.missed("reading"))
    assert re.fullmatch(r"reading: no answer within the time for looking, [0-9]+(\.[0-9]{1,2})? seconds", told)
