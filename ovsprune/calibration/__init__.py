"""Pictures, activation streams, second moments, and the surgeon that works on them."""
