"""What a training keeps: the state of a checkpoint, its ledger of committed steps, and going on from them."""
