"""The command line, on models small enough to train in a second."""
