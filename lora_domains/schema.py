"""Parsed JSON checked against a JSON schema, without a validator library.

Only the keywords of JSON Schema that the package's schemas use are known. An adapter loads in a few
milliseconds: jsonschema takes at least five times as long for a card as this does, and
fastjsonschema a third of a second in each process to compile the schema.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TYPES = {
    dict: ("object",), list: ("array",), str: ("string",), bool: ("boolean",),
    int: ("integer", "number"), float: ("number",), type(None): ("null",),
}  # fmt: skip
"""The types of JSON Schema that a parsed value has."""
RANGES = {
    "minimum": operator.ge, "maximum": operator.le,
    "exclusiveMinimum": operator.gt, "exclusiveMaximum": operator.lt,
}  # fmt: skip


class Fault(NamedTuple):
    """The first place where a value breaks its schema."""

    path: str
    """``.key`` and ``[number]`` from the root down to the value."""
    expected: str
    found: str

    @property
    def key(self) -> str:
        return self.path.removeprefix(".")


def fault_in(value: Any, schema: Mapping[str, Any]) -> Fault | None:
    """The first place where ``value`` breaks ``schema``; None where it keeps it.

    NaN and infinity, which JSON lacks, are faults anywhere.
    """
    return _fault(value, schema, schema.get("$defs", {}))


def _fault(value: Any, rule: Mapping[str, Any], shared: Mapping[str, Any]) -> Fault | None:
    if "$ref" in rule:
        rule = shared[rule["$ref"].rpartition("/")[2]]
    expected = _unmet(value, rule)
    if expected is not None:
        return Fault("", expected, f"{type(value).__name__} {str(value)[:40]!r}")
    if isinstance(value, dict):
        return _fault_in_object(value, rule, shared)
    if isinstance(value, list):
        items = rule.get("items", {})
        for number, part in enumerate(value):
            if fault := _fault(part, items, shared):
                return fault._replace(path=f"[{number}]{fault.path}")
    return None


def _fault_in_object(
    value: dict[str, Any], rule: Mapping[str, Any], shared: Mapping[str, Any]
) -> Fault | None:
    for name in rule.get("required", ()):
        if name not in value:
            return Fault("", f"a key {name!r}", f"no {name!r}")
    known, others = rule.get("properties", {}), rule.get("additionalProperties", {})
    for name, part in value.items():
        if name not in known and others is False:
            return Fault(f".{name}", "a known key", "an unknown one")
        if fault := _fault(part, known.get(name, others), shared):
            return fault._replace(path=f".{name}{fault.path}")
    return None


def _unmet(value: Any, rule: Mapping[str, Any]) -> str | None:
    """What ``rule`` expects of the value itself; None where the value meets it."""
    kinds = rule.get("type")
    if kinds is not None:
        allowed: Sequence[str] = (kinds,) if isinstance(kinds, str) else kinds
        if not any(kind in allowed for kind in TYPES.get(type(value), ())):
            return " or ".join(allowed)
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if kinds is not None and len(rule) == 1:
        return None
    if "const" in rule and (isinstance(value, bool) or value != rule["const"]):
        return repr(rule["const"])
    if "enum" in rule and value not in rule["enum"]:
        return "one of " + ", ".join(map(repr, rule["enum"]))
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return f"text that matches {rule['pattern']}"
    if isinstance(value, list):
        low, high = rule.get("minItems", 0), rule.get("maxItems", len(value))
        return None if low <= len(value) <= high else f"{low} to {high} elements"
    if isinstance(value, int | float) and not isinstance(value, bool):
        for keyword, holds in RANGES.items():
            if keyword in rule and not holds(value, rule[keyword]):
                return f"a number with {keyword} {rule[keyword]}"
    return None
