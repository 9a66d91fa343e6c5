"""What runs inside a rank: a thread that reports, and what a rank leaves behind when it ends."""
