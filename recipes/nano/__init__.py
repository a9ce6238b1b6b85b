"""kvern-nano: its corpus, tokenizer, generated rows, training run, figures, and the way into the package.

Every step is a command of `python -m recipes.nano`, and each is deterministic: the same interpreter and documentation
give the same files.
"""
