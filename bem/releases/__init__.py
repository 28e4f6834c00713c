"""Adapters that ship with this package."""
