"""Inspection: does a model carry a backdoor, and which?"""
