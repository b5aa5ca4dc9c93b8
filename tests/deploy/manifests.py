"""The Kubernetes objects, as `kubectl apply -k` would send them, and the schemas they must fit."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

from tests.deploy.image import ROOT
from tests.deploy.kuberay import POD_MONITOR, RAY_SERVICE

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
VERSIONS = ("1.30", "1.37")
"""The oldest version of Kubernetes that has all that is used, and the newest known here."""

Object = dict[str, Any]
Scope = tuple[str, Object]
"""What a pod comes from, as kind/name, and its template."""


@functools.cache
def render(overlay: str) -> tuple[Object, ...]:
    """All objects of an overlay, from kubectl's own kustomize."""
    return tuple(yaml.safe_load_all(kustomize(KUBERNETES / "overlays" / overlay)))


def kustomize(folder: Path) -> str:
    """What a folder with a kustomization becomes."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(overlay: str, kind: str) -> list[Object]:
    """The objects of one kind."""
    return [one for one in render(overlay) if one["kind"] == kind]


def templates(overlay: str) -> Iterator[Scope]:
    """Every pod template, wherever it stands."""
    for one in render(overlay):
        if one["kind"] in ("Deployment", "Job"):
            yield f"{one['kind']}/{one['metadata']['name']}", one["spec"]["template"]
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield f"RayService/{group.get('groupName', 'head')}", group["template"]


def check(one: Object, version: str) -> None:
    """Raise unless the object fits its schema; an unknown field is an error."""
    if one["kind"] == "RayService":
        Draft202012Validator(RAY_SERVICE).validate(one)
    elif one["kind"] == "PodMonitor":
        Draft202012Validator(POD_MONITOR).validate(one)
    else:
        kubernetes_validate.validate(one, version, strict=True)
