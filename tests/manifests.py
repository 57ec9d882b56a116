"""cron/cronjob.yaml as objects, for the tests that need an account as epok has it in a cluster."""

import string
from collections.abc import Iterable

import yaml
from lab import EPOK
from objects import Object

CRON = EPOK.parent / "cron"
ACCOUNT = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")


def manifests(namespace: str = "kube-system", image: str = "epok", interfaces: str = "eth0") -> list[Object]:
    """All objects. Raises KeyError or ValueError at a $ that stands for none of the three variables."""
    values = {"EPOK_NS": namespace, "EPOK_IMAGE": image, "EPOK_INTERFACES": interfaces}
    text = string.Template((CRON / "cronjob.yaml").read_text()).substitute(values)
    return list(yaml.safe_load_all(text))


def account(namespace: str = "kube-system") -> list[Object]:
    """The account that epok has in the cluster: all but the CronJob."""
    return [made for made in manifests(namespace) if made["kind"] in ACCOUNT]


def one(kind: str, objects: Iterable[Object]) -> Object:
    """The only object of that kind."""
    [found] = [made for made in objects if made["kind"] == kind]
    return found
