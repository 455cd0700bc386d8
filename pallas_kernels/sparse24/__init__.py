"""out = A B with A [m, k] 2:4 sparse along k."""
