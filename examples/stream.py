"""Print an answer as it is computed; the same seed gives the same answer: python examples/stream.py [MODEL]"""

import sys

from kvern.llm import LLM

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "coder-0.5b")
for piece in llm.stream("Name three uses of a hash table.", max_tokens=48, temperature=0.7, seed=1):
    print(piece, end="", flush=True)
print()
