"""Matrix products over groups of token rows: one weight slice per group."""
