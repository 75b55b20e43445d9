"""Checks docs/deploy/kubernetes: against the schemas of Kubernetes, and against compose/gateway.yaml.

usage: python3 tests/deploy/kubernetes.py KUBECTL

Needs kubernetes-validate (PyPI), which brings schemas and a YAML parser; tests/deploy/check has it.
"""

import copy
import itertools
import os
import re
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.join(ROOT, "docs/deploy/kubernetes")
# The oldest with everything that the manifests use, and the newest that there is a schema for.
VERSIONS = ["1.29", "1.37"]
PATCHES = ["sysctls", "sysctls-by-init", "tun-by-device-plugin", "lasting-state"]


def read(path):
    with open(os.path.join(ROOT, path)) as file:
        return file.read()


def kustomize(kubectl, patches):
    """What `kubectl apply -k` would send, with these patches of those that are commented out."""
    text = read("docs/deploy/kubernetes/kustomization.yaml")
    for patch in PATCHES:
        assert f"#   - path: patches/{patch}.yaml\n" in text, patch
    if patches:
        text = text.replace("# patches:\n", "patches:\n")
    for patch in patches:
        text = text.replace(f"#   - path: patches/{patch}.yaml", f"  - path: patches/{patch}.yaml")
    with tempfile.TemporaryDirectory() as copied:
        subprocess.run(["cp", "-r", f"{HERE}/.", copied], check=True)
        with open(os.path.join(copied, "kustomization.yaml"), "w") as file:
            file.write(text)
        output = subprocess.run(
            [kubectl, "kustomize", copied], check=True, capture_output=True, text=True
        )
        assert not output.stderr, output.stderr
        return [document for document in yaml.safe_load_all(output.stdout) if document]


def valid(document, version):
    try:
        kubernetes_validate.validate(document, version, strict=True)
        return None
    except kubernetes_validate.ValidationError as error:
        return error.message


def only(documents, kind):
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def pod(documents):
    return only(documents, "StatefulSet")["spec"]["template"]["spec"]


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


def check(documents, patches):
    for document, version in itertools.product(documents, VERSIONS):
        problem = valid(document, version)
        assert problem is None, f"{document['kind']} with {patches}, Kubernetes {version}: {problem}"
    compose = yaml.safe_load(read("compose/gateway.yaml"))["services"]["gateway"]
    spec = pod(documents)
    (gateway,) = spec["containers"]
    rights = gateway["securityContext"]
    assert rights["capabilities"]["drop"] == compose["cap_drop"]
    assert rights["capabilities"]["add"] == compose["cap_add"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"

    routes = read("src/admin/routes.rs")
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
        assert f'"{gateway[probe]["httpGet"]["path"]}"' in routes, probe
    settings = read("src/config/load.rs")
    environment = {variable["name"]: variable for variable in gateway["env"]}
    for name in environment:
        assert not name.startswith("FIREZONE_") or f'"{name}"' in settings, f"{name} is no setting"
    linger = seconds(environment["FIREZONE_SHUTDOWN_LINGER"]["value"])
    assert linger + 5 < spec["terminationGracePeriodSeconds"]

    mounts = {mount["mountPath"]: mount["name"] for mount in gateway["volumeMounts"]}
    claims = only(documents, "StatefulSet")["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"] for volume in spec["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in claims}
    assert set(mounts.values()) == volumes | claimed and not volumes & claimed
    token = environment["FIREZONE_TOKEN_FILE"]["value"]
    assert mounts[os.path.dirname(token)] == "token"
    assert mounts[compose["volumes"][0].split(":")[1]] == "state"
    assert ("/dev/net/tun" in mounts) != ("tun-by-device-plugin" in patches)

    wanted = compose["sysctls"]
    if "sysctls" in patches:
        given = {item["name"]: item["value"] for item in spec["securityContext"]["sysctls"]}
        assert given == wanted, given
        for name in wanted:
            assert f"#       - {name}\n" in read("docs/deploy/kubernetes/patches/sysctls.yaml"), name
    if "sysctls-by-init" in patches:
        (init,) = spec["initContainers"]
        assert dict(item.split("=") for item in init["command"][2:]) == wanted

    labels = only(documents, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    for kind, path in [
        ("Service", ["spec", "selector"]),
        ("PodDisruptionBudget", ["spec", "selector", "matchLabels"]),
        ("NetworkPolicy", ["spec", "podSelector", "matchLabels"]),
        ("StatefulSet", ["spec", "selector", "matchLabels"]),
    ]:
        value = only(documents, kind)
        for step in path:
            value = value[step]
        assert value.items() <= labels.items(), kind


def main():
    kubectl = sys.argv[1]
    version = re.search(r'^version = "(.*)"', read("Cargo.toml"), re.M)[1]
    combinations = [[], *([patch] for patch in PATCHES), ["sysctls", "tun-by-device-plugin", "lasting-state"]]
    for patches in combinations:
        documents = kustomize(kubectl, patches)
        check(documents, patches)
        image = pod(documents)["containers"][0]["image"]
        assert image == f"firezone-gateway:{version}", image
        print(f"    {len(documents)} objects, {'as they are' if not patches else ', '.join(patches)}")
    # Whether anything would be noticed at all.
    documents = kustomize(kubectl, [])
    for spoil in [
        lambda spec: spec.update(terminationGracePeriod=45),
        lambda spec: spec["containers"][0].update(ports="8080"),
        lambda spec: spec["containers"][0]["livenessProbe"].update(periodSeconds="10"),
    ]:
        spoilt = copy.deepcopy(documents)
        spoil(pod(spoilt))
        assert valid(only(spoilt, "StatefulSet"), VERSIONS[0]), "a mistake passes"


main()
