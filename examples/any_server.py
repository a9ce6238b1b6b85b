"""Ask any OpenAI-compatible server, Kvern's for one: python examples/any_server.py [URL]"""

import sys

from kvern.client import Client

with Client(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000") as client:
    print("models:", *client.models())
    print(client.chat("What is a latent cache?", max_tokens=24, temperature=0).text)
    for piece in client.stream("And what is it good for?", max_tokens=24, temperature=0):
        print(piece, end="", flush=True)
    print()
