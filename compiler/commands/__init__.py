"""The commands: one a file. Each parses, calls and prints; :mod:`sparsec.compiler.cli` gathers them."""
