"""Adapter folders: PEFT's format, strict loading, versions, merging."""
