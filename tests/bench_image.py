"""Prints what the image weighs and what a run of it costs. Must be run as root.

First the layers, in bytes as a tar archive. Then a run with nothing to change of the CronJob's pod, inside the image
and outside of it with the .venv, in turn: the cluster is a real kube-apiserver, the host is reached over a real sshd.
Medians and peak memory of several runs; CPU time is user and system together.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

import yaml
from apiserver import ADDRESS, PORT, ApiServer
from bench import RUNS, SIZES, cluster, meter
from container import ACCOUNT, USER, Container, Store, service_account
from lab import EPOK, Lab
from manifests import account
from sshd import Sshd, make_key

HOST = "10.0.0.1"
SECRET = "/etc/epok"


def show_layers(store: Store) -> None:
    image = store.image("localhost/epok")
    for size, what in zip(image.layers, ("the base image", "/epok"), strict=True):
        print(f"{size / 1e6:8.1f} MB  {what}")
    sizes: dict[str, int] = {}
    for path in (image.root / "epok").rglob("*"):
        if path.is_file():
            top = path.relative_to(image.root / "epok").parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    print("of it:   " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in largest))


def show_runs(lab: Lab, store: Store, forwards: int, folder: Path) -> None:
    server, sshd = ApiServer(lab.host, folder), Sshd(lab.host)
    server.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(account()))
    server.create(*cluster(forwards)["items"])
    secret = folder / "secret"
    secret.mkdir()
    key = make_key(secret / "id_rsa", "ed25519")
    (secret / "known_hosts").write_text(f"{HOST} {sshd.host_key()}\n")
    sshd.authorize(key.with_name("id_rsa.pub").read_text())
    for file in secret.iterdir():
        os.chown(file, 0, int(USER))
        file.chmod(0o440)
    env = {"EPOK_INTERFACES": "eth0", "EPOK_SSH_HOST": f"root@{HOST}"}
    pod = {"EPOK_SSH_KEY": f"{SECRET}/id_rsa", "EPOK_SSH_KNOWN_HOSTS": f"{SECRET}/known_hosts"}
    pod |= {"KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT)}
    volumes = {SECRET: secret, ACCOUNT: service_account(folder / "account", server, "kube-system")}
    inside = Container(store.image("localhost/epok"), volumes, env | pod).argv("ssh")
    files = ["--key", str(key), "--known-hosts", str(secret / "known_hosts")]
    kubeconfig = server.kubeconfig("epok", token=server.token())
    settings = [f"{name}={value}" for name, value in env.items()]
    outside = ["env", *settings, sys.executable, str(EPOK), "ssh", *files, "--kubeconfig", kubeconfig]
    meter(lab, inside)
    runs = [(meter(lab, inside), meter(lab, outside)) for _ in range(RUNS)]
    for where, of_one in zip(("inside", "outside"), zip(*runs, strict=True), strict=True):
        seconds, peak, cpu = zip(*of_one, strict=True)
        times = f"{statistics.median(seconds):6.2f} s {statistics.median(cpu):6.2f} s"
        print(f"{forwards:8} {where:8} {times} {max(peak):5.0f} MB", flush=True)


def main() -> None:
    with Store() as store:
        store.build()
        show_layers(store)
        print("forwards where        run      CPU     peak")
        for forwards in SIZES:
            with Lab("nft", nodes=0) as lab, tempfile.TemporaryDirectory() as folder:
                show_runs(lab, store, forwards, Path(folder))


if __name__ == "__main__":
    main()
