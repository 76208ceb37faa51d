"""Off the serving path: traces recorded and replayed, drafters measured."""
