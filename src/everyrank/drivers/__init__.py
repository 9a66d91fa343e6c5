"""Who starts the processes: drivers, their plans, and the engine that carries a plan out."""
