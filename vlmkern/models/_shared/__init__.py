"""What models of any kind need: weights in and out of files, and the sections of their configurations."""
