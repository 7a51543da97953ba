"""The keys of a config.json, read strictly."""

from __future__ import annotations

import sys
from typing import Any

from grpo_jax.messages.values import shown

_REQUIRED = object()

# Far above any model that there is; beyond, the list of its tensors alone would fill the memory.
_LARGEST = {"num_hidden_layers": 2_000, "max_position_embeddings": 2**31 - 1}
_LARGEST_SIZE = 2**24


class Keys:
    """The keys of one config.json, with the file's name in every message."""

    def __init__(self, hf: dict[str, Any], source: str):
        self.hf, self.source, self.absent = hf, source, {}

    def unsupported(self, key: str, value: Any, supported: str) -> ValueError:
        return ValueError(
            f"{self.source}: {key} = {shown(value)} is not supported. Supported: {supported}."
        )

    def get(self, key: str) -> Any:
        value = self.hf.get(key, self.absent.get(key, _REQUIRED))
        if value is _REQUIRED:
            raise ValueError(f"{self.source}: the key {key} is missing.")
        return value

    def size(self, key: str, null: int | None = None) -> int:
        """A whole number above 0; `null` stands in for a null, where one is allowed."""
        value = self.get(key)
        if value is None and null is not None:
            return null
        if type(value) is not int or value <= 0:
            raise ValueError(
                f"{self.source}: {key} = {shown(value)} must be a whole number above 0."
            )
        largest = _LARGEST.get(key, _LARGEST_SIZE)
        if value > largest:
            raise ValueError(f"{self.source}: {key} = {shown(value)} must be at most {largest}.")
        return value

    def number(self, key: str, holder: dict[str, Any], name: str | None = None) -> float:
        """A finite number above 0 from a part of the file, called `name` in messages."""
        name = name or key
        if key not in holder:
            raise ValueError(f"{self.source}: the key {name} is missing.")
        value = holder[key]
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.source}: {name} = {shown(value)} must be a number above 0.")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where absent, as in all families."""
        value = self.hf.get(key, False)
        if type(value) is not bool:
            raise ValueError(f"{self.source}: {key} = {shown(value)} must be true or false.")
        return value
