"""Idefics2: how it sees a picture."""
