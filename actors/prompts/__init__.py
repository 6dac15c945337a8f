"""Prompt sources, one kind a file: base.py has the contract."""
