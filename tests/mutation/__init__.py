"""Would the suite notice? Sixty seeded one-line mistakes in the code, and the tests that run the line each is on.

    python -m tests.mutation.coverage_run tests            # once: which test runs which line (.mutation/coverage)
    python -m tests.mutation.draw                          # mutants.json: sixty, ten a package, of seed 0
    python -m tests.mutation.run                           # each against its tests; goes on where it was stopped

A mutant lives in a copy of the tree, never in the tree itself. `mutants.json` and `results.json` are committed.
"""
