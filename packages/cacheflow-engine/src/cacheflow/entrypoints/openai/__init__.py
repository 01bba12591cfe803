"""The launcher module of the OpenAI-compatible frontend."""
