"""SwiGLU: the product with both halves of the gate, and the gate alone, forwards and backwards."""
