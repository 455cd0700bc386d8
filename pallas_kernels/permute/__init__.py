"""Tokens to experts: scores, groups of rows, the gather into them and the sum over copies back."""
