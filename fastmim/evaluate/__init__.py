"""What trained encoders are worth, and how they see."""
