"""Prints what the image weighs and what a run of it costs. Must be run as root.

First the layers, in bytes as a tar archive. Then a run with nothing to change of the CronJob's pod, inside the image
and outside of it with the .venv, in turn: the cluster is a real kube-apiserver, the host is reached over a real sshd.
Medians and peak memory of several runs; CPU time is user and system together.
"""

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the packages `bench` and `lab`

from bench.measure import RUNS, SIZES, cluster, meter
from lab.apiserver import ApiServer
from lab.container import ACCOUNT, API, Container, Image, Store, secret_volume, service_account
from lab.manifests import container, environment, manifests
from lab.network import EPOK, Lab
from lab.sshd import Sshd, make_key

HOST = "10.0.0.1"
SECRET = "/etc/epok"


def show_layers(image: Image) -> None:
    for size, what in zip(image.layers, ("the base image", "/epok"), strict=True):
        print(f"{size / 1e6:8.1f} MB  {what}")
    sizes: dict[str, int] = {}
    for path in (image.root / "epok").rglob("*"):
        if path.is_file():
            top = path.relative_to(image.root / "epok").parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    print("of it:   " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in largest))


def show_runs(lab: Lab, image: Image, forwards: int, folder: Path) -> None:
    server, sshd = ApiServer(lab.host, folder), Sshd(lab.host)
    server.grant()
    server.create(*cluster(forwards)["items"])
    key, known_hosts = make_key(folder / "key", "ed25519"), folder / "known_hosts"
    known_hosts.write_text(f"{HOST} {sshd.host_key()}\n")
    sshd.authorize(key.with_suffix(".pub").read_text())
    data = {"id_rsa": key.read_bytes(), "known_hosts": known_hosts.read_bytes()}
    account = service_account(folder / "account", server, "kube-system")
    env = environment(container(manifests()), {"ssh_host": f"root@{HOST}", "ssh_port": "22"})
    volumes = {SECRET: secret_volume(folder / "secret", data), ACCOUNT: account}
    inside = Container(image, volumes, env | API).argv("ssh")
    files = ["--key", str(key), "--known-hosts", str(known_hosts)]
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
        image = store.build()
        show_layers(image)
        print("forwards where        run      CPU     peak")
        for forwards in SIZES:
            with Lab("nft", nodes=0) as lab, tempfile.TemporaryDirectory() as folder:
                show_runs(lab, image, forwards, Path(folder))


if __name__ == "__main__":
    main()
