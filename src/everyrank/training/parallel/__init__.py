"""How the ranks share the work: wrappers, compression of gradients, local updates."""
