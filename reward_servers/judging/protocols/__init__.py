"""Ways of asking a judge: one file each, wording and reading together, each with its paper.

A protocol's methods take a Judge and return a value, or raise Undecided (the judge did not say) or AttemptFailed (it
could not be asked). Whoever changes a wording or a reading raises the protocol's version: it is part of cache keys
and of scorer versions.
"""
