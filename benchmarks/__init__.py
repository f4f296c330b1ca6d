"""What is measured against a yardstick, as ratios within one run."""
