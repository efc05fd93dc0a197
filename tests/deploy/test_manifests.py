"""What is to be deployed: valid for Kubernetes and systemd, and in accord with the server's own options."""

from __future__ import annotations

import configparser
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from encode_server.settings import load_settings
from encode_server.wire.load import CONTENT_HEADER

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = ("gpu", "cpu")


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request) -> dict[str, dict[str, Any]]:
    """An overlay's resources by kind."""
    return {resource["kind"]: resource for resource in render(request.param)}


def render(overlay: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def pod(rendered: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = rendered["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_kubernetes_takes_it(rendered):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"} == set(rendered)
    for resource in rendered.values():
        kubernetes_validate.validate(resource, "1.32", strict=True)


def test_the_monitoring_overlay_renders():
    kinds = [resource["kind"] for resource in render("monitoring")]
    assert sorted(kinds) == ["ConfigMap", "PrometheusRule", "ScaledObject", "ServiceMonitor", "ServiceMonitor"]


def test_each_service_monitor_finds_the_service_it_is_for():
    services = [resource["metadata"] for resource in render("fleet") if resource["kind"] == "Service"]
    monitors = [resource for resource in render("monitoring") if resource["kind"] == "ServiceMonitor"]
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [service["name"] for service in services if wanted <= service.get("labels", {}).items()]
        assert found == [monitor["metadata"]["name"]], "no pod is scraped twice"
    assert {monitor["metadata"]["name"] for monitor in monitors} == {"encode-server", "encode-server-route"}


def test_route_is_given_a_single_key():
    (route,) = [r for r in render("fleet") if r["kind"] == "Deployment" and r["metadata"]["name"].endswith("route")]
    env = {variable["name"]: variable for variable in pod({"Deployment": route})[1]["env"]}
    assert env["ENCODE_ROUTE_ENCODER_API_KEY"]["valueFrom"]["secretKeyRef"]["key"] == "route-api-key"


def test_the_fleet_is_taken_and_route_is_let_in_to_the_encoders():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    resources = render("fleet")
    for resource in resources:
        kubernetes_validate.validate(resource, "1.32", strict=True)
    named = {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}
    pods = named["Service", "encode-server-pods"]["spec"]
    (url,) = [
        variable["value"]
        for variable in pod({"Deployment": named["Deployment", "encode-server-route"]})[1]["env"]
        if variable["name"] == "ENCODE_ROUTE_ENCODER_DNS"
    ]
    assert pods["clusterIP"] == "None" and url == f"http://encode-server-pods:{pods['ports'][0]['port']}"
    route = named["Deployment", "encode-server-route"]["spec"]["template"]["metadata"]["labels"]
    let_in = named["NetworkPolicy", "encode-server"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert let_in.items() <= route.items()
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        selector = named[kind, "encode-server-route"]["spec"]
        labels = selector.get("podSelector", selector.get("selector"))
        assert labels.get("matchLabels", labels).items() <= route.items()


def test_the_gateway_sends_the_same_content_to_the_same_encoder():
    resources = {resource["kind"]: resource for resource in render("gateway")}
    policy = resources["BackendTrafficPolicy"]["spec"]
    assert policy["loadBalancer"]["consistentHash"]["header"]["name"] == CONTENT_HEADER
    (backend,) = resources["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    service = resources["Service"]
    assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])


def test_ray_takes_the_arguments_of_the_ray_service():
    (resource,) = render("kuberay")
    (application,) = yaml.safe_load(resource["spec"]["serveConfigV2"])["applications"]
    pytest.importorskip("ray")
    from encode_server.cluster.application import Arguments

    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    Arguments.model_validate(application["args"])


def test_selectors_find_the_pods_and_only_them(rendered):
    labels = rendered["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        rendered["Service"]["spec"]["selector"],
        rendered["Deployment"]["spec"]["selector"]["matchLabels"],
        rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        rendered["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()


def test_clients_and_prefills_need_no_label_of_the_encoders(rendered):
    policy = rendered["NetworkPolicy"]["spec"]
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    peers += [peer for rule in policy["egress"] for peer in rule["to"]]
    named = [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]
    assert named == [{"encode-server/client": "true"}, {"encode-server/prefill": "true"}]


def test_the_pod_outlives_its_requests(rendered, tmp_path):
    (text,) = rendered["ConfigMap"]["data"].values()
    (tmp_path / "options.toml").write_text(text)
    settings = load_settings({"config": str(tmp_path / "options.toml")})
    spec, container = pod(rendered)
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"] + settings.drain_s + settings.grace_s
    assert spec["terminationGracePeriodSeconds"] >= waits + 10
    readiness = container["readinessProbe"]
    assert settings.drain_s >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_probes_ask_what_they_mean(rendered):
    _, container = pod(rendered)
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}


def test_a_pod_may_do_no_more_than_it_must(rendered):
    spec, container = pod(rendered)
    assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_an_image_for_gpus_can_compile_what_triton_compiles():
    """Triton needs a C compiler, Python's headers and a folder to write to, whose root is read-only in a pod."""
    image = (DEPLOY.parent / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r'\[ "\$TORCH" = cpu \] \|\| echo gcc libc6-dev libpython3-dev', image) and "ARG TORCH" in image
    cache = re.search(r"TRITON_CACHE_DIR=(\S+)", image)
    deployment = yaml.safe_load((DEPLOY / "kubernetes/base/deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert cache is not None and any(cache[1].startswith(f"{mount}/") for mount in mounts)


def test_systemd_takes_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (DEPLOY / "systemd/encode-server.service").read_text()
    file = tmp_path / "encode-server.service"
    file.write_text(unit.replace("/opt/encode-server/bin/encode-server", "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_systemd_waits_for_the_drain_and_the_grace():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd/encode-server.service")
    settings = load_settings({"config": str(DEPLOY / "systemd/encode-server.toml")})
    assert int(unit["Service"]["TimeoutStopSec"]) >= settings.drain_s + settings.grace_s + 10
    assert unit["Service"]["Type"] == "notify" and unit["Service"]["KillMode"] == "mixed"
