"""Graph networks on causal sets, the discrete spacetimes of quantum gravity."""
