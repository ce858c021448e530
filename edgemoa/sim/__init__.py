"""The simulator: a virtual clock, network, engine and users around the daemon's own core."""
