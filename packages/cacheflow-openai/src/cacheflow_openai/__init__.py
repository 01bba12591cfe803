"""cacheflow."""
