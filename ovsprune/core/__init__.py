"""Errors, registries, records, protocols: shapes that every room agrees on; knows no model."""
