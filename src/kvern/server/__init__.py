"""HTTP over the request path of `llm`: it adds routes, limits on bodies, and turns; dialects are in `wire`."""
