"""Public functions, one per file; the command line only calls them."""
