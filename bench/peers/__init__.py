"""Kvern beside other engines on the same weights: installs or builds them, alternates runs, prints one table.

`python -m bench.peers` (see `bench.peers.__main__` for the flags, docs/peers.md for what is compared with what).
"""
