"""The commands beside ``run``: each module's first docstring line is its help, ``main(argv)`` its entry."""
