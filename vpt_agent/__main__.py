"""``python -m vpt_agent``: the command, where it is not on the path."""

from vpt_agent.cli import main

if __name__ == "__main__":
    main()
