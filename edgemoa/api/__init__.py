"""The local API: HTTP over a Unix socket, in shapes that clients already speak."""
