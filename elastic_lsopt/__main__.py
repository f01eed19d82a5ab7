"""`python -m elastic_lsopt COMMAND …`: the command line as a module, for launchers."""

from elastic_lsopt.cli.main import command

if __name__ == "__main__":
    command()
