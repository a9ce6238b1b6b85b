"""The fields that say what an answer must match, in each dialect's words, and the OutputFormat that they become.

    OpenAI      response_format {type, json_schema: {name, schema, strict}};  text.format {type, name, schema, strict}
    vLLM        guided_json, guided_regex, guided_choice, guided_grammar; structured_outputs {json, regex, ...}
    Anthropic   output_config.format {type, schema}

A schema is enforced whether `strict` is set or not. vLLM's choice of a backend, and its patterns of whitespace, are
refused as unknown.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from kvern.errors import BadRequestError
from kvern.text.output_format import OutputFormat
from kvern.wire.fields import OBJECT, STRING, JSONObject, Strict, Text, check_json, string_or_object

MAX_SOURCE = 1 << 16
"""Characters of a regular expression or a grammar."""

FormatName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Source = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_SOURCE)]
ChoiceText = Annotated[Text, StringConstraints(min_length=1, max_length=1000)]
Choices = Annotated[list[ChoiceText], Field(min_length=1, max_length=1024)]
SchemaOrText = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[JSONObject, Tag(OBJECT)], Discriminator(string_or_object)
]
"""A JSON schema, or one as text."""


class JSONSchema(Strict):
    """A named schema."""

    name: FormatName
    definition: JSONObject = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = Field(default=None, description="The schema is enforced in any case.")


class ResponseFormat(Strict):
    """The form of the content: any text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def to_format(self) -> OutputFormat | None:
        """Translate. Raises BadRequestError where type and json_schema do not go together."""
        where = "response_format.json_schema"
        if (self.json_schema is None) == (self.type == "json_schema"):
            says = "is missing" if self.json_schema is None else "goes with type json_schema"
            raise BadRequestError(f"{where} {says}", param=where)
        if self.json_schema is not None:
            return OutputFormat.json_schema(self.json_schema.definition, f"{where}.schema")
        return OutputFormat.json_object("response_format") if self.type == "json_object" else None


class TextFormat(Strict):
    """The form of the text: any, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: FormatName | None = None
    definition: JSONObject | None = Field(default=None, alias="schema")
    description: Text | None = None
    strict: bool | None = Field(default=None, description="The schema is enforced in any case.")

    def to_format(self) -> OutputFormat | None:
        """Translate. Raises BadRequestError for missing fields, and for those of another type."""
        for name, given in (("name", self.name), ("schema", self.definition)):
            if (given is None) == (self.type == "json_schema"):
                says = "is missing" if given is None else "goes with type json_schema"
                raise BadRequestError(f"text.format.{name} {says}", param=f"text.format.{name}")
        if self.definition is not None:
            return OutputFormat.json_schema(self.definition, "text.format.schema")
        return OutputFormat.json_object("text.format") if self.type == "json_object" else None


class JSONOutputFormat(Strict):
    """JSON that matches a schema: the one form that Anthropic's dialect knows."""

    type: Literal["json_schema"]
    definition: JSONObject = Field(alias="schema")

    def to_format(self) -> OutputFormat:
        """Translate."""
        return OutputFormat.json_schema(self.definition, "output_config.format.schema")


class StructuredOutputs(Strict):
    """vLLM's newer field: one of these says what the answer must match."""

    definition: SchemaOrText | None = Field(default=None, alias="json")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    json_object: bool | None = None


class GuidedFields(Strict):
    """vLLM's fields for what an answer must match; at most one may be given."""

    guided_json: SchemaOrText | None = Field(default=None, description="A JSON schema, or one as text.")
    guided_regex: Source | None = Field(default=None, description="Rust's syntax; it matches the whole answer.")
    guided_choice: Choices | None = None
    guided_grammar: Source | None = Field(default=None, description="Lark's syntax, or GBNF.")
    structured_outputs: StructuredOutputs | None = None

    def guided_format(self) -> OutputFormat | None:
        """Translate. Raises BadRequestError for more than one, and for a schema that is no JSON object."""
        newer = self.structured_outputs or StructuredOutputs()
        given = [
            *_all("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
            *_all("structured_outputs.", newer.definition, newer.regex, newer.choice, newer.grammar),
        ]
        if newer.json_object:
            given.append(OutputFormat.json_object("structured_outputs.json_object"))
        return only(given)


def only(given: list[OutputFormat]) -> OutputFormat | None:
    """The one format among those that a request gives, if any. Raises BadRequestError for more."""
    if len(given) > 1:
        says = f"{given[0].param} and {given[1].param} exclude each other"
        raise BadRequestError(says, param=given[1].param)
    return given[0] if given else None


def _all(
    prefix: str, schema: str | dict[str, Any] | None, regex: str | None, choice: list[str] | None, text: str | None
) -> list[OutputFormat]:
    found = []
    if schema is not None:
        found.append(OutputFormat.json_schema(_as_schema(schema, f"{prefix}json"), f"{prefix}json"))
    if regex is not None:
        found.append(OutputFormat.regex(regex, f"{prefix}regex"))
    if choice is not None:
        found.append(OutputFormat.choice(choice, f"{prefix}choice"))
    if text is not None:
        found.append(OutputFormat.grammar(text, f"{prefix}grammar"))
    return found


def _as_schema(given: str | dict[str, Any], param: str) -> dict[str, Any]:
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
        check_json(schema)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"{param} is no JSON schema", param=param) from error
    if not isinstance(schema, dict):
        raise BadRequestError(f"{param} must hold a JSON object", param=param)
    return schema
