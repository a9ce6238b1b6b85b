"""Continue a prompt, in this process: python examples/generate.py [MODEL]"""

import sys

from kvern.llm import LLM

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "coder-0.5b")
completion = llm.generate("def fibonacci(n: int) -> int:\n", max_tokens=48, temperature=0, stop=["\n\n\n"])
print(completion.text)
print(f"{completion.prompt_tokens} + {completion.completion_tokens} tokens, ended by {completion.finish_reason}")
