"""What a network of agents needs to reach a target: planned, and measured."""
