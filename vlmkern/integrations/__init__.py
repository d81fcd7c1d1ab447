"""The ops inside other people's libraries; each integration is imported by name and needs its library."""
