"""Ways to merge several deltas of one base into one; a file each."""
