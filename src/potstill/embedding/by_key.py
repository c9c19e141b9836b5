"""Declarations whose kind is chosen by a key of its own: `{head: linear, ...}` or `{static: {...}, ...}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from potstill.losses.declared import Declared


class ChosenByKey(Declared):
    """A family in which exactly one of the kinds' names is a key of the recipe. Derive it from `Declared` too."""

    empty_is_default: ClassVar[bool] = False  # the key may stand without a value, which means all defaults

    @classmethod
    def read(cls, value: Any) -> Any:
        """Find the kind for `Declared`; a key without a value is left out, unless that means all defaults."""
        if isinstance(value, cls):
            return value
        keys = dict(value) if isinstance(value, Mapping) else {}
        for name in [name for name in cls.kinds if name in keys and keys[name] is None]:
            keys.pop(name)
            if cls.kinds[name].empty_is_default:
                keys[name] = {}
        given = [name for name in cls.kinds if name in keys]
        if len(given) != 1:
            *names, last = cls.kinds
            raise ValueError(f"expected one of {', '.join(names)} and {last}, got {' and '.join(given) or 'none'}")
        return {**keys, cls.key: given[0]}

    @classmethod
    def _plain(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(value)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        made = super(Declared, cls).__get_pydantic_json_schema__(core_schema, handler)  # recipes have no key `kind`
        if cls.empty_is_default:
            schema = handler.resolve_ref_schema(made)
            schema["required"].append(cls.name)
            schema["properties"][cls.name] = {"anyOf": [schema["properties"][cls.name], {"type": "null"}]}
        return made
