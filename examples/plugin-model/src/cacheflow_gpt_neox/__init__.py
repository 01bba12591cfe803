"""GPT-NeoX for cacheflow: an example of a model plugin. The engine finds the model through this package's entry point."""
