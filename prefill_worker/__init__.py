"""Requests in, first token and ticket out. May import `engine`, `kv_transfer` and `proto`."""
