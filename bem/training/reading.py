"""Old name of `bem.training.hidden`, until its last caller says the new one."""

from bem.training.hidden import hidden_states

__all__ = ["hidden_states"]
