"""Casts to eight bits, with scales that are powers of two."""
