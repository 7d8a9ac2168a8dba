"""CustomResourceDefinitions out of the pydantic models: `crds/` holds what this module says.

Pydantic speaks JSON Schema with references; the API server wants one structural OpenAPI v3.0 schema
without them. What JSON Schema cannot say (relations between fields, immutability) is CEL, kept
beside the conversion in `_RULES`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from hbm_operator import names
from hbm_operator.models.partition import HBMPartitionSpec, HBMPartitionStatus
from hbm_operator.models.policy import HBMPolicySpec, HBMPolicyStatus

Schema = dict[str, Any]

_KEPT: Final[tuple[str, ...]] = (
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "default",
    "x-kubernetes-int-or-string",
)
"""Keywords that mean the same in both languages."""

_MAX_TIME_LENGTH: Final = 64
_MAX_STATUS_STRING: Final = 1024


def _rule(rule: str, message: str, field: str = "") -> Schema:
    """One CEL rule. The API server shows the value itself beside the message."""
    made = {"rule": rule, "message": message}
    if field:
        made["fieldPath"] = field
    return made


_RULES: Final[dict[str, list[Schema]]] = {
    "AlphaSpec": [
        _rule(
            "self.min <= self.max",
            "alpha.min (0.1 unless given) must not be above alpha.max (0.9 unless given)",
        ),
        _rule(
            "!has(self.fixed) || (self.min <= self.fixed && self.fixed <= self.max)",
            "alpha.fixed must lie between alpha.min (0.1 unless given) and alpha.max "
            "(0.9 unless given)",
        ),
        _rule(
            "!has(self.initial) || (self.min <= self.initial && self.initial <= self.max)",
            "alpha.initial must lie between alpha.min (0.1 unless given) and alpha.max "
            "(0.9 unless given)",
        ),
    ],
    "GovernSpec": [
        _rule(
            "self.mode != 'Fixed' || has(self.alpha.fixed)",
            "mode Fixed needs alpha.fixed",
            ".alpha",
        ),
    ],
    "SelectorRequirement": [
        _rule(
            "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0"
            " : !has(self.values) || size(self.values) == 0",
            "operators In and NotIn need at least one value, Exists and DoesNotExist take none",
        ),
    ],
    "RefillSpec": [
        _rule(
            "type(self.maxBytesPerSecond) != int || int(self.maxBytesPerSecond) >= 0",
            "refill.maxBytesPerSecond must not be negative; 0 turns the refill off",
            ".maxBytesPerSecond",
        ),
    ],
    "PodReference": [
        _rule(
            "self == oldSelf",
            "podRef is immutable: a pod that comes back under the same name gets a new "
            "HBMPartition",
        ),
    ],
}
_RULES["HBMPolicySpec"] = _RULES["GovernSpec"]
_RULES["HBMPartitionSpec"] = _RULES["GovernSpec"]


class _Converter:
    """JSON Schema of one model -> structural schema, references written out."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._root = model.model_json_schema(by_alias=True, mode="validation")
        self._definitions: dict[str, Schema] = self._root.get("$defs", {})

    def convert(self) -> Schema:
        return self._schema(self._root)

    def _schema(self, source: Schema) -> Schema:
        if "$ref" in source:
            definition = self._definitions[source["$ref"].rsplit("/", 1)[1]]
            # What stands beside a reference says what the part is here, not in general.
            return self._schema({**definition, **{k: v for k, v in source.items() if k != "$ref"}})
        if "anyOf" in source:
            present = [option for option in source["anyOf"] if option.get("type") != "null"]
            if len(present) != 1:
                raise ValueError(f"a field of several types has no structural schema: {source}")
            outside = {k: v for k, v in source.items() if k not in ("anyOf", "default")}
            return self._schema({**present[0], **outside})
        made: Schema = {key: source[key] for key in _KEPT if key in source}
        if "description" in source:
            made["description"] = source["description"]
        for bound, exclusive in (
            ("minimum", "exclusiveMinimum"),
            ("maximum", "exclusiveMaximum"),
        ):
            if exclusive in source:
                made |= {bound: source[exclusive], exclusive: True}
        if made.get("x-kubernetes-int-or-string"):
            made.pop("type")
            made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        elif source.get("type") == "object":
            self._object(source, made)
        elif source.get("type") == "array":
            made["items"] = self._schema(source["items"])
            if not made.get("default", True):
                del made["default"]  # no list and an empty one say the same
            _list_semantics(made)
        elif source.get("type") == "string" and "enum" not in made:
            made.setdefault(
                "maxLength",
                _MAX_TIME_LENGTH if made.get("format") == "date-time" else _MAX_STATUS_STRING,
            )
        elif source.get("type") == "integer":
            made.setdefault("format", "int64")
        return made

    def _object(self, source: Schema, made: Schema) -> None:
        if rules := _RULES.get(source.get("title", "")):
            made["x-kubernetes-validations"] = rules
        if "properties" not in source:
            made["additionalProperties"] = self._schema(source["additionalProperties"])
            return
        required = source.get("required", [])
        properties: dict[str, Schema] = {}
        for name, field in source["properties"].items():
            properties[name] = self._schema(field)
            default = _defaults(properties[name])
            if default and "default" not in field and name not in required:
                # Made by a factory in Python. Written out: rules are checked against a default
                # before its own parts get theirs.
                properties[name]["default"] = default
        made["properties"] = properties
        if required:
            made["required"] = sorted(required)


def _defaults(schema: Schema) -> Schema:
    """The object that the defaults of its fields make; empty where a field has to be given."""
    if schema.get("required"):
        return {}
    return {
        name: copy.deepcopy(field["default"])
        for name, field in schema.get("properties", {}).items()
        if "default" in field
    }


def _drop_defaults(schema: Schema) -> None:
    schema.pop("default", None)
    for inner in schema.get("properties", {}).values():
        _drop_defaults(inner)
    if "items" in schema:
        _drop_defaults(schema["items"])


def _list_semantics(made: Schema) -> None:
    """Conditions are merged by type when several writers apply; other lists have one writer."""
    if {"type", "lastTransitionTime"} <= made["items"].get("properties", {}).keys():
        made["x-kubernetes-list-type"] = "map"
        made["x-kubernetes-list-map-keys"] = ["type"]
    else:
        made["x-kubernetes-list-type"] = "atomic"


def _root_schema(
    spec: type[BaseModel], status: type[BaseModel], description: str, *, spec_required: bool
) -> Schema:
    spec_schema = _Converter(spec).convert()
    spec_schema["description"] = "What is wanted."
    if not spec_required:
        spec_schema["default"] = _defaults(spec_schema)
    status_schema = _Converter(status).convert()
    _drop_defaults(status_schema)  # a default would be a value that nobody measured
    status_schema["description"] = "What was seen last; written by machines."
    return {
        "type": "object",
        "description": description,
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of this schema."},
            "kind": {"type": "string", "description": "Kind of the object."},
            "metadata": {"type": "object"},
            "spec": spec_schema,
            "status": status_schema,
        },
        "required": ["spec"] if spec_required else [],
    }


def _condition_path(type_: str) -> str:
    return f'.status.conditions[?(@.type=="{type_}")].status'


def _columns(*columns: tuple[str, str, str, str]) -> list[Schema]:
    made = []
    for name, type_, path, description in columns:
        column = {"name": name, "type": type_, "jsonPath": path, "description": description}
        made.append(column)
    made.append({"name": "AGE", "type": "date", "jsonPath": ".metadata.creationTimestamp"})
    return made


def _definition(
    kind: str,
    plural: str,
    short_name: str,
    schema: Schema,
    columns: list[Schema],
    selectable: tuple[str, ...] = (),
) -> Schema:
    if not schema["required"]:
        del schema["required"]
    version: Schema = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": schema},
    }
    if selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in selectable]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
                "categories": ["hbm"],
            },
            "versions": [version],
        },
    }


def policy_definition() -> Schema:
    """The CustomResourceDefinition of `HBMPolicy`."""
    return _definition(
        "HBMPolicy",
        "hbmpolicies",
        "hbmpol",
        _root_schema(
            HBMPolicySpec,
            HBMPolicyStatus,
            "Which pods of this namespace are governed, and how their pool of GPU memory is shared "
            "between embedding rows and per-user KV pages.",
            spec_required=False,
        ),
        _columns(
            ("READY", "string", _condition_path("Ready"), "All selected pods follow the policy."),
            ("MODE", "string", ".spec.mode", "Who moves α."),
            ("SELECTED", "integer", ".status.selected", "Pods that the policy governs."),
            ("APPLIED", "integer", ".status.applied", "Of these, how many follow it."),
            ("FAILED", "integer", ".status.failed", "Of these, how many say that they cannot."),
            ("PRIORITY", "integer", ".spec.priority", "Highest wins where several match."),
        ),
    )


def partition_definition() -> Schema:
    """The CustomResourceDefinition of `HBMPartition`."""
    return _definition(
        "HBMPartition",
        "hbmpartitions",
        "hbmp",
        _root_schema(
            HBMPartitionSpec,
            HBMPartitionStatus,
            "One injected GPU pod: what is asked of it and what it says of itself. Made by the "
            "controller; people edit the HBMPolicy.",
            spec_required=True,
        ),
        _columns(
            ("READY", "string", _condition_path("Ready"), "The sum of all conditions."),
            ("POLICY", "string", ".spec.policyRef.name", "The policy that governs the pod."),
            ("NODE", "string", ".spec.nodeName", "Node that the pod runs on."),
            ("ALPHA", "number", ".status.alpha", "α as the server has it."),
            ("TARGET", "number", ".status.target", "α that is asked for, or recommended."),
            ("KV-HIT", "number", ".status.kvHitRatio", "History tokens whose KV was reused."),
            ("EMB-HIT", "number", ".status.embHitRatio", "Row lookups that hit."),
            ("P99", "number", ".status.p99Ms", "P99 of the server's latency, ms."),
            ("APPLIED", "string", _condition_path("Applied"), "The sidecar follows the spec."),
        ),
        selectable=(".spec.nodeName", ".spec.podRef.uid"),
    )


def definitions() -> dict[str, Schema]:
    """File name -> definition, for both custom resources."""
    return {
        f"{names.GROUP}_hbmpolicies.yaml": policy_definition(),
        f"{names.GROUP}_hbmpartitions.yaml": partition_definition(),
    }


class _Dumper(yaml.SafeDumper):
    """Repeated parts are written out: the API server's YAML is easier read without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(definition: Schema) -> str:
    """As the file stands in `crds/`."""
    return yaml.dump(
        definition, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2
    )


def write(folder: Path) -> list[Path]:
    """Write both definitions into a folder and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, definition in definitions().items():
        path = folder / name
        path.write_text(to_yaml(definition), encoding="utf-8")
        written.append(path)
    return written
