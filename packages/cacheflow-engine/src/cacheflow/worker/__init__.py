"""Runs steps: from block tables and token ids to tensors, through the model, to tokens. Knows no requests, queues or text."""
