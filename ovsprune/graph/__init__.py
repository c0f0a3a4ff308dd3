"""What can be cut, what must go along, and the cutting."""
