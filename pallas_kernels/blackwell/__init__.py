"""2:4 products on Blackwell's own sparse tensor cores (sm_100): compiled, never run, never chosen by itself."""
