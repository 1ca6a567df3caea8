"""What the numbered stages share: small, flat, one job per file."""
