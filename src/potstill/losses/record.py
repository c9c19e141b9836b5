"""Records: a mapping of a recipe with fixed keys, such as the address of a server, as one frozen dataclass."""

from __future__ import annotations

from typing import Any, ClassVar

from potstill.losses.declared import Declared, describe


class Record:
    """Base of a dataclass that a recipe spells out; like `Declared`, without a choice among kinds."""

    __pydantic_config__: ClassVar[dict[str, Any]] = Declared.__pydantic_config__

    def __post_init__(self) -> None:
        Declared.__post_init__(self)  # type: ignore[arg-type]  # it needs a dataclass and no more

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        describe(cls, handler.resolve_ref_schema(schema))
        return schema
