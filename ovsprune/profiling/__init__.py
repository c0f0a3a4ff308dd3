"""Measured latency, memory and MACs."""
