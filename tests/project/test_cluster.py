"""The image and the Kubernetes manifests: valid for KubeRay, of the pinned Ray, and with runs on shared storage."""

import gzip
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from support.made import shared

from safer_ray.config.read import load_config

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "cluster/Dockerfile"
README = REPOSITORY / "cluster/README.md"
MANIFESTS = ("raycluster", "rayjob")


def load(manifest):
    """A manifest as it is sent: JSON, in which YAML's aliases are copies."""
    text = (REPOSITORY / f"cluster/kuberay/{manifest}.yaml").read_text(encoding="utf-8")
    return json.loads(json.dumps(yaml.safe_load(text)))


def cluster_spec(manifest):
    spec = load(manifest)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(manifest):
    """The head group and the worker groups, each with its pod template."""
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def all_pods(manifest):
    """The pod specs of head, workers and, in a job, the submitter."""
    templates = [group["template"] for group in groups(manifest)]
    if "submitterPodTemplate" in load(manifest)["spec"]:
        templates.append(load(manifest)["spec"]["submitterPodTemplate"])
    return [template["spec"] for template in templates]


def instructions():
    """The Dockerfile's instructions, comments dropped and continued lines joined: `("RUN", "pip …")`."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def arguments(instruction):
    return [rest for name, rest in instructions() if name == instruction]


def pinned(package):
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{package}==(\S+)$", pins, flags=re.MULTILINE).group(1)


def closed(schema):
    """A Kubernetes structural schema as JSON Schema: fields that it does not name are errors."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string") is True:
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") is True and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


@pytest.fixture(scope="module")
def complaints():
    """What KubeRay's v1 schema says against a manifest, as `path: message`."""
    validators = {}
    for name in ("RayCluster", "RayJob"):
        text = gzip.decompress(shared(f"crds/ray.io_{name.lower()}s.yaml.gz").read_bytes())
        crd = yaml.load(text, Loader=yaml.CSafeLoader)
        (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
        validators[name] = jsonschema.Draft202012Validator(closed(schema))

    def complain(manifest):
        errors = validators[manifest["kind"]].iter_errors(manifest)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]

    return complain


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_are_valid_for_kuberay(complaints, manifest):
    assert load(manifest)["apiVersion"] == "ray.io/v1"
    assert complaints(load(manifest)) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("", "specs"),
        ("spec", "enableInTreeAutoscalling"),
        ("spec.autoscalerOptions", "versions"),
        ("spec.headGroupSpec", "rayStartParam"),
        ("spec.workerGroupSpecs.1", "minReplica"),
        ("spec.workerGroupSpecs.0.template.spec", "volume"),
        ("spec.headGroupSpec.template.spec.containers.0", "volumeMount"),
        ("spec.headGroupSpec.template.spec.containers.0.securityContext.capabilities", "dropped"),
    ],
)
def test_a_misspelt_field_is_reported(complaints, path, wrong):
    manifest = load("raycluster")
    place = manifest
    for key in filter(None, path.split(".")):
        place = place[int(key) if key.isdigit() else key]
    place[wrong] = {}
    assert complaints(manifest) == [f"{path}: Additional properties are not allowed ('{wrong}' was unexpected)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rayStartParams": {"num-cpus": 0}}, "0 is not of type 'string'"),
        ({"serviceType": ["ClusterIP"]}, "['ClusterIP'] is not of type 'string'"),
        ({"template": None}, "None is not of type 'object'"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported(complaints, change, message):
    manifest = load("raycluster")
    manifest["spec"]["headGroupSpec"] |= change
    (complaint,) = complaints(manifest)
    assert message in complaint


def test_a_quantity_may_be_a_number_or_text_but_must_be_one(complaints):
    manifest = load("raycluster")
    limits = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["cpu"] = 2
    assert complaints(manifest) == []
    limits["cpu"] = "two"
    (complaint,) = complaints(manifest)
    assert "'two' does not match" in complaint


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_name_the_ray_of_the_constraints(manifest):
    assert cluster_spec(manifest)["rayVersion"] == pinned("ray")


def test_the_image_installs_the_ray_and_torch_of_the_constraints():
    assert any("constraints.txt" in copied.split()[:-1] for copied in arguments("COPY"))
    torch, dependencies, project = (run for run in arguments("RUN") if "pip install" in run)
    assert "grep '^torch==' constraints.txt" in torch
    assert "--constraint constraints.txt" in dependencies
    assert "--no-deps" in project
    assert not re.search(r"ray(\[\S*)?[=<>~]=|rayproject/", "\n".join(rest for _, rest in instructions()))


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_all_pods_run_the_image_of_this_version(manifest):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    image = f"safer-ray:{project['version']}"
    assert {container["image"] for pod in all_pods(manifest) for container in pod["containers"]} == {image}
    assert f"--tag {image} " in README.read_text(encoding="utf-8")


def test_every_path_that_the_image_copies_exists():
    copied = [path for rest in arguments("COPY") for path in rest.split()[:-1] if not path.startswith("--")]
    assert {"safer_ray", "jobs", "serve", "configs"} <= set(copied)
    assert [path for path in copied if not (REPOSITORY / path).exists()] == []


def test_the_image_lets_kuberay_start_ray():
    assert arguments("ENTRYPOINT") == []
    assert arguments("WORKDIR") == ["/app"]
    assert any("wget" in run for run in arguments("RUN"))


def test_the_image_runs_as_a_user_who_is_not_root():
    *_, user = arguments("USER")
    uid, gid = map(int, user.split(":"))
    assert uid > 0
    assert gid > 0
    for manifest in MANIFESTS:
        for pod in all_pods(manifest):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == uid
            assert pod["securityContext"]["runAsGroup"] == pod["securityContext"]["fsGroup"] == gid


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_no_container_can_gain_privileges(manifest):
    owners = [container for pod in all_pods(manifest) for container in pod["containers"]]
    for owner in [*owners, cluster_spec(manifest)["autoscalerOptions"]]:
        assert owner["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_clusters_ask_for_a_token(manifest):
    assert cluster_spec(manifest)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_nothing_is_exposed_outside_the_cluster(manifest):
    head = cluster_spec(manifest)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    assert "headService" not in head
    for pod in all_pods(manifest):
        assert "hostNetwork" not in pod
        assert not any("hostPort" in port for container in pod["containers"] for port in container.get("ports", []))


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_ray_pod_has_the_shared_volume_at_runs(manifest):
    claim = next(yaml.safe_load_all(re.search(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.S).group(1)))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(manifest):
        pod = group["template"]["spec"]
        claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert claims[mounts["/runs"]] == claim["metadata"]["name"]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_ray_containers_wait_passively_and_bound_their_resources(manifest):
    for group in groups(manifest):
        for container in group["template"]["spec"]["containers"]:
            assert {"name": "OMP_WAIT_POLICY", "value": "PASSIVE"} in container["env"]
    for pod in all_pods(manifest):
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_workers_scale_and_the_head_takes_no_tasks(manifest):
    spec = cluster_spec(manifest)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    with_gpu = []
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        with_gpu.append("nvidia.com/gpu" in container["resources"]["limits"])
    assert with_gpu == [False, True]


def test_a_job_runs_on_the_cluster_that_stands_in_the_other_manifest():
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


def test_a_job_runs_a_shipped_config_on_the_shared_volume():
    python, m, module, config, *options = load("rayjob")["spec"]["entrypoint"].split()
    assert [python, m, module] == ["python", "-m", "jobs.pipeline"]
    assert options == ["--runner", "ray", "--set", "root=/runs"]
    assert load_config(REPOSITORY / config, [options[-1]]).root == Path("/runs")


def test_a_job_is_tried_again_and_ends_its_cluster():
    spec = load("rayjob")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
