"""Arithmetic about machines and models that needs no tensor: what fits, what a token costs."""
