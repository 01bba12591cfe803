"""The engine as a process of its own: the messages, the process that hosts the engine, the client, and the supervisor."""
