"""What the commands do, once they are read: each one returns what it says."""
