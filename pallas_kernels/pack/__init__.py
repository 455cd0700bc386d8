"""Choose two of four, and pack them."""
