"""The larger commands of `unigrpo`, one module each: add_parser(commands) and run(args)."""
