"""Where steps run. Each executor is a plugin; the engine's core knows only their interface."""
