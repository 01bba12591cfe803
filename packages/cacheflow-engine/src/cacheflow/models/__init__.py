"""The architectures that come with the engine. Each is one file, found through the `cacheflow.models` entry points."""
