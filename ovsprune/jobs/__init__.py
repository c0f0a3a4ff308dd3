"""One file a job: the only files that see the whole story; the command line only calls them."""
