"""The engine's own attention backend. Others come as plugins; models and the scheduler never import this package."""
