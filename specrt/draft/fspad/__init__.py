"""FSPAD, EAGLE-1 and EAGLE-2: one trained layer over the target's features drafts."""
