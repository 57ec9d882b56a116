"""An SSH server in a namespace of the lab, with users and a sudoers file of its own: the machine's stay as they are.

Every command that it is asked for goes through a script that notes it down, and that a test can make misbehave:

    server = Sshd(lab.host)
    server.misbehave("echo no >&2; exit 1")
"""

import contextlib
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lab.machine import until
from lab.network import Namespace

PLACE = "/run/epok"  # as seen inside; the lab gives the host a /run of its own
USER = "tester"
FEW_SESSIONS, SESSIONS = 2222, 2
PORTS = (22, FEW_SESSIONS)
MISBEHAVING = range(2201, 2206)
STALLED_LOGIN, BROKEN_LOGIN, STALLED_COMMAND, ENDLESS_OUTPUT, DRIPPING_OUTPUT = MISBEHAVING
KEY_TYPES = ("ed25519", "ecdsa", "rsa")

CONFIG = f"""
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {PLACE}/authorized_keys
Banner {PLACE}/banner
ForceCommand {PLACE}/forced
LogLevel VERBOSE
MaxStartups 100
Match LocalPort {FEW_SESSIONS}
    MaxSessions {SESSIONS}
Match LocalPort {STALLED_LOGIN}
    AuthorizedKeysFile none
    AuthorizedKeysCommand /bin/sleep 60
    AuthorizedKeysCommandUser root
Match LocalPort {BROKEN_LOGIN}
    AuthorizedKeysFile none
    AuthorizedKeysCommand {PLACE}/break-off
    AuthorizedKeysCommandUser root
Match LocalPort {STALLED_COMMAND}
    ForceCommand sleep 60
Match LocalPort {ENDLESS_OUTPUT}
    ForceCommand yes a line without end
Match LocalPort {DRIPPING_OUTPUT}
    ForceCommand while :; do echo drip; sleep 0.1; done
"""
FORCED = f"""#!/bin/sh
printf '%s\\n' "$SSH_ORIGINAL_COMMAND" >>{PLACE}/commands
[ -e {PLACE}/instead ] && exec sh {PLACE}/instead
exec sh -c "$SSH_ORIGINAL_COMMAND"
"""
# The password is one that nothing matches: sshd without PAM lets nobody in whose account is locked with "!".
# The machine's own root may have a .bashrc that takes a while.
ETC = {
    "passwd": f"root:x:0:0::{PLACE}:/bin/bash\n{USER}:x:64321:64321::{PLACE}:/bin/bash\n",
    "shadow": f"root:*:19000:0:99999:7:::\n{USER}:*:19000:0:99999:7:::\n",
    "group": f"root:x:0:\n{USER}:x:64321:\n",
}
MAKE_USERS = f"""
for file in passwd shadow group; do
    grep -v '^root:' /etc/$file >>{PLACE}/etc/$file
done
for file in passwd shadow group sudoers; do
    mount --bind {PLACE}/etc/$file /etc/$file
done
"""
SUDOERS = """Defaults env_reset, use_pty, !fqdn
Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
root ALL=(ALL:ALL) ALL
"""


class Sshd:
    """A server on PORTS, and on those where it misbehaves, until its namespace ends."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.place = Path(f"/proc/{space.pid}/root{PLACE}")  # as seen from outside
        for directory in (self.place, self.place / "etc"):
            directory.mkdir(mode=0o755)
        for name, text in ETC.items():
            self.write(f"etc/{name}", text, 0o600 if name == "shadow" else 0o644)
        self.sudoers()
        space.run(["sh", "-ec", MAKE_USERS])
        self.write("config", penalties() + CONFIG)
        self.write("forced", FORCED, 0o755)
        self.write("break-off", "#!/bin/sh\nkill -9 $PPID\n", 0o755)
        self.write("banner", "Unauthorised access is \x1b[31mforbidden\x1b[0m.\nerror: not an error\n")
        self.write("authorized_keys", "")
        for kind in KEY_TYPES:
            make_key(self.place / f"host_{kind}", kind)
        self.reset()
        self.start(*PORTS, *MISBEHAVING)

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        (self.place / name).write_text(text)
        (self.place / name).chmod(mode)

    def reset(self) -> None:
        """Good behaviour, no rights for the user, nothing noted down."""
        self.write("commands", "", 0o666)
        self.write("log", "")
        self.sudoers()
        (self.place / "instead").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.place / "cut").rmdir()

    def start(self, *ports: int, keys: str = "host", more: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """An sshd on more ports, ready when this returns, with the host keys of that name, and more options."""
        argv = ["/usr/sbin/sshd", "-D", "-f", f"{PLACE}/config", "-E", f"{PLACE}/log"]
        argv += [word for port in ports for word in ("-p", str(port))]
        argv += [word for kind in KEY_TYPES for word in ("-h", f"{PLACE}/{keys}_{kind}")]
        running = self.space.popen([*argv, *more])
        for port in ports:
            await_banner(self.space, port)
        return running

    def stop(self, running: "subprocess.Popen[str]", port: int) -> None:
        """Ends one that was started on that port alone: the process at hand is only what entered the namespace."""
        running.kill()
        running.wait()
        self.space.run(["pkill", "-f", f"sshd: /usr/sbin/sshd -D .* -p {port} "], check=False)

    def authorize(self, *lines: str) -> None:
        self.write("authorized_keys", "".join(f"{line}\n" for line in lines))

    def sudoers(self, *lines: str) -> None:
        self.write("etc/sudoers", SUDOERS + "".join(f"{line}\n" for line in lines), 0o440)

    def misbehave(self, script: str) -> None:
        """Run this shell script instead of each command; $SSH_ORIGINAL_COMMAND is the command."""
        self.write("instead", script)

    def commands(self) -> list[str]:
        """What the host was asked to run since reset()."""
        return (self.place / "commands").read_text().splitlines()

    def connections(self) -> int:
        """How many came since reset(); the log is written before a connection's first byte is answered."""
        return (self.place / "log").read_text().count("Connection from ")

    def host_key(self, kind: str = "ed25519") -> str:
        """Like "ssh-ed25519 AAAA..."."""
        return " ".join((self.place / f"host_{kind}.pub").read_text().split()[:2])


def penalties() -> str:
    """A line for the config: newer servers shut out for a while who failed to log in, which tests do all the time."""
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", version)
    return "PerSourcePenalties no\n" if found and (int(found[1]), int(found[2])) >= (9, 8) else ""


def await_banner(space: Namespace, port: int) -> None:
    """Returns when an SSH server answers there."""

    def answers() -> bool:
        with contextlib.suppress(ConnectionRefusedError), space.entered():
            with socket.create_connection(("127.0.0.1", port), 60) as sock:
                assert sock.recv(4) == b"SSH-"
            return True
        return False

    until(answers, f"sshd on port {port}")


def make_key(file: Path, kind: str, *options: str) -> Path:
    size = {"rsa": ["-b", "2048"]}.get(kind, [])
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, *size, "-N", "", "-C", f"a {kind} key", *options, "-f", str(file)], check=True
    )
    return file


@contextlib.contextmanager
def impostor(space: Namespace, port: int, say: Callable[[socket.socket], object]) -> Iterator[None]:
    """Something on that port of the namespace that is no SSH server: `say` gets each connection, which then stays."""
    with space.entered():
        listener = socket.create_server(("", port), backlog=100)
    taken: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other side has had enough, or the test is over
            say(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(listener.accept()[0])
                threading.Thread(target=talk, args=(taken[-1],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept(); close() alone would not
        listener.close()
        thread.join()
        for connection in taken:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
