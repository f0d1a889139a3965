"""Passes: one file a pass, one idea a file. The contract is in base.py."""
