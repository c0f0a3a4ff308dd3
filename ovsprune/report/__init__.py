"""Output for people: formatted numbers, tables, model cards and plots."""
