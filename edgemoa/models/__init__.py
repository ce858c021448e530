"""Models on this board: the catalog, fetching, importing GGUF files, and checking them."""
