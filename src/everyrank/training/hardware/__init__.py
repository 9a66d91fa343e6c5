"""What a GPU is told and given: kernels, memory formats, batches that come ahead, when to collect garbage."""
