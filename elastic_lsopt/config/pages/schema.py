"""The JSON schema of a job's YAML; `python -m elastic_lsopt.config.pages.schema` writes `schema.json` anew.

An editor with a YAML language server checks and completes a file whose first line is

    # yaml-language-server: $schema=https://... or a path to elastic_lsopt/config/pages/schema.json
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from elastic_lsopt.config.ranges import IMPORT_PATH
from elastic_lsopt.config.settings import TrainConfig

# Texts of a form, as one would write them.
FORMS = {
    r"^[^:/\s]+:\d{1,5}$": "host:port",
    r"^etcd://[^:/\s]+:\d{1,5}$": "etcd://host:port",
    IMPORT_PATH: "package.module:Class",
}
SHIPPED = Path(__file__).with_name("schema.json")


@cache
def json_schema(of: type = TrainConfig) -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) that follows from `TrainConfig`, or from other settings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(of).json_schema()}


def schema_text() -> str:
    """The text of the shipped `schema.json`."""
    return json.dumps({**json_schema(), "title": "elastic_lsopt job"}, indent=2) + "\n"


def allowed(key: str, of: type = TrainConfig) -> str:
    """What a value of this (dotted) key may be, in words.

    >>> allowed("warmup_ratio")
    'a number >= 0 and < 1'
    """
    return _words(setting(key, of), of)


def setting(key: str, of: type = TrainConfig) -> dict[str, Any]:
    """The schema of one dotted key, such as `elastic.min_nodes`. Raises KeyError where there is none."""
    schema = json_schema(of)
    for name in key.split("."):
        choices = [schema, *schema.get("anyOf", [])]
        schema = next(s for s in (_resolved(c, of) for c in choices) if "properties" in s)["properties"][name]
    return schema


def _resolved(schema: dict[str, Any], of: type) -> dict[str, Any]:
    reference = schema.get("$ref")
    return json_schema(of)["$defs"][reference.rpartition("/")[2]] if reference else schema


def _words(schema: dict[str, Any], of: type) -> str:
    schema = _resolved(schema, of)
    if "pattern" in schema:
        return FORMS[schema["pattern"]]
    if "anyOf" in schema:
        return " or ".join(_words(choice, of) for choice in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return f"'{schema['const']}'"
    kind = schema["type"]
    if kind == "array":
        return f"a list of {_words(schema['items'], of)}"
    words = {
        "boolean": "true or false",
        "integer": "an integer",
        "number": "a number",
        "object": "a mapping",
        "string": "a non-empty string" if schema.get("minLength") else "a string",
        "null": "null",
    }[kind]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(schema[bound])}" for bound, sign in signs.items() if bound in schema]
    return f"{words} {' and '.join(bounds)}".rstrip()


def _number(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{bound:g}"


if __name__ == "__main__":
    SHIPPED.write_text(schema_text(), encoding="utf-8")
