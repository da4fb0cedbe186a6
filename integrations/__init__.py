"""Integrations, installed as `tokengate.integrations`: one file or one package per host library.

They import tokengate, never the reverse, and a module is not named after its host.
"""
