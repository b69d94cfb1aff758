"""Run a transformers causal LM over a paged KV pool. May import `pdserve.proto` only."""
