"""Models assembled from the ops, one package each."""
