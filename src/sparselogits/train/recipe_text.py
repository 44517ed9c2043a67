"""Format recipe settings as a commented YAML file and as tables for the documentation."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sparselogits.train.recipe import Lora, Quantize, Recipe, Student, Thinning, ThinningStage

_EXAMPLES = {
    "weights": "weights: [0.5, 0.5]",
    "thinning": "thinning: {rounds: 5}",
    "lora": "lora: {rank: 16}",
    "quantize": "quantize: {config: int4-weight-only, group_size: 32}",
    "report_to": "report_to: [tensorboard]",
}
_START: dict[str, Any] = {"cache": "my-cache", "out": "my-run", "student": {"size": "tiny"}}
_WIDTH = 98


def recipe_text(values: Mapping[str, Any]) -> str:
    """Return a YAML recipe that lists the fields of `Recipe` and `Student`, each with a comment.

    Args:
        values: settings by key, as for `parse_recipe`. Other settings have default or example
            values.
    """
    merged = {**_START, **values}
    lines = [
        "# A training run: sparselogits train recipe.yaml",
        "# Every setting is listed with its default; settings that are not set are comments.",
    ]
    for name, field in _fields(Recipe).items():
        lines += ["", *_comment(field), *_entry(name, field, merged)]
    further = {name: values[name] for name in values if name not in Recipe.model_fields}
    lines += ["", "# Any other field of transformers' TrainingArguments can be added here."]
    lines += [f"{name}: {_scalar(value)}" for name, value in further.items()]
    if not further:
        lines.append("# optim: adafactor")
    return "\n".join(lines) + "\n"


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a pydantic model by name, inherited fields last."""
    names = [name for name in model.__annotations__ if name in model.model_fields]
    return {name: model.model_fields[name] for name in [*names, *model.model_fields]}


def _entry(name: str, field: FieldInfo, values: Mapping[str, Any]) -> Iterator[str]:
    given = name in values
    value = values[name] if given else _default(field)
    if name == "student":
        yield "student:"
        own = value if isinstance(value, Mapping) else {}
        for inner, inner_field in Student.model_fields.items():
            yield from (f"  {line}" for line in _comment(inner_field))
            if inner in own:
                yield f"  {inner}: {_scalar(own[inner])}"
            else:
                example = _EXAMPLES.get(inner, f"{inner}: {_scalar(_default(inner_field))}")
                yield f"  # {example}"
        return
    if value in (None, [], {}) and not given:
        yield f"# {_EXAMPLES.get(name, f'{name}:')}"
    else:
        yield f"{name}: {_scalar(value)}"


def _comment(field: FieldInfo) -> list[str]:
    text = field.description or ""
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _scalar(value: Any) -> str:
    """Format a value as YAML; all but simple words are written as JSON, which is valid YAML."""
    if isinstance(value, bool | int | float) or value is None:
        return json.dumps(value)
    plain = str(value)
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value)
    word = re.fullmatch(r"[A-Za-z_/][\w./-]*", plain) is not None
    return plain if word and plain.lower() not in ("true", "false", "null") else json.dumps(plain)


def _default(field: FieldInfo) -> Any:
    if field.default_factory is not None:
        return field.default_factory()  # type: ignore[call-arg]
    return None if field.default is PydanticUndefined else field.default


def recipe_table() -> str:
    """Return Markdown tables with the key, default and meaning of every recipe setting."""
    parts = []
    models: dict[str, type[BaseModel]] = {
        "": Recipe,
        "student.": Student,
        "student.lora.": Lora,
        "student.quantize.": Quantize,
        "thinning.": Thinning,
        "thinning.schedule[].": ThinningStage,
    }
    for prefix, model in models.items():
        parts.append("| key | default | meaning |\n|---|---|---|")
        for name, field in _fields(model).items():
            default = "required" if field.is_required() else _shown(_default(field))
            meaning = (field.description or "").replace("|", "\\|")
            parts.append(f"| `{prefix}{name}` | {default} | {meaning} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _shown(value: Any) -> str:
    return "" if value in (None, [], {}) else f"`{_scalar(value)}`"


if __name__ == "__main__":
    print(recipe_table(), end="")
