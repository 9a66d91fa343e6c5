"""How processes are started and watched on one node: engine, forkserver, agent, and dying with the parent."""
