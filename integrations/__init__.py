"""Integrations, installed as `tokengate.integrations`: one flat module per host library.

They import tokengate, never the reverse, and a module is not named after its host.
"""
