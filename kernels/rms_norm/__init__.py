"""A residual sum and the RMS norm of it, forwards and backwards."""
