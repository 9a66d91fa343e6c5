"""The VRT network (arXiv 2201.12288), written from the paper."""
