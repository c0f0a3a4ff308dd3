"""Command line: one file per command, without logic and without heavy imports."""
