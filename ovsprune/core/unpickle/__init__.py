"""Restricted reader for checkpoints of other frameworks: no class is imported, no code runs."""
