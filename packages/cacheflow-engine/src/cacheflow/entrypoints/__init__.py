"""What is started from a command line: the launcher of HTTP frontends and the modules that the quickstart names."""
