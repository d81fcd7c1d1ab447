"""Linear layers: what comes after a product, forwards and backwards."""
