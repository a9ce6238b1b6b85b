"""What `kvern bench` measures: the engine in this process, and any OpenAI-compatible server through raw sockets."""
