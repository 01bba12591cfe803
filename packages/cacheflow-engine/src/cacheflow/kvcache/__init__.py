"""Who holds which KV block: plain integers, no tensors."""
