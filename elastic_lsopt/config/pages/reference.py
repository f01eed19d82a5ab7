"""The reference of every YAML key: `python -m elastic_lsopt.config.pages.reference` writes `docs/keys.md` anew.

A key's range is its annotation's, its meaning its docstring; `examples.py` has an example for each. What a method, an
update or an average has of its own is read from the source of its class, so that nothing here imports torch.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from elastic_lsopt.config.compare import CompareConfig
from elastic_lsopt.config.consensus import ConsensusConfig
from elastic_lsopt.config.elastic import ElasticConfig
from elastic_lsopt.config.lora import LoraConfig
from elastic_lsopt.config.pages import examples
from elastic_lsopt.config.pages.schema import allowed, setting
from elastic_lsopt.config.probes import ProbeConfig
from elastic_lsopt.config.schedules import BatchScheduleConfig, LrSchedulerKwargs
from elastic_lsopt.config.settings import EVALUATE_ELSEWHERE, TrainConfig
from elastic_lsopt.config.study import Grid, StudyConfig

PACKAGE = Path(__file__).parents[2]
PAGE = PACKAGE.parent / "docs/keys.md"

HEAD = """\
# Every key of a YAML file

<!-- `make schema` writes this page from elastic_lsopt/config: change the docstring of a field there. -->

A file is one job. It needs a model, `dataset`, `output_dir`, and one of `max_steps` and `num_train_epochs`; every
other key has a default. `key=value` on the command line is laid over the file, a key inside a block by a dot:
`landscape.rho=0.1`. `elastic-lsopt validate FILE.yaml` names what is wrong, with its line and the fix. The first line
of this example lets an editor with a YAML language server complete and check the file:

```yaml
# yaml-language-server: $schema=elastic_lsopt/config/pages/schema.json
model: {model_type: llama, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4}
dataset: python-stdlib
output_dir: runs/first
max_steps: 100
```
"""
OF_PROBES = """\
## Each of `probes`

Beside these keys, a measure's own settings ([measures](measures.md)), such as `k: 3` of `top_eigenvalues`.
`import: "package.module:function"` in place of `measure` names a probe of your own ([how](authors.md)).
"""
OF_CONSENSUS = """\
## The block `consensus`

Beside these keys, the rule's own hyper-parameters, `tau` among them ([what it does](consensus.md)).
"""
OF_RULES = """\
## Each rule of consensus

`rule: "package.module:Class"` names a class of your own. Papers and the values that they suggest:
[papers](papers.md).
"""
OF_METHODS = """\
## Each method: fields of `landscape`

`import: "package.module:Class"` in place of `method` names a class of your own ([how](authors.md)). Papers and the
values that they suggest: [papers](papers.md).
"""
OF_UPDATES = """\
## Each update: fields of `optim_args`

`optim: "package.module:Class"` names a class of your own ([how](authors.md)). Those that are called as classes of
torch.optim take these classes' own arguments (`optim: sgd`, `optim_args: {nesterov: true}`), but for those that are
keys of the job: momentum of sgd, betas and eps of adamw and adam.
"""
OF_AVERAGES = """\
## Each average: fields of `averages.NAME`

A name of your choice takes the kind as `import: ema`, and a class of your own as `import: "package.module:Class"`
([how](authors.md)).
"""
OF_STUDIES = """\
## A study

A study's file is one of another kind, for `elastic-lsopt study FILE.yaml` ([what it does](study.md)). Each
key of `grid` is a list; the networks are all combinations.
"""

OF_COMPARISONS = """\
## A comparison

A comparison's file is for `elastic-lsopt compare FILE.yaml` ([what it does](compare.md)); `job` holds keys of the job
above.
"""


def keys_text() -> str:
    """The text of `docs/keys.md`."""
    parts = [
        HEAD, *_settings(TrainConfig, examples.JOB),
        "## The block `lora`\n", *_settings(LoraConfig, examples.LORA, "lora."),
        "## The block `lr_scheduler_kwargs`\n",
        *_settings(LrSchedulerKwargs, examples.RATE, "lr_scheduler_kwargs."),
        "## The block `batch_schedule`\n", *_settings(BatchScheduleConfig, examples.BATCH, "batch_schedule."),
        *_settings(ElasticConfig, examples.ELASTIC, "elastic.", "The block `elastic`: "),
        OF_CONSENSUS, *_settings(ConsensusConfig, examples.CONSENSUS, "consensus."),
        OF_RULES, *_algorithms("consensus", lambda name, own: {"consensus": {"rule": name, "replicas": 4, **own}}),
        OF_PROBES, *_settings(ProbeConfig, examples.PROBE, "probes.NAME."),
        OF_METHODS, *_algorithms("optimizers", lambda name, own: {"landscape": {"method": name, **own}}),
        OF_UPDATES, *_algorithms("updates", _as_optim),
        OF_AVERAGES, *_algorithms("averages", lambda name, own: {"averages": {name: own}}),
        OF_STUDIES, *_settings(StudyConfig, examples.STUDY, end=" of a study"),
        *_settings(Grid, examples.GRID, "grid."),
        OF_COMPARISONS, *_settings(CompareConfig, examples.COMPARE, end=" of a comparison"),
    ]  # fmt: skip
    return "\n".join(parts)


def _settings(kind: type, given: Mapping[str, str], prefix: str = "", block: str = "", end: str = "") -> Iterator[str]:
    """A heading where the source has a comment above its fields, and a part for each field."""
    groups, last = _groups(kind), ""
    for f in fields(kind):
        if f.name in ("settings", "hyperparameters"):
            continue  # what is another's own
        if groups[f.name] != last:
            last = groups[f.name]
            yield f"## {block}{last[0].lower() + last[1:] if block else last}\n"
        made = f.default if f.default_factory is MISSING else f.default_factory()
        default = "It must be given" if made is MISSING else f"Default: `{yaml_of(made)}`"
        meaning = " ".join(setting(f.name, kind)["description"].split())
        yield f"### `{prefix}{f.name}`{end}\n\n{meaning}\n"
        yield f"Takes {allowed(f.name, kind)}. {default}.\n"
        yield f"```yaml\n{given[f.name]}\n```\n"


def _groups(kind: type) -> dict[str, str]:
    """The comment of the source under which each field stands."""
    source = inspect.getsource(kind)
    [body] = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    names = {node.lineno: node.target.id for node, _ in annotated(body)}
    group, found = "", {}
    for number, line in enumerate(source.splitlines(), 1):
        if comment := re.match(r"    # ([^:]*?)[.:]", line):
            group = comment[1]
        if number in names:
            found[names[number]] = group
    return found


HOMES = ("elastic_lsopt.optimizers.", "elastic_lsopt.consensus.")
"""Where the classes are that others are made of."""


@dataclass(frozen=True)
class Own:
    """A field of a method, an update or an average, as its source says it."""

    name: str
    takes: str
    default: Any
    meaning: str


def _as_optim(name: str, own: dict[str, Any]) -> dict[str, Any]:
    constant = {"lr_scheduler_type": "constant"} if name in EVALUATE_ELSEWHERE else {}
    return {"optim": name, "optim_args": own, **constant}


def _algorithms(folder: str, example: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Iterator[str]:
    """A part for each class that is registered in this folder; `example` makes YAML of its name and fields."""
    for path in sorted((PACKAGE / folder).glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for found in module.body:
            name = _registered_as(found)
            if not isinstance(found, ast.ClassDef) or name is None:
                continue
            own = list(_own(found, module))
            first = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
            costs = " ".join((ast.get_docstring(found) or "").split("\n\n")[0].split())
            yield f"### `{name}`\n\n{first}\n\n{costs}\n"
            if own:
                rows = [f"| `{f.name}` | {f.takes} | `{yaml_of(f.default)}` | {_cell(f.meaning)} |" for f in own]
                yield "\n".join(["| field | takes | default | meaning |", "|---|---|---|---|", *rows, ""])
            values = example(name, {f.name: f.default for f in own if f.default is not None})
            lines = [f"{key}: {yaml_of(value)}" for key, value in values.items() if value != {}]
            yield "\n".join(["```yaml", *examples.BESIDE.get(name, ()), *lines, "```", ""])


def _registered_as(node: ast.stmt) -> str | None:
    for call in node.decorator_list if isinstance(node, ast.ClassDef) else ():
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
            return ast.literal_eval(call.args[0])
    return None


def _own(body: ast.ClassDef, module: ast.Module) -> Iterator[Own]:
    """The fields of a class, then those that a method has from what it is made of."""
    seen = set()
    for node, meaning in annotated(body):
        if "ClassVar" not in ast.unparse(node.annotation) and node.value is not None:
            seen.add(node.target.id)
            yield Own(node.target.id, in_words(node.annotation), _default(node.value), meaning)
    for base in body.bases:
        for home in module.body:
            if isinstance(home, ast.ClassDef) and home.name == ast.unparse(base):
                yield from (f for f in _own(home, module) if f.name not in seen)
            if not isinstance(home, ast.ImportFrom) or not str(home.module).startswith(HOMES):
                continue
            if any(a.name == ast.unparse(base) for a in home.names):
                path = PACKAGE.parent / f"{str(home.module).replace('.', '/')}.py"
                theirs = ast.parse(path.read_text(encoding="utf-8"))
                found = [c for c in theirs.body if isinstance(c, ast.ClassDef) and c.name == ast.unparse(base)]
                yield from (f for c in found for f in _own(c, theirs) if f.name not in seen)


def _default(value: ast.expr) -> Any:
    match value:
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Name(id="dict"))]):
            return {}
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Lambda(body=body))]):
            return ast.literal_eval(body)
    return ast.literal_eval(value)


def annotated(body: ast.ClassDef) -> Iterator[tuple[Any, str]]:
    """The fields of a class, each with the text below it."""
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield node, " ".join(text.split())
                case _:
                    yield node, ""


WORDS = {
    "float": "a number", "int": "an integer", "bool": "true or false", "str": "a string",
    "Scheduled": "a number or a schedule", "Perturb": "a mapping", "Graph": "one of ring, exponential, complete",
}  # fmt: skip
"""Of the types of fields."""


def in_words(annotation: ast.expr) -> str:
    match annotation:
        case ast.Name(id=name):
            return WORDS[name]
        case ast.Constant(value=None):
            return "null"
        case ast.BinOp(left=left, right=right):
            return f"{in_words(left)} or {in_words(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return f"one of {', '.join(ast.literal_eval(choices))}"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[first, *_])):
            return f"a list, each {in_words(first)}"
    raise ValueError(f"no words for {ast.unparse(annotation)}; add them.")


def yaml_of(value: Any) -> str:
    plain = to_jsonable_python(value)
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000).splitlines()[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(keys_text(), encoding="utf-8")
