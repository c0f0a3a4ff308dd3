"""Pruning pipeline: search space, selection of units, cutting, repair, provenance."""
