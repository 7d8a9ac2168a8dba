"""From YAML text to a checked pydantic model, with one line about the first thing that is wrong."""

from __future__ import annotations

from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def parse_model(
    text: str, label: str, model: type[Model], refused: type[Exception], keys: str, listed: str
) -> Model:
    """`label` names the text in the error; `keys`: what a mapping must hold; `listed`: where all
    keys stand. Raises `refused`."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise refused(f"{label}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise refused(f"{label}: nested too deeply") from error
    if not isinstance(raw, dict):
        raise refused(f"{label}: must be a mapping with {keys}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise refused(f"{label}: {_first_problem(error, listed)}") from error


def _first_problem(error: ValidationError, listed: str) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    if problem["type"] == "missing":
        message = "this key is required"
    elif problem["type"] == "extra_forbidden":
        message = f"unknown key; {listed}"
    elif problem["type"] != "value_error":
        value = repr(problem["input"])
        message = f"{message} (got {value if len(value) <= 80 else value[:77] + '...'})"
    return f"{where}: {message}" if where else message
