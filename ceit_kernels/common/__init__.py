"""What the operators share; imports nothing from them."""
