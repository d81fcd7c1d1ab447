"""Attention: forward, gradients, and how both are planned."""
