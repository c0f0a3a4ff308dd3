"""Methods to compare against: iterative magnitude pruning and Torch-Pruning."""
