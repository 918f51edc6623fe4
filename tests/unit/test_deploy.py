"""The deployment files: valid for Kubernetes, and true to each other and to the router's configuration."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from kvrouter_grpc import __version__
from kvrouter_grpc.config.load import load

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "base"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
CONFIG = load({}, {}, BASE / "router-config.yaml")

Resource = dict[str, Any]


def resources() -> list[Resource]:
    """Every document that the kustomization renders; the generated ConfigMap without its name's hash."""
    documents = [
        document for name in KUSTOMIZATION["resources"] for document in yaml.safe_load_all((BASE / name).read_text())
    ]
    for generated in KUSTOMIZATION["configMapGenerator"]:
        files = dict(each.split("=") for each in generated["files"])
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": generated["name"]},
                "data": {key: (BASE / path).read_text() for key, path in files.items()},
            }
        )
    return documents


RESOURCES = resources()


def find(kind: str, name: str) -> Resource:
    (found,) = (each for each in RESOURCES if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def label(resource: Resource) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


ROUTER = find("Deployment", "kvrouter")
ENGINE = find("StatefulSet", "vllm")
WORKLOADS = pytest.mark.parametrize("workload", [ROUTER, ENGINE], ids=label)


def pod(workload: Resource) -> Resource:
    return workload["spec"]["template"]["spec"]


def container(workload: Resource) -> Resource:
    (only,) = pod(workload)["containers"]
    return only


def ports(workload: Resource) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(workload)["ports"]}


def engine_flags() -> dict[str, str]:
    flags = (argument.partition("=") for argument in container(ENGINE)["args"] if argument.startswith("--"))
    return {name: value for name, _, value in flags}


@pytest.mark.parametrize("resource", RESOURCES, ids=label)
def test_resource_is_valid(resource: Resource) -> None:
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_validation_would_notice_a_misspelt_field() -> None:
    broken = json.loads(json.dumps(ROUTER))
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_every_file_is_part_of_the_kustomization() -> None:
    generated = [entry.split("=")[1] for each in KUSTOMIZATION["configMapGenerator"] for entry in each["files"]]
    assert sorted(path.name for path in BASE.iterdir()) == sorted(
        ["kustomization.yaml", *KUSTOMIZATION["resources"], *generated]
    )


def test_images_are_pinned_where_the_kustomization_says() -> None:
    pinned = {f"{each['name']}:{each['newTag']}" for each in KUSTOMIZATION["images"]}
    assert pinned == {container(ROUTER)["image"], container(ENGINE)["image"]}
    assert container(ROUTER)["image"] == f"kvrouter-grpc:{__version__}"


# --- the overlay with prefill and decode pools ----------------------------------------------------------------------


DISAGGREGATED = ROOT / "deploy" / "disaggregated"


def added(resource: Resource, patch: Path) -> Resource:
    """The resource with a JSON patch that only adds."""
    changed: Resource = json.loads(json.dumps(resource))
    for operation in yaml.safe_load(patch.read_text()):
        assert operation["op"] == "add"
        *path, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        place: Any = changed
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if last == "-":
            place.append(operation["value"])
        else:
            place[last] = operation["value"]
    return changed


PREFILL = yaml.safe_load((DISAGGREGATED / "prefill-statefulset.yaml").read_text())
DECODE = added(ENGINE, DISAGGREGATED / "decode.patch.yaml")
POLICY = added(find("NetworkPolicy", "vllm"), DISAGGREGATED / "networkpolicy.patch.yaml")


def test_every_file_is_part_of_the_overlay() -> None:
    overlay = yaml.safe_load((DISAGGREGATED / "kustomization.yaml").read_text())
    patches = {patch["path"]: patch["target"]["kind"] for patch in overlay["patches"]}
    assert patches == {"decode.patch.yaml": "StatefulSet", "networkpolicy.patch.yaml": "NetworkPolicy"}
    own = ["kustomization.yaml", "prefill-statefulset.yaml", "router-config.yaml", *patches]
    assert sorted(path.name for path in DISAGGREGATED.iterdir()) == sorted(own)
    assert overlay["resources"] == ["../base", "prefill-statefulset.yaml"]
    assert overlay["images"] == [each for each in KUSTOMIZATION["images"] if each["name"].startswith("vllm")]


@pytest.mark.parametrize("resource", [PREFILL, DECODE, POLICY], ids=label)
def test_resource_of_the_overlay_is_valid(resource: Resource) -> None:
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_pools_differ_in_name_and_label_only() -> None:
    prefill, decode = json.loads(json.dumps(PREFILL)), json.loads(json.dumps(DECODE))
    for pool, name in ((prefill, "prefill"), (decode, "decode")):
        labels = pool["spec"]["template"]["metadata"]["labels"]
        assert pool["spec"]["selector"]["matchLabels"] == labels
        assert labels.pop("app.kubernetes.io/component") == name
        del pool["spec"]["selector"], pool["spec"]["replicas"], pool["metadata"]
    connector = "--kv-transfer-config="
    for pool in (prefill, decode):
        (given,) = [each for each in container(pool)["args"] if each.startswith(connector)]
        assert json.loads(given.removeprefix(connector))["kv_connector"] == "NixlConnector"
    assert prefill == decode


def test_workers_of_the_overlay_are_pods_of_their_pool() -> None:
    config = load({}, {}, DISAGGREGATED / "router-config.yaml")
    assert config.warnings == ()
    assert config.prefill_pools() == {"dynamo.decode.generate": "dynamo.prefill.generate"}
    for pool, endpoint in ((PREFILL, "dynamo.prefill.generate"), (DECODE, "dynamo.decode.generate")):
        names = [worker.name for worker in config.workers if worker.endpoint == endpoint]
        assert names == [f"{pool['metadata']['name']}-{i}" for i in range(pool["spec"]["replicas"])]
    for worker in config.workers:
        assert urlsplit(worker.url).hostname == f"{worker.name}.{ENGINE['spec']['serviceName']}"


def test_engines_of_the_pools_reach_each_other() -> None:
    router, engines = POLICY["spec"]["ingress"]
    assert "ports" in router
    assert engines == {"from": [{"podSelector": {"matchLabels": ENGINE["spec"]["selector"]["matchLabels"]}}]}


@WORKLOADS
def test_selectors_match_the_pods(workload: Resource) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert (
        pod(workload)["serviceAccountName"] == find("ServiceAccount", workload["metadata"]["name"])["metadata"]["name"]
    )


@WORKLOADS
def test_no_pod_has_a_token_or_service_links(workload: Resource) -> None:
    # Service links inject VLLM_PORT, which vLLM reads as a setting, and KVROUTER_PORT, which looks like one.
    assert pod(workload)["automountServiceAccountToken"] is False
    assert pod(workload)["enableServiceLinks"] is False
    assert find("ServiceAccount", pod(workload)["serviceAccountName"])["automountServiceAccountToken"] is False


@pytest.mark.parametrize("service", [each for each in RESOURCES if each["kind"] == "Service"], ids=label)
def test_service_reaches_a_named_port(service: Resource) -> None:
    selector = service["spec"]["selector"]
    (workload,) = (
        each for each in (ROUTER, ENGINE) if selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()
    )
    for each in service["spec"]["ports"]:
        assert ports(workload)[each["targetPort"]] == each["port"]


def test_router_has_a_virtual_and_a_headless_service() -> None:
    assert find("Service", "kvrouter")["spec"]["type"] == "ClusterIP"
    assert "clusterIP" not in find("Service", "kvrouter")["spec"]
    assert find("Service", "kvrouter-headless")["spec"]["clusterIP"] == "None"
    assert find("Service", ENGINE["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


def test_configuration_is_complete_and_clean() -> None:
    assert CONFIG.warnings == ()
    data = find("ConfigMap", "kvrouter")["data"]
    (mount,) = container(ROUTER)["volumeMounts"]
    (volume,) = pod(ROUTER)["volumes"]
    assert volume["configMap"]["name"] == "kvrouter"
    assert [f"--config={mount['mountPath']}/{key}" for key in data] == container(ROUTER)["args"][1:]


def test_configuration_listens_where_the_pod_is_asked() -> None:
    host, _, port = CONFIG.server.listen.rpartition(":")
    assert (host, int(port)) == ("0.0.0.0", ports(ROUTER)["grpc"])
    for probe, service in [
        ("startupProbe", "liveness"),
        ("readinessProbe", "kvrouter.v1.KvRouter"),
        ("livenessProbe", "liveness"),
    ]:
        assert container(ROUTER)[probe]["grpc"] == {"port": int(port), "service": service}


def test_metrics_are_served_where_the_pod_says() -> None:
    assert CONFIG.server.metrics_port == ports(ROUTER)["metrics"]


def test_administration_is_not_reachable_from_the_network() -> None:
    assert CONFIG.server.admin_listen is not None
    host, _, port = CONFIG.server.admin_listen.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) not in ports(ROUTER).values()


def test_every_worker_of_the_configuration_is_a_pod() -> None:
    name = ENGINE["metadata"]["name"]
    assert [worker.name for worker in CONFIG.workers] == [f"{name}-{i}" for i in range(ENGINE["spec"]["replicas"])]
    events = json.loads(engine_flags()["--kv-events-config"])
    for worker in CONFIG.workers:
        assert worker.events is not None
        assert worker.replay is not None
        for url, port in [
            (worker.url, int(engine_flags()["--port"])),
            (worker.events, urlsplit(events["endpoint"].replace("*", "any")).port),
            (worker.replay, urlsplit(events["replay_endpoint"].replace("*", "any")).port),
        ]:
            assert urlsplit(url).hostname == f"{worker.name}.{ENGINE['spec']['serviceName']}"
            assert urlsplit(url).port == port
            assert port in ports(ENGINE).values()


def test_engines_publish_what_the_router_needs() -> None:
    flags = engine_flags()
    events = json.loads(flags["--kv-events-config"])
    assert events["enable_kv_cache_events"] is True
    assert events["publisher"] == "zmq"
    assert "--enable-prompt-tokens-details" in flags
    assert "--enable-prefix-caching" in flags
    assert int(flags["--block-size"]) == CONFIG.router.block_size


def test_engines_answer_the_router_only() -> None:
    policy = find("NetworkPolicy", "vllm")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= ENGINE["spec"]["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    (rule,) = policy["ingress"]
    (source,) = rule["from"]
    assert source == {"podSelector": {"matchLabels": ROUTER["spec"]["selector"]["matchLabels"]}}
    assert {each["port"] for each in rule["ports"]} == set(ports(ENGINE).values())


def test_router_reaches_workers_and_names_only() -> None:
    policy = find("NetworkPolicy", "kvrouter")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= ROUTER["spec"]["template"]["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert {each["port"] for rule in policy["ingress"] for each in rule["ports"]} == set(ports(ROUTER).values())
    workers, names = policy["egress"]
    assert workers["to"] == [{"podSelector": {"matchLabels": ENGINE["spec"]["selector"]["matchLabels"]}}]
    assert {each["port"] for each in workers["ports"]} == set(ports(ENGINE).values())
    assert {each["port"] for each in names["ports"]} == {53}


def test_router_is_hardened() -> None:
    whole, own = pod(ROUTER)["securityContext"], container(ROUTER)["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}


def test_pod_outlives_the_drain() -> None:
    assert pod(ROUTER)["terminationGracePeriodSeconds"] > CONFIG.server.drain_timeout_s


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "deploy" / "Dockerfile").read_text())
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_image_runs_as_the_user_that_the_pod_demands() -> None:
    (user,) = (rest for word, rest in dockerfile() if word == "USER")
    whole = pod(ROUTER)["securityContext"]
    assert user == f"{whole['runAsUser']}:{whole['runAsGroup']}"


def test_image_is_built_from_files_that_exist_and_enter_the_context() -> None:
    copied = {
        source
        for word, rest in dockerfile()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    kept = {
        line.removeprefix("!")
        for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == kept
    assert all((ROOT / each).exists() for each in copied)


def test_image_starts_from_public_python_images_and_ends_without_a_compiler() -> None:
    stages = [rest.split()[0] for word, rest in dockerfile() if word == "FROM"]
    assert all(re.fullmatch(r"python:\$\{PYTHON_VERSION\}-[a-z-]+", stage) for stage in stages)
    assert "slim" not in stages[0]
    assert "slim" in stages[-1]
    last = [word for word, _ in dockerfile()]
    last = last[len(last) - 1 - last[::-1].index("FROM") :]
    assert "RUN" not in last
    assert "HEALTHCHECK" not in last  # Kubernetes asks over gRPC


def test_image_carries_the_version_of_the_package() -> None:
    assert ("ARG", f"VERSION={__version__}") in dockerfile()
