"""Repair: turn a suspicious model into one that can be trusted more; one file per method."""
