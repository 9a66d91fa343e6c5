"""``torch.cuda``: its functions, memory figures, random generators, streams and events."""
