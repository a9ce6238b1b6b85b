"""Other names for the served model: clients that insist on theirs (`claude-*`, `deepseek-chat`) are answered by it.

    PATTERN[=NAME],...      * stands for any characters; without NAME the served model is meant

The first pattern that fits counts, and a model's own name comes before all of them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase


class Aliases:
    """The aliases of one server."""

    def __init__(self, text: str) -> None:
        """Read the setting `model_alias`, whose form the settings have checked."""
        pairs = (one.partition("=") for one in text.split(",") if one.strip())
        self._pairs = tuple((pattern.strip(), name.strip()) for pattern, _, name in pairs)

    def resolve(self, name: str, served: str) -> str:
        """The model that `name` stands for; `name` itself where no pattern fits."""
        if name == served:
            return name
        target = next((target for pattern, target in self._pairs if fnmatchcase(name, pattern)), name)
        return target or served
