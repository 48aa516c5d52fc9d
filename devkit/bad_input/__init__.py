"""Property tests of bad input: a right result or one clear error, in time, with nothing left behind.

campaign.py     runs a property over drawn cases     judge.py   accepts or refuses an outcome
strategies.py   Hypothesis strategies of bad input   watch.py   observes files, processes and connections
"""
