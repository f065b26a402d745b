"""`python -m app COMMAND`: serve, worker, migrate, keys, settings."""

import argparse
import sys

COMMANDS = {
    "serve": "run the server",
    "worker": "run an extra process that takes what is due (PostgreSQL)",
    "migrate": "bring the database's schema up to date",
    "keys": "show the API keys and the webhook secret",
    "settings": "show every setting and where it came from",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m app", description="Loupe")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    command = parser.parse_args(arguments).command

    # Imported here, so that whoever imports this module does not load the whole application.
    from app import commands as run
    from app.settings import SettingsError

    try:
        getattr(run, command)()
    except SettingsError as error:
        sys.exit(f"loupe: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
