"""Clips from folders of frames, lmdb and video files, as samples for training and testing."""
