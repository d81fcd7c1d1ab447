"""Qwen2-VL: how it sees a picture."""
