"""How processes and nodes find each other: stores, ports, network interfaces, and the handshake."""
