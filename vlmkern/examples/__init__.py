"""Small programs that show the package at work: python -m vlmkern.examples.<name>."""
