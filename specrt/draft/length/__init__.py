"""How long and how many: what decides the size of a round's trees."""
