"""What a started process inherits, holds and leaves: fresh starts, surroundings, sweeping up, the torch it needs."""
