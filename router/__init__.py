"""The edge: validation, tokenizing, routing, the life of a request. May import `proto` only; no torch, no ray."""
