"""How many prefill, how many decode, and whether to split at all: profiles, a performance model, a simulator, a search.

Everything here is pure: time and random sources are arguments. Files are read and written by the commands in
`cluster`.
"""
