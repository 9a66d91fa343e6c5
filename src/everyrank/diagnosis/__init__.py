"""Records of failures, what each rank is doing, and the verdict: who is guilty."""
