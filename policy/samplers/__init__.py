"""Transition kernels, one a file: base.py has the contract and the shared arithmetic."""
