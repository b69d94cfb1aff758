"""Tickets in, tokens out. May import `engine`, `kv_transfer` and `proto`."""
