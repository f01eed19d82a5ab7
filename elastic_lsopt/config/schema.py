"""The JSON schema of a job's YAML; `python -m elastic_lsopt.config.schema` writes `schema.json` anew.

An editor with a YAML language server checks and completes a file whose first line is

    # yaml-language-server: $schema=https://... or a path to elastic_lsopt/config/schema.json
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
def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) that follows from `TrainConfig`."""
    schema = TypeAdapter(TrainConfig).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "elastic_lsopt job"}


def schema_text() -> str:
    """The text of the shipped `schema.json`."""
    return json.dumps(json_schema(), indent=2) + "\n"


def allowed(key: str) -> str:
    """What a value of this (dotted) key may be, in words: `a number >= 0 and < 1`, `one of adamw, adam, sgd`."""
    return _words(setting(key))


def setting(key: str) -> dict[str, Any]:
    """The schema of one dotted key, such as `elastic.min_nodes`. Raises KeyError where there is none."""
    schema = json_schema()
    for name in key.split("."):
        choices = [schema, *schema.get("anyOf", [])]
        schema = next(s for s in map(_resolved, choices) if "properties" in s)["properties"][name]
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return json_schema()["$defs"][reference.rpartition("/")[2]] if reference else schema


def _words(schema: dict[str, Any]) -> str:
    schema = _resolved(schema)
    if "pattern" in schema:
        return FORMS[schema["pattern"]]
    if "anyOf" in schema:
        return " or ".join(_words(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return f"'{schema['const']}'"
    kind = schema["type"]
    if kind == "array":
        return f"a list of {_words(schema['items'])}"
    words = {
        "boolean": "true or false",
        "integer": "an integer",
        "number": "a number",
        "object": "a mapping",
        "string": "a non-empty string" if schema.get("minLength") else "a string",
        "null": "null",
    }[kind]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    return f"{words} {' and '.join(bounds)}".rstrip()


if __name__ == "__main__":
    SHIPPED.write_text(schema_text(), encoding="utf-8")
