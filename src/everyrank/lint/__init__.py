"""The linter: finds the classic mistakes of distributed programs, and mends those that can be mended.

A file becomes parts (a Python module, shell text, an option tree), a rule looks at one kind of part, and what it finds
carries the edits that would mend it. Nothing here imports torch.
"""
