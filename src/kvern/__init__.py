"""Kvern runs, tunes and proves models of the DeepSeek-V3 architecture on machines that a team owns."""

__version__ = "0.1.0"
