"""What the model itself says: its answers, and what its layers would answer."""
