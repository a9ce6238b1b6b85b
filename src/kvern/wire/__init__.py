"""The bodies of the HTTP interfaces, as values. Pure translation: no input or output, no torch."""
