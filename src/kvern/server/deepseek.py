"""DeepSeek's addresses of routes that other dialects share: without /v1, or below /beta or /anthropic."""

from __future__ import annotations

from fastapi import APIRouter

from kvern.server import messages, routes

router = APIRouter(include_in_schema=False)
for prefix in ("", "/beta"):
    router.add_api_route(f"{prefix}/chat/completions", routes.chat_completions, methods=["POST"])
    router.add_api_route(f"{prefix}/completions", routes.completions, methods=["POST"])
    router.add_api_route(f"{prefix}/models", routes.models, methods=["GET"], response_model=None)
router.add_api_route("/anthropic/v1/messages", messages.messages, methods=["POST"])
router.add_api_route("/anthropic/v1/messages/count_tokens", messages.count_tokens, methods=["POST"])
