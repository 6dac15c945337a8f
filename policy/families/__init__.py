"""Model families, one a file: base.py has the contract."""
