"""From a single device to DistributedDataParallel: what to change in a plain training program, as a diff to read.

The rule of the change: the global batch stays what the batch was. Each rank takes its share of every batch that one
process would have made, in the same order, and gradients are averaged with the shares' sizes as weights. So the number
of steps, the learning rate and the curve of the loss stay as they were, to rounding.
"""
