"""One HTML page of a run's folder: what is in it, its charts, and the page."""
