"""What holds for every pod, however it looks."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
from hbm_operator import names
from hbm_operator.injector import (
    InjectionSettings,
    NamespaceFacts,
    Outcome,
    Stamp,
    inject,
    json_patch,
)
from hbm_operator.injector.resources import qos_class
from hypothesis import example, given
from hypothesis import strategies as st

SETTINGS = InjectionSettings(image="hbm-partition/sidecar:0.1.0", version="0.1.0")
CLASSIC = InjectionSettings(image="hbm-partition/sidecar:0.1.0", version="0.1.0", native=False)
ADDED_TO_SERVER = {"HBM_RUN_DIR", "HBM_NODE"}

amounts = st.sampled_from(["0", "100m", "0.1", "1", "2", "1Gi", "1073741824", "1e9", "500M"])
resource_names = st.sampled_from(["cpu", "memory", "nvidia.com/gpu", "ephemeral-storage"])


@st.composite
def resources(draw: st.DrawFn) -> dict[str, Any]:
    limits = draw(st.dictionaries(resource_names, amounts, max_size=4))
    requests = draw(
        st.one_of(
            st.just(limits),  # Guaranteed is rare by chance
            st.dictionaries(resource_names, amounts, max_size=4),
        )
    )
    parts = {"limits": limits, "requests": requests}
    return {key: value for key, value in parts.items() if draw(st.booleans())}


@st.composite
def containers(draw: st.DrawFn, name: str) -> dict[str, Any]:
    container: dict[str, Any] = {"name": name, "image": f"{name}:1"}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "resources": resources(),
        "env": st.lists(
            st.sampled_from(
                [
                    {"name": "HBM_RUN_DIR", "value": "/elsewhere"},
                    {"name": "HBM_NODE", "value": "me"},
                    {"name": "A", "value": "~/1"},
                ]
            ),
            max_size=3,
            unique_by=lambda variable: str(variable["name"]),
        ),
        "ports": st.lists(
            st.fixed_dictionaries({"containerPort": st.sampled_from([80, 8000, 9400])}), max_size=2
        ),
        "volumeMounts": st.lists(
            st.sampled_from(
                [
                    {"name": "data", "mountPath": "/data"},
                    {"name": "run", "mountPath": "/run"},
                    {"name": "data", "mountPath": "/run/hbm"},
                ]
            ),
            max_size=2,
        ),
        "securityContext": st.just({"runAsUser": 1000}),
        "restartPolicy": st.just("Always"),
    }
    for key, strategy in optional.items():
        if (key != "restartPolicy" or name.startswith("init")) and draw(st.booleans()):
            container[key] = draw(strategy)
    return container


annotations = st.dictionaries(
    st.sampled_from(
        [*sorted(names.INPUT_ANNOTATIONS), names.SKIP_REASON, "team", "a/b~c", f"{names.GROUP}/x"]
    ),
    st.sampled_from(
        ["c0", "c1", "true", "false", "1", "2", "9999", "shm", "200m", "1Gi", "", "host-network"]
    ),
    max_size=4,
)


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    metadata: dict[str, Any] = draw(
        st.sampled_from([{"name": "p"}, {"generateName": "p-"}, {"generateName": "p-", "uid": "u"}])
    ).copy()
    labels = draw(
        st.dictionaries(
            st.sampled_from([names.INJECT_LABEL, "app", names.CONTAINER]),
            st.sampled_from(["true", "true", "false", "yes"]),
        )
    )
    for key, value in (("labels", labels), ("annotations", draw(annotations))):
        if value or draw(st.booleans()):
            metadata[key] = value
    spec: dict[str, Any] = {
        "containers": [draw(containers(f"c{index}")) for index in range(draw(st.integers(1, 3)))]
    }
    if draw(st.booleans()):
        spec["initContainers"] = [
            draw(containers(f"init{index}")) for index in range(draw(st.integers(0, 2)))
        ]
    if draw(st.booleans()):
        spec["volumes"] = [{"name": "data", "emptyDir": {}}, {"name": "run", "emptyDir": {}}]
    for key, values in (
        ("hostNetwork", [True, False]),
        ("restartPolicy", ["Always", "Never", "OnFailure"]),
        ("automountServiceAccountToken", [False]),
        ("imagePullSecrets", [[{"name": "registry"}]]),
        ("resources", [{}, {"requests": {"cpu": "2"}}, {"limits": {"cpu": "2", "memory": "4Gi"}}]),
    ):
        if draw(st.integers(0, 3)) == 0:
            spec[key] = draw(st.sampled_from(values))
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


namespaces = st.builds(NamespaceFacts, st.just("shop"), st.booleans())
settings = st.sampled_from([SETTINGS, CLASSIC])
SIMPLE = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p", "labels": {names.INJECT_LABEL: "true"}},
    "spec": {"containers": [{"name": "c0", "image": "c0:1"}]},
}


@given(pods(), namespaces, settings)
@example(SIMPLE, NamespaceFacts("shop", False), SETTINGS)
def test_second_call_changes_nothing(
    pod: dict[str, Any], namespace: NamespaceFacts, settings: InjectionSettings
) -> None:
    once = inject(pod, namespace, settings)
    twice = inject(once.pod, namespace, settings)
    assert twice.pod == once.pod
    assert (twice.outcome is Outcome.DENIED) == (once.outcome is Outcome.DENIED)


@given(pods(), namespaces, settings)
def test_patch_makes_the_same_pod(
    pod: dict[str, Any], namespace: NamespaceFacts, settings: InjectionSettings
) -> None:
    given_pod = copy.deepcopy(pod)
    after = inject(pod, namespace, settings).pod
    assert pod == given_pod
    assert jsonpatch.apply_patch(pod, json_patch(pod, after)) == after


@given(pods(), namespaces, settings)
def test_qos_class_never_changes(
    pod: dict[str, Any], namespace: NamespaceFacts, settings: InjectionSettings
) -> None:
    after = inject(pod, namespace, settings).pod
    assert qos_class(after["spec"]) is qos_class(pod["spec"])


@given(pods(), namespaces, settings)
@example(SIMPLE, NamespaceFacts("shop", False), CLASSIC)
def test_nothing_else_changes(
    pod: dict[str, Any], namespace: NamespaceFacts, settings: InjectionSettings
) -> None:
    result = inject(pod, namespace, settings)
    if result.outcome is Outcome.INJECTED:
        assert _stripped(result.pod) == _plain(pod)
    elif result.outcome is Outcome.SKIPPED:
        marks = result.pod["metadata"]["annotations"]
        assert marks[names.SKIP_REASON] == result.skip_reason
        assert marks[names.SKIP_MESSAGE] in result.warnings[-1]
        assert _plain(result.pod) == _plain(pod)
    else:
        assert result.pod == pod


@given(pods(), namespaces, settings)
def test_injected_pods_are_complete(
    pod: dict[str, Any], namespace: NamespaceFacts, settings: InjectionSettings
) -> None:
    result = inject(pod, namespace, settings)
    if result.outcome is not Outcome.INJECTED:
        return
    spec, stamp = result.pod["spec"], Stamp.of(result.pod)
    assert stamp is not None
    assert stamp.holds_for(result.pod)
    if stamp.native:
        sidecar = spec["initContainers"][0]
        assert sidecar["restartPolicy"] == "Always"
        assert spec["containers"][0]["name"] == pod["spec"]["containers"][0]["name"]
    else:
        sidecar = spec["containers"][-1]
        assert "restartPolicy" not in sidecar
    assert sidecar["name"] == names.SIDECAR_CONTAINER
    assert "readinessProbe" not in sidecar
    server = next(one for one in spec["containers"] if one["name"] == stamp.container)
    assert {"name": names.RUN_VOLUME, "mountPath": names.RUN_DIR} in server["volumeMounts"]
    assert {variable["name"] for variable in server["env"]} >= ADDED_TO_SERVER
    mounted = {mount["name"] for mount in sidecar["volumeMounts"]}
    assert mounted == set(stamp.volumes) <= {volume["name"] for volume in spec["volumes"]}


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from(["", "a", "b"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["", "a", "a/b", "a~1", "~"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(json_values, json_values)
def test_patch_between_any_two_values(before: Any, after: Any) -> None:
    patch = json_patch(before, after)
    applied = jsonpatch.apply_patch(before, patch) if patch else before
    assert _typed(applied) == _typed(after)
    assert not json_patch(before, before)


def _typed(value: Any) -> str:
    """Text that tells True from 1."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_typed(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(_typed, value)) + "]" if isinstance(value, list) else repr(value)


def _plain(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod without skip reasons and without empty parts, which mean the same as none."""
    pod = copy.deepcopy(pod)
    for key in (names.SKIP_REASON, names.SKIP_MESSAGE):
        pod["metadata"].get("annotations", {}).pop(key, None)
    for part in (pod["metadata"], pod["spec"], *pod["spec"]["containers"]):
        for key in ("labels", "annotations", "initContainers", "volumes", "env", "volumeMounts"):
            if not part.get(key, True):
                del part[key]
    return pod


def _stripped(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod without everything that its stamp says was added."""
    stamp = Stamp.of(pod)
    assert stamp is not None
    pod = copy.deepcopy(pod)
    metadata, spec = pod["metadata"], pod["spec"]
    del metadata["labels"][names.INJECTED], metadata["annotations"][names.STATUS]
    assert metadata["annotations"].pop("kubectl.kubernetes.io/default-container") == stamp.container
    for key, gone in (
        ("initContainers", stamp.init_containers),
        ("containers", stamp.containers),
        ("volumes", stamp.volumes),
    ):
        spec[key] = [entry for entry in spec.get(key, ()) if entry["name"] not in gone]
    server = next(one for one in spec["containers"] if one["name"] == stamp.container)
    server["volumeMounts"] = [
        mount for mount in server["volumeMounts"] if mount["name"] != names.RUN_VOLUME
    ]
    ours = ({"name": "HBM_RUN_DIR", "value": names.RUN_DIR},)
    server["env"] = [
        variable for variable in server["env"] if variable not in ours and "value" in variable
    ]
    return _plain(pod)
