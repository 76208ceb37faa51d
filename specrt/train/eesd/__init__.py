"""What exits are trained as."""
