"""The agents' models: one module with stacked parameters, and each agent's module linked to it."""

from gut_fast.agents.stack import StackedModule, means, stack, stacks_of

__all__ = ["StackedModule", "means", "stack", "stacks_of"]
