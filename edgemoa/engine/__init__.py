"""The engine shell: the model in a process of its own, and the daemon's handle on it."""
