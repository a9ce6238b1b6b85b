"""A conversation of two turns, in this process: python examples/chat.py [MODEL]"""

import sys

from kvern.llm import LLM
from kvern.text.messages import Message

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "coder-0.5b")
conversation = [Message("system", "Answer with code only."), Message("user", "Reverse a string in Python.")]
first = llm.chat(conversation, max_tokens=32, temperature=0)
print(first.text)

conversation += [Message("assistant", first.text), Message("user", "Now in Rust.")]
print(llm.chat(conversation, max_tokens=32, temperature=0).text)
