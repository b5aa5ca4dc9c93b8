"""The Kubernetes objects: valid, at one with each other, with the image and with the server."""

import copy
import json
import os
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from model_store.store import CACHE_VARIABLE, STORE_VARIABLE
from serving import deployment, node
from serving.config import ServeConfig
from serving.local_key import ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE
from serving.replica import NAME
from serving.spread import LABEL, NONE
from taskbone import __version__
from tests.deploy.image import ROOT, environment, last_stage
from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    VERSIONS,
    Object,
    check,
    kustomize,
    of_kind,
    render,
    templates,
)
from tests.test_project import parse

SERVING = [name for name in OVERLAYS if name != "backbone"]
RAY = [name for name in OVERLAYS if name.startswith("ray-")]
PODS = [
    pytest.param(name, template, id=f"{overlay}-{name}")
    for overlay in OVERLAYS
    for name, template in templates(overlay)
]
HEALTH = ("/health/live", "/health/ready", "/api/gcs_healthz")
"""Our own routes that need no key, and that of the head's dashboard."""
README = (ROOT / "deploy" / "README.md").read_text()


# --- by their schemas -----------------------------------------------------------------------------


def test_there_is_an_overlay_for_each_way_of_running() -> None:
    assert OVERLAYS == ["backbone", "cpu", "gpu", "ray-cpu", "ray-gpu"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_its_schema(overlay: str, version: str) -> None:
    for one in render(overlay):
        check(one, version)
    for name, template in templates(overlay):
        check({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, version)
        assert template["spec"]["containers"], name


@pytest.mark.parametrize("overlay", RAY)
def test_a_field_that_does_not_exist_is_found(overlay: str) -> None:
    (service,) = of_kind(overlay, "RayService")
    for path in (
        ["spec"],
        ["spec", "rayClusterConfig"],
        ["spec", "rayClusterConfig", "headGroupSpec"],
    ):
        wrong = copy.deepcopy(service)
        place = wrong
        for step in path:
            place = place[step]
        place["replica"] = 2
        with pytest.raises(ValidationError, match="replica"):
            check(wrong, VERSIONS[-1])


def test_every_file_is_used_by_a_kustomization(tmp_path: Path) -> None:
    used = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        told = yaml.safe_load(file.read_text())
        names = told.get("resources", []) + told.get("components", [])
        names += [patch["path"] for patch in told.get("patches", [])]
        used |= {(file.parent / name).resolve() for name in names}
    files = {file for file in KUBERNETES.rglob("*.yaml") if file.name != "kustomization.yaml"}
    # The values of another project's Helm chart.
    files.remove(KUBERNETES / "components" / "queue-autoscaler" / "prometheus-adapter.yaml")
    assert files - used == set()


@pytest.mark.parametrize("component", ["pod-monitor", "queue-autoscaler"])
def test_a_component_can_be_added_to_an_overlay(component: str, tmp_path: Path) -> None:
    here = os.path.relpath(KUBERNETES, tmp_path.resolve())
    told = {
        "namespace": "taskbone",
        "resources": [f"{here}/overlays/cpu"],
        "components": [f"{here}/components/{component}"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(told))
    found = list(yaml.safe_load_all(kustomize(tmp_path)))
    for one in found:
        check(one, VERSIONS[-1])
    if component == "pod-monitor":
        (monitor,) = [one for one in found if one["kind"] == "PodMonitor"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["path"] == "/metrics"
        assert endpoint["authorization"]["credentials"] == {
            "name": "taskbone-keys",
            "key": TOKEN_VARIABLE,
        }
    else:
        (scaler,) = [one for one in found if one["kind"] == "HorizontalPodAutoscaler"]
        (metric,) = scaler["spec"]["metrics"]
        name = metric["pods"]["metric"]["name"]
        values = KUBERNETES / "components" / component / "prometheus-adapter.yaml"
        (rule,) = yaml.safe_load(values.read_text())["rules"]["custom"]
        assert rule["name"]["as"] == name
        assert rule["seriesQuery"].startswith(name + "{")


# --- pods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "template"), PODS)
def test_a_pod_has_no_rights(name: str, template: Object) -> None:
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "taskbone"
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert last_stage("USER") == [user]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(("name", "template"), PODS)
def test_a_pod_has_what_it_needs_and_a_limit(name: str, template: Object) -> None:
    (container,) = template["spec"]["containers"]
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
    # It can write where the image says that it writes.
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/tmp", environment()[CACHE_VARIABLE]} <= mounted.keys()  # noqa: S108 - compared
    assert set(mounted.values()) == {volume["name"] for volume in template["spec"]["volumes"]}
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if asked := container.get(probe):
            path, port = asked["httpGet"]["path"], asked["httpGet"]["port"]
            assert port in ports or port in ports.values()
            assert path in HEALTH


@pytest.mark.parametrize("overlay", SERVING)
def test_what_answers_is_given_time_to_end(overlay: str) -> None:
    answering = [
        template
        for _, template in templates(overlay)
        if template["metadata"]["labels"]["app.kubernetes.io/component"] in ("server", "worker")
    ]
    assert answering
    for template in answering:
        (container,) = template["spec"]["containers"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        front_door = deployment.GRACE_S
        replica = node.REPLICA_END_S if overlay in RAY else 0
        assert (
            template["spec"]["terminationGracePeriodSeconds"] >= pause + replica + front_door + 10
        )
        assert len(template["spec"]["topologySpreadConstraints"]) == 2


# --- what refers to what --------------------------------------------------------------------------


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


@pytest.mark.parametrize("overlay", SERVING)
def test_selectors_find_the_pods(overlay: str) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in templates(overlay)}
    answering = {
        name for name, found in labels.items() if found["app.kubernetes.io/component"] != "head"
    }
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert {
            name for name in labels if selects(budget["spec"]["selector"], labels[name])
        } == answering
    for service in of_kind(overlay, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        assert {name for name in labels if selects(selector, labels[name])} == answering
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert f"{target['kind']}/{target['name']}" in labels
        assert 2 <= scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    for name, template in templates(overlay):
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            assert selects(constraint["labelSelector"], labels[name])
    for one in of_kind(overlay, "Deployment"):
        assert selects(one["spec"]["selector"], labels[f"Deployment/{one['metadata']['name']}"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_that_pods_refer_to_exist_or_are_made_by_the_readme(overlay: str) -> None:
    made = {one["metadata"]["name"] for one in of_kind("cpu", "ConfigMap")}
    # kubectl create secret generic NAME, as the README has its reader type.
    made |= set(re.findall(r"create secret generic (\S+)", README))
    for _, template in templates(overlay):
        for source in template["spec"]["containers"][0]["envFrom"]:
            (kind,) = source.keys() & {"configMapRef", "secretRef"}
            assert source[kind]["name"] in made
    for variable in (TOKEN_VARIABLE, ADMIN_TOKEN_VARIABLE):
        assert f"--from-literal={variable}=" in README
    for config in of_kind(overlay, "ConfigMap"):
        assert config["data"].keys() == {STORE_VARIABLE}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_image_is_of_this_version(overlay: str) -> None:
    kind = "cuda" if "gpu" in overlay else "cpu"
    wanted = f"registry.example.com/taskbone:{__version__}-{kind}"
    for name, template in templates(overlay):
        assert template["spec"]["containers"][0]["image"] == wanted, name


@pytest.mark.parametrize("overlay", ["backbone", "cpu", "gpu"])
def test_what_a_pod_starts_is_a_command_of_ours(overlay: str) -> None:
    (entrypoint,) = last_stage("ENTRYPOINT")
    for _, template in templates(overlay):
        (container,) = template["spec"]["containers"]
        arguments = [argument.replace("$(CPUS)", "2") for argument in container["args"]]
        parse(shlex.join([*json.loads(entrypoint), *arguments]))
        if overlay == "gpu":
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
            assert "--device=cuda" in arguments


# --- who reaches whom -----------------------------------------------------------------------------


def open_to(overlay: str, component: str) -> list[tuple[str, list[int]]]:
    """Who may reach pods of a component at which ports; no ports: all."""
    labels = {"app.kubernetes.io/name": "taskbone", "app.kubernetes.io/component": component}
    found = []
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert "Ingress" in policy["spec"]["policyTypes"]
        if not selects(policy["spec"]["podSelector"], labels):
            continue
        for rule in policy["spec"]["ingress"]:
            who = json.dumps(rule["from"], sort_keys=True) if "from" in rule else "everyone"
            found.append((who, [port["port"] for port in rule.get("ports", [])]))
    return found


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_a_server_is_reached_at_its_front_door_alone(overlay: str) -> None:
    assert open_to(overlay, "server") == [("everyone", [8000])]


@pytest.mark.parametrize("overlay", RAY)
def test_rays_ports_are_for_its_own_pods(overlay: str) -> None:
    own = '[{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "taskbone"}}}]'
    assert sorted(open_to(overlay, "worker")) == sorted([("everyone", [8000]), (own, [])])
    (operator,) = set(map(str, open_to(overlay, "head"))) - set(
        map(str, open_to(overlay, "worker"))
    )
    assert "kuberay-operator" in operator
    assert "[8265]" in operator


# --- Ray ------------------------------------------------------------------------------------------


def serve_config(overlay: str) -> dict[str, Any]:
    (service,) = of_kind(overlay, "RayService")
    found: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return found


FILE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())


@pytest.mark.parametrize("config", [FILE, *map(serve_config, RAY)], ids=["file", *RAY])
def test_ray_serve_takes_the_configuration(config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        # Ray's own, while it is imported.
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema
    known = ServeDeploySchema.model_validate(config)
    # What it does not know it would ignore.
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    (application,) = known.applications
    assert application.import_path == "serving.deployment:application"
    assert application.name == NAME
    ServeConfig.of(store="s3://taskbone/store", **application.args)


@pytest.mark.parametrize("overlay", RAY)
def test_a_ray_service_is_the_file_with_the_sizes_of_its_pods(overlay: str) -> None:
    config = serve_config(overlay)
    arguments = config["applications"][0]["args"]
    (service,) = of_kind(overlay, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert str(arguments.pop("engine_threads")) == limits["cpu"]
    assert arguments.pop("device", "cpu") == ("cuda" if "nvidia.com/gpu" in limits else "cpu")
    assert config == FILE
    assert cluster["headGroupSpec"]["rayStartParams"]["labels"] == f"{LABEL}={NONE}"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    pins = (ROOT / "constraints.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in pins


# --- the way through ------------------------------------------------------------------------------


def test_the_readme_names_every_overlay_and_folders_that_exist() -> None:
    assert [name for name in OVERLAYS if f"overlays/{name}" not in README] == []
    named = re.findall(r"-[kf] (deploy/\S+)", README)
    assert len(named) > 4
    assert [name for name in named if not (ROOT / name).exists()] == []
