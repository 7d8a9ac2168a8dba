"""The JSON body of `/v1/rank`, and the checks that no schema language can say.

The pydantic models are built for one `ModelConfig`, so that the OpenAPI document states its
limits and an error names the very element that breaks them.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.history import first_kept_token
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from hbm_serving.config import ModelConfig
from hbm_serving.errors import RequestError
from hbm_serving.features import Ints, RankRequest

MAX_TIMESTAMP = (1 << 53) - 1
"""Largest integer that every JSON reader keeps exact."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RankResponse(BaseModel):
    """Answer of `/v1/rank`; more about the request stands in the `X-HBM-*` headers."""

    scores: list[float] = Field(description="One per candidate, in the order of the request.")
    model: str
    model_version: int
    history_tokens: int = Field(description="History tokens that were scored (kept part).")
    kv_reused_tokens: int = Field(description="Of these, tokens whose KV was in the pool.")


class ErrorDetail(BaseModel):
    field: str = Field(description="Where the problem is, e.g. `history.items[3]`, or `server`.")
    message: str
    reason: str = Field(description="The kind of problem as one word, e.g. `bad_request`.")


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


def rank_body(model: ModelConfig) -> type[BaseModel]:
    """The request model of `/v1/rank` for one served model."""
    item = Annotated[int, Field(ge=0, lt=model.items)]
    time = Annotated[int, Field(ge=0, le=MAX_TIMESTAMP)]
    longest = model.max_request_history_tokens
    fields: dict[str, Any] = {
        "items": (
            Annotated[list[item], Field(max_length=longest)],
            Field(description="Item ids, oldest first."),
        ),
        "timestamps": (
            Annotated[list[time], Field(max_length=longest)],
            Field(description="When, as integers of one unit (e.g. Unix s), never falling."),
        ),
    }
    if model.actions:
        action = Annotated[int, Field(ge=0, lt=model.actions)]
        fields["actions"] = (
            Annotated[list[action], Field(max_length=longest)] | None,
            Field(default=None, description="What the user did with each item."),
        )
    history = create_model("History", __base__=_Strict, **fields)
    return create_model(
        "RankRequest",
        __base__=_Strict,
        history=(history, Field(description="The whole history, as far as the client keeps it.")),
        candidates=(
            Annotated[list[item], Field(min_length=1, max_length=model.max_candidates)],
            Field(description="Item ids to score."),
        ),
        query_time=(
            time | None,
            Field(
                default=None,
                description="Time of the query; default: the last timestamp of the history.",
            ),
        ),
    )


def location(loc: tuple[int | str, ...]) -> str:
    """`("history", "items", 3)` -> `history.items[3]`; the whole body is `body`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text or "body"


class RequestParser:
    """Turns bodies and arrays into `RankRequest`s. Stateless after construction."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.body = rank_body(model)

    def parse_json(self, raw: bytes, user: int) -> RankRequest:
        """Body of `/v1/rank` -> request. Raises `RequestError` that names the field."""
        try:
            body: Any = self.body.model_validate_json(raw)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            field, message = location(problem["loc"]), problem["msg"]
            if problem["type"] == "json_invalid":
                raise RequestError(field, message, status=400) from None
            raise RequestError(field, message) from None
        history = body.history
        actions = history.actions if self.model.actions else None
        return self.build(
            user,
            np.array(history.items, dtype=np.int64),
            np.array(history.timestamps, dtype=np.int64),
            None if actions is None else np.array(actions, dtype=np.int64),
            np.array(body.candidates, dtype=np.int64),
            body.query_time,
        )

    def build(
        self,
        user: int,
        items: Ints,
        timestamps: Ints,
        actions: Ints | None,
        candidates: Ints,
        query_time: int | None,
        names: tuple[str, str, str] = (
            "history.items",
            "history.timestamps",
            "history.actions",
        ),
    ) -> RankRequest:
        """Checks what belongs together, drops old blocks of a history that is too long."""
        tokens = len(items)
        if len(timestamps) != tokens:
            raise RequestError(
                names[1], f"has {len(timestamps)} entries, {names[0]} has {tokens}; give one each"
            )
        if actions is not None and len(actions) != tokens:
            raise RequestError(
                names[2], f"has {len(actions)} entries, {names[0]} has {tokens}; give one each"
            )
        falling = np.flatnonzero(timestamps[1:] < timestamps[:-1])
        if len(falling):
            at = int(falling[0]) + 1
            raise RequestError(
                f"{names[1]}[{at}]",
                f"{timestamps[at]} is before the timestamp ahead of it ({timestamps[at - 1]}); "
                "order the history from oldest to newest",
            )
        if query_time is None:
            query_time = int(timestamps[-1]) if tokens else 0
        model = self.model
        start = first_kept_token(tokens, model.max_sequence_tokens, model.drop_block_tokens)
        return RankRequest(
            user,
            items[start:],
            timestamps[start:],
            None if actions is None else actions[start:],
            candidates,
            query_time,
            tokens,
        )

    def check_range(self, name: str, values: Ints, limit: int) -> None:
        """Every value in [0, limit), or `RequestError` that names the first that is not."""
        wrong: npt.NDArray[np.intp] = np.flatnonzero((values < 0) | (values >= limit))
        if len(wrong):
            at = int(wrong[0])
            raise RequestError(f"{name}[{at}]", f"{values[at]} is not in 0..{limit - 1}")
