"""Records, shards and their loaders; readers of medical files; simulated and real samples."""
