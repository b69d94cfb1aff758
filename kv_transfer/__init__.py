"""Move KV blocks from one worker to another. May import `pdserve.proto` only."""
