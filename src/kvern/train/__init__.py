"""Training of V3 models: precision, losses and the balance of experts. It runs the modules of `kvern.model`, uncached.

Reading order: model (a Transformer made trainable), packed_rows, loss, balance, optim, schedule.
"""
