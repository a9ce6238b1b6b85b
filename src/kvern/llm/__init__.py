"""The offline Python API, and the request path that every interface uses.

    messages or text -> token ids -> engine -> updates -> detokenizer -> stop strings -> pieces of text

`prepare` is the first part, which fails where a request is at fault, so a server can refuse before it sends a byte.
`text_stream` is the last part, one object a request. `offline` puts an engine between them and drives it in the
caller's thread; the server puts the same engine on a thread of its own.
"""

from kvern.llm.offline import LLM, collect, resolve, served_name
from kvern.llm.prepare import Prepared
from kvern.llm.text_stream import TextStream
from kvern.text.events import Piece

__all__ = ["LLM", "Piece", "Prepared", "TextStream", "collect", "resolve", "served_name"]
