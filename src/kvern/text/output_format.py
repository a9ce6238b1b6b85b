"""What the text of an answer must match, as a request says it: structured output.

Every dialect's fields (OpenAI's `response_format` and `text.format`, vLLM's `guided_*`) become an OutputFormat; what
Kvern cannot hold an answer to is refused when its grammar is made (`text.grammar`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class OutputFormat:
    """A form that an answer must have; the class methods make them.

    definition: nothing for any JSON object, else a JSON schema, a regular expression, texts, or a grammar. param: the
    request's field that holds it, for refusals.
    """

    kind: Kind
    definition: Any = None
    param: str = "format"

    @classmethod
    def json_object(cls, param: str = "format") -> OutputFormat:
        """Any JSON object."""
        return cls("json_object", None, param)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], param: str = "format") -> OutputFormat:
        """JSON that matches a schema (draft 2020-12); objects have the properties in the schema's order."""
        return cls("json_schema", schema, param)

    @classmethod
    def regex(cls, pattern: str, param: str = "format") -> OutputFormat:
        """Text that a regular expression matches as a whole, in Rust's syntax: no look-around, no back references.

        The classes d, w and s hold ASCII characters only.
        """
        return cls("regex", pattern, param)

    @classmethod
    def choice(cls, texts: Sequence[str], param: str = "format") -> OutputFormat:
        """One of these texts."""
        return cls("choice", tuple(texts), param)

    @classmethod
    def grammar(cls, text: str, param: str = "format") -> OutputFormat:
        """Text that a context-free grammar derives: Lark's syntax (`start: ...`), or GBNF (`root ::= ...`)."""
        return cls("grammar", text, param)
