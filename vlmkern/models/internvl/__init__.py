"""InternVL 2.5: how it sees a picture."""
