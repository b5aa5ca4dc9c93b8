"""Committed examples of the artifact format's versions: what was readable once stays readable."""
