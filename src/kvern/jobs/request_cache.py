"""When two requests have one answer, so that the second need not be computed.

    key = sha256(revision of the model, owner, endpoint, canonical body)

Only requests whose answer is determined have a key: temperature 0, or a seed. The owner is part of it, so nobody learns
from the time an answer takes what others have asked. A response that is to be stored has none either: each is an object
of its own. `user` and `priority` change nothing in an answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

CHANGES_NOTHING = ("user", "priority", "metadata", "prompt_cache_key", "safety_identifier", "service_tier")
RESPONSES = "/v1/responses"
ID = re.compile("[a-z]+[-_]([0-9a-f]{24})")
"""What follows the kind is random, so it stands nowhere but in ids."""


def key(revision: str, owner: str, url: str, body: Mapping[str, Any]) -> str | None:
    """The key of a request; None where its answer is drawn anew each time."""
    if body.get("temperature") != 0 and body.get("seed") is None:
        return None
    if url == RESPONSES and body.get("store") is not False:
        return None
    said = {name: value for name, value in body.items() if name not in CHANGES_NOTHING and value is not None}
    text = json.dumps([revision, owner, url, said], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def renamed(body: dict[str, Any]) -> dict[str, Any]:
    """An answer with an id of its own, of the same kind, and items named after it."""
    found = ID.fullmatch(str(body.get("id")))
    if found is None:
        return body
    renamed: dict[str, Any] = json.loads(json.dumps(body).replace(found[1], secrets.token_hex(len(found[1]) // 2)))
    return renamed
