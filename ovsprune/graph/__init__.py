"""Groups of coupled channels (from the dependency graph), their costs, and cutting them."""
