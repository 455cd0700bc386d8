"""From text to batches: documents, tokenizer, token files, sources."""
