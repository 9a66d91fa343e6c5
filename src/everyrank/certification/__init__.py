"""The certificate: a small training under every launcher, kills and resizes, and what its ledger and weights say."""
