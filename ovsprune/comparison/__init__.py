"""Runs several pruning methods under the same budget, data and seeds."""
