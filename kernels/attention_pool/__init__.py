"""Attention pooling of windows: forward in two forms, and gradients."""
