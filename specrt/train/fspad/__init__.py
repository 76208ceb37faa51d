"""What FSPAD and EAGLE drafters are trained as."""
