"""A residual sum and the layer norm of it, forwards and backwards."""
